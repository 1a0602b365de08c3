"""Metrics over HTTP: stages, expected cost beside a baseline, and what outcomes report; and that counting is cheap."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from live_service import Running, running
from prometheus_client.parser import text_string_to_metric_families

from features.load import load_router
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.router import Router
from router_ml.types import Estimate, Message, RouteRequest
from serving.metrics import STAGES
from serving.spend import Spend, baseline_order
from serving.timing import Durations

EASY, HARD = "What is the plural of river cloud engine?", "Prove rigorously that the comet operator is bounded."


@pytest.fixture
def live(tiny_bundle: Path, tmp_path: Path) -> Iterator[Running]:
    with running(tiny_bundle, tmp_path / "router.db") as live:
        yield live


def route(live: Running, **body: Any) -> dict[str, Any]:
    answer = live.http.post("/route", json=body)
    assert answer.is_success, answer.text
    return dict(answer.json())


def report(live: Running, **body: Any) -> None:
    assert live.http.post("/outcomes", json=body).is_success


def samples(live: Running) -> dict[tuple[str, tuple[str, ...]], float]:
    """Every sample by its name and its labels' values, in the order of the labels' names."""
    families = text_string_to_metric_families(live.http.get("/metrics").text)
    return {
        (s.name, tuple(v for _, v in sorted(s.labels.items()))): s.value for family in families for s in family.samples
    }


def total(found: dict[tuple[str, tuple[str, ...]], float], name: str) -> float:
    return sum(value for (n, _), value in found.items() if n == name)


def test_expected_cost_and_what_the_baseline_would_have_cost(live: Running) -> None:
    answers = [
        route(live, prompt=EASY),
        route(live, prompt=HARD, tier="economy"),
        route(live, prompt=HARD, data_class="internal"),  # which the baseline may not see
        route(live, prompt=HARD, candidates=["mid", "hosted"]),
        route(live, prompt=EASY, min_probability=0.3),
    ]
    refused = live.http.post("/route", json={"prompt": EASY, "data_class": "top"})
    assert refused.status_code == 422
    route_preview = live.http.post("/route/preview", json={"prompt": EASY})
    assert route_preview.is_success
    tiers = ("standard", "economy", "standard", "standard", "custom")
    baselines = ("frontier", "frontier", "local", "mid", "frontier")
    expected: dict[tuple[str, tuple[str, ...]], float] = {}
    for answer, tier, baseline in zip(answers, tiers, baselines, strict=True):
        by_model = {c["model"]: c for c in answer["candidates"]}
        assert baseline in by_model
        for prefix, model in (("expected", answer["model"]), ("baseline", baseline)):
            labels = (model, tier)
            for name, of in (("cost", "expected_cost_usd"), ("answer_cost", "expected_total_cost_usd")):
                key = (f"router_{prefix}_{name}_usd_total", labels)
                expected[key] = expected.get(key, 0.0) + by_model[model][of]
            key = (f"router_{prefix}_ok_total", labels)
            expected[key] = expected.get(key, 0.0) + by_model[model]["p_ok"]
    found = samples(live)
    names = {name for name, _ in expected}
    assert {key: value for key, value in found.items() if key[0] in names} == pytest.approx(expected)
    assert 0 < total(found, "router_expected_cost_usd_total") < total(found, "router_baseline_cost_usd_total")


def test_the_baseline_is_the_best_of_the_log_or_the_one_that_is_set(tiny_bundle: Path, tmp_path: Path) -> None:
    router = load_router(tiny_bundle)
    assert baseline_order(router) == ("frontier", "mid", "hosted", "local")  # the log's skills
    assert baseline_order(router, "hosted") == ("hosted", "frontier", "mid", "local")
    assert baseline_order(router, "gone") == baseline_order(router)
    with running(tiny_bundle, tmp_path / "a.db", baseline_model="mid") as live:
        answer = route(live, prompt=EASY)
        mid = next(c for c in answer["candidates"] if c["model"] == "mid")
        line = 'router_baseline_cost_usd_total{baseline="mid",tier="standard"}'
        assert live.metric(line) == pytest.approx(mid["expected_cost_usd"])
        said = live.http.get("/metrics").text
        assert "had the baseline served the same requests: the setting baseline_model" in said
    with (
        pytest.raises(InputError, match="'gone' is not in the bundle's catalogue: choose one of frontier, mid"),
        running(tiny_bundle, tmp_path / "b.db", baseline_model="gone"),
    ):
        pass


def test_what_outcomes_report(live: Running) -> None:
    easy, hard, odd = route(live, prompt=EASY), route(live, prompt=HARD), route(live, prompt=HARD)
    report(live, decision_id=easy["decision_id"], status="ok", cost_usd=0.25)
    report(live, decision_id=easy["decision_id"], status="ok", cost_usd=0.25)  # a repetition
    report(live, decision_id=easy["decision_id"], quality=0.5, quality_source="user")  # feedback alone
    report(live, decision_id=hard["decision_id"], status="ok", served_model="mid", cost_usd=1.0)
    report(live, decision_id=hard["decision_id"], quality=1.0)
    report(live, decision_id=odd["decision_id"], status="timeout", served_model="an invented name")
    report(live, decision_id="of-another-process", status="ok", cost_usd=4.0)
    found = samples(live)
    paid = {labels: value for (name, labels), value in found.items() if name == "router_cost_usd_total"}
    assert paid == {(easy["model"],): 0.25, ("mid",): 1.0, ("unknown",): 4.0}
    outcomes = {labels: value for (name, labels), value in found.items() if name == "router_outcomes_total"}
    assert outcomes == {(easy["model"], "ok"): 1, ("mid", "ok"): 1, ("unknown", "timeout"): 1, ("unknown", "ok"): 1}
    quality = {labels[0]: value for (name, labels), value in found.items() if name == "router_outcome_quality_sum"}
    assert quality == {easy["model"]: 0.5, "mid": 1.0} and total(found, "router_outcome_quality_count") == 2


def test_every_stage_of_every_decision_is_timed(live: Running) -> None:
    began = time.perf_counter()
    for _ in range(20):
        route(live, prompt=HARD)
    live.http.post("/route", json={"prompt": [HARD]})
    live.http.post("/route", json={"prompt": HARD, "data_class": "top"})
    spent = time.perf_counter() - began
    found = samples(live)
    assert {labels[0] for name, labels in found if name == "router_stage_seconds_sum"} == set(STAGES)
    for stage in STAGES:
        assert found["router_stage_seconds_count", (stage,)] == 20
        assert found["router_stage_seconds_bucket", ("+Inf", stage)] == 20
        assert 0 < found["router_stage_seconds_sum", (stage,)] < spent
    assert total(found, "router_stage_seconds_sum") < spent
    decided = found["router_stage_seconds_sum", ("estimate",)] + found["router_stage_seconds_sum", ("choose",)]
    assert found["router_decision_seconds_sum", ()] == pytest.approx(decided)
    assert found["router_decision_seconds_count", ()] == 20


def test_durations_are_counted_where_prometheus_counts_them() -> None:
    from prometheus_client import CollectorRegistry, Histogram

    bounds = (0.001, 0.01, 0.1)
    ours, theirs = Durations(bounds), Histogram("x", "x", buckets=bounds, registry=CollectorRegistry())
    for seconds in (0.0, 0.0005, 0.001, 0.0010001, 0.05, 0.1, 7.0):
        ours.observe(seconds)
        theirs.observe(seconds)
    (family,) = theirs.collect()
    buckets = [(s.labels["le"], s.value) for s in family.samples if s.name == "x_bucket"]
    assert list(ours.buckets()) == buckets
    assert ours.total == pytest.approx(next(s.value for s in family.samples if s.name == "x_sum"))


class Fixed:
    """A learner that says the same of every request."""

    def __init__(self, p: float) -> None:
        self.p = p

    def estimate(self, _request: RouteRequest) -> Estimate:
        return Estimate(np.full(4, self.p, np.float32), np.full(4, 100, np.float32), 50.0)


def test_counting_costs_microseconds_and_unknown_probabilities_are_left_out(catalog: Catalog) -> None:
    request = RouteRequest(messages=(Message("user", EASY),))
    blind = Router(catalog, Fixed(float("nan")), Policy(), "v")
    spend = Spend(blind)
    spend.decided(blind, blind.decide(request), "standard")
    assert not any(family.samples for family in spend.collect() if "expected" in family.name)
    seeing = Router(catalog, Fixed(0.8), Policy(), "v")
    decision = seeing.decide(request)
    best = min(_timed(lambda: spend.decided(seeing, decision, "standard")) for _ in range(20))
    assert best < 10e-6  # 1 us on a quiet machine
    assert baseline_order(seeing) == ("frontier", "mid", "hosted", "local")  # nothing learnt: by price


def _timed(call: Any, times: int = 500) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times
