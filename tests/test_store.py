"""The store: nothing acknowledged is lost, nothing is stored twice, and the log can be trained on."""

from __future__ import annotations

import math
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from live_service import wait_for

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, validate
from router_ml.outcome_queue import IdempotencyConflictError, StoreError
from router_ml.router import new_id
from router_ml.store import Store
from router_ml.stored import decision_of_row
from router_ml.stored_features import pack_features, unpack_features
from router_ml.types import Arm, Candidate, CandidateFeatures, Message, Outcome, RouteDecision, RouteRequest

NAN = float("nan")


@pytest.fixture
def store(store_url: str) -> Iterator[Store]:
    store = Store(store_url).start()
    yield store
    store.close()


def execute(url: str, sql: str) -> list[tuple[object, ...]]:
    """Another program's statement on the same database."""
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        result = connection.exec_driver_sql(sql)
        rows = [tuple(row) for row in result] if result.returns_rows else []
    engine.dispose()
    return rows


def request(**fields: object) -> RouteRequest:
    return RouteRequest(messages=(Message("user", "a secret prompt"),), **fields)  # type: ignore[arg-type]


def decision(**fields: object) -> RouteDecision:
    values = {
        "decision_id": new_id(),
        "model": "mid",
        "candidates": (Candidate("mid", 0.75, 0.002, 0.005), Candidate("frontier", NAN, 0.01)),
        "excluded": {"local": "not in region 'us'"},
        "propensity": 0.9,
        "explored": False,
        "meets_threshold": True,
        "min_probability": 0.7,
        "quality_threshold": 0.8,
        "reason": "cheapest",
        "model_version": "m1",
        "policy_version": "p1",
    }
    return RouteDecision(**values | fields)  # type: ignore[arg-type]


def kept(store: Store, made: RouteDecision, of: RouteRequest | None = None, **text: str) -> RouteDecision:
    assert store.record(of or request(), made, provider="acme", **text)
    return made


IN_SESSION = {"incumbent": "mid", "stayed": False, "cached_tokens": 2048.5}


def test_a_decision_comes_back_whole(store: Store) -> None:
    before = time.time_ns() // 1000
    of = request(
        request_id="r",
        session="s",
        tenant="t",
        key="k",
        task="code",
        data_class="internal",
        region="us",
        tier="premium",
        needs=frozenset({"tools", "json"}),
        max_cost_usd=0.5,
        willingness_to_pay_usd=0.25,
    )
    arm = Arm("challenger", "tenant", 0.05, 0.8, "c")
    made = kept(store, decision(explored=True, data_class="internal", arm=arm, **IN_SESSION), of)
    assert store.flush()
    (row,) = store.decisions()
    assert decision_of_row(row).arm == arm
    at = row.pop("time_us")
    assert before <= at <= time.time_ns() // 1000
    assert row == {
        "decision_id": made.decision_id,
        "request_id": "r",
        "session": "s",
        "tenant": "t",
        "key": "k",
        "task": "code",
        "data_class": "internal",
        "region": "us",
        "tier": "premium",
        "needs": ["json", "tools"],
        "max_cost_usd": 0.5,
        "willingness_to_pay_usd": 0.25,
        "candidates": [
            {"model": "mid", "p_ok": 0.75, "expected_cost_usd": 0.002, "expected_total_cost_usd": 0.005},
            {"model": "frontier", "p_ok": None, "expected_cost_usd": 0.01, "expected_total_cost_usd": None},
        ],
        "excluded": {"local": "not in region 'us'"},
        "model": "mid",
        "provider": "acme",
        "propensity": 0.9,
        "arm": "challenger",
        "arm_unit": "tenant",
        "arm_share": 0.05,
        "arm_propensity": 0.8,
        "arm_cluster": "c",
        "explored": True,
        "meets_threshold": True,
        "min_probability": 0.7,
        "quality_threshold": 0.8,
        "reason": "cheapest",
        "model_version": "m1",
        "policy_version": "p1",
        "prompt": None,
        "messages": None,
        "tools": None,
        "features": None,
        "incumbent": "mid",
        "stayed": False,
        "cached_tokens": 2048.5,
        "degraded": False,
        "expected_cost_usd": 0.002,
        "reserve_usd": None,
    }
    assert decision_of_row(row | {"candidates": row["candidates"][:1]}) == replace(made, candidates=made.candidates[:1])
    assert math.isnan(decision_of_row(row).candidates[1].p_ok)
    assert store.decision(made.decision_id) == row | {"time_us": at}
    assert store.decision("nobody's") is None


def features(models: int = 3, embedding: int = 16) -> CandidateFeatures:
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((models, 5), dtype=np.float32)
    rows[0, 0] = np.nan
    return CandidateFeatures(
        rows,
        rows[:, :2].T,  # not contiguous
        rng.random(models, dtype=np.float32),
        12.75,
        rng.random(embedding, dtype=np.float32) if embedding else None,
    )


@pytest.mark.parametrize(("models", "embedding"), [(3, 16), (1, 0)])
def test_features_come_back_bit_for_bit(store: Store, models: int, embedding: int) -> None:
    kept_features = features(models, embedding)
    made = decision()
    assert store.record(request(), made, provider="acme", features=kept_features)
    assert store.flush()
    row = store.decision(made.decision_id)
    assert row is not None and row["prompt"] is None
    back = unpack_features(row["features"])
    assert back.input_tokens == kept_features.input_tokens
    for name in ("rows", "parts", "output_tokens"):
        assert np.array_equal(getattr(back, name), getattr(kept_features, name), equal_nan=True), name
    assert (back.embedding is None) == (kept_features.embedding is None)
    if embedding:
        assert np.array_equal(back.embedding, kept_features.embedding)
    (exported,) = store.iter_log_rows()
    assert "features" not in exported


def test_features_of_another_layout_are_refused() -> None:
    data = pack_features(features())
    for broken in (b"", data[:-1], data + b"1234", b"rmf9" + data[4:]):
        with pytest.raises(InputError, match="stored features cannot be read"):
            unpack_features(broken)


def test_a_database_of_an_earlier_program_gets_what_is_new(store_url: str) -> None:
    store = Store(store_url).start()
    old = kept(store, decision())
    store.close()
    execute(store_url, "ALTER TABLE decisions DROP COLUMN features")
    execute(store_url, "DROP TABLE shared")
    both = [Store(store_url), Store(store_url)]
    assert execute(store_url, "SELECT count(*) FROM shared") == [(0,)]
    made = decision()
    both[0].start()
    assert both[0].record(request(), made, provider="acme", features=features())
    both[0].close()
    assert [row["features"] is None for row in both[1].decisions()] == [True, False]
    assert both[1].decision(old.decision_id) is not None
    both[1].close()
    execute(store_url, "UPDATE store_info SET value = '99'")
    execute(store_url, "ALTER TABLE decisions DROP COLUMN features")
    with pytest.raises(InputError, match="version 99"):
        Store(store_url)
    columns = sa.inspect(sa.create_engine(store_url)).get_columns("decisions")
    assert "features" not in {column["name"] for column in columns}  # what is not ours is left as it is


def test_decisions_are_committed_within_the_interval_by_themselves(store_url: str) -> None:
    store = Store(store_url, interval=0.05).start()
    kept(store, decision())
    deadline = time.monotonic() + 5
    while execute(store_url, "select count(*) from decisions") == [(0,)]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.close()


def test_what_is_queued_is_written_on_close(store_url: str) -> None:
    store = Store(store_url, interval=60).start()
    ids = [kept(store, decision()).decision_id for _ in range(1234)]
    store.close()
    assert [row["decision_id"] for row in Store(store_url).decisions()] == ids
    assert not store.record(request(), decision(), provider="acme")
    assert store.counters.dropped == 1


def test_recording_from_many_threads_loses_nothing(store: Store) -> None:
    made = [[decision() for _ in range(300)] for _ in range(4)]
    threads = [threading.Thread(target=lambda part=part: [kept(store, d) for d in part]) for part in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.flush()
    assert {row["decision_id"] for row in store.decisions()} == {d.decision_id for part in made for d in part}


def test_an_outcome_is_committed_when_it_is_acknowledged(store_url: str) -> None:
    store = Store(store_url, interval=60).start()
    receipt = store.add_outcome(Outcome(decision_id="d", quality=1.0)).result(timeout=10)
    assert execute(store_url, "select outcome_id from outcomes") == [(receipt.outcome_id,)]
    store.close()


def test_the_same_outcome_again_is_stored_once(store: Store) -> None:
    outcome = Outcome(decision_id="d", cost_usd=0.1)
    first = store.add_outcome(outcome).result(10)
    again = store.add_outcome(outcome).result(10)
    assert (again.outcome_id, first.replayed, again.replayed) == (first.outcome_id, False, True)
    other = store.add_outcome(replace(outcome, cost_usd=0.2)).result(10)
    assert not other.replayed
    keyed = [store.add_outcome(outcome, idempotency_key="k") for _ in range(20)]
    assert len({f.result(10).outcome_id for f in keyed}) == 1
    assert sum(not f.result().replayed for f in keyed) == 1
    assert len(list(store.outcomes())) == store.counters.outcomes == 3


def test_the_same_key_with_another_outcome_is_a_conflict(store: Store) -> None:
    first = store.add_outcome(Outcome(decision_id="d", quality=1.0), idempotency_key="k").result(10)
    with pytest.raises(IdempotencyConflictError, match="use a new key"):
        store.add_outcome(Outcome(decision_id="d", quality=0.0), idempotency_key="k").result(10)
    assert [row["quality"] for row in store.outcomes()] == [1.0]
    # Within one commit, too: the first of them counts.
    both = [store.add_outcome(Outcome(decision_id="e", quality=q), idempotency_key="l") for q in (0.25, 0.75)]
    wait(both, 10)
    assert both[0].exception() is None and isinstance(both[1].exception(), IdempotencyConflictError)
    # Callers do not see each other's keys.
    other = store.add_outcome(Outcome(decision_id="d", quality=0.0), idempotency_key="k", key="another").result(10)
    assert other.outcome_id != first.outcome_id


def test_two_stores_on_one_database_agree(store_url: str) -> None:
    stores = [Store(store_url).start() for _ in range(2)]
    futures = [
        stores[i % 2].add_outcome(Outcome(decision_id=f"d{i // 2}"), idempotency_key=f"k{i // 2}") for i in range(200)
    ]
    ids = [future.result(30).outcome_id for future in futures]
    assert ids[::2] == ids[1::2]
    assert stores[0].counts() == {"decisions": 0, "outcomes": 100, "unmatched_outcomes": 100}
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("outcome", "says"),
    [
        (Outcome(), "decision_id"),
        (Outcome(decision_id="d", status="fine"), "ok, error, timeout"),
        (Outcome(decision_id="d", quality=1.01), "quality"),
        (Outcome(decision_id="d", quality=NAN), "quality"),
        (Outcome(decision_id="d", cost_usd=-0.01), "cost_usd"),
        (Outcome(decision_id="d", latency_ms=NAN), "latency_ms"),
        (Outcome(decision_id="d", output_tokens=2**63), "output_tokens"),
        (Outcome(decision_id="d", retries=-1), "retries"),
    ],
)
def test_an_outcome_out_of_range_is_refused(store: Store, outcome: Outcome, says: str) -> None:
    with pytest.raises(InputError, match=says):
        store.add_outcome(outcome)
    assert store.counts()["outcomes"] == 0


def test_a_row_that_the_database_cannot_hold_costs_only_itself(store: Store, store_url: str) -> None:
    assert not store.record(request(), decision(reason="\ud800 half a character"), provider="acme")
    no_row = {"explored": 2**63} if store_url.startswith("sqlite") else {"reason": "text that ends\0 early"}
    for fields in ({"explored": False}, no_row, {"explored": True}):
        kept(store, decision(**fields), request())
    bad = store.add_outcome(Outcome(decision_id="\ud800"))
    good = store.add_outcome(Outcome(decision_id="d"))
    assert good.result(10)
    with pytest.raises(InputError, match="cannot be stored"):
        bad.result(10)
    assert store.flush()
    assert [row["explored"] for row in store.decisions()] == [False, True]
    assert store.counters.dropped == 3 and store.degraded == []


def test_late_outcomes_join_and_add_up(store: Store) -> None:
    named, unnamed, repeated, unanswered = (kept(store, decision(), request(request_id=r)) for r in "abcc")
    for outcome in (
        Outcome(decision_id=named.decision_id, status="timeout", retries=2, cost_usd=0.1, latency_ms=900.0),
        Outcome(decision_id=named.decision_id, quality=0.25, quality_source="judge"),
        Outcome(decision_id=named.decision_id, quality=1.0, quality_source="user"),
        Outcome(request_id="b", input_tokens=10, output_tokens=20, served_model="frontier"),
        Outcome(request_id="c", quality=0.5),
        Outcome(decision_id="never made", quality=0.5),
        Outcome(request_id="never seen"),
    ):
        store.add_outcome(outcome).result(10)
    assert store.flush()
    rows = {row["request_id"]: row for row in store.iter_log_rows()}
    a, b, c, c_again = (rows[d.decision_id] for d in (named, unnamed, repeated, unanswered))
    assert (a["status"], a["retries"], a["cost_usd"], a["quality"], a["quality_source"]) == (
        *("timeout", 2, 0.1, 1.0, "user"),
    )
    assert (b["model"], b["fallback_from"], b["provider"], b["output_tokens"]) == ("frontier", "mid", None, 20)
    assert (c["status"], c["quality"]) == (None, None)
    assert (c_again["status"], c_again["quality"], c_again["provider"]) == ("ok", 0.5, "acme")
    assert store.counts() == {"decisions": 4, "outcomes": 7, "unmatched_outcomes": 2}
    assert len(list(store.outcomes())) == 7


def test_the_rows_are_a_request_log(store: Store, catalog: Catalog) -> None:
    import polars as pl

    for i in range(1203):
        made = kept(
            store,
            decision(),
            request(session="s", task="code"),
            prompt="2+2?",
            messages='[{"role": "user", "content": "2+2?"}]',
            tools="[]",
        )
        if i % 100 == 0:
            store.add_outcome(Outcome(decision_id=made.decision_id, served_model="frontier", quality=0.5)).result(10)
    assert store.flush()
    rows = list(store.iter_log_rows())
    assert set(rows[0]) == set(LOG_SCHEMA)
    good, rejects = validate(pl.DataFrame(rows, schema=LOG_SCHEMA), catalog=catalog)
    assert rejects.height == 0 and good.height == 1203
    assert good["prompt"].unique().to_list() == ["2+2?"]
    assert good["candidates"].to_list()[0] == ["mid", "frontier"]
    assert good["fallback_from"].count() == 13
    middle = list(store.decisions())[600]["time_us"]
    since = [row["time"] for row in store.iter_log_rows(since_us=middle)]
    assert 1 <= len(since) < 1203 and min(since) >= datetime.fromtimestamp(middle / 1e6, UTC)


def test_a_full_spool_drops_decisions_and_says_so(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store.db"), spool_bytes=4_200, interval=60).start()
    with sqlite3.connect(tmp_path / "store.db", isolation_level=None) as lock:
        lock.execute("begin exclusive")
        taken = [store.record(request(), decision(), provider="a", prompt="x" * 500) for _ in range(10)]
        kept_ones = sum(taken)
        assert taken == [True] * kept_ones + [False] * (10 - kept_ones) and 2 <= kept_ones <= 6
        assert store.counters.dropped == 10 - kept_ones and store.pending == kept_ones
    assert store.flush(30)
    wait_for(lambda: store.record(request(), decision(), provider="a"))  # there is room again
    store.close()
    assert store.counters.decisions == kept_ones + 1 and store.counters.dropped >= 10 - kept_ones


def test_too_many_waiting_outcomes_are_refused(store_url: str) -> None:
    store = Store(store_url, max_pending=3)  # not started: nothing is written
    futures = [store.add_outcome(Outcome(decision_id=str(i))) for i in range(3)]
    with pytest.raises(StoreError, match="again later"):
        store.add_outcome(Outcome(decision_id="3"))
    assert store.degraded == ["store"]
    store.start()
    assert all(future.result(10) for future in futures)
    assert store.degraded == []
    store.close()


def test_a_database_that_is_away_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "store.db"
    store = Store(str(path)).start()
    first = kept(store, decision())
    assert store.flush()
    lock = sqlite3.connect(path, isolation_level=None)
    lock.execute("pragma journal_mode=wal")
    lock.execute("begin exclusive")
    made = [kept(store, decision()).decision_id for _ in range(5)]
    outcome = Outcome(decision_id=first.decision_id, quality=1.0)
    spooled = store.add_outcome(outcome, idempotency_key="k").result(30)
    assert not spooled.replayed and store.degraded == ["store"]
    again = store.add_outcome(outcome, idempotency_key="k").result(30)
    assert (again.outcome_id, again.replayed) == (spooled.outcome_id, True)
    with pytest.raises(IdempotencyConflictError):
        store.add_outcome(replace(outcome, quality=0.0), idempotency_key="k").result(30)
    assert store.counters.failures >= 1 and store.pending >= 6
    assert "locked" in caplog.text and "secret" not in caplog.text
    lock.execute("commit")
    assert store.flush(30)
    assert [row["decision_id"] for row in store.decisions()][1:] == made
    after = store.add_outcome(outcome, idempotency_key="k").result(10)
    assert (after.outcome_id, after.replayed) == (spooled.outcome_id, True)
    assert [row["outcome_id"] for row in store.outcomes()] == [spooled.outcome_id]
    assert store.counters.outcomes == 1 and store.degraded == []
    store.close()


KILLED = """
import sys
from concurrent.futures import as_completed
from router_ml.store import Store
from router_ml.types import Outcome
store = Store(sys.argv[1]).start()
i = 0
while True:
    batch = [store.add_outcome(Outcome(decision_id=f"d{i + j}")) for j in range(20)]
    i += 20
    for future in batch:
        print(future.result().outcome_id, flush=True)
"""


def test_kill_loses_no_acknowledged_outcome(store_url: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, store_url], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    seen = [process.stdout.readline().strip() for _ in range(300)]
    os.kill(process.pid, signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    acknowledged = {line for line in [*seen, *rest] if len(line) == 32}
    process.wait()
    stored = {row["outcome_id"] for row in Store(store_url).outcomes()}
    assert len(acknowledged) >= 300 and acknowledged <= stored


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "in memory"),
        (":memory:", "in memory"),
        ("mysql+pymysql://u:hush@h/d", "cannot be opened|neither SQLite nor Postgres"),
        ("postgresql+nodriver://u:hush@h/d", "cannot be opened"),
        ("://", "not valid"),
        ("sqlite:////proc/no/such/place.db", "cannot be opened"),
    ],
)
def test_a_store_that_cannot_be_opened_says_why(url: str, says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        Store(url)
    assert "hush" not in str(caught.value)


def test_a_file_of_something_else_and_tables_of_another_version_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "text.db"
    other.write_text("this is no database, it is a text of some length, and stays as it is")
    with pytest.raises(InputError, match="not a database"):
        Store(str(other))
    assert other.read_text().startswith("this is no database")
    path = tmp_path / "store.db"
    Store(str(path)).close()
    with sqlite3.connect(path) as connection:
        connection.execute("update store_info set value = '99'")
    with pytest.raises(InputError, match="version 99"):
        Store(str(path))


@pytest.mark.parametrize("there", ["nothing", "an earlier program's tables"])
def test_processes_may_open_a_store_at_once(store_url: str, there: str) -> None:
    if there != "nothing":
        Store(store_url).close()
        execute(store_url, "ALTER TABLE decisions DROP COLUMN features")
    errors: list[BaseException] = []

    def attempt(open_store: Callable[[], Store]) -> None:
        try:
            open_store().close()
        except BaseException as error:  # noqa: BLE001 (a thread's failure has to reach the test)
            errors.append(error)

    threads = [threading.Thread(target=attempt, args=(lambda: Store(store_url),)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_spool_of_an_earlier_version_lacks_the_columns_that_have_come_since(tmp_path: Path) -> None:
    from router_ml.tables import decision_row, insert_decisions, open_database

    engine = open_database(str(tmp_path / "store.db"))
    made = decision()
    row = decision_row(request(), made) | dict.fromkeys(("prompt", "messages", "tools", "features"))
    earlier = {name: value for name, value in row.items() if name not in IN_SESSION} | {"provider": "acme"}
    with engine.begin() as connection:
        insert_decisions(connection, [earlier])
    engine.dispose()
    (stored,) = Store(str(tmp_path / "store.db")).decisions()
    assert stored["decision_id"] == made.decision_id and {stored[name] for name in IN_SESSION} == {None}
