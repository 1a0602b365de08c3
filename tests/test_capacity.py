"""Models of bounded capacity: past it the next candidate, and why; a moving count of calls and tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from live_service import running
from small_demo import Demo, small_demo

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.reasons import kind
from serving.capacity import FORGOTTEN_SECONDS, WINDOW_SECONDS, Capacity
from serving.settings import Settings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _bounded(catalog: Catalog, calls: int | None = None, rate: float | None = None) -> Catalog:
    bounds = {"max_concurrency": calls, "max_tokens_per_second": rate}
    return Catalog(tuple(replace(c, **bounds) if c.id == "local" else c for c in catalog))


def test_calls_in_flight(catalog: Catalog) -> None:
    clock, of = Clock(), _bounded(catalog, calls=2)
    capacity = Capacity(clock)
    for i in range(2):
        assert capacity.full(of) == {}
        capacity.decided(of, "local", f"d{i}", 10.0)
    capacity.decided(of, "mid", "d9", 10.0)
    (said,) = capacity.full(of).items()
    assert said == ("local", "at capacity: 2 calls of 2 are in flight") and kind(said[1]) == "capacity"
    capacity.ended("d9")
    capacity.ended("d-unknown")
    assert capacity.full(of)
    capacity.ended("d0")
    capacity.ended("d0")
    assert capacity.full(of) == {}
    capacity.decided(of, "local", "d2", 10.0)
    assert capacity.full(of)
    clock.now += FORGOTTEN_SECONDS + 1  # outcomes that never come do not keep a model out
    assert capacity.full(of) == {}
    assert capacity.full(catalog) == {}


def test_tokens_a_second(catalog: Catalog) -> None:
    clock, of = Clock(), _bounded(catalog, rate=100.0)
    capacity = Capacity(clock)
    capacity.decided(of, "local", "d0", float("nan"))
    capacity.decided(of, "local", "d1", 600.0)
    clock.now += 4.0
    assert capacity.full(of) == {}
    capacity.decided(of, "local", "d2", 400.0)
    capacity.ended("d2")  # the work was done all the same
    assert capacity.full(of) == {"local": "at capacity: 100 tokens a second of 100"}
    clock.now += WINDOW_SECONDS - 4.0
    assert capacity.full(of) == {}


def test_processes_share_a_bound(catalog: Catalog) -> None:
    of, capacity = _bounded(catalog, calls=5, rate=100.0), Capacity(Clock(), replicas=2)
    capacity.decided(of, "local", "d0", 499.0)
    assert capacity.full(of) == {}
    capacity.decided(of, "local", "d1", 1.0)
    assert capacity.full(of) == {"local": "at capacity: 2 calls of 2 are in flight"}
    capacity.ended("d0")
    assert capacity.full(of) == {"local": "at capacity: 50 tokens a second of 50"}
    few = Capacity(Clock(), replicas=9)
    assert few.full(of) == {}, "a process has one call at least"
    few.decided(of, "local", "d0", 0.0)
    assert few.full(of) == {"local": "at capacity: 1 calls of 1 are in flight"}
    with pytest.raises(InputError, match="1 or more: count the processes"):
        Settings(bundle=Path("b"), replicas=0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return small_demo(tmp_path_factory)


def test_past_its_capacity_a_model_leaves_requests_to_the_next(demo: Demo, tmp_path: Path) -> None:
    ask = {"prompt": "Where is my parcel?", "min_probability": 0.0}
    with running(demo.out / "bundle", tmp_path / "store.db") as service:
        live = service.service.live
        first = service.http.post("/route", json=ask).json()["model"]
        cards = [replace(c, max_concurrency=2) if c.id == first else c for c in live.live.router.catalog]
        live.live = replace(live.live, router=replace(live.live.router, catalog=Catalog(tuple(cards))))
        answers = [service.http.post("/route", json=ask).json() for _ in range(3)]
        assert [a["model"] == first for a in answers] == [True, True, False]
        assert answers[2]["excluded"] == {first: "at capacity: 2 calls of 2 are in flight"}
        assert service.http.post("/route/preview", json=ask).json()["model"] != first
        only = service.http.post("/route/preview", json=ask | {"candidates": [first]}).json()
        assert only["model"] == first, "a full model is better than none"
        said = {"decision_id": answers[0]["decision_id"], "status": "ok"}
        assert service.http.post("/outcomes", json=said).status_code == 200
        assert service.http.post("/route", json=ask).json()["model"] == first
        assert service.http.post("/route", json=ask).json()["model"] != first
        assert 'router_excluded_total{constraint="capacity"} 2.0' in service.http.get("/metrics").text
