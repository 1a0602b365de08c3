"""The watch on live outcomes: rarely wrong however often it looks, quick where answers fall, and the way it takes."""

from __future__ import annotations

import dataclasses
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner
from conftest import new_postgres
from live_service import ROOT, running, wait_for
from moving_champions import NAME, aliases, another
from relay import Relay, relay_to

from router_ml.audit import changes
from router_ml.bundle import read_bundle
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.rollout import history, promote, reign, rolled_back
from router_ml.rollout_cli import _until_signal
from router_ml.stored import told_decisions
from router_ml.tables import OUTCOMES, insert_decisions, open_database
from router_ml.types import Candidate
from training.tracking import register_bundle
from training.watch import watch

Row = dict[str, Any]


def rows(n: int, rng: np.random.Generator, *, shift: float = 0.0, mean: float = 0.8, **same: Any) -> list[Row]:
    """Decisions whose answers are acceptable with probability p_ok + `shift`."""
    p_ok = np.clip(rng.beta(20 * mean, 20 * (1 - mean), n), 0.01, 0.99)
    quality = (rng.random(n) < np.clip(p_ok + shift, 0.0, 1.0)).astype(float)
    fixed = {"key": None, "tenant": None, "session": None, "model": "mid", "served": "mid", "status": "ok"}
    return [
        {"decision_id": f"{i:09d}", "time_us": i, "quality_threshold": 0.5, "p_ok": p, "quality": q, **fixed, **same}
        for i, (p, q) in enumerate(zip(p_ok.tolist(), quality.tolist(), strict=True))
    ]


def alarms(runs: int, n: int, *, tolerance: float, **options: Any) -> list[int]:
    """The number of outcomes at each run's first alarm, of a look after every outcome."""
    found = []
    for seed in range(runs):
        upper = watch(rows(n, np.random.default_rng(seed), **options), tolerance=tolerance).upper
        broken = np.flatnonzero(upper < -tolerance)
        found += [int(broken[0]) + 1] if len(broken) else []
    return found


@pytest.mark.parametrize("mean", [0.6, 0.9])
def test_false_alarms_stay_rare_however_often_one_looks(mean: float) -> None:
    """Where outcomes are as promised, where the tolerance is used up, and without any tolerance; 1,000 looks each."""
    assert alarms(200, 1000, tolerance=0.03, mean=mean) == []
    assert len(alarms(200, 1000, tolerance=0.03, mean=mean, shift=-0.03)) <= 10
    assert len(alarms(200, 1000, tolerance=0.0, mean=mean)) <= 10


def test_a_drop_is_found_within_some_hundred_outcomes() -> None:
    found = alarms(100, 2500, tolerance=0.03, shift=-0.1)
    assert len(found) == 100
    assert np.quantile(found, 0.5) < 500 and np.quantile(found, 0.9) < 1000


def late(n: int, rng: np.random.Generator, shift: float) -> list[Row]:
    """Sessions of some five requests, one of which shares its luck, whose outcomes come up to 400 decisions later."""
    found = rows(n, rng, mean=0.75)
    session = rng.integers(0, n // 5, n) // 4 + np.arange(n) // 20
    luck = rng.normal(0.0, 0.15, int(session.max()) + 1)
    for i, row in enumerate(found):
        p = float(np.clip(row["p_ok"] + luck[session[i]] + shift, 0.0, 1.0))
        row |= {"session": f"s{session[i]}", "quality": float(rng.random() < p), "known": i + int(rng.integers(0, 400))}
    return found


def looked(every: Row, now: int) -> Row:
    return every if every["known"] <= now else {**every, "quality": None, "status": None}


def test_sessions_that_grow_and_outcomes_that_come_late_raise_no_more_alarms() -> None:
    def alarmed(seed: int, shift: float) -> bool:
        made = late(1600, np.random.default_rng(seed), shift)
        looks = (watch([looked(row, now) for row in made[:now]], tolerance=0.0) for now in range(200, 1601, 200))
        return any(look.broken for look in looks)

    assert sum(alarmed(seed, 0.0) for seed in range(40)) <= 2
    assert all(alarmed(seed, -0.12) for seed in range(10))


def test_a_look_knows_nothing_of_what_comes_after_it() -> None:
    made = rows(400, np.random.default_rng(1), mean=0.7)
    whole = watch(made)
    for n in (25, 120, 400):
        early = watch(made[:n])
        assert (early.residual, early.high) == pytest.approx((whole.mean[n - 1], whole.upper[n - 1]))
        assert early.upper == pytest.approx(whole.upper[:n])
    assert watch(list(reversed(made))).high == whole.high


def test_what_counts_as_an_outcome() -> None:
    (row,) = rows(1, np.random.default_rng(0), p_ok=0.8, quality=0.6)

    def residual(**changed: Any) -> float:
        return watch([row | changed]).residual

    assert residual() == pytest.approx(1 - 0.8)
    assert residual(quality_threshold=0.6) == pytest.approx(1 - 0.8)
    assert residual(quality_threshold=0.7) == pytest.approx(-0.8)
    assert residual(status="error", quality=0.9) == pytest.approx(0.2), "who gave feedback had an answer"
    assert residual(status=None) == pytest.approx(0.2)
    for nothing in (
        {"quality": None}, {"quality": None, "status": "cancelled"}, {"quality": None, "status": "error"},
        {"p_ok": None}, {"quality_threshold": None}, {"served": "other"},
    ):  # fmt: skip
        assert watch([row | nothing]).n == 0, nothing
    none = watch([row | {"quality": None}])
    assert (none.n, none.decisions, none.broken, none.models) == (0, 1, False, ()) and np.isnan(none.high)
    assert none.why == "no outcome of this version yet" and "0 of 1 decisions have an answer" in none.assumptions[0]


def test_failures_do_not_count_where_feedback_is_rare() -> None:
    """One answer in twenty is told of, and every failure: as many failures as outcomes are no bad answers."""
    rng = np.random.default_rng(4)
    made = [
        row | {"quality": None, "status": "timeout"} if rng.random() < 0.05 else
        row | ({} if rng.random() < 0.05 else {"quality": None})
        for row in rows(20_000, rng)
    ]  # fmt: skip
    found = watch(made)
    assert 800 < found.n < 1_200 and not found.broken and abs(found.residual) < 0.04


def test_answers_in_a_models_place_do_not_hide_that_it_is_worse() -> None:
    made = rows(900, np.random.default_rng(4), p_ok=0.8, quality=0.0)
    fall = [row | {"served": "other", "quality": 1.0} if i % 4 else row for i, row in enumerate(made)]
    found = watch(fall)
    assert found.broken and [(of.model, of.n) for of in found.models] == [("mid", 225)]


@pytest.mark.parametrize("wrong", [{"tolerance": -0.1}, {"tolerance": 1.0}, {"confidence": 1.0}, {"tightest_at": 3}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="a watch needs a tolerance"):
        watch([], **wrong)  # type: ignore[arg-type]


def test_twenty_sessions_are_the_least() -> None:
    made = rows(19, np.random.default_rng(0), mean=0.9, quality=0.0)
    found = watch(made)
    assert not found.broken and found.why.endswith("bounds are known from 20 sessions on")
    one = watch([row | {"session": "long"} for row in rows(500, np.random.default_rng(0), quality=0.0)])
    assert (one.n, one.clusters, one.broken) == (500, 1, False)
    assert watch(rows(40, np.random.default_rng(0), mean=0.9, quality=0.0)).broken


def test_the_models_whose_answers_fell_are_named() -> None:
    rng = np.random.default_rng(2)
    good, bad = rows(900, rng, model="good", served="good"), rows(900, rng, shift=-0.25, model="bad", served="bad")
    found = watch([row | {"decision_id": f"{row['model']}{row['decision_id']}"} for row in good + bad])
    assert found.broken and [(of.model, of.fell) for of in found.models] == [("bad", True), ("good", False)]
    bad_one, good_one = found.models
    assert bad_one.n == 900 and bad_one.high < -0.1 and good_one.low < 0.0 < good_one.high
    assert bad_one.residual == pytest.approx(bad_one.observed - bad_one.promised)
    assert "at least 0.0" in found.why and "by model bad -0.2" in found.why
    assert found.residual == pytest.approx(found.observed - found.promised)


def test_the_result_is_a_frame_and_a_plot(tmp_path: Path) -> None:
    found = watch([row | {"session": f"s{i // 3}"} for i, row in enumerate(rows(300, np.random.default_rng(3)))])
    frame = found.to_frame()
    assert frame.columns == ["time", "clusters", "n", "residual", "low", "high", "broken"]
    assert len(frame) == found.clusters == 100 and frame["n"].to_list() == list(range(3, 301, 3))
    assert frame["high"][-1] == found.high and frame["time"].is_sorted() and not frame["broken"].any()
    found.plot().savefig(tmp_path / "watch.png")
    assert (tmp_path / "watch.png").stat().st_size > 10_000
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.n = 0  # type: ignore[misc]


# --- on a real store and a real registry


def fill(store: str, bundle: str, n: int, quality: float, *, p_ok: float = 0.8, degraded: bool = False) -> None:
    """Decisions of a bundle, now, and their outcomes."""
    now, of = time.time_ns() // 1000, f"{bundle}-{time.time_ns()}"
    fixed = {
        "needs": (), "excluded": {}, "model": "mid", "provider": "acme", "propensity": 1.0, "explored": False,
        "meets_threshold": True, "min_probability": 0.5, "quality_threshold": 0.5, "reason": "cheapest",
        "policy_version": "p", "candidates": [Candidate("mid", p_ok, 0.01, 0.01), Candidate("local", 0.1, 0.0, 0.0)],
        "model_version": bundle, "degraded": degraded,
    }  # fmt: skip
    engine = open_database(store)
    with engine.begin() as connection:
        insert_decisions(connection, [{"decision_id": f"{of}-{i}", "time_us": now + i, **fixed} for i in range(n)])
        told = [{"time_us": now + n, "decision_id": f"{of}-{i}", "status": "ok", "quality": quality} for i in range(n)]
        ids = [
            {**dict.fromkeys(("outcome_id", "idempotency_key", "digest"), row["decision_id"]), **row} for row in told
        ]
        connection.execute(OUTCOMES.insert(), ids)
    engine.dispose()


@pytest.fixture(scope="module")
def bundles(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"1": tiny_bundle, "2": another(tiny_bundle, tmp_path_factory.mktemp("bundle") / "second")}


@pytest.fixture(scope="module")
def registered(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("registry")
    for bundle in bundles.values():
        register_bundle(bundle, tracking_uri=f"sqlite:///{folder}/mlflow.db", name=NAME, params={}, metrics={})
    return folder / "mlflow.db"


@pytest.fixture
def uri(registered: Path, tmp_path: Path) -> str:
    """A registry where version 2 is champion after version 1."""
    shutil.copy(registered, tmp_path / "mlflow.db")
    for version in "12":
        promote(f"sqlite:///{tmp_path}/mlflow.db", NAME, version, who="setup")
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture
def store(tmp_path: Path) -> str:
    open_database(str(tmp_path / "store.db")).dispose()
    return str(tmp_path / "store.db")


@pytest.fixture
def of(bundles: dict[str, Path]) -> dict[str, str]:
    """Bundle versions by version."""
    return {version: read_bundle(bundle).version for version, bundle in bundles.items()}


def once(uri: str, store: str, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(main, ["watch", NAME, "--store", store, "--tracking-uri", uri, "--once", *options])
    return done.exit_code, done.output


def test_only_the_bundles_own_decisions_are_read(store_url: str) -> None:
    fill(store_url, "aa", 600, 0.9)
    fill(store_url, "bb", 30, 0.1)
    fill(store_url, "aa", 30, 0.2, degraded=True)
    engine = open_database(store_url)
    with engine.begin() as connection:
        connection.exec_driver_sql("update decisions set degraded = null where model_version = 'bb'")
    found = list(told_decisions(engine, "aa"))
    assert len(found) == 600 and {row["quality"] for row in found} == {0.9}
    times = [row["time_us"] for row in found]
    assert times == sorted(times) and len(list(told_decisions(engine, "aa", times[100]))) == 500
    assert len(list(told_decisions(engine, "bb"))) == 30
    assert (found[0]["p_ok"], found[0]["model"], found[0]["served"]) == (0.8, "mid", "mid")
    assert watch(found).n == 600
    engine.dispose()


def test_a_broken_promise_moves_the_alias_once_and_says_why(uri: str, store: str, of: dict[str, str]) -> None:
    code, said = once(uri, store)
    assert code == 0 and f"{NAME} version 2 holds: no outcome of this version yet" in said
    fill(store, of["2"], 60, 1.0)
    assert once(uri, store)[0] == 0
    fill(store, of["2"], 300, 0.0)
    code, said = once(uri, store, "--dry-run")
    assert code == 1 and "breaks its promise" in said and "nothing is moved" in said and aliases(uri) == ("2", "1")
    assert once(uri, store, "--tolerance", "0.9")[0] == 0
    code, said = once(uri, store)
    assert code == 1 and "rolled back to version 1" in said and aliases(uri) == ("1", None)
    assert "with 95% confidence" in str(rolled_back(uri, NAME, "2")) and reign(uri, NAME).automatic
    (note,) = (change for change in changes(open_database(store)) if change["kind"] == "registry")
    assert note["who"].startswith("router-ml watch, ") and note["after"]["automatic"]
    assert note["after"]["reason"] == rolled_back(uri, NAME, "2")
    said = CliRunner().invoke(main, ["audit", "changes", "--store", store]).output
    assert "router version 1 automatically rolled back to, was 2: of 360 outcomes" in said


def test_a_champion_that_was_reached_automatically_stays_until_somebody_promotes(
    uri: str, store: str, of: dict[str, str]
) -> None:
    fill(store, of["1"], 60, 0.0)  # before it became champion again: not its record
    promote(uri, NAME, "1", who="setup")
    promote(uri, NAME, "2", who="setup")
    fill(store, of["2"], 60, 0.0)
    assert "rolled back to version 1" in once(uri, store)[1]
    code, said = once(uri, store)
    assert code == 0 and "version 1 holds: no outcome" in said
    fill(store, of["1"], 60, 0.0)
    code, said = once(uri, store)
    assert code == 1 and "an automatic rollback led to it: promote a version" in said and aliases(uri) == ("1", None)
    promote(uri, NAME, "1", who="ann")
    assert once(uri, store)[0] == 0, "its record begins anew"
    fill(store, of["1"], 60, 0.0)
    code, said = once(uri, store)
    assert code == 1 and "not rolled back: nothing to go back to" in said and aliases(uri) == ("1", None)


def test_two_watchers_at_once_move_it_once(uri: str, store: str, of: dict[str, str]) -> None:
    promote(uri, NAME, "1", who="setup")
    promote(uri, NAME, "2", who="setup")
    fill(store, of["2"], 60, 0.0)
    command = [sys.executable, "-m", "router_ml.cli", "watch", NAME, "--store", store, "--tracking-uri", uri, "--once"]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert aliases(uri)[0] == "1" and sum("rolled back to version 1" in text for text in said) == 1, said
    assert len([c for c in changes(open_database(store)) if c["kind"] == "registry"]) == 1
    assert [p.rolled_back is not None for p in history(uri, NAME)] == [True, False]


def test_what_is_not_there_is_said_at_once(uri: str, store: str, tmp_path: Path) -> None:
    code, said = once(uri, str(tmp_path / "typo.db"))
    assert code == 2 and "there is no store at" in said
    code, said = once(f"sqlite:///{tmp_path}/typo/mlflow.db", store)
    assert code == 2 and "no model registry at" in said
    done = CliRunner().invoke(main, ["watch", NAME, "--store", str(tmp_path / "typo.db"), "--tracking-uri", uri])
    assert done.exit_code == 2 and "there is no store at" in done.output


@pytest.fixture
def way() -> Iterator[tuple[Relay, str]]:
    """A Postgres store behind a way that can be cut."""
    with new_postgres() as url:
        real = sa.make_url(url)
        open_database(url).dispose()
        with relay_to(real.port or 5432) as relay:
            port = int(relay.url.rpartition(":")[2])
            yield relay, real.set(port=port).render_as_string(hide_password=False)


def test_the_first_signal_is_noted_and_the_second_one_ends() -> None:
    # A shell's background job ignores SIGINT, and what it starts inherits that.
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt), _until_signal() as came:
        signal.raise_signal(signal.SIGINT)
        assert came == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    signal.signal(signal.SIGINT, outside)


def test_a_watch_outlives_registry_and_store_and_ends_by_a_signal(
    uri: str, way: tuple[Relay, str], of: dict[str, str], tmp_path: Path
) -> None:
    (relay, store), made = way, uri.removeprefix("sqlite:///")
    uri = f"sqlite:///{tmp_path}/later.db"  # this process has the other one open
    command = [sys.executable, "-m", "router_ml.cli", "watch", NAME, "--store", store, "--tracking-uri", uri]
    with (tmp_path / "said").open("w") as out:
        running_watch = subprocess.Popen([*command, "--every", "0.1"], cwd=ROOT, stdout=out, stderr=out)

    def wait_until(text: str) -> None:
        def there() -> bool:
            assert running_watch.poll() is None, (tmp_path / "said").read_text()
            return text in (tmp_path / "said").read_text().rpartition("NEXT")[2]

        wait_for(there, 60)
        with (tmp_path / "said").open("a") as out:
            out.write("NEXT")

    try:
        wait_until("it is tried again in 0.1 s: no model registry at")
        shutil.copy(made, tmp_path / "later.db")
        wait_until("version 2 holds: no outcome")
        with relay.cut():
            wait_until("it is tried again in 0.1 s: the store")
        wait_until("version 2 holds: no outcome")
        fill(store, of["2"], 60, 0.0)
        wait_until("rolled back to version 1")
        wait_until("version 1 holds: no outcome")
    finally:
        running_watch.terminate()
        code = running_watch.wait(30)
    assert code == 0 and "the watch ends by SIGTERM" in (tmp_path / "said").read_text()
    assert aliases(uri) == ("1", None)


def test_a_service_follows_the_watch_back(
    uri: str, bundles: dict[str, Path], of: dict[str, str], tmp_path: Path
) -> None:
    """The whole way: decisions over HTTP, outcomes that break the promise, the watch, the alias, the service."""
    store = str(tmp_path / "served.db")
    following = {"model": f"{NAME}@champion", "tracking_uri": uri, "cache": tmp_path / "cache", "poll_seconds": 0.2}
    with running(None, store, **following) as live:

        def route(n: int, quality: float) -> set[str]:
            versions = set()
            for i in range(n):
                made = live.http.post("/route", json={"prompt": f"What is the plural of river {i}?"}).json()
                told = {"decision_id": made["decision_id"], "status": "ok", "quality": quality}
                assert live.http.post("/outcomes", json=told).status_code == 200
                versions.add(made["model_version"])
            assert live.service.store.flush()
            return versions

        assert route(30, 1.0) == {of["2"]}
        code, said = once(uri, store)
        assert code == 0 and "version 2 holds: of 30 outcomes in 30 sessions 1.000 are acceptable" in said
        assert route(90, 0.0) == {of["2"]}
        code, said = once(uri, store)
        assert code == 1 and "rolled back to version 1" in said and aliases(uri) == ("1", None)
        wait_for(lambda: live.http.get("/readyz").json()["model_version"] == of["1"])
        assert route(25, 1.0) == {of["1"]}
        code, said = once(uri, store)
        assert code == 0 and "version 1 holds: of 25 outcomes" in said
        noted = live.http.get("/admin/changes").json()["changes"]
        assert [c["after"]["version"] for c in noted if c["kind"] == "registry"] == ["1"]
        assert [c["who"] for c in noted if c["kind"] == "model"][-1] == f"registry {NAME}@champion version 1"
