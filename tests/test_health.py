"""Circuits: opened by failures in a window, probed when half open, set by a gateway; no clock is trusted but one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_service import Running, running

from router_ml.errors import InputError
from serving.health import Health, HealthSettings

PROVIDERS = {"a": "one", "b": "one", "c": "two"}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def health(clock: Clock) -> Health:
    return Health(HealthSettings(window_seconds=60, min_calls=4, failure_share=0.5, open_seconds=30), clock)


def fail(health: Health, model: str, times: int, *, failed: bool = True, of: str = "") -> None:
    for _ in range(times):
        health.report(model, PROVIDERS[model], failed=failed, decision_id=of)


def test_enough_failures_in_the_window_open_it(health: Health, clock: Clock) -> None:
    fail(health, "a", 3)
    assert health.down(PROVIDERS) == {}
    clock.now += 61  # they are forgotten
    fail(health, "a", 3)
    fail(health, "a", 1, failed=False)
    assert health.down(PROVIDERS) == {"a": "circuit open: 3 of 4 calls failed in 60 s"}
    assert health.states()[("model", "a")] == "open" and health.states()[("provider", "one")] == "closed"


def test_few_failures_among_many_calls_do_not(health: Health) -> None:
    for _ in range(20):
        fail(health, "a", 2, failed=False)
        fail(health, "a", 1)
    assert health.down(PROVIDERS) == {}


def test_two_models_of_a_provider_that_fail_take_the_provider_out(health: Health) -> None:
    fail(health, "a", 2)
    fail(health, "b", 2)
    assert health.down(PROVIDERS) == dict.fromkeys(
        ("a", "b"), "circuit open: 4 of 4 calls of provider 'one' failed in 60 s"
    )


def test_half_open_lets_one_through_and_its_outcome_decides(health: Health, clock: Clock) -> None:
    fail(health, "a", 4)
    clock.now += 29
    assert "a" in health.down(PROVIDERS)
    clock.now += 2
    assert health.states()[("model", "a")] == "half-open" and health.down(PROVIDERS) == {}
    health.chosen("a", "one", "probe")
    assert "a" in health.down(PROVIDERS)  # one is enough
    fail(health, "a", 1, failed=False)  # of a call from before
    assert "a" in health.down(PROVIDERS)
    fail(health, "a", 1, of="probe")
    clock.now += 29
    assert "a" in health.down(PROVIDERS)
    clock.now += 2
    health.chosen("a", "one", "probe")
    fail(health, "a", 1, failed=False, of="probe")
    assert health.down(PROVIDERS) == {} and health.states()[("model", "a")] == "closed"
    fail(health, "a", 3)
    assert health.down(PROVIDERS) == {}  # what was before is forgotten


def test_a_probe_that_is_never_reported_is_not_waited_for_for_ever(health: Health, clock: Clock) -> None:
    fail(health, "a", 4)
    clock.now += 31
    health.chosen("a", "one", "probe")
    assert "a" in health.down(PROVIDERS)
    clock.now += 31
    assert health.down(PROVIDERS) == {}


def test_a_late_failure_does_not_prolong_an_open_circuit(health: Health, clock: Clock) -> None:
    fail(health, "a", 4)
    clock.now += 20
    fail(health, "a", 5)
    fail(health, "a", 1, failed=False)  # nor does a late success close it
    assert "a" in health.down(PROVIDERS)
    clock.now += 11
    assert health.down(PROVIDERS) == {}


def test_a_gateway_opens_and_closes_it_by_hand(health: Health, clock: Clock) -> None:
    health.set("a", "open")
    clock.now += 10_000
    fail(health, "a", 5, failed=False)
    assert health.down(PROVIDERS) == {"a": "taken out by hand"}
    health.set("a", "auto")
    assert health.down(PROVIDERS) == {}
    fail(health, "b", 4)
    health.set("b", "closed")
    assert health.down(PROVIDERS) == {}


def test_a_dead_model_does_not_keep_its_provider_out(health: Health, clock: Clock) -> None:
    fail(health, "a", 4)
    fail(health, "b", 4)
    for round_ in range(3):
        clock.now += 31
        health.chosen("a", "one", f"a{round_}")  # the router prefers the one that stays dead
        fail(health, "a", 1, of=f"a{round_}")
        assert set(health.down(PROVIDERS)) == {"a"} if round_ else "b" not in health.down(PROVIDERS)
        health.chosen("b", "one", f"b{round_}")
        fail(health, "b", 1, failed=False, of=f"b{round_}")
        clock.now += 0.1
    health.set("b", "auto")
    health.chosen("b", "one", "last")
    fail(health, "b", 1, failed=False, of="last")
    assert set(health.down(PROVIDERS)) == {"a"}


def test_last_resort_traffic_does_not_keep_a_circuit_shut(health: Health, clock: Clock) -> None:
    fail(health, "a", 4)
    let_through = 0
    for step in range(60):
        clock.now += 10
        let_through += "a" not in health.down(PROVIDERS)
        health.chosen("a", "one", f"forced {step}")  # nothing else may serve it, and nobody reports
    assert let_through >= 10


def test_a_report_takes_the_same_time_however_many_calls_there_are() -> None:
    health = Health(HealthSettings(window_seconds=1000))
    fail(health, "c", 20_000, failed=False)
    started = time.perf_counter()
    fail(health, "c", 1000, failed=False)
    assert (time.perf_counter() - started) / 1000 < 200e-6


@pytest.mark.parametrize(
    "wrong", [{"window_seconds": 0}, {"open_seconds": -1}, {"min_calls": 0}, {"probes": 0}, {"failure_share": 0.0}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="health"):
        HealthSettings(**wrong)


@pytest.fixture
def live(tiny_bundle: Path, tmp_path: Path) -> Iterator[Running]:
    health = HealthSettings(min_calls=3, open_seconds=1000)
    with running(tiny_bundle, tmp_path / "store.db", health=health) as live:
        yield live


def ask(live: Running, **body: Any) -> dict[str, Any]:
    said = live.http.post("/route", json={"prompt": "What is the plural of river?", **body})
    assert said.status_code == 200, said.text
    return dict(said.json())


def tell(live: Running, decision_id: str, **body: Any) -> None:
    assert live.http.post("/outcomes", json={"decision_id": decision_id, **body}).status_code == 200


def test_outcomes_open_a_circuit_and_no_answer_offers_the_model(live: Running) -> None:
    first = ask(live)["model"]
    for status in ("error", "timeout", "rate_limited"):
        answer = ask(live)
        assert answer["model"] == first
        tell(live, answer["decision_id"], status=status)
    answer = ask(live)
    assert answer["model"] != first and first not in {c["model"] for c in answer["candidates"]}
    assert answer["excluded"][first] == "circuit open: 3 of 3 calls failed in 60 s"
    assert live.metric(f'router_circuit_open{{name="{first}",of="model"}}') == 1
    assert live.metric('router_excluded_total{constraint="circuit"}') >= 1


def test_feedback_and_strangers_say_nothing_of_the_call(live: Running) -> None:
    first = ask(live)["model"]
    for _ in range(6):
        answer = ask(live)
        tell(live, answer["decision_id"], quality=0.0)
        tell(live, "unknown", served_model=first, status="error", retries=_)
        tell(live, answer["decision_id"], status="error", served_model="nobody")
    assert ask(live)["model"] == first
    answer = ask(live)
    for retries in range(5):
        tell(live, answer["decision_id"], status="error", retries=retries)  # one call, told of five times
    assert ask(live)["model"] == first


def test_a_fallback_that_served_tells_that_the_chosen_one_failed(live: Running) -> None:
    first = ask(live)["model"]
    for _ in range(3):
        answer = ask(live)
        tell(live, answer["decision_id"], status="ok", served_model=answer["candidates"][1]["model"])
    assert first in ask(live)["excluded"]


def test_a_request_that_only_a_failing_model_may_serve_goes_there_all_the_same(live: Running) -> None:
    for _ in range(3):
        tell(live, ask(live, candidates=["mid"])["decision_id"], status="error")
    answer = ask(live, candidates=["mid"])
    assert answer["model"] == "mid"  # to refuse it would be an outage for sure
    assert "mid" in ask(live, candidates=["mid", "frontier"])["excluded"]


def test_a_gateway_sets_a_models_health(live: Running) -> None:
    first = ask(live)["model"]
    said = live.http.put(f"/models/{first}/health", json={"state": "open"})
    assert said.status_code == 200 and said.json() == {"model": first, "state": "open"}
    assert ask(live)["excluded"][first] == "taken out by hand"
    assert live.http.put(f"/models/{first}/health", json={"state": "auto"}).json()["state"] == "closed"
    assert ask(live)["model"] == first
    assert live.http.put("/models/nobody/health", json={"state": "open"}).status_code == 404
    assert live.http.put(f"/models/{first}/health", json={"state": "ajar"}).status_code == 422
