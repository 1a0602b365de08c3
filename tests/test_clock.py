"""A wall clock that jumps: nothing that waits, measures or orders by it may stop working. What it says is wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from live_service import running, wait_for

from router_ml.router import new_id
from serving.health import HealthSettings

PROMPT = {"prompt": "What is the plural of river cloud engine?"}
DAY = 86_400.0


class Clock:
    """The wall clock, off by `offset` seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.offset = 0.0
        real, real_ns = time.time, time.time_ns
        monkeypatch.setattr(time, "time", lambda: real() + self.offset)
        monkeypatch.setattr(time, "time_ns", lambda: real_ns() + int(self.offset * 1e9))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize("jump", [-3650 * DAY, -3600.0, 3600.0, 3650 * DAY])
def test_routing_circuits_commits_and_reloads_outlive_a_jump(
    clock: Clock, jump: float, tiny_bundle: Path, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[tiers]\nstandard = 0.5")
    following = {"policy": policy, "watch_seconds": 0.02}
    with running(tiny_bundle, tmp_path / "store.db", **following, health=HealthSettings(open_seconds=0.4)) as live:

        def route() -> dict[str, object]:
            return dict(live.http.post("/route", json=PROMPT).raise_for_status().json())

        def fail() -> None:
            outcome = {"decision_id": route()["decision_id"], "status": "error"}
            assert live.http.post("/outcomes", json=outcome).is_success

        ids = [str(route()["decision_id"]) for _ in range(20)]
        assert route()["model"] == "local"
        for _ in range(3):
            fail()
        clock.offset = jump
        ids += [str(route()["decision_id"]) for _ in range(20)]

        # The circuit counts calls from before and after the jump together, opens, and is probed in its time.
        for _ in range(2):
            fail()
        assert "circuit open" in str(route()["excluded"])
        began = time.monotonic()
        wait_for(lambda: route()["model"] == "local", 5)
        assert time.monotonic() - began < 2.0

        policy.write_text("[tiers]\nstandard = 0.6")
        wait_for(lambda: route()["min_probability"] == 0.6, 5)
        policy.write_text("[tiers]\nstandard = 0.5")
        wait_for(lambda: route()["min_probability"] == 0.5, 5)
        clock.offset = 0.0
        ids += [str(route()["decision_id"]) for _ in range(20)]
        policy.write_text("[tiers]\nstandard = 0.7")
        wait_for(lambda: route()["min_probability"] == 0.7, 5)

        stored = {row["decision_id"] for row in live.decisions()}  # group commits go on
        assert len(set(ids)) == 60 and set(ids) <= stored
        changes = [c for c in live.http.get("/admin/changes").json()["changes"] if c["kind"] == "policy"]
    dials = [change["after"]["policy"]["tiers"]["standard"] for change in changes]
    assert dials == [0.5, 0.6, 0.5, 0.7]
    assert [change["before"] for change in changes[1:]] == [change["after"] for change in changes[:-1]]


def test_ids_sort_by_time_and_stay_unique_when_it_goes_back(clock: Clock) -> None:
    first = new_id()
    clock.offset = 10.0
    later = new_id()
    clock.offset = 0.0
    assert first < later and len(later) == 32
    clock.offset = -time.time()  # 1970
    assert len(new_id()) == 32 and len({new_id() for _ in range(10_000)}) == 10_000
