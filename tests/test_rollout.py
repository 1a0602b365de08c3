"""The champion's way forward and back, on a real MLflow: killed at each step, two at once, a server that dies."""

from __future__ import annotations

import json
import math
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from live_service import ROOT, running, wait_for
from mlflow import MlflowClient
from moving_champions import NAME, MlflowServer, add_versions, aliases, another, registry_with

from router_ml.audit import changes
from router_ml.bundle import read_bundle
from router_ml.cli import main
from router_ml.errors import InputError, MovedError, NoWayBackError, RegistryError
from router_ml.registry import resolve
from router_ml.rollout import Past, history, promote, reign, rollback, rolled_back
from router_ml.tables import open_database
from training.tracking import register_bundle

Make = Callable[..., str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """It takes its time to start, so it starts beside the first tests."""
    made = MlflowServer(tmp_path_factory.mktemp("server"))
    yield made
    made.kill()


@pytest.fixture
def make(server: MlflowServer, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Make:
    return lambda *bundles, **options: registry_with(tmp_path_factory, tmp_path / "registry", *bundles, **options)


@pytest.fixture
def store(tmp_path: Path) -> str:
    open_database(str(tmp_path / "store.db")).dispose()
    return str(tmp_path / "store.db")


def past(uri: str, version: str) -> Past:
    return next(p for p in history(uri, NAME) if p.version == version)


def noted(store: str) -> list[dict[str, Any]]:
    return [change["after"] for change in changes(open_database(store)) if change["kind"] == "registry"]


def test_a_promotion_moves_the_alias_and_says_so_in_tags_and_audit_log(make: Make, store: str) -> None:
    uri = make("aa", "bb")
    first = promote(uri, NAME, "1", who="ann")
    assert (first.version, first.before, first.forced) == ("1", None, False)
    assert aliases(uri) == ("1", None)
    gate = {"passed": True, "quality": 0.81}
    made = promote(uri, NAME, "2", who="bob", reason="cheaper\n by half", gate=gate, store=store, expected="1")
    assert (made.version, made.before, made.who, made.reason) == ("2", "1", "bob", "cheaper by half")
    assert abs(made.time - datetime.now(UTC)) < timedelta(minutes=1)
    assert aliases(uri) == ("2", "1")
    tags = resolve(uri, NAME).tags
    assert tags["router_ml.promoted_by"] == "bob" and json.loads(tags["router_ml.gate"]) == gate
    assert int(tags["router_ml.promoted_us"]) == round(made.time.timestamp() * 1e6)
    newest, oldest = history(uri, NAME)
    assert (newest.promoted, newest.by, newest.reason, newest.gate) == (made.time, "bob", "cheaper by half", gate)
    assert (newest.bundle, newest.aliases, newest.until) == ("bb", ("champion",), None)
    assert oldest.promoted == first.time and oldest.until is not None and oldest.until >= made.time
    (note,) = noted(store)
    assert note.items() >= {"action": "promote", "version": "2", "before": "1", "gate": gate, "forced": False}.items()


def test_a_gate_with_numbers_without_bounds_is_kept_as_json(make: Make, store: str) -> None:
    """As of a log with one session, whose interval is the whole line."""
    uri = make("aa", "bb", champions="1")
    gate = {"passed": False, "conditions": ({"low": -math.inf, "high": math.inf, "value": math.nan, "n": 1},)}
    promote(uri, NAME, "2", who="ann", forced=True, reason="one session", gate=gate, store=store)
    null = {"passed": False, "conditions": [{"low": None, "high": None, "value": None, "n": 1}]}

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(resolve(uri, NAME).tags["router_ml.gate"], parse_constant=refuse) == null
    with closing(sqlite3.connect(store)) as connection:
        (content,) = connection.execute("select after from changes where kind = 'registry'").fetchone()
    assert json.loads(content, parse_constant=refuse)["gate"] == null
    assert past(uri, "2").gate == null


def test_what_does_not_fit_is_refused_and_nothing_moves(make: Make, store: str, tmp_path: Path) -> None:
    uri = make("aa", "bb", champions="1")
    with pytest.raises(MovedError, match=r"is not version 2 any more, it is version 1: nothing was moved"):
        promote(uri, NAME, "2", who="me", expected="2", store=store)
    with pytest.raises(RegistryError, match=r"has no version '7' \(it has: 1, 2\)"):
        promote(uri, NAME, "7", who="me", store=store)
    with pytest.raises(RegistryError, match="no model 'other'"):
        promote(uri, "other", "1", who="me", store=store)
    with pytest.raises(InputError, match="a forced promotion needs a reason"):
        promote(uri, NAME, "2", who="me", forced=True, reason=" ", store=store)
    with pytest.raises(InputError, match="give the service's store"):
        promote(uri, NAME, "2", who="me", forced=True, reason="now")
    with pytest.raises(InputError, match="there is no store at"):
        promote(uri, NAME, "2", who="me", forced=True, reason="now", store=str(tmp_path / "typo.db"))
    with pytest.raises(InputError, match="a rollback needs a reason"):
        rollback(uri, NAME, who="me", reason="")
    assert aliases(uri) == ("1", None) and noted(store) == []
    assert "router_ml.promoted_us" not in resolve(uri, NAME).tags or past(uri, "2").promoted is None


def test_a_forced_promotion_is_noted_before_the_alias_moves(
    make: Make, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make("aa", "bb", champions="1")
    order: list[str] = []
    move = MlflowClient.set_registered_model_alias

    def watched(self: MlflowClient, name: str, alias: str, version: str) -> None:
        order.append(f"{alias}, notes: {len(noted(store))}")
        move(self, name, alias, version)

    monkeypatch.setattr(MlflowClient, "set_registered_model_alias", watched)
    promote(uri, NAME, "2", who="ann", forced=True, reason="the gate is wrong", store=store)
    assert order == ["previous, notes: 1", "champion, notes: 1"]
    promote(uri, NAME, "2", who="ann", forced=True, reason="the gate is wrong", store=store)
    assert len(noted(store)) == 2
    assert past(uri, "2").forced and past(uri, "2").reason == "the gate is wrong"
    said = CliRunner().invoke(main, ["audit", "changes", "--store", store])
    assert "registry  by ann: router version 2 promoted by force, was 1: the gate is wrong\n" in said.output
    promote(uri, NAME, "1", who="ann")
    promote(uri, NAME, "2", who="ann")
    assert not past(uri, "2").forced and past(uri, "2").reason is None


def test_a_store_that_takes_no_note_keeps_the_champion(make: Make, store: str) -> None:
    uri = make("aa", "bb", champions="1")
    engine = open_database(store)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "create trigger full before insert on changes begin select raise(abort, 'full'); end"
        )
    for forced in (True, False):
        with pytest.raises(InputError, match=r"cannot be written to, so nothing was moved: full"):
            promote(uri, NAME, "2", who="me", forced=forced, reason="now", store=store)
    assert aliases(uri) == ("1", None)


def test_a_promotion_that_fails_is_noted_as_such(make: Make, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = make("aa", "bb", champions="1")

    def broken(*_: object) -> None:
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", broken)
        with pytest.raises(RegistryError, match=r"did not answer as it should: gone"):
            promote(uri, NAME, "2", who="me", store=store)
    assert aliases(uri) == ("1", None) and past(uri, "2").promoted is None
    assert ["failed" in note for note in noted(store)] == [False, True]
    said = CliRunner().invoke(main, ["audit", "changes", "--store", store]).output
    assert "(did not come to pass: " in said and "gone" in said


def test_rollbacks_go_further_back_and_not_forth_again(make: Make, store: str) -> None:
    uri = make("aa", "bb", "cc", "dd", champions="123")
    back = rollback(uri, NAME, who="ann", reason="answers got worse", store=store)
    assert (back.version, back.before) == ("2", "3") and aliases(uri) == ("2", "1")
    assert rolled_back(uri, NAME, "3") == "answers got worse" and rolled_back(uri, NAME, "2") is None
    assert rollback(uri, NAME, who="ann", reason="still").version == "1" and aliases(uri) == ("1", None)
    with pytest.raises(NoWayBackError, match=r"no version that was champion before version 1 and was not rolled back"):
        rollback(uri, NAME, who="ann", reason="more")
    assert aliases(uri) == ("1", None) and rolled_back(uri, NAME, "1") is None
    promote(uri, NAME, "4", who="bob")
    assert aliases(uri) == ("4", "1")
    third = past(uri, "3")
    assert (third.rolled_back, third.rolled_back_by, third.rolled_back_reason) == (
        back.time,
        "ann",
        "answers got worse",
    )
    assert (past(uri, "1").rolled_back, past(uri, "4").rolled_back) == (None, None)
    (note,) = noted(store)
    assert note.items() >= {"action": "rollback", "version": "2", "before": "3", "automatic": False}.items()
    said = CliRunner().invoke(main, ["audit", "changes", "--store", store]).output
    assert "registry  by ann: router version 2 rolled back to, was 3: answers got worse" in said


def test_a_bundle_that_was_rolled_back_is_known_under_every_version(make: Make, store: str) -> None:
    uri = make("aa", "bb", "bb", "cc", champions="12")
    rollback(uri, NAME, who="ann", reason="bad")
    assert [rolled_back(uri, NAME, v) for v in "1234"] == [None, "bad", "bad", None]
    promote(uri, NAME, "3", who="bob", forced=True, reason="it was the provider", store=store)
    assert rolled_back(uri, NAME, "2") is None, "its bundle is champion"
    promote(uri, NAME, "4", who="bob")
    assert [rolled_back(uri, NAME, v) for v in "23"] == [None, None], "it was left by a promotion since"
    assert rollback(uri, NAME, who="ann", reason="worse").version == "3"
    assert rollback(uri, NAME, who="ann", reason="worse").version == "1"


def test_a_model_without_a_champion_has_no_way_back(make: Make) -> None:
    uri = make("aa")
    with pytest.raises(NoWayBackError, match="has no champion"):
        rollback(uri, NAME, who="me", reason="why not")
    with pytest.raises(RegistryError, match="has no champion: promote one first"):
        reign(uri, NAME)
    assert [p.promoted for p in history(uri, NAME)] == [None]


def test_an_automatic_rollback_is_known_until_somebody_promotes(make: Make) -> None:
    uri = make("aa", "bb", champions="12")
    before = reign(uri, NAME)
    assert (before.version, before.bundle, before.automatic) == ("2", "bb", False) and before.since_us > 0
    moved = rollback(uri, NAME, who="watch", reason="fell", automatic=True, expected="2")
    after = reign(uri, NAME)
    assert (after.version, after.automatic) == ("1", True)
    assert after.since_us == round(moved.time.timestamp() * 1e6) > before.since_us
    promote(uri, NAME, "1", who="ann")
    assert not reign(uri, NAME).automatic and reign(uri, NAME).since_us > after.since_us


def test_readers_see_the_old_or_the_new_version(make: Make) -> None:
    uri = make("aa", "bb", champions="1")
    stop, seen = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            seen.append(resolve(uri, NAME).version)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        for _ in range(8):
            promote(uri, NAME, "2", who="me")
            promote(uri, NAME, "1", who="me")
        stop.set()
        reading.result()
    assert set(seen) <= {"1", "2"} and len(seen) > 20


# Runs `action` in forked processes that are killed before their first, second, … call of MLflow, until one comes
# through. A fork has all of MLflow imported, and its registry not yet open.
KILLED = """
import json, os, shutil, signal, sys
from mlflow import MlflowClient
from router_ml import rollout

template, folder, store, action = sys.argv[1:]
CALLS = ("get_registered_model", "search_model_versions", "set_model_version_tag", "delete_model_version_tag",
         "set_registered_model_alias", "delete_registered_model_alias")

def run(at, uri):
    count = 0
    def counted(name):
        call = getattr(MlflowClient, name)
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        setattr(MlflowClient, name, wrapped)
    for name in CALLS:
        counted(name)
    if action == "promote":
        rollout.promote(uri, "router", "4", who="me", forced=True, reason="why", gate={"a": 1}, store=store)
    else:
        rollout.rollback(uri, "router", who="me", reason="why", store=store, automatic=True)

shutil.copy(template, f"{folder}.warm.db")
rollout.history(f"sqlite:///{folder}.warm.db", "router")
for at in range(1, 40):
    os.makedirs(f"{folder}/{at}")
    shutil.copy(template, f"{folder}/{at}/mlflow.db")
    pid = os.fork()
    if not pid:
        try:
            run(at, f"sqlite:///{folder}/{at}/mlflow.db")
            os._exit(0)
        except BaseException as error:
            print(error, flush=True)
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == 0:
        print(json.dumps({"through": at}))
        sys.exit(0)
    if code != -signal.SIGKILL:
        sys.exit(3)
"""


def killed_at_each_call(uri: str, folder: Path, store: str, action: str) -> list[str]:
    """A registry for each call before which the process was killed, and last the one of which it came through."""
    template = uri.removeprefix("sqlite:///")
    command = [sys.executable, "-c", KILLED, template, str(folder), store, action]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return [f"sqlite:///{folder}/{at}/mlflow.db" for at in range(1, json.loads(done.stdout)["through"] + 1)]


def test_a_promotion_killed_at_any_call_leaves_a_champion_and_a_way_on(make: Make, store: str, tmp_path: Path) -> None:
    uri = make("aa", "bb", "cc", "dd", champions="123")
    found = killed_at_each_call(uri, tmp_path / "killed", store, "promote")
    reached = [aliases(u)[0] for u in found]
    moved = reached.index("4")
    assert moved >= 8 and reached == ["3"] * moved + ["4"] * (len(found) - moved) and len(found) - moved >= 2
    for at, here in enumerate(found):
        champion, told = reached[at], history(here, NAME)
        assert [p.promoted is not None for p in told] == [champion == "4", True, True, True], at
        assert [p.rolled_back for p in told] == [None] * 4, at
        if at % 2:
            promote(here, NAME, "4", who="me")
            champion = "4"
            assert aliases(here) == ("4", "3"), at
        way = [rollback(here, NAME, who="me", reason="x").version for _ in range(2)]
        assert way == (["3", "2"] if champion == "4" else ["2", "1"]), at
        assert aliases(here) == (way[1], "1" if champion == "4" else None), at


def test_a_rollback_killed_at_any_call_leaves_a_champion_and_a_way_on(make: Make, store: str, tmp_path: Path) -> None:
    uri = make("aa", "bb", "cc", "dd", champions="123")
    found = killed_at_each_call(uri, tmp_path / "killed", store, "rollback")
    reached = [aliases(u)[0] for u in found]
    moved = reached.index("2")
    assert moved >= 9 and reached == ["3"] * moved + ["2"] * (len(found) - moved) and len(found) - moved >= 3
    for at, here in enumerate(found):
        back = reached[at] == "2"
        assert (rolled_back(here, NAME, "3") == "why") == back and reign(here, NAME).automatic == back, at
        if at % 2:
            promote(here, NAME, "4", who="me")
            assert aliases(here) == ("4", reached[at]), at
            assert (rolled_back(here, NAME, "3") == "why") == back, at
            assert rollback(here, NAME, who="me", reason="y").version == reached[at], at
        assert rollback(here, NAME, who="me", reason="x").version == ("1" if back else "2"), at
        assert rolled_back(here, NAME, "3") is not None, at


# Processes that each do one of `actions` at the same moment, `rounds` times, each time after a promotion of `first`.
AT_ONCE = """
import json, os, shutil, sys
from mlflow import MlflowClient
from router_ml import rollout
from router_ml.errors import RegistryError

uri, rounds, first, *actions = sys.argv[1:]

def act(action, ready=None, gate=None):
    try:
        if ready:
            rollout.history(uri, "router")  # connected and warm
            os.write(ready, b"x")
            os.read(gate, 1)
        if action == "rollback":
            rollout.rollback(uri, "router", who="me", reason="why", expected="3")
        elif action == "look":
            found = MlflowClient(uri, uri).get_registered_model("router").aliases
            print(json.dumps({"aliases": [str(found.get(a)) for a in ("champion", "previous")]}), flush=True)
        else:
            rollout.promote(uri, "router", action, who="me")
        return 0
    except RegistryError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1

def fork(*args):
    pid = os.fork()
    if not pid:
        os._exit(act(*args))
    return pid

def end(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

if uri.startswith("sqlite"):  # all of MLflow is imported before the forks, and none of them finds this one open
    shutil.copy(uri.removeprefix("sqlite:///"), uri.removeprefix("sqlite:///") + ".warm")
    rollout.history(uri + ".warm", "router")
for _ in range(int(rounds)):
    for version in first:
        assert end(fork(version)) == 0
    ready, told = os.pipe()
    wait, gate = os.pipe()
    pids = [fork(action, told, wait) for action in actions]
    for _ in pids:
        os.read(ready, 1)
    os.write(gate, b"x" * len(pids))
    print(json.dumps({"codes": [end(pid) for pid in pids]}), flush=True)
    assert end(fork("look")) == 0
"""


def at_once(uri: str, rounds: int, first: str, *actions: str) -> tuple[list[list[int]], list[list[str]], str]:
    """By round the exit codes of the processes, and [champion, previous] afterwards; and what was said."""
    command = [sys.executable, "-c", AT_ONCE, uri, str(rounds), first, *actions]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    codes = [line["codes"] for line in lines if "codes" in line]
    found = [line["aliases"] for line in lines if "aliases" in line]
    assert len(codes) == len(found) == rounds
    return codes, found, done.stdout


@pytest.fixture(params=["sqlite", "http"])
def shared_registry(request: pytest.FixtureRequest, make: Make, server: MlflowServer) -> str:
    """Three versions behind a lock, or behind a server without one."""
    if request.param == "sqlite":
        return make("aa", "bb", "cc")
    server.wait()
    client = MlflowClient(server.uri, server.uri)
    for known in client.search_registered_models():
        client.delete_registered_model(known.name)
    add_versions(server.uri, "aa", "bb", "cc")
    return server.uri


def test_of_two_promotions_at_once_one_wins(shared_registry: str) -> None:
    codes, found, said = at_once(shared_registry, 4, "3", "1", "2")
    assert all(0 in of for of in codes), said
    assert all(champion in ("1", "2") and previous != champion for champion, previous in found), said
    assert all(champion in ("1", "2", "3") for _, champion in found), said


def test_of_two_rollbacks_at_once_one_moves(shared_registry: str) -> None:
    codes, found, said = at_once(shared_registry, 2, "123", "rollback", "rollback")
    assert all(0 in of for of in codes) and found == [["2", "1"]] * 2, said
    if shared_registry.startswith("sqlite"):
        assert all(sorted(of) == [0, 1] for of in codes) and "it is version 2" in said, said


def test_threads_of_one_process_take_turns(make: Make) -> None:
    uri = make("aa", "bb", "cc", champions="3")
    with ThreadPoolExecutor(4) as pool:
        moved = list(pool.map(lambda v: promote(uri, NAME, v, who="me"), ["1", "2"] * 6))
    champion, previous = aliases(uri)
    assert champion in ("1", "2") and previous != champion
    assert {m.before for m in moved} <= {"1", "2", "3"}


def test_an_answer_that_is_lost_is_an_error_though_the_alias_has_moved(
    make: Make, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = make("aa", "bb", "cc", champions="12")
    move = MlflowClient.set_registered_model_alias

    def lost(self: MlflowClient, name: str, alias: str, version: str) -> None:
        move(self, name, alias, version)
        if alias == "champion":
            raise ConnectionError("the connection is gone")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_registered_model_alias", lost)
        with pytest.raises(RegistryError, match="the connection is gone"):
            promote(uri, NAME, "3", who="me", store=store)
        assert aliases(uri) == ("3", "2") and past(uri, "3").promoted is not None
        with pytest.raises(RegistryError, match="the connection is gone"):
            rollback(uri, NAME, who="me", reason="bad", store=store)
    assert aliases(uri) == ("2", "2") and rolled_back(uri, NAME, "3") == "bad"
    assert rollback(uri, NAME, who="me", reason="bad", expected="2").version == "1"
    assert aliases(uri) == ("1", None)


def test_a_server_that_dies_half_way_leaves_a_champion_that_services_follow(
    server: MlflowServer, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed when `previous` has moved, and `champion` has not."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server.wait()
    name, bundles = "dies", {"1": tiny_bundle, "2": another(tiny_bundle, tmp_path / "second")}
    for bundle in bundles.values():
        register_bundle(bundle, tracking_uri=server.uri, name=name, params={}, metrics={})
    promote(server.uri, name, "1", who="me")
    following = {"model": f"{name}@champion", "tracking_uri": server.uri, "cache": tmp_path / "cache"}
    with running(None, tmp_path / "store.db", **following, poll_seconds=0.2) as live:
        move = MlflowClient.set_registered_model_alias

        def dying(self: MlflowClient, model: str, alias: str, version: str) -> None:
            move(self, model, alias, version)
            if alias == "previous":
                server.kill()

        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "set_registered_model_alias", dying)
            with pytest.raises(RegistryError, match="did not answer as it should"):
                promote(server.uri, name, "2", who="me")
        assert live.http.post("/route", json={"prompt": "x"}).is_success
        server.start()
        server.wait()
        found = MlflowClient(server.uri, server.uri).get_registered_model(name).aliases
        assert {alias: str(version) for alias, version in found.items()} == {"champion": "1", "previous": "1"}

        def served(version: str) -> Callable[[], bool]:
            def agrees() -> bool:
                ready = live.http.get("/readyz").json()
                return bool(ready["model_version"] == read_bundle(bundles[version]).version and not ready["degraded"])

            return agrees

        wait_for(served("1"), 30)
        promote(server.uri, name, "2", who="me")
        wait_for(served("2"), 30)
        assert rollback(server.uri, name, who="me", reason="back").version == "1"
        wait_for(served("1"), 30)


def test_the_commands(make: Make, store: str) -> None:
    uri = make("aa", "bb", champions="12")

    def said(*words: str) -> tuple[int, str]:
        done = CliRunner().invoke(main, [*words, "--tracking-uri", uri])
        return done.exit_code, done.output

    assert said("rollback", NAME, "--reason", "worse", "--expected", "1")[0] == 2
    options = ("--reason", "worse", "--store", store, "--who", "ann")
    assert said("rollback", NAME, *options) == (0, "router version 1 is champion again; version 2 is rolled back\n")
    assert [note["reason"] for note in noted(store)] == ["worse"]
    code, text = said("rollback", NAME, "--reason", "worse")
    assert code == 2 and "nothing to go back to" in text and "router-ml promote router VERSION" in text
    code, text = said("history", NAME)
    two, one = text.splitlines()
    assert code == 0 and two.startswith("version 2  bundle bb  promoted 20")
    assert " by setup  rolled back 20" in two and two.endswith(" by ann (worse)")
    assert one.startswith("version 1  bundle aa  champion  promoted 20") and one.endswith(" by setup")
    rows = [json.loads(line) for line in said("history", NAME, "--json")[1].splitlines()]
    assert [row["version"] for row in rows] == ["2", "1"] and rows[0]["rolled_back_reason"] == "worse"
    full = [json.loads(line) for line in said("history", NAME, "--full")[1].splitlines()]
    assert [{k: row[k] for k in rows[0]} for row in full] == rows
    assert [row["metrics"] for row in full] == [{}, {}] and all(row["created_us"] > 1e15 for row in full)
    assert said("history", "other")[0] == 2


def test_a_move_begins_when_all_has_been_looked_at_and_noted(make: Make, store: str) -> None:
    uri = make("aa", "bb")
    begun: list[int] = []

    def begins() -> None:
        begun.append(len(noted(store)))

    with pytest.raises(NoWayBackError):
        rollback(uri, NAME, who="ann", reason="worse", store=store, begins=begins)
    with pytest.raises(MovedError):
        promote(uri, NAME, "2", who="ann", expected="2", store=store, begins=begins)
    with pytest.raises(RegistryError):
        promote(uri, NAME, "9", who="ann", store=store, begins=begins)
    assert begun == [] and noted(store) == []
    promote(uri, NAME, "1", who="ann", store=store, begins=begins)
    promote(uri, NAME, "2", who="ann", begins=begins)
    rollback(uri, NAME, who="ann", reason="worse", store=store, begins=begins)
    assert begun == [1, 1, 2] and len(noted(store)) == 2
