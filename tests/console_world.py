"""A real service with a trade-off, stored decisions and keys, and a real browser that looks at its console."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
from axe_playwright_python.sync_playwright import Axe
from conftest import Contest
from live_service import Running, running, sha256
from playwright.sync_api import Browser, Page, sync_playwright

from features.load import load_router
from router_ml.bundle import read_bundle
from router_ml.tables import DECISIONS, OUTCOMES
from training.tradeoff import tradeoff

OWNER, VIEWER = "owner-key", "viewer-key"
KEYS: dict[str, Any] = {
    "owner": {"sha256": sha256(OWNER), "scopes": ["admin", "route", "outcomes"]},
    "viewer": {"sha256": sha256(VIEWER), "scopes": ["read"]},
    "gateway": {"sha256": sha256("gateway-key")},
    "of-acme": {"sha256": sha256("acme-key"), "scopes": ["read"], "tenant": "acme"},
}
PICTURES = os.environ.get("ROUTER_ML_PICTURES")  # a folder, such as docs/images: screenshots go there
SETTINGS = (0.0, 0.3, 0.5, 0.6, 0.65, 0.75, 0.8, 0.9, 0.95)
EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=2</script>'


@dataclass
class Console:
    """The service, where it is, and what ends with it: the browser, which is started when a test wants it."""

    live: Running
    url: str
    ends: contextlib.ExitStack
    _browser: Browser | None = None

    @property
    def browser(self) -> Browser:
        """Debian's Chromium, headless; skips the test where there is none."""
        if self._browser is None:
            at = chromium()
            playwright = self.ends.enter_context(sync_playwright())
            self._browser = playwright.chromium.launch(executable_path=at, args=["--no-sandbox"])
            self.ends.callback(self._browser.close)
        return self._browser

    @property
    def owner(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": OWNER}, timeout=120)


@dataclass
class Seen:
    """What a page asked for and complained of."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def chromium() -> str:
    """Debian's Chromium, or the one that ROUTER_ML_CHROMIUM names; skips the test where there is none."""
    found = os.environ.get("ROUTER_ML_CHROMIUM") or shutil.which("chromium")
    if found is None:
        pytest.skip("needs a Chromium: apt-get install chromium, or name one with ROUTER_ML_CHROMIUM")
    return found


@contextlib.contextmanager
def console(contest: Contest, folder: Path) -> Iterator[Console]:
    bundle = contest.challenger
    found = tradeoff(
        load_router(bundle), contest.log, read_bundle(bundle).manifest, settings=SETTINGS, most_rows=1500,
        keep_prompts=True,
    )  # fmt: skip
    found.write(folder / "tradeoff.json")
    options: dict[str, Any] = {"api_keys": KEYS, "tradeoff": folder / "tradeoff.json", "store_prompts": "text"}
    with (
        running(bundle, folder / "store.db", **options) as live,
        contextlib.ExitStack() as ends,
    ):
        made = Console(live, str(live.http.base_url).rstrip("/"), ends)
        _ask_some(made, contest)
        yield made


def _ask_some(made: Console, contest: Contest) -> None:
    """Some logged requests, asked again, with outcomes; among them one whose text is markup."""
    rows = list(contest.log.tail(60).iter_rows(named=True))
    with made.owner as http:
        for i, row in enumerate(rows):
            body = {"prompt": row["prompt"] or "Hello", "tenant": row["tenant"], "task": row["task"] or "none"}
            answer = http.post("/route", json=body if i else {"prompt": EVIL, "tenant": EVIL, "task": "=1+1"})
            assert answer.status_code == 200, answer.text
            told = {"decision_id": answer.json()["decision_id"], "input_tokens": 100, "output_tokens": 50 + i}
            if i % 3:
                http.post("/outcomes", json={**told, "quality": float(i % 4 > 0), "quality_source": "user"})
    assert made.live.service.store.flush()


def many(store_url: str, n: int) -> None:
    """`n` further decisions like the first one, over twenty days, and an outcome for every other one."""
    engine = sa.create_engine(store_url if "://" in store_url else f"sqlite:///{store_url}")
    with engine.begin() as connection:
        first = connection.scalar(sa.select(DECISIONS.c.decision_id).order_by(DECISIONS.c.time_us.desc()).limit(1))
        names = [c.name for c in DECISIONS.columns]
        mine = {"decision_id": "printf('bulk%07d', i)", "time_us": f"time_us - i * {20 * 86_400_000_000 // n}"}
        numbers = "with recursive n(i) as (select 1 union all select i + 1 from n where i < :n)"
        values = ", ".join(mine.get(name, _quoted(name)) for name in names)
        connection.execute(
            sa.text(
                f"insert into decisions ({', '.join(map(_quoted, names))}) {numbers} "
                f"select {values} from decisions, n where decision_id = :of"
            ),
            {"n": n, "of": first},
        )
        told = {
            "outcome_id": "printf('bulk%07d', i)", "idempotency_key": "printf('bulk%07d', i)", "digest": "''",
            "time_us": "1", "decision_id": "printf('bulk%07d', i)", "status": "'ok'", "input_tokens": "100",
            "output_tokens": "40", "key": "'owner'", "quality": "case when i % 10 then 1.0 else 0.0 end",
        }  # fmt: skip
        assert set(told) <= {c.name for c in OUTCOMES.columns}
        connection.execute(
            sa.text(
                f"insert into outcomes ({', '.join(map(_quoted, told))}) {numbers} "
                f"select {', '.join(told.values())} from n where i % 2 = 0"
            ),
            {"n": n},
        )
    engine.dispose()


def _quoted(name: str) -> str:
    return f'"{name}"'


@contextlib.contextmanager
def page(of: Console, key: str | None, view: str = "tradeoff", **context: Any) -> Iterator[tuple[Page, Seen]]:
    """A tab of its own, logged in with `key`, at a view that is there whole."""
    tab = of.browser.new_context(**{"viewport": {"width": 1200, "height": 900}} | context)
    made, seen = tab.new_page(), Seen()
    made.set_default_timeout(20_000)
    made.on("request", lambda request: seen.requests.append(request.url))
    made.on("pageerror", lambda error: seen.errors.append(str(error)))
    made.on("console", lambda said: seen.errors.append(said.text) if said.type == "error" else None)
    if key is not None:
        made.add_init_script(f"sessionStorage.setItem('router-ml-key', '{key}')")
    try:
        made.goto(f"{of.url}/console#/{view}")
        if key is not None:
            made.wait_for_selector("main h2")
        yield made, seen
    finally:
        tab.close()


def picture(tab: Page, name: str, **options: Any) -> None:
    if PICTURES:
        Path(PICTURES).mkdir(parents=True, exist_ok=True)
        tab.screenshot(path=Path(PICTURES) / f"{name}.png", **options)


def violations(tab: Page) -> list[str]:
    """What axe-core finds against WCAG 2.2, levels A and AA: rule and element. It comes past the page's own policy."""
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    found = Axe().run(tab, options={"runOnly": {"type": "tag", "values": tags}}).response
    assert len(found["passes"]) > 10
    return [
        f"{each['id']}: {node['html'][:200]} {node.get('failureSummary', '')[:300]}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


def at(tab: Page) -> float:
    """The setting of the dial that the numbers are of."""
    return float(tab.locator("#numbers dd").first.inner_text())


def set_dial(tab: Page, value: float) -> None:
    """Moves the slider to the setting of this value, as its own keys would."""
    settings = sorted({*SETTINGS, 0.5, 0.7, 0.85})
    tab.locator("#dial").evaluate(
        "(e, at) => { e.value = at; e.dispatchEvent(new Event('input', {bubbles: true})) }", settings.index(value)
    )
    assert at(tab) == value


def number(text: str) -> int:
    """The first whole number of a text such as "100,060 decisions"."""
    found = re.search(r"\d[\d,]*", text)
    assert found, text
    return int(found[0].replace(",", ""))
