"""What the service survives under load, done to a real process: kill -9, overload, no disk, no database.

What comes of the registry is in test_swaps.py, of SIGTERM in test_serving_lifecycle.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from router_ml.store import Store
from serving.routes import OVERLOADED
from tests.live_service import ROOT, process, wait_for
from tests.relay import relay_to

PROMPT = {"messages": [{"role": "user", "content": "what is the capital of france"}]}


@dataclass
class Acknowledged:
    """What clients were told is taken."""

    decisions: set[str] = field(default_factory=set)
    outcomes: set[str] = field(default_factory=set)
    wrong: list[int] = field(default_factory=list)


@contextlib.contextmanager
def under_load(http: httpx.Client, clients: int = 3) -> Iterator[Acknowledged]:
    """Clients that route and report without a pause, until the block ends or the service is gone."""
    told, stop = Acknowledged(), threading.Event()

    def client() -> None:
        with httpx.Client(base_url=http.base_url, timeout=30) as own, contextlib.suppress(httpx.TransportError):
            while not stop.is_set():
                answer = own.post("/route", json=PROMPT)
                if answer.status_code != 200:
                    told.wrong.append(answer.status_code)
                    continue
                decision_id = answer.json()["decision_id"]
                told.decisions.add(decision_id)
                receipt = own.post("/outcomes", json={"decision_id": decision_id, "quality": 1.0, "status": "ok"})
                if receipt.status_code == 200:
                    told.outcomes.add(receipt.json()["outcome_id"])
                else:
                    told.wrong.append(receipt.status_code)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield told
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def missing(url: str, told: Acknowledged) -> tuple[set[str], set[str]]:
    """What was acknowledged and is not in the store."""
    store = Store(url)
    try:
        decisions = {row["decision_id"] for row in store.decisions()}
        return told.decisions - decisions, told.outcomes - {row["outcome_id"] for row in store.outcomes()}
    finally:
        store.close()


def children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True).stdout
    return [int(line) for line in found.split()]


def gone(pid: int) -> Callable[[], bool]:
    def look() -> bool:
        stat = Path(f"/proc/{pid}/stat")
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"

    return look


def test_kill_under_load_loses_nothing_that_was_acknowledged(tiny_bundle: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store.db")
    with process(bundle=tiny_bundle, store=url) as (started, http):
        helpers = children(started.pid)
        with under_load(http) as told:
            wait_for(lambda: len(told.outcomes) > 300, 60)
            os.kill(started.pid, signal.SIGKILL)
            started.wait(10)
        assert not told.wrong
    for pid in helpers:  # what drains the spool ends by itself, when it has done so
        wait_for(gone(pid), 30)
    assert missing(url, told) == (set(), set())


def test_both_killed_under_load_the_next_start_takes_over(tiny_bundle: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store.db")
    with process(bundle=tiny_bundle, store=url) as (started, http), under_load(http) as told:
        wait_for(lambda: len(told.outcomes) > 100, 60)
        helpers = children(started.pid)
        for pid in helpers:
            os.kill(pid, signal.SIGSTOP)  # so that something is left in the spool
        before = len(told.decisions)
        wait_for(lambda: len(told.decisions) > before + 20, 60)
        for pid in (started.pid, *helpers):
            os.kill(pid, signal.SIGKILL)
        started.wait(10)
    assert missing(url, told)[0]
    with process(bundle=tiny_bundle, store=url):
        wait_for(lambda: missing(url, told) == (set(), set()), 30)


def test_a_drain_that_dies_is_started_again(tiny_bundle: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store.db")
    with process(bundle=tiny_bundle, store=url) as (started, http):
        with under_load(http) as told:
            for _ in range(3):
                before = len(told.decisions)
                for pid in children(started.pid):
                    os.kill(pid, signal.SIGKILL)
                wait_for(lambda before=before: len(told.decisions) > before + 100, 60)
                wait_for(lambda: len(children(started.pid)) == 1)
        assert not told.wrong
        started.send_signal(signal.SIGTERM)
        said, _ = started.communicate(timeout=60)
    assert "starting it again" in said
    assert missing(url, told) == (set(), set())


def test_a_database_that_goes_and_comes_back(tiny_bundle: Path, tmp_path: Path, postgres_url: str) -> None:
    real = sa.make_url(postgres_url)
    with relay_to(real.port or 5432) as relay:
        through = real.set(host="127.0.0.1", port=int(relay.url.rpartition(":")[2]))
        settings: dict[str, Any] = {"store": through.render_as_string(hide_password=False), "spool": tmp_path / "spool"}
        with process(bundle=tiny_bundle, **settings) as (started, http):
            with under_load(http) as told:
                wait_for(lambda: len(told.outcomes) > 50, 60)
                with relay.cut():
                    wait_for(lambda: "store" in http.get("/readyz").json()["degraded"], 30)
                    before, outcomes = len(told.decisions), len(told.outcomes)
                    wait_for(lambda: len(told.decisions) > before + 200, 60)
                    wait_for(lambda: len(told.outcomes) > outcomes + 20, 60)
                wait_for(lambda: http.get("/readyz").json()["degraded"] == [], 60)
            assert not told.wrong
            started.send_signal(signal.SIGTERM)
            said, _ = started.communicate(timeout=60)
        assert "capital of france" not in said
    assert missing(postgres_url, told) == (set(), set())


def test_a_service_starts_without_its_database(tiny_bundle: Path, tmp_path: Path, postgres_url: str) -> None:
    real = sa.make_url(postgres_url)
    with relay_to(real.port or 5432) as relay:
        through = real.set(host="127.0.0.1", port=int(relay.url.rpartition(":")[2]))
        settings: dict[str, Any] = {"store": through.render_as_string(hide_password=False), "spool": tmp_path / "spool"}
        with contextlib.ExitStack() as stack:
            cut = stack.enter_context(contextlib.ExitStack())
            cut.enter_context(relay.cut())
            started, http = stack.enter_context(process(bundle=tiny_bundle, **settings))
            assert "store" in http.get("/readyz").json()["degraded"]
            with under_load(http) as told:
                wait_for(lambda: len(told.outcomes) > 5, 60)
                cut.close()
                wait_for(lambda: http.get("/readyz").json()["degraded"] == [], 60)
            assert not told.wrong
            started.send_signal(signal.SIGTERM)
            started.communicate(timeout=60)
    assert missing(postgres_url, told) == (set(), set())


def test_a_full_disk_stops_no_answer(tiny_bundle: Path, tmp_path: Path) -> None:
    """No file may grow past 400 kB: what a full disk does to spool and database at once. Then there is room again."""
    url = str(tmp_path / "store.db")
    with process(bundle=tiny_bundle, store=url) as (started, http):
        everyone = [started.pid, *children(started.pid)]

        def limit(size: int) -> None:
            for pid in everyone:
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        limit(400_000)
        with under_load(http) as told:
            wait_for(lambda: {"store", "spool"} <= set(http.get("/readyz").json()["degraded"]), 60)
            before = len(told.decisions)
            wait_for(lambda: len(told.decisions) > before + 100, 60)
            metrics = http.get("/metrics").text
            assert "router_spool_failures_total 0" not in metrics and "router_spool_failures_total" in metrics
        limit(resource.RLIM_INFINITY)
        wait_for(lambda: http.get("/readyz").json()["degraded"] == [], 60)
        started.send_signal(signal.SIGTERM)
        started.communicate(timeout=60)
    assert set(told.wrong) <= {503}  # outcomes, where even the spool could not take them
    assert missing(url, told) == (set(), set())


def test_a_full_spool_is_counted_and_stops_no_answer(tiny_bundle: Path, tmp_path: Path) -> None:
    url = str(tmp_path / "store.db")
    with process(bundle=tiny_bundle, store=url, spool_bytes=1 << 20, store_prompts="text") as (started, http):
        (drain,) = children(started.pid)
        os.kill(drain, signal.SIGSTOP)  # as when the database takes nothing for hours
        statuses = {http.post("/route", json={"prompt": "a long word " * 500}).status_code for _ in range(300)}
        assert statuses == {200}
        assert http.get("/readyz").json()["degraded"] == ["spool"]
        dropped = [line for line in http.get("/metrics").text.splitlines() if line.startswith("router_store_dropped")]
        assert len(dropped) == 1 and float(dropped[0].split()[1]) > 0
        os.kill(drain, signal.SIGCONT)
        wait_for(lambda: http.get("/readyz").json()["degraded"] == [], 30)


def test_more_than_can_be_decided_is_shed_in_bounded_time(tiny_bundle: Path, tmp_path: Path) -> None:
    """300 connections that ask again at once, so that their generator, which shares the machine, cannot fall behind.

    Twice the peak at a fixed rate is measured by benchmarks.load.
    """
    bodies = tmp_path / "bodies.jsonl"
    long = "compare these two proofs and say which is right: " * 18
    bodies.write_text(json.dumps({"messages": [{"role": "user", "content": long}]}) + "\n")

    def load(url: str, connections: int, seconds: int) -> dict[str, Any]:
        options = ["--url", url, "--bodies", str(bodies), "--closed", "--seconds", str(seconds)]
        command = [sys.executable, "-m", "benchmarks.arrivals", *options, "--connections", str(connections)]
        return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout))

    with process(bundle=tiny_bundle, store=tmp_path / "store.db", max_waiting=30) as (_, http):
        url = f"{http.base_url}/route"
        peak, over, after = load(url, 8, 2), load(url, 300, 5), load(url, 8, 2)
    assert set(peak["statuses"]) == set(after["statuses"]) == {"200"}
    assert set(over["statuses"]) == {"200", "503"} and over["unanswered"] == 0, over
    assert over["statuses"]["200"] > 0.15 * peak["rps"] * 5, over  # what is shed takes time, too
    assert over["p50_ms"] < 1500, over  # p99 is benchmarks.load's: here other tests share disk and processors
    assert after["p50_ms"] < 3 * peak["p50_ms"], (peak, after)


def test_batches_take_turns_and_too_many_are_shed(tiny_bundle: Path, tmp_path: Path) -> None:
    body = {"requests": [{"prompt": "compare these two proofs and say which is right: " * 20}] * 100}
    with process(bundle=tiny_bundle, store=tmp_path / "store.db") as (_, http), httpx.Client(timeout=60) as own:
        own.base_url = http.base_url
        with ThreadPoolExecutor(60) as pool:
            batches = [pool.submit(own.post, "/route/batch", json=body) for _ in range(60)]
            taken = []
            while not all(batch.done() for batch in batches):
                began = time.perf_counter()
                assert http.post("/route", json=PROMPT).status_code == 200
                taken.append(time.perf_counter() - began)
        statuses = [batch.result().status_code for batch in batches]
    assert set(statuses) == {200, 503} and statuses.count(200) >= 30
    assert all(b.result().headers["retry-after"] == "1" for b in batches if b.result().status_code == 503)
    assert sorted(taken)[len(taken) // 2] < 0.25, taken  # singles come in between


def test_what_is_shed_says_when_to_come_again() -> None:
    assert OVERLOADED.status_code == 503 and OVERLOADED.headers["retry-after"] == "1"
    assert OVERLOADED.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("seconds", [0.0, 0.6])
def test_sigterm_under_load_drops_nothing(tiny_bundle: Path, tmp_path: Path, seconds: float) -> None:
    url = str(tmp_path / "store.db")
    with process(bundle=tiny_bundle, store=url, drain_seconds=seconds) as (started, http), under_load(http) as told:
        wait_for(lambda: len(told.outcomes) > 100, 60)
        started.send_signal(signal.SIGTERM)
        if seconds:
            wait_for(lambda: http.get("/readyz").status_code == 503)
        started.wait(30)
        assert started.returncode in (0, -signal.SIGTERM)  # uvicorn hands the signal on when it has finished
    assert not told.wrong
    assert missing(url, told) == (set(), set())
