"""The console's JavaScript at its edges, in a real Chromium: what is asked, kept and said where answers come late or not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from console_world import Console, page
from live_service import running
from playwright.sync_api import Page, expect

TIERS = {"economy": 0.5, "standard": 0.7, "premium": 0.85}


@pytest.fixture(scope="module")
def bare(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    """A service without keys and without a trade-off, with some decisions."""
    with (
        running(tiny_bundle, tmp_path_factory.mktemp("bare") / "store.db") as live,
        contextlib.ExitStack() as ends,
    ):
        made = Console(live, str(live.http.base_url).rstrip("/"), ends)
        for i in range(120):
            body = {"prompt": f"Hello {i}", "tenant": "slow" if i % 2 else "fast"}
            assert live.http.post("/route", json=body).status_code == 200
        assert live.service.store.flush()
        yield made


@pytest.fixture(autouse=True)
def _default(bare: Console) -> Iterator[None]:
    yield
    bare.live.http.delete("/policy")


def call(tab: Page, file: str, expression: str, given: Any = None) -> Any:
    """What `expression` is in the console's own file: `m` is the module, `given` the argument."""
    return tab.evaluate(
        f"async (given) => {{ const m = await import('/console/static/{file}'); return {expression}; }}", given
    )


def test_whatever_no_file_judges_is_asked_about_before_it_replaces_what_is_in_force(bare: Console) -> None:
    base = {"default_tier": "standard", "tiers": {"standard": 0.7, "premium": 0.9}, "rules": []}
    zero = {"quality": [0, 0, 0], "cost_usd": [0, 0, 0], "slices": [], "weaker": []}
    t = {
        "model_version": "b1", "settings": [0.5, 0.7], "gate": {"quality": 0.02, "slice": 0.1, "slice_rows": 50},
        "tiers": [{"name": "standard", "today": 1, "apart": None, "changes": [{**zero, "weaker": ["falls"]}, zero]}],
    }  # fmt: skip

    def tiers(**more: Any) -> dict[str, Any]:
        return {**base, "tiers": {**base["tiers"], **more}}

    def table(threshold: float) -> dict[str, Any]:
        return tiers(standard={"min_probability": 0.7, "quality_threshold": threshold})

    with page(bare, "") as (tab, _):

        def asked(before: Any, after: Any, file: Any = t) -> str:
            return "; ".join(call(tab, "against.js", "m.weakerPolicy(...given)", [file, before, after, "b1"]))

        unknown = "whether this is weaker is not known: "
        assert asked(base, tiers(standard=0.5)) == "falls"
        assert asked(base, base) == "" and asked(tiers(standard=0.5), base, {**t, "tiers": []}) == ""
        assert asked(base, tiers(premium=0.95)) == "", "a higher promise is none that is weaker"
        assert asked(base, tiers(premium=0.95), None) == ""
        assert asked({**base, "default_tier": "premium"}, base) == f'{unknown}default_tier "premium" → "standard"'
        assert asked(base, tiers(premium=0.1)) == f"{unknown}tiers.premium 0.9 → 0.1"
        assert asked(base, tiers(standard=0.1), None) == f"{unknown}tiers.standard 0.7 → 0.1"
        assert asked(table(0.9), table(0.1)) == f"{unknown}tiers.standard.quality_threshold 0.9 → 0.1"
        assert f'{unknown}rules.0.model — → "pocket"' in asked(base, {**base, "rules": [{"model": "pocket"}]})
        assert f"{unknown}tiers.premium 0.9 → —" in asked(base, {**base, "tiers": {"standard": 0.7}})
        idle = {**t, "tiers": [{"name": "premium", "today": None, "why": "no rows", "changes": []}]}
        assert "0.9 → 0.1 (tier premium was not judged: no rows)" in asked(base, tiers(premium=0.1), idle)


def test_undo_asks_without_a_trade_off_file(bare: Console) -> None:
    http = bare.live.http
    for standard in (0.5, 0.9):
        assert http.put("/policy", json={"tiers": {**TIERS, "standard": standard}}).status_code == 200
    now = http.get("/policy").json()["version"]
    with page(bare, "") as (tab, _):
        tab.locator("button.undo").click()
        expect(tab.locator("dialog li")).to_have_text("whether this is weaker is not known: tiers.standard 0.9 → 0.5")
        tab.locator("dialog button", has_text="Cancel").click()
        assert http.get("/policy").json()["version"] == now
        tab.locator("button.undo").click()
        tab.locator("dialog button.primary").click()
        expect(tab.locator("#status")).to_contain_text("Undone")
        assert http.get("/policy").json()["policy"]["tiers"]["standard"] == 0.5
