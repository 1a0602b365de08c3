"""The challenger's shadow: scored after the answer, kept beside it, and never anybody's trouble."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_service import Running, process, running, wait_for

import serving.shadow
from benchmarks.shadow import measure
from features.load import load_router
from router_ml.canary import probability
from router_ml.conversation import request_of
from router_ml.shadow import shadow_row
from router_ml.store import Store
from router_ml.types import Estimate, RouteRequest
from serving.challenger import Challenger
from serving.live import LiveRouter
from serving.shadow import Shadow

EASY, HARD = "What is the plural of river cloud engine?", "Prove rigorously that the tensor operator is bounded."
DIAL = 0.6
BODY = {"prompt": HARD, "min_probability": DIAL}


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that runs other tests beside this one is no loop that is late."""
    monkeypatch.setattr(serving.shadow, "LATE_SECONDS", 30.0)


@pytest.fixture
def live(tiny_bundle: Path, sparse_bundle: Path, tmp_path: Path) -> Iterator[Running]:
    """A service on a copy of the one bundle, with a copy of the other as its challenger."""
    for name, bundle in (("champion", tiny_bundle), ("challenger", sparse_bundle)):
        shutil.copytree(bundle, tmp_path / name)
    settings: dict[str, Any] = {"challenger": tmp_path / "challenger", "watch_seconds": 0.05}
    with running(tmp_path / "champion", tmp_path / "store.db", **settings) as live:
        yield live


def shadows(live: Running) -> list[dict[str, Any]]:
    assert live.service.store.flush()
    return list(live.service.store.shadows())


def scored(live: Running) -> float:
    return sum(live.metric(f'router_shadow_decisions_total{{agrees="{agrees}"}}') for agrees in ("true", "false"))


def sabotage(live: Running, estimator: Any) -> None:
    """Lets the challenger estimate with this."""
    assert live.service.shadow is not None
    holder = live.service.shadow.challenger._holder
    assert holder is not None
    holder.live = replace(holder.live, router=replace(holder.live.router, estimator=estimator))


def test_the_challenger_is_scored_and_never_served(live: Running, sparse_bundle: Path) -> None:
    answers = [live.http.post("/route", json=BODY | {"prompt": p}).json() for p in (HARD, EASY)]
    preview = live.http.post("/route/preview", json=BODY).json()
    wait_for(lambda: scored(live) == 2)
    rows = {row["decision_id"]: row for row in shadows(live)}
    assert rows.keys() == {answer["decision_id"] for answer in answers}
    router = replace(load_router(sparse_bundle), draw=lambda: 1.0)
    costs = {"champion": 0.0, "challenger": 0.0}
    for prompt, answer in zip((HARD, EASY), answers, strict=True):
        row, alone = rows[answer["decision_id"]], router.decide(request_of(prompt=prompt, min_probability=DIAL))
        assert (row["bundle"], row["model_version"]) == ("challenger", router.model_version)
        assert (row["model"], row["propensity"], row["degraded"]) == (alone.model, 1.0, False)
        for name in ("p_ok", "expected_cost_usd", "expected_total_cost_usd"):
            assert row[name] == pytest.approx(getattr(alone.chosen, name))
        assert row["served_probability"] == probability(alone, answer["model"])
        served = next(c for c in alone.candidates if c.model == answer["model"])
        assert row["served_p_ok"] == pytest.approx(served.p_ok)
        assert answer["model_version"] != router.model_version and router.model_version not in str(answer)
        costs["champion"] += answer["expected_cost_usd"]
        costs["challenger"] += row["expected_cost_usd"]
    assert router.model_version not in str(preview)
    assert (rows[answers[0]["decision_id"]]["model"], answers[0]["model"]) == ("hosted", "mid")
    assert live.metric('router_shadow_decisions_total{agrees="true"}') == 1.0
    for bundle, usd in costs.items():
        assert live.metric(f'router_shadow_expected_cost_usd_total{{bundle="{bundle}"}}') == pytest.approx(usd)
    assert {row["arm"] for row in live.decisions()} == {None}
    ready = live.http.get("/readyz").json()
    assert (ready["challenger"], ready["degraded"]) == (router.model_version, [])


def test_both_are_under_the_same_policy_and_circuits(live: Running) -> None:
    """Circuits and the policy are the same for both."""
    policy = {"tiers": {"standard": {"min_probability": 0.5, "quality_threshold": 0.5}}, "exploration_rate": 1.0}
    assert live.http.put("/policy", json=policy).status_code == 200
    assert live.http.put("/models/hosted/health", json={"state": "open"}).status_code == 200
    first = live.http.post("/route", json={"prompt": HARD}).json()
    wait_for(lambda: scored(live) == 1)
    (row,) = shadows(live)
    assert row["policy_version"] == first["policy_version"] and row["model"] != "hosted"
    assert (row["propensity"], row["served_probability"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


class Broken:
    thresholds = (0.5,)

    def estimate(self, request: RouteRequest) -> Estimate:
        raise ZeroDivisionError(request.messages[0].text)


class Slow(Broken):
    def estimate(self, request: RouteRequest) -> Estimate:
        time.sleep(0.05)
        return super().estimate(request)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_challenger_that_fails_changes_no_answer(live: Running, share: float, caplog: Any) -> None:
    before = live.http.post("/route", json=BODY).json()
    wait_for(lambda: scored(live) == 1)
    sabotage(live, Broken())
    assert live.http.put("/policy", json={"canary": {"share": share, "by": "request"}}).status_code == 200
    for _ in range(6):
        answer = live.http.post("/route", json=BODY).json()
        own = ("decision_id", "policy_version")
        assert {k: v for k, v in answer.items() if k not in own} == {k: v for k, v in before.items() if k not in own}
        live.http.get("/healthz")  # answered after the shadow of the request before it
    assert {(row["arm"], row["propensity"]) for row in live.decisions()} == {(None, 1.0)} and len(shadows(live)) == 1
    assert live.http.get("/readyz").json()["degraded"] == ["challenger"]  # three times in a row: it is left alone
    if share:
        counted = {why: live.metric(f'router_canary_fallbacks_total{{why="{why}"}}') for why in ("error", "resting")}
        assert counted == {"error": 3.0, "resting": 3.0}
    else:
        # On a busy machine the loop may be too late for a shadow, which is then shed and is no failure.
        late = live.metric('router_shadow_shed_total{why="late"}') or 0.0
        failures = live.metric('router_shadow_failures_total{why="error"}')
        resting = live.metric('router_shadow_shed_total{why="resting"}')
        assert failures == 3.0 and failures + resting + late == 6.0
    assert "left alone for 30 s: its decisions fail (ZeroDivisionError)" in caplog.text and HARD not in caplog.text


def test_a_slow_challenger_is_left_alone(live: Running) -> None:
    live.http.post("/route", json=BODY)
    sabotage(live, Slow())
    started = time.perf_counter()
    for _ in range(40):
        assert live.http.post("/route", json=BODY).status_code == 200
    assert time.perf_counter() - started < 40 * 0.05
    assert live.http.get("/readyz").json()["degraded"] == ["challenger"]


def test_shadows_are_shed_where_the_loop_is_late(live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving.shadow, "LATE_SECONDS", -1.0)
    assert live.http.post("/route", json=BODY).status_code == 200
    wait_for(lambda: live.metric('router_shadow_shed_total{why="late"}') == 1.0)
    monkeypatch.setattr(serving.shadow, "ROOM", 0)
    assert live.http.post("/route", json=BODY).status_code == 200
    assert live.metric('router_shadow_shed_total{why="full"}') == 1.0 and shadows(live) == []


def test_a_folder_that_is_no_bundle_is_no_reason_not_to_serve(
    tiny_bundle: Path, sparse_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "challenger"
    settings = {"challenger": folder, "watch_seconds": 0.05}
    with running(tiny_bundle, tmp_path / "store.db", **settings) as live:
        assert live.http.post("/route", json=BODY).status_code == 200
        ready = live.http.get("/readyz").json()
        assert (ready["challenger"], ready["degraded"]) == (None, ["challenger"])
        aside = tmp_path / "aside"
        shutil.copytree(sparse_bundle, aside)
        aside.rename(folder)
        wait_for(lambda: live.http.get("/readyz").json()["degraded"] == [])
        live.http.post("/route", json=BODY)
        wait_for(lambda: scored(live) == 1)
        booster = folder / "booster.txt"
        booster.write_bytes(booster.read_bytes().replace(b"0", b"1", 1))
        wait_for(lambda: live.http.get("/readyz").json()["degraded"] == ["challenger"])
        live.http.post("/route", json=BODY)
        wait_for(lambda: scored(live) == 2)  # with the last good one
        assert live.service.store.flush()
        assert [c["kind"] for c in live.service.store.changes()].count("challenger") == 1


def test_a_policy_that_does_not_fit_the_challenger_leaves_it_out(live: Running) -> None:
    assert live.service.shadow is not None
    challenger = live.service.shadow.challenger
    champion = live.service.live.live
    policy = champion.router.policy.with_changes(
        tiers={"standard": 0.5, "odd": champion.router.policy.dials["standard"]._replace(quality_threshold=0.5)}
    )
    assert challenger.arms(replace(champion, router=champion.router.with_policy(policy))) is not None
    unknown = replace(champion.router, policy=policy.with_changes(default_model="nobody"))
    assert challenger.arms(replace(champion, router=unknown)) is None and challenger.degraded
    assert "nobody" in str(challenger.misfit)
    assert challenger.arms(champion) is not None and not challenger.degraded


def test_a_challenger_that_is_the_champion_is_none(tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "store.db", challenger=tiny_bundle) as live:
        assert live.http.put("/policy", json={"canary": {"share": 1.0}}).status_code == 200
        assert live.http.post("/route", json=BODY).status_code == 200
        assert [row["arm"] for row in live.decisions()] == [None] and shadows(live) == []
        assert live.http.get("/readyz").json()["degraded"] == []


def test_residency_is_proven_of_a_canarys_decisions(live: Running, sparse_bundle: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from router_ml.cli import main

    assert live.http.put("/policy", json={"canary": {"share": 1.0}}).status_code == 200
    answer = live.http.post("/route", json=BODY | {"data_class": "internal"}).json()
    assert (answer["model"], answer["model_version"]) == ("local", load_router(sparse_bundle).model_version)
    assert [row["arm"] for row in live.decisions()] == ["challenger"]
    said = CliRunner().invoke(main, ["audit", "residency", "--store", str(tmp_path / "store.db")])
    assert said.exit_code == 0, said.output
    explained = CliRunner().invoke(
        main,
        ["explain", answer["decision_id"], "--bundle", str(sparse_bundle), "--store", str(tmp_path / "store.db")],
    )
    assert explained.exit_code == 0 and "local" in explained.output


def test_a_store_keeps_shadows_of_either_kind(store_url: str, tiny_bundle: Path) -> None:
    served = replace(load_router(tiny_bundle), draw=lambda: 1.0).decide(request_of(prompt=HARD, min_probability=DIAL))
    fewer = replace(served, candidates=served.candidates[1:], model=served.candidates[1].model)
    store = Store(store_url).start()
    store.record_shadow(shadow_row("champion", served, fewer))
    store.record_shadow(shadow_row("champion", served, served))  # the first one stays
    assert store.flush()
    (row,) = store.shadows()
    assert row["decision_id"] == served.decision_id and row["model"] == fewer.model
    assert (row["served_probability"], row["served_p_ok"]) == (0.0, None)  # it would not have been a candidate
    store.close()


def test_a_killed_process_loses_no_shadow(tiny_bundle: Path, sparse_bundle: Path, tmp_path: Path) -> None:
    """The drain process takes shadows to the database, too; also after the service was killed."""
    settings = {"bundle": tiny_bundle, "challenger": sparse_bundle, "store": tmp_path / "store.db"}
    with process(**settings) as (started, http):
        asked, counted = 0, 0.0

        def three_are_scored() -> bool:  # on a busy machine some are shed
            nonlocal asked, counted
            assert http.post("/route", json=BODY).status_code == 200
            asked += 1
            told = http.get("/metrics").text.splitlines()
            counted = sum(float(line.split()[-1]) for line in told if line.startswith("router_shadow_decisions_total"))
            return counted >= 3

        wait_for(three_are_scored, 60)
        started.kill()
    store = Store(str(tmp_path / "store.db")).start()
    wait_for(lambda: len(list(store.decisions())) == asked and len(list(store.shadows())) >= counted)
    store.close()


def test_a_shadow_costs_about_what_a_decision_does(tiny_bundle: Path, sparse_bundle: Path, tmp_path: Path) -> None:
    """The bar is 1.5, which docs/benchmarks.md has the figure for; on a machine that others use, a median may waver."""
    challenger, store = Challenger(sparse_bundle), Store(str(tmp_path / "store.db")).start()
    challenger.reload()
    arms = challenger.arms(LiveRouter(tiny_bundle).live)
    assert arms is not None
    requests = [request_of(prompt=f"{prompt} {i}", min_probability=DIAL) for i in range(20) for prompt in (EASY, HARD)]
    found = asyncio.run(measure(arms, Shadow(challenger, store), requests, 10, 0.2))
    assert store.flush() and len(list(store.shadows())) == 400
    store.close()
    assert found["overhead"] < 2.0, found


def test_what_is_loaded_is_only_a_bundle(tmp_path: Path) -> None:
    challenger = Challenger(tmp_path)
    assert challenger.degraded and challenger.model_version is None and challenger.live is None
