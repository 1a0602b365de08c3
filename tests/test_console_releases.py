"""Releases in the console: real versions in a real MLflow, promoted and rolled back from the page by real gates."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil
import pytest
from conftest import Contest
from console_world import EVIL, KEYS, OWNER, VIEWER, Console, page, picture, violations
from live_service import process, running, wait_for
from moving_champions import NAME, aliases, another
from playwright.sync_api import Page, expect

from router_ml import registry, rollout
from router_ml.logs import write_log
from router_ml.tables import open_database
from serving.console import releasing
from training.tracking import register_bundle
from training.train import train
from training.world import SIMULATED_CATALOG

ROWS = "#versions > .scroll > table > tbody > tr"
GOOD, BAD = "2", "3"
RELEASES = "/console/api/releases"


@dataclass(frozen=True)
class Place:
    """A registry with a champion (1), its twin under another version (2) and a bad router (3), and a log of today."""

    uri: str
    folder: Path
    logs: Path

    def point(self, alias: str, version: str) -> None:
        registry.connect(self.uri).set_registered_model_alias(NAME, alias, version)

    def served(self, **more: Any) -> dict[str, Any]:
        at = {
            "model": f"{NAME}@champion",
            "tracking_uri": self.uri,
            "cache": self.folder / "cache",
            "poll_seconds": 0.5,
        }
        return {**at, "release_logs": self.logs, **more}


@pytest.fixture(scope="module")
def place(contest: Contest, tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("releases")
    new = contest.log.tail(800)
    late = datetime.now(UTC) - timedelta(hours=1) - new["time"].max()  # type: ignore[operator]
    write_log([new.with_columns(pl.col("time") + late)], folder / "logs", catalog=SIMULATED_CATALOG)
    upside_down = contest.log.head(250).with_columns(quality=1.0 - pl.col("quality"))
    train(upside_down, SIMULATED_CATALOG, out=folder / "bad", encoder="lexical", holdout=0.0)
    uri = f"sqlite:///{folder}/mlflow.db"
    figures = {"held_out": {"auc": 0.7, "ece": 0.05, "log_loss": 0.6}, "held_out_requests": 2400}
    twin = another(contest.challenger, folder / "twin")
    for bundle, alias in ((contest.challenger, "champion"), (twin, "challenger"), (folder / "bad", None)):
        register_bundle(bundle, tracking_uri=uri, name=NAME, params={}, metrics=figures, alias=alias)
    return Place(uri, folder, folder / "logs")


@pytest.fixture(scope="module")
def world(place: Place) -> Iterator[Console]:
    with (
        running(None, place.folder / "store.db", api_keys=KEYS, **place.served()) as live,
        ExitStack() as ends,
    ):
        yield Console(live, str(live.http.base_url).rstrip("/"), ends)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the rest of the suite a niced child would wait for minutes; one test says that they are niced."""
    for work in releasing.NICE:
        monkeypatch.setitem(releasing.NICE, work, 0)


@pytest.fixture(autouse=True)
def _as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Version 1 is champion and 2 the challenger, with no record of rollbacks."""
    yield
    if "place" in request.fixturenames or "world" in request.fixturenames:
        place = request.getfixturevalue("place")
        client = registry.connect(place.uri)
        place.point("champion", "1")
        place.point("challenger", GOOD)
        for version in client.search_model_versions(f"name = '{NAME}'"):
            for key in [k for k in version.tags if k.startswith("router_ml.")]:
                client.delete_model_version_tag(NAME, str(version.version), key)


def ended(http: httpx.Client, seconds: float = 180.0) -> dict[str, Any]:
    """The run that was at work, when it has ended."""
    wait_for(lambda: http.get(RELEASES).json()["run"]["state"] != "running", seconds)
    return dict(http.get(RELEASES).json()["run"])


def asked(http: httpx.Client, action: str, version: str, reason: str = "because") -> httpx.Response:
    return http.post(f"{RELEASES}/{action}", json={"version": version, "reason": reason})


def notes(console: Console) -> list[dict[str, Any]]:
    return [change for change in console.live.service.store.changes() if change["kind"] == "registry"]


def fill_in(tab: Page, button: str, reason: str) -> None:
    """Presses a button of the versions and answers the question that comes."""
    tab.get_by_role("button", name=button).click()
    expect(tab.locator("dialog textarea")).to_be_focused()
    tab.keyboard.type(reason)
    tab.locator("dialog button.primary").click()


def test_a_good_challenger_is_promoted_from_the_page_and_rolled_back(world: Console, place: Place) -> None:
    with page(world, OWNER, "releases") as (tab, seen), world.owner as http:
        rows = tab.locator(ROWS)
        expect(rows).to_have_count(3, timeout=60_000)
        assert "champion" in rows.nth(2).inner_text() and "AUC 0.700" in rows.nth(2).inner_text()
        assert tab.get_by_role("button", name="Promote…").count() == 1
        tab.get_by_role("button", name="Promote…").click()
        for scheme in ("dark", "light"):
            tab.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            assert violations(tab) == []
        tab.keyboard.press("Escape")
        expect(tab.get_by_role("button", name="Promote…")).to_be_focused()
        tab.keyboard.press("Enter")
        tab.locator("dialog button.primary").click()
        assert "Say why" in tab.locator("dialog [role=alert]").inner_text()
        tab.locator("dialog button", has_text="Cancel").click()
        assert http.get(RELEASES).json()["run"] is None, "asked, not begun"
        fill_in(tab, "Promote…", f"newer {EVIL}")
        run = tab.locator("#run")
        expect(run.locator("[role=status]")).to_contain_text("At work", timeout=60_000)
        assert run.locator("progress").count() == 1
        expect(run.locator("[role=status]")).to_contain_text("This service serves it", timeout=180_000)
        expect(tab.locator("#versions details")).to_have_count(1, timeout=60_000)
        tab.locator("#versions details summary").first.click()
        assert tab.locator("#versions details").first.locator("tbody tr").count() == 9
        assert run.locator("tbody tr").count() == 9 and "doubly robust" in run.inner_text()
        assert "UTC" in run.inner_text() and EVIL in run.inner_text() and tab.evaluate("window.hit") is None
        expect(rows.nth(1)).to_contain_text("champion", timeout=60_000)
        expect(rows.nth(1)).to_contain_text("passed")
        assert aliases(place.uri) == (GOOD, "1")
        expect(tab.locator("#status")).to_be_empty()
        expect(tab.locator("main .source").first).to_contain_text("version 2 of router@champion")
        bundle = world.live.service.live.live.router.model_version
        assert http.get("/readyz").json()["model_version"] == bundle
        expect(tab.locator("#served")).to_contain_text(bundle)
        expect(tab.locator("#past tbody")).to_contain_text("version 2 promoted")
        assert tab.locator("#past tbody tr", has_text="version 2 promoted").count() == 1
        expect(tab.locator("#past tbody")).to_contain_text(f"the promotion of {NAME} version 2 was asked for")
        fill_in(tab, "Roll back…", "answers got worse")
        expect(run.locator("h3")).to_have_text("Rollback of version 2", timeout=60_000)
        expect(run.locator("[role=status]")).to_contain_text("This service serves it", timeout=60_000)
        assert aliases(place.uri)[0] == "1"
        expect(rows.nth(1)).to_contain_text("rolled back", timeout=60_000)
        assert seen.errors == [] and all(url.startswith(world.url + "/") for url in seen.requests)
    asked_for, first, asked_again, second = notes(world)[-4:]
    assert (asked_for["after"]["action"], asked_for["after"]["reason"]) == ("promote", f"newer {EVIL}")
    assert asked_for["after"]["asked"] and asked_again["after"]["asked"] and asked_for["who"] == "owner"
    assert (first["who"], first["after"]["action"], first["after"]["reason"]) == ("owner", "promote", f"newer {EVIL}")
    assert (second["after"]["action"], second["after"]["reason"]) == ("rollback", "answers got worse")


def test_a_bad_challenger_is_refused_with_its_conditions(world: Console, place: Place) -> None:
    place.point("challenger", BAD)
    world.live.service.releases._listing = None  # what it kept of the registry is older than this
    with page(world, OWNER, "releases") as (tab, _):
        fill_in(tab, "Promote…", "it is cheaper")
        run = tab.locator("#run")
        expect(run.locator("[role=status]")).to_contain_text("The gate refuses it", timeout=180_000)
        quality = run.locator("tbody tr", has_text="quality").first
        assert "fails" in quality.inner_text() and "-0.02" in quality.inner_text()
        assert "its lower bound has to be -0.02 or more" in quality.inner_text()
        assert aliases(place.uri)[0] == "1"
        expect(tab.locator("#past tbody tr").first).to_contain_text("It did not come to pass", timeout=60_000)
        picture(tab, "refused")
        for width, scheme in ((1200, "light"), (380, "dark")):
            tab.set_viewport_size({"width": width, "height": 800})
            tab.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
            assert violations(tab) == []
            assert tab.evaluate("document.documentElement.scrollWidth") <= width
    noted = notes(world)[-1]
    assert noted["who"] == "owner" and noted["after"]["failed"].startswith("router version 3 is not promoted: quality")
    assert noted["after"]["gate"]["conditions"]["quality"]["holds"] is False


def test_a_read_only_key_sees_it_and_is_refused(world: Console) -> None:
    with page(world, VIEWER, "releases") as (tab, seen):
        expect(tab.locator(ROWS)).to_have_count(3, timeout=60_000)
        assert tab.locator("main button").count() == 0
        assert "may read and not change" in tab.locator("#versions").inner_text()
        tab.goto(f"{world.url}/console#/tradeoff")
        expect(tab.locator("main")).to_contain_text("the service has no trade-off: start it with --tradeoff FILE")
        assert seen.errors == []
    assert_refused(world)


def test_only_admin_keys_move_anything(world: Console) -> None:
    assert_refused(world)


def assert_refused(world: Console) -> None:
    before = world.live.service.releases.run
    for key, status in (("viewer-key", 403), ("gateway-key", 403), ("acme-key", 403), ("nobody", 401)):
        for action in ("promote", "rollback"):
            with httpx.Client(base_url=world.url, headers={"x-api-key": key}) as http:
                assert asked(http, action, GOOD).status_code == status
    assert world.live.service.releases.run is before


def test_what_a_request_says_becomes_no_option(world: Console) -> None:
    with world.owner as http:
        for version in ("--force", "2 --force", "2\n", "٢", "02", "", "2/../3"):
            assert asked(http, "promote", version).status_code == 422, version
        for reason in ("", "  ", "x" * 501, "a\0b", "a\x1b[31m"):
            assert asked(http, "promote", GOOD, reason).status_code == 422, reason
        body = {"version": GOOD, "reason": "x"}
        assert http.post(f"{RELEASES}/promote", json={**body, "force": True}).status_code == 422
        form = {"content-type": "text/plain"}  # all that another origin's page could send without being asked
        assert http.post(f"{RELEASES}/promote", content=json.dumps(body), headers=form).status_code == 415
        assert http.get(RELEASES).json()["run"] is None or http.get(RELEASES).json()["run"]["state"] != "running"


def test_two_at_once_are_one_and_a_champion_that_has_changed_stays(world: Console, place: Place) -> None:
    why = "--force --store=/etc/passwd; $(touch x) `id`"
    with world.owner as http, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: asked(http, "rollback", BAD, why), range(6)))
        assert sorted(a.status_code for a in answers) == [200, 409, 409, 409, 409, 409]
        busy = next(a for a in answers if a.status_code == 409).json()
        assert busy["type"].endswith(":busy") and "owner asked for is at work" in busy["detail"]
        run = ended(http)
    assert run["state"] == "failed" and "it is version 1: nothing was moved" in run["says"] and run["reason"] == why
    assert not run["moving"] and "the versions tell" not in run["says"]
    begun, told_of = of_run(world, run)
    assert begun["asked"] and "nothing was moved" in told_of["failed"] and "unsure" not in told_of
    assert aliases(place.uri)[0] == "1"


def test_a_registry_that_is_away_is_said(world: Console, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    away = place.folder / "away.db"
    monkeypatch.setattr(world.live.service.releases, "settings", replaced(world, tracking_uri=f"sqlite:///{away}"))
    with world.owner as http:
        world.live.service.releases._listing = None
        listed = http.get(f"{RELEASES}/versions")
        assert listed.status_code == 503 and "no model registry at" in listed.json()["detail"]
        for action in ("promote", "rollback"):
            assert asked(http, action, GOOD, "it is better").status_code == 200
            run = ended(http)
            assert "no model registry at" in run["says"] and not run["moving"]
            begun, told_of = of_run(world, run)
            assert (begun["asked"], begun["action"], begun["version"], begun["reason"]) == (
                True,
                action,
                GOOD,
                "it is better",
            )
            assert "no model registry at" in told_of["failed"] and told_of["action"] == action
    assert not away.exists()


def of_run(console: Console, run: dict[str, Any]) -> list[dict[str, Any]]:
    """What the service itself has noted of a promotion or rollback."""
    assert console.live.service.store.flush()
    wait_for(lambda: any("failed" in n["after"] and n["after"]["id"] == run["id"] for n in notes(console)))
    return [note["after"] for note in notes(console) if note["after"]["id"] == run["id"]]


KILLED = """
import os, runpy, mlflow
mlflow.MlflowClient.set_registered_model_alias = lambda *_: os.kill(os.getpid(), 9)
runpy.run_module("router_ml.told", run_name="__main__")
"""


def test_a_child_that_is_killed_during_the_move_leaves_the_truth(
    world: Console, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the note of the move and the alias: the note says what was to be, the next one that nobody knows."""
    rollout.promote(place.uri, NAME, GOOD, who="ann")
    monkeypatch.setattr(releasing, "module_command", lambda _: [sys.executable, "-c", KILLED])
    with world.owner as http:
        assert asked(http, "rollback", GOOD).status_code == 200
        run = ended(http)
    assert run["state"] == "failed" and run["moving"] and run["says"].endswith("the versions tell")
    begun, told_of = of_run(world, run)
    assert begun["asked"] and told_of["unsure"]
    assert told_of["failed"].startswith("was ended during the move; the versions tell (it ended with code -9")
    by_the_command = notes(world)[-2]["after"]
    assert (by_the_command["action"], by_the_command["version"], by_the_command.get("failed")) == (
        "rollback",
        "1",
        None,
    )
    assert aliases(place.uri)[0] == GOOD
    with page(world, OWNER, "releases") as (tab, _):
        latest = tab.locator("#past tbody tr").first
        expect(latest).to_contain_text("It may not have come to pass: was ended during the move", timeout=60_000)


def replaced(world: Console, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(world.live.service.settings, **changes)


def test_a_child_that_hangs_is_ended_with_all_that_it_started(world: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releasing, "MOVE_SECONDS", 0.4)
    with world.owner as http:
        assert asked(http, "promote", GOOD).status_code == 200
        run = ended(http)
        assert run["state"] == "failed" and "longer than 0.4 s and was ended" in run["says"]
    wait_for(lambda: not told())


def told(pid: int | None = None) -> list[psutil.Process]:
    """The processes that do the console's work for a service."""
    below = psutil.Process(pid).children(recursive=True)
    return [p for p in below if p.status() != psutil.STATUS_ZOMBIE and any("router_ml.told" in w for w in p.cmdline())]


def test_a_service_without_a_registry_says_why(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tiny_bundle, tmp_path / "store.db") as live:
        said = live.http.get(RELEASES).json()
        assert "serves a bundle from a folder" in said["why_not"] and said["name"] is None
        refused = asked(live.http, "promote", "1")
        assert refused.status_code == 409 and "--model NAME@champion" in refused.json()["detail"]
        assert live.http.get(f"{RELEASES}/versions").status_code == 409
        monkeypatch.setattr(live.service.releases, "settings", _following(live.service.settings))
        monkeypatch.setattr(releasing, "find_spec", lambda name: None if name == "mlflow" else True)
        said = live.http.get(RELEASES).json()["why_not"]
        assert "installed without mlflow" in said and "router-ml[serve,train]" in said


def _following(settings: Any) -> Any:
    from dataclasses import replace

    return replace(settings, bundle=None, model="router@champion")


def test_a_service_that_is_restarted_meanwhile_is_said(world: Console, place: Place, tmp_path: Path) -> None:
    """Killed, so that it cannot tidy up: the child ends with it, and the page says that nothing more is known."""
    open_database(str(tmp_path / "store.db")).dispose()
    common = {"store": tmp_path / "store.db", "tracking_uri": place.uri, "model": f"{NAME}@champion"}
    common |= {"cache": tmp_path / "cache", "release_logs": place.logs, "poll_seconds": 5.0}
    with ExitStack() as ends:
        one, http = ends.enter_context(process(**common))
        other = Console(world.live, str(http.base_url).rstrip("/"), ends, world.browser)
        tab, seen = ends.enter_context(page(other, "", "releases"))
        expect(tab.locator(ROWS)).to_have_count(3, timeout=60_000)
        tab.route("**/console/api/releases", lambda route: route.abort("connectionrefused"), times=1)
        fill_in(tab, "Promote…", "before the restart")
        expect(tab.locator("#status")).to_have_text("Promotion of version 2 has begun.", timeout=60_000)
        expect(tab.locator("#run [role=status]")).to_contain_text("At work", timeout=60_000)
        wait_for(lambda: bool(told(one.pid)))
        (child,) = told(one.pid)
        os.kill(one.pid, signal.SIGKILL)
        one.wait()
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 5.0)
        expect(tab.locator("#run [role=status]")).to_contain_text("does not answer; it is asked on")
        ends.enter_context(process(http.base_url.port, **common))
        expect(tab.locator("#run [role=status]")).to_contain_text("the service was restarted meanwhile", timeout=60_000)
        assert seen.errors == [] or all("ERR_CONNECTION_REFUSED" in error for error in seen.errors)
        (noted,) = (c for c in http.get("/console/api/changes").json()["changes"] if c["kind"] == "registry")
        assert noted["after"]["asked"] and noted["after"]["reason"] == "before the restart"
    assert aliases(place.uri)[0] == "1"


def test_decisions_go_on_while_the_gate_judges_and_the_service_follows(
    world: Console, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child is niced: a decision waits for a turn at most."""
    monkeypatch.setitem(releasing.NICE, "promote", 3)
    with world.owner as http:
        assert asked(http, "promote", GOOD, "to be measured").status_code == 200
        wait_for(lambda: any(p.nice() >= 3 for p in told()), 30.0)
        took = []
        while http.get(RELEASES).json()["run"]["state"] == "running":
            began = time.perf_counter()
            assert http.post("/route/preview", json={"prompt": "Hi"}).status_code == 200
            took.append(time.perf_counter() - began)
            time.sleep(0.01)
        run = ended(http)
        assert run["state"] == "done" and all(c["holds"] for c in run["result"]["conditions"])
        follower = world.live.service.follower
        assert follower is not None
        wait_for(lambda: follower.version == GOOD, 60.0)
        assert asked(http, "rollback", GOOD).status_code == 200
        assert ended(http)["says"] == "router version 1 is champion again; version 2 is rolled back"
        wait_for(lambda: follower.version == "1", 60.0)
        versions = http.get(f"{RELEASES}/versions").json()["versions"]
        assert [v["version"] for v in versions] == ["3", "2", "1"] and versions[2]["aliases"] == ["champion"]
        assert versions[1]["rolled_back_by"] == "owner" and versions[1]["metrics"]["held_out/auc"] == 0.7
        assert len(took) > 50 and sorted(took)[len(took) // 2] < 0.05 and max(took) < 1.0
