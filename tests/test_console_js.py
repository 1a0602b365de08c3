"""The console at its edges, in a real Chromium: what is asked, kept and said where answers come late or not at all."""

from __future__ import annotations

import contextlib
import csv
import io
import time
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
    base: dict[str, Any] = {"default_tier": "standard", "tiers": {"standard": 0.7, "premium": 0.9}, "rules": []}
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


def test_what_a_put_answers_is_in_force_though_another_process_has_not_followed(bare: Console) -> None:
    http = bare.live.http
    with page(bare, "") as (tab, _):
        assert http.put("/policy", json={"tiers": {**TIERS, "standard": 0.9}}).status_code == 200
        tab.reload()
        tab.wait_for_selector("button.undo")
        stale = http.get("/policy")
        tab.route(  # a process that has not followed yet
            "**/policy",
            lambda route: route.fulfill(status=200, headers={"etag": stale.headers["etag"]}, body=stale.text)
            if route.request.method == "GET" else route.continue_(),
        )  # fmt: skip
        tab.locator("button.undo").click()
        tab.locator("dialog button.primary").click()
        expect(tab.locator("#status")).to_contain_text("Undone: policy")
        expect(tab.locator("#history h3")).to_be_focused()
        undone = http.get("/policy").json()["version"]
        assert undone != stale.json()["version"]
        tab.locator("button.undo").click()  # the next change is of that version, not of the stale one
        expect(tab.locator("#status")).to_contain_text(f"Undone: policy {stale.json()['version']}")
        # Saved, and nothing can be read afterwards: it is not said to be unsaved.
        tab.unroute("**/policy")
        tab.route("**/console/api/changes", lambda route: route.abort())
        tab.locator("button.undo").click()
        tab.locator("dialog button.primary").click()
        expect(tab.locator("#history .warning")).to_contain_text("The versions cannot be shown now")
        expect(tab.locator("#status")).to_contain_text("Undone: policy")
        assert "Not saved" not in tab.locator("#alert").inner_text()


def test_somebody_elses_policy_that_cannot_be_read_is_said(bare: Console) -> None:
    http = bare.live.http
    assert http.put("/policy", json={"tiers": {**TIERS, "standard": 0.9}}).status_code == 200
    with page(bare, "") as (tab, _):
        tab.wait_for_selector("button.undo")
        theirs = http.put("/policy", json={"tiers": {**TIERS, "standard": 0.95}}).json()["version"]
        tab.route("**/policy", lambda route: route.abort() if route.request.method == "GET" else route.continue_())
        tab.locator("button.undo").click()
        tab.locator("dialog button.primary").click()
        expect(tab.locator("#alert")).to_contain_text("Not saved: somebody has changed the policy meanwhile, and which")
        assert http.get("/policy").json()["version"] == theirs


def test_ten_versions_are_shown_and_all_on_demand(bare: Console) -> None:
    for i in range(12):
        put = {"tiers": {**TIERS, "standard": 0.6 + i / 100}}
        assert bare.live.http.put("/policy", json=put).status_code == 200
    with page(bare, "") as (tab, _):
        expect(tab.locator("#history tbody tr")).to_have_count(10)
        tab.locator("#all-versions").click()
        expect(tab.locator("#history h3")).to_be_focused()
        assert tab.locator("#history tbody tr").count() > 12 and tab.locator("#all-versions").count() == 0


def test_a_page_of_decisions_is_of_the_search_that_was_submitted(bare: Console) -> None:
    with page(bare, "", "decisions") as (tab, seen):
        tab.locator("#by-tenant").fill("fast")
        tab.keyboard.press("Enter")
        caption = tab.locator("#found caption")
        expect(caption).to_contain_text("60 decisions in the service's store, 1 to 50")
        expect(caption).to_contain_text('searched for: Tenant "fast"')
        tab.locator("#by-tenant").fill("edited")
        tab.locator("#older").focus()
        tab.keyboard.press("Enter")
        expect(caption).to_contain_text("51 to 60")
        expect(tab.locator("#found .scroll")).to_be_focused()
        expect(tab.locator("#status")).to_have_text("60 decisions, 51 to 60.")
        asked = [url for url in seen.requests if "/api/decisions" in url]
        assert "tenant=fast" in asked[-1] and "after=" in asked[-1]
        late: list[Any] = []  # the answer to the first of two questions, which is let through after the second's
        tab.route("**/console/api/decisions?tenant=slow*", lambda route: late.append(route))
        for tenant in ("slow", "fast"):
            tab.locator("#by-tenant").fill(tenant)
            tab.keyboard.press("Enter")
        expect(caption).to_contain_text("1 to 50")
        with tab.expect_response("**/console/api/decisions?tenant=slow*"):
            late[0].continue_()
        tab.evaluate("new Promise((done) => setTimeout(done, 100))")
        assert 'Tenant "fast"' in caption.inner_text()


def test_savings_are_those_of_the_controls_or_none(bare: Console) -> None:
    with page(bare, "", "savings") as (tab, _):
        late: list[Any] = []
        tab.route("**/console/api/sums?days=1", lambda route: late.append(route))
        tab.route("**/console/api/sums?days=90", lambda route: route.abort())
        tab.locator("#days").select_option("1")
        expect(tab.locator("#csv")).to_be_disabled()
        tab.locator("#by").select_option("day")
        assert tab.locator("#sums").inner_text() == "Adding up…", "nothing of the days before"
        tab.locator("#days").select_option("7")
        expect(tab.locator("#sums .source")).to_be_visible()
        since = tab.locator("#sums .source").inner_text()
        with tab.expect_response("**/console/api/sums?days=1"):
            late[0].continue_()
        tab.evaluate("new Promise((done) => setTimeout(done, 100))")
        assert tab.locator("#sums .source").inner_text() == since
        tab.locator("#days").select_option("90")
        expect(tab.locator("#sums .warning")).to_have_text("the service does not answer.")
        tab.locator("#by").select_option("task")
        assert tab.locator("#csv").is_disabled() and tab.locator("#sums table").count() == 0


def test_an_export_holds_no_formula_and_every_nano_dollar(bare: Console) -> None:
    sums = [
        "calls", "reported", "priced", "open", "cost_nano", "open_expected_nano", "compared", "compared_cost_nano",
        "baseline_nano", "savings_nano",
    ]  # fmt: skip
    names = ['x;=HYPERLINK("http://e")', " =1+1", '"@x', "\t1", "\n-1", "'+1", "a=b"]
    rows = [[name, *([1] * len(sums))] for name in names]
    rows += [["big", *([2**53 - 1] * len(sums))] for _ in range(3)]
    found = {"columns": ["tenant", *sums], "rows": rows, "baseline": "=b", "since_us": 1e15, "made_us": 1e15}
    with page(bare, "") as (tab, _):
        text = call(tab, "savings.js", "m.csv(m.grouped(given, 'tenant'), 'tenant', given)", found)
    read = {row["tenant"]: row for row in csv.DictReader(io.StringIO(text, newline=""))}
    assert set(read) == {names[0], *(f"'{name}" for name in names[1:-1]), "a=b", "big"}
    assert read["big"]["cost_usd"].replace(".", "") == str(3 * (2**53 - 1)) and read["a=b"]["baseline"] == "'=b"
    assert text.startswith('"tenant","calls"') and '"x;=HYPERLINK(""http://e"")",1,' in text


def test_a_run_that_the_answering_process_does_not_know_is_followed_in_the_audit_log(bare: Console) -> None:
    run: dict[str, Any] = {
        "id": "mine", "action": "promote", "version": "7", "reason": "better", "who": "owner", "state": "running",
        "started_us": time.time_ns() // 1000, "stage": "judging",
    }  # fmt: skip
    store = bare.live.service.store
    with page(bare, "") as (tab, _):
        tab.evaluate("(run) => sessionStorage.setItem('router-ml-run', JSON.stringify(run))", run)
        tab.goto(f"{bare.url}/console#/releases")
        said = tab.locator("#run [role=status]")
        expect(said).to_contain_text("another process of the service may be at it, or the service was restarted")
        assert tab.locator("#run h3").inner_text() == "Promotion of version 7"
        assert "followed" not in said.inner_text()
        real = bare.live.http.get("/console/api/releases").json()
        other = {**run, "id": "theirs", "action": "rollback", "who": "another", "started_us": run["started_us"] + 1}
        tab.route("**/console/api/releases", lambda route: route.fulfill(json={**real, "run": other}))
        expect(said).to_contain_text("Rollback of version 7, which another asked for, has followed")
        failed = {
            "id": "mine",
            "action": "promote",
            "version": "7",
            "reason": "better",
            "failed": "the gate refuses it",
        }
        store.note_change("registry", "owner", failed)
        assert store.flush()
        expect(said).to_contain_text("It did not come to pass: the gate refuses it. Rollback of version 7")
        expect(tab.locator("#past")).to_contain_text("router version 7 was to be promoted")
        assert tab.evaluate("sessionStorage.getItem('router-ml-run')") is None
