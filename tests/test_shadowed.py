"""What a shadow shows: agreement, expectations, and off-policy values that are right where the truth is known."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_service import running, wait_for

import serving.shadow
from router_ml.errors import InputError
from router_ml.shadow import shadow_row
from router_ml.store import Store
from router_ml.types import Arm, Candidate, Outcome, RouteDecision, RouteRequest
from training.shadowed import shadowed

TRUE_QUALITY = {"cheap": 0.5, "good": 0.8}
PRICE = {"cheap": 0.001, "good": 0.01}
RATE = 0.4


def decision(number: int, version: str, first: str, *, propensity: float, **more: Any) -> RouteDecision:
    """One of two candidates first, each with what the true world has of it on average."""
    order = [first, *(model for model in PRICE if model != first)]
    chosen = tuple(Candidate(model, TRUE_QUALITY[model], PRICE[model], 2 * PRICE[model]) for model in order)
    values: dict[str, Any] = {
        "decision_id": f"{version}-{number}", "model": first,
        "candidates": chosen, "excluded": {}, "propensity": propensity,
        "explored": False, "reason": "the test", "meets_threshold": True, "min_probability": 0.5,
        "model_version": version, "policy_version": "p",
    }  # fmt: skip
    return RouteDecision(**values | more)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(str(tmp_path / "store.db")).start()
    yield made
    made.close()


def record(
    store: Store, n: int, *, seed: int = 0, rate: float = RATE, arms: bool = False, feedback: float = 1.0
) -> None:
    """n requests that the champion gives to "cheap" but where it explores, and the challenger would give to "good"."""
    rng, told = np.random.default_rng(seed), []
    for i in range(n):
        explored = bool(rng.random() < rate)
        model = str(rng.choice(list(PRICE))) if explored else "cheap"
        own = (1.0 - rate) * (model == "cheap") + rate / 2
        # A tenth of the decisions are the canary's: the propensity over both draws is another one than within the arm.
        arm = Arm("champion", "request", 0.1, own, None) if arms else None
        served = decision(i, "old", model, propensity=own * (0.9 if arms else 1.0), explored=explored, arm=arm)
        store.record(RouteRequest(messages=(), session=f"s{i // 2}" if rate else None), served, provider="x")
        wanted = decision(i, "new", "good", propensity=1.0 - rate / 2)
        store.record_shadow(shadow_row("challenger", served, wanted))
        if rng.random() < feedback:
            good = float(rng.random() < TRUE_QUALITY[model])
            said = Outcome(decision_id=served.decision_id, quality=good, cost_usd=PRICE[model] * rng.uniform(0.5, 1.5))
            told.append(store.add_outcome(said))
    assert store.flush() and all(one.result(10) for one in told)


@pytest.mark.parametrize(("arms", "feedback"), [(False, 1.0), (True, 1.0), (False, 0.6)])
def test_off_policy_values_are_those_of_the_world(store: Store, arms: bool, feedback: float) -> None:
    record(store, 1200, seed=3, arms=arms, feedback=feedback)
    found = shadowed(store.url)
    assert (found.champion, found.challenger, found.n, found.judged) == ("old", "new", 1200, 1200)
    assert found.agreement == 0.0 and found.compared == pytest.approx(1200 * (1 - RATE), rel=0.1)
    # The challenger explores, too, as its policy says.
    challenger = (1 - RATE / 2) * TRUE_QUALITY["good"] + RATE / 2 * TRUE_QUALITY["cheap"]
    champion = (1 - RATE / 2) * TRUE_QUALITY["cheap"] + RATE / 2 * TRUE_QUALITY["good"]
    quality, cost = found.observed["quality"], found.observed["cost_usd"]
    assert quality.change.low < challenger - champion < quality.change.high and quality.change.low > 0.0
    assert quality.champion == pytest.approx(champion, abs=0.05)
    assert quality.challenger - quality.champion == pytest.approx(quality.change.value)
    assert cost.change.value == pytest.approx((1 - RATE) * (PRICE["good"] - PRICE["cheap"]), rel=0.2)
    assert found.outcomes == pytest.approx(1200 * feedback, rel=0.1)
    frame = found.to_frame()
    assert frame["by"].to_list() == ["own estimates"] * 3 + ["off-policy"] * 2
    assert frame.row(0)[3:6] == pytest.approx((0.5, 0.8, 0.3)) and frame["change"].null_count() == 0
    assert found.moves.row(0, named=True)["from"] == "cheap" and found.moves["share"].sum() == 1.0
    assert len(found.plot().axes[0].get_yticklabels()) == 2


def test_the_interval_covers_what_is_true(tmp_path: Path) -> None:
    """Without a bias in twelve stores: the mean estimate is near the truth by its own standard error."""
    true, off = (1 - RATE) * 0.3, []
    for seed in range(12):
        made = Store(str(tmp_path / f"{seed}.db"), interval=0.5).start()
        record(made, 200, seed=seed)
        change = shadowed(made.url).observed["quality"].change
        off.append((change.value - true) / change.se)
        made.close()
    assert abs(np.mean(off)) < 3.0 / np.sqrt(12) and 0.4 < np.std(off) < 1.8


def test_without_exploration_no_outcome_tells(store: Store) -> None:
    record(store, 60, rate=0.0)
    found = shadowed(store.url)
    assert found.observed == {} and found.judged == 0 and "exploration_rate" in found.why["quality"]
    assert found.expected["p_ok"].change.value == pytest.approx(0.3)
    assert found.to_frame()["change"].null_count() == 2 and len(found.plot().axes[0].get_yticklabels()) == 1


def test_pairs_are_told_apart_and_what_is_left_out_is_counted(store: Store) -> None:
    record(store, 40)
    served = decision(900, "new", "good", propensity=1.0, arm=Arm("challenger", "request", 0.1, 1.0, None))
    store.record(RouteRequest(messages=()), served, provider="x")
    store.record_shadow(shadow_row("champion", served, decision(900, "old", "cheap", propensity=1.0)))
    served = decision(901, "old", "cheap", propensity=1.0)
    store.record(RouteRequest(messages=()), served, provider="x")
    store.record_shadow(shadow_row("challenger", served, decision(901, "newer", "cheap", propensity=1.0)))
    assert store.flush()
    newest = shadowed(store.url)
    assert (newest.challenger, newest.n, newest.agreement) == ("newer", 1, 1.0)
    assert any("1 requests that the challenger served" in note for note in newest.notes)
    assert any("40 shadows of other pairs" in note for note in newest.notes)
    assert shadowed(store.url, challenger="new").n == 40
    with pytest.raises(InputError, match="no shadow of challenger x beside champion old"):
        shadowed(store.url, challenger="x")


def test_a_model_that_the_champion_does_not_know_is_out_of_reach(store: Store) -> None:
    rng = np.random.default_rng(1)
    for i in range(60):
        model = str(rng.choice(list(PRICE)))
        served = decision(i, "old", model, propensity=0.5, explored=i % 2 == 0)
        store.record(RouteRequest(messages=()), served, provider="x")
        wanted = decision(i, "new", "good", propensity=1.0)
        wanted = replace(
            wanted, model="newcomer", candidates=(Candidate("newcomer", 0.9, 0.002, 0.003), *wanted.candidates)
        )
        store.record_shadow(shadow_row("challenger", served, wanted))
        store.add_outcome(Outcome(decision_id=served.decision_id, quality=1.0)).result(10)
    assert store.flush()
    found = shadowed(store.url)
    assert "could not have made" in found.why["quality"] and set(found.moves["to"]) == {"newcomer"}


def test_an_empty_store_and_none(store: Store, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--challenger"):
        shadowed(store.url)
    with pytest.raises(InputError, match="there is no store"):
        shadowed(str(tmp_path / "none.db"))


def test_what_the_service_stores_is_read(
    tiny_bundle: Path, sparse_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving.shadow, "LATE_SECONDS", 30.0)
    for name, bundle in (("champion", tiny_bundle), ("challenger", sparse_bundle)):
        shutil.copytree(bundle, tmp_path / name)
    with running(tmp_path / "champion", tmp_path / "store.db", challenger=tmp_path / "challenger") as live:
        assert live.http.put("/policy", json={"exploration_rate": 0.5}).status_code == 200
        answers = []
        for i in range(40):
            body = {"prompt": f"Prove rigorously that operator {i} is bounded.", "min_probability": 0.6}
            answers.append(live.http.post("/route", json=body).json())
            said = {"decision_id": answers[-1]["decision_id"], "quality": float(i % 3 > 0), "cost_usd": 0.01}
            assert live.http.post("/outcomes", json=said).status_code == 200
        assert live.service.shadow is not None
        wait_for(lambda: live.service.store.flush() and len(list(live.service.store.shadows())) == 40)
        found = shadowed(str(tmp_path / "store.db"))
        rows = {row["decision_id"]: row for row in live.service.store.shadows()}
    plain = [a for a in answers if not a["explored"]]
    assert (found.n, found.compared, found.outcomes) == (40, len(plain), 40)
    assert (
        found.champion == answers[0]["model_version"]
        and found.challenger == rows[answers[0]["decision_id"]]["model_version"]
    )
    same = [a["model"] == rows[a["decision_id"]]["model"] for a in plain]
    assert found.agreement == pytest.approx(np.mean(same))
    assert found.expected["expected_cost_usd"].champion == pytest.approx(
        np.mean([a["expected_cost_usd"] for a in plain])
    )
    assert found.moves["n"].sum() == len(plain) - sum(same)
