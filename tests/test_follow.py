"""Following a registry's alias: a real MLflow, a real service, and whatever a registry does when it is not well."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import polars as pl
import pytest
from faulty_server import DIE, HANG, Answer, faulty
from live_service import ROOT, Running, free_port, process, running, start_process, wait_for
from mlflow import MlflowClient
from relay import relay_to

from features.load import save_router
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.follow import Backoff, Followed
from router_ml.registry import download, promote
from serving.follower import Follower
from serving.live import LiveRouter
from training.dataset import build_dataset
from training.fit import fit
from training.tracking import register_bundle

PROMPT = {"prompt": "What is the plural of river cloud engine?"}
NAME = "router"
GOOD, OTHER, ALTERED, EMPTY = "1", "2", "3", "4"


def version_of(folder: Path) -> str:
    return read_bundle(folder).version


@pytest.fixture(scope="module")
def narrow_bundle(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle without the model "mid"."""
    three = catalog.subset(["frontier", "hosted", "local"])
    data = build_dataset(tiny_log.filter(pl.col("model") != "mid"), three)
    out = tmp_path_factory.mktemp("bundle") / "narrow"
    save_router(out, fit(data, encoder="lexical").estimator, {"quality_threshold": 0.5})
    return out


@pytest.fixture(scope="module")
def registry(tiny_bundle: Path, narrow_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A registry with two good versions, one whose booster was altered after it was registered, and one of nothing."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    for bundle, version in ((tiny_bundle, GOOD), (narrow_bundle, OTHER), (tiny_bundle, ALTERED), (tiny_bundle, EMPTY)):
        made = register_bundle(bundle, tracking_uri=uri, name=NAME, params={}, metrics={})
        assert made.version == version
        source = Path(made.source.removeprefix("file://"))
        if version == ALTERED:
            (booster,) = source.rglob("booster.txt")
            booster.write_bytes(booster.read_bytes().replace(b"0", b"1", 1))
        if version == EMPTY:
            (manifest,) = source.rglob("manifest.json")
            manifest.unlink()
    return uri


@pytest.fixture(scope="module")
def mlflow_server(registry: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a real MLflow server that has both good versions; it takes its time, so it starts beside the rest."""
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"file://{folder}/artifacts", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*command, "--workers", "1"], stdout=log, stderr=log, start_new_session=True)
    try:
        yield port
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers, too
        server.wait()


@pytest.fixture(scope="module")
def served(registry: str, mlflow_server: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service in this process that follows the alias "live"; it began with nothing in its cache."""
    folder = tmp_path_factory.mktemp("served")
    promote(registry, NAME, GOOD, "live")
    following = {"model": f"{NAME}@live", "tracking_uri": registry, "cache": folder / "cache", "poll_seconds": 0.1}
    with running(None, folder / "store.db", **following) as live:
        yield live
        assert live.service.follower is not None
        pid = live.service.follower.pid
    wait_for(lambda: not alive(pid))


@pytest.fixture
def live(served: Running, registry: str) -> Running:
    """The service at the version GOOD, everything in order."""
    promote(registry, NAME, GOOD, "live")
    wait_for(lambda: at(served) == GOOD and degraded(served) == [])
    return served


def at(live: Running) -> str:
    assert live.service.follower is not None
    return live.service.follower.version


def cache(live: Running) -> Path:
    return live.service.settings.cache


def current(live: Running) -> str:
    """The version that the next start would begin with."""
    return (cache(live) / "current").resolve().name


def degraded(live: Running) -> list[str]:
    return list(live.http.get("/readyz").json()["degraded"])


def pid_of(follower: Follower | None) -> int:
    assert follower is not None and follower.pid is not None
    return follower.pid


def alive(pid: int | None) -> bool:
    """Whether the process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_alias_is_followed_and_a_rollback_needs_no_download(
    live: Running, registry: str, tiny_bundle: Path, narrow_bundle: Path
) -> None:
    assert live.http.post("/route", json=PROMPT).json()["model_version"] == version_of(tiny_bundle)
    assert current(live) == GOOD
    before = (cache(live) / "versions" / GOOD / "manifest.json").stat()
    promote(registry, NAME, OTHER, "live")
    wait_for(lambda: live.http.get("/readyz").json()["model_version"] == version_of(narrow_bundle))
    wait_for(lambda: current(live) == OTHER)
    assert live.metric(f'router_registry_info{{model="router@live",version="{OTHER}"}}') == 1.0
    assert live.metric("router_registry_up") == 1.0
    promote(registry, NAME, GOOD, "live")
    wait_for(lambda: live.http.get("/readyz").json()["model_version"] == version_of(tiny_bundle))
    after = (cache(live) / "versions" / GOOD / "manifest.json").stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert live.service.store.flush()
    who = [change["who"] for change in live.http.get("/admin/changes").json()["changes"] if change["kind"] == "model"]
    assert who[0] == f"the start, registry router@live version {GOOD}"
    assert who[-2:] == [f"registry router@live version {OTHER}", f"registry router@live version {GOOD}"]


@pytest.mark.parametrize(
    ("version", "why"), [(ALTERED, r"booster.txt does not match its hash"), (EMPTY, "holds no bundle")]
)
def test_a_version_that_cannot_be_used_leaves_the_old_one_and_is_tried_seldom(
    live: Running, registry: str, tiny_bundle: Path, version: str, why: str
) -> None:
    failures = live.metric("router_registry_failures_total")
    promote(registry, NAME, version, "live")
    wait_for(lambda: degraded(live) == ["registry"])
    assert live.service.follower is not None and why in str(live.service.follower.last_error)
    began = time.monotonic()
    time.sleep(1.5)
    tried = live.metric("router_registry_failures_total") - failures
    # Some 15 looks; pauses of 0.2, 0.4, 0.8 s between the tries, so at most one more a doubling.
    assert 1 <= tried <= 5, time.monotonic() - began
    assert live.metric("router_registry_up") == 0.0
    assert live.http.post("/route", json=PROMPT).json()["model_version"] == version_of(tiny_bundle)
    problem = live.http.post("/admin/reload", json={})
    assert problem.status_code == 503 and why in problem.json()["detail"]
    assert at(live) == GOOD and current(live) == GOOD
    assert not (cache(live) / "versions" / version).exists()
    assert list((cache(live) / "incoming").iterdir()) == []


def test_a_reload_asks_the_registry_at_once(live: Running, registry: str, narrow_bundle: Path) -> None:
    follower = live.service.follower
    assert follower is not None
    os.kill(pid_of(follower), signal.SIGSTOP)  # it cannot have been quicker than the request
    try:
        promote(registry, NAME, OTHER, "live")
        asked = follower.ask()
        assert not asked.done() and at(live) == GOOD
    finally:
        os.kill(pid_of(follower), signal.SIGCONT)
    # A registry in an SQLite file may be locked just then, and says so; asked again it answers.
    assert (asked.result(60) or follower.ask().result(60)) and at(live) == OTHER
    answer = live.http.post("/admin/reload", json={})
    assert answer.json()["model_version"] == version_of(narrow_bundle)


def test_a_follower_that_is_killed_is_replaced(live: Running, registry: str) -> None:
    follower, restarts = live.service.follower, live.metric("router_registry_restarts_total")
    assert follower is not None and follower.pid is not None
    before = follower.pid
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: follower.pid not in (None, before))
    assert not alive(before)
    promote(registry, NAME, OTHER, "live")
    wait_for(lambda: at(live) == OTHER and degraded(live) == [], 90)
    assert live.metric("router_registry_restarts_total") == restarts + 1


def test_files_altered_in_the_cache_are_fetched_again(live: Running, registry: str) -> None:
    promote(registry, NAME, OTHER, "live")
    wait_for(lambda: at(live) == OTHER)
    booster = cache(live) / "versions" / GOOD / "booster.txt"
    booster.write_bytes(booster.read_bytes()[:-10])
    promote(registry, NAME, GOOD, "live")
    wait_for(lambda: at(live) == GOOD and degraded(live) == [])


def test_a_policy_is_followed_beside_the_registry_and_one_that_fits_no_version_keeps_the_old_one(
    registry: str, tmp_path: Path, served: Running
) -> None:
    """The version OTHER has no model "mid"."""
    policy = tmp_path / "policy.toml"
    policy.write_text('default_model = "mid"')
    shutil.copytree(cache(served), tmp_path / "cache", symlinks=True)
    promote(registry, NAME, GOOD, "policed")
    source = json.loads((tmp_path / "cache" / "source.json").read_text()) | {"alias": "policed"}
    (tmp_path / "cache" / "source.json").write_text(json.dumps(source))
    (tmp_path / "cache" / "current").unlink()
    (tmp_path / "cache" / "current").symlink_to(f"versions/{GOOD}")
    following = {"model": f"{NAME}@policed", "tracking_uri": registry, "cache": tmp_path / "cache"}
    with running(None, tmp_path / "store.db", **following, policy=policy, poll_seconds=0.1, watch_seconds=0.02) as live:
        wait_for(lambda: degraded(live) == [], 90)  # MLflow is imported
        promote(registry, NAME, OTHER, "policed")
        wait_for(lambda: degraded(live) == ["registry"])
        assert live.service.follower is not None and "'mid'" in str(live.service.follower.last_error)
        assert at(live) == GOOD and live.http.get("/policy").json()["policy"]["default_model"] == "mid"
        policy.write_text('default_model = "hosted"')
        wait_for(lambda: live.http.get("/policy").json()["policy"]["default_model"] == "hosted")
        answer = live.http.post("/admin/reload", json={})
        assert answer.is_success and at(live) == OTHER and degraded(live) == []


def test_processes_begin_with_the_last_good_version_and_leave_no_follower(
    registry: str, tiny_bundle: Path, served: Running, tmp_path: Path
) -> None:
    away = tmp_path / "mlflow.db"
    settings = {
        "model": f"{NAME}@live",
        "tracking_uri": f"sqlite:///{away}",
        "cache": tmp_path / "cache",
        "store": tmp_path / "store.db",
        "poll_seconds": 0.1,
    }
    nothing = start_process(port=free_port(), **settings)
    said, _ = nothing.communicate(timeout=60)
    assert nothing.returncode == 2 and "Traceback" not in said
    assert "no model registry at" in said and "holds no version from before" in said

    promote(registry, NAME, GOOD, "live")
    shutil.copy(registry.removeprefix("sqlite:///"), away)
    with process(**settings) as (started, _):
        (follower,) = followers(started.pid)
        started.kill()
        wait_for(lambda: not alive(follower))

    away.rename(tmp_path / "moved.db")
    with process(**settings) as (started, http):
        assert http.post("/route", json=PROMPT).json()["model_version"] == version_of(tiny_bundle)
        assert http.get("/readyz").json()["degraded"] == ["registry"]
        wait_for(lambda: "router_registry_failures_total 0.0" not in http.get("/metrics").text, 90)
        assert "no model registry at" in http.post("/admin/reload", json={}).json()["detail"]
        (tmp_path / "moved.db").rename(away)
        wait_for(lambda: http.get("/readyz").json()["degraded"] == [])
        (follower,) = followers(started.pid)
        started.terminate()
        said, _ = started.communicate(timeout=30)
        assert not alive(follower) and "Traceback" not in said


def followers(pid: int) -> list[int]:
    """The processes that follow a registry for the process `pid`."""
    children = [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    return [child for child in children if b"router_ml.follow" in Path(f"/proc/{child}/cmdline").read_bytes()]


def test_a_cache_of_another_alias_is_not_served(registry: str, served: Running, tmp_path: Path) -> None:
    shutil.copytree(cache(served), tmp_path / "cache", symlinks=True)
    other = Followed(uri=registry, name=NAME, alias="none", cache=tmp_path / "cache", poll_seconds=10.0)
    with pytest.raises(Exception, match=r"no alias 'none'.*holds no version from before"):
        Follower(other).boot(LiveRouter)
    (tmp_path / "mine" / "versions").mkdir(parents=True)
    with pytest.raises(Exception, match="is no cache of a registry's versions"):
        Follower(Followed(uri=registry, name=NAME, alias="live", cache=tmp_path / "mine", poll_seconds=10.0)).boot(
            LiveRouter
        )
    assert (tmp_path / "mine" / "versions").is_dir()


def test_without_room_in_the_cache_it_says_so_and_leaves_nothing(
    registry: str, served: Running, tmp_path: Path
) -> None:
    """A limit on the size of a file stands for a full disk: the bundle's largest file has 137 kB."""
    followed = {"uri": registry, "name": NAME, "alias": "live", "cache": str(tmp_path / "cache"), "poll_seconds": 10.0}
    follower = subprocess.Popen(
        [sys.executable, "-c", "from router_ml.follow import main; main()"],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert follower.stdin is not None and follower.stdout is not None
    follower.stdin.write(json.dumps(followed) + "\n")
    follower.stdin.flush()
    reports = [json.loads(follower.stdout.readline()) for _ in range(3)]
    assert [report["event"] for report in reports] == ["looking", "downloading", "failed"]
    assert "has no room for a new version: make room on its disk" in reports[-1]["error"]
    assert [path for path in (tmp_path / "cache").rglob("*") if path.is_file()] == []
    follower.stdin.close()  # as the service's end would
    assert follower.wait(10) == 0
    follower.stdout.close()


def test_a_server_that_is_not_well_changes_nothing(
    mlflow_server: int,
    tiny_bundle: Path,
    narrow_bundle: Path,
    served: Running,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # for the follower, which inherits both
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{mlflow_server}"

    def up() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{uri}/health").is_success
        return False

    wait_for(up, 60)
    for bundle in (tiny_bundle, narrow_bundle):
        register_bundle(bundle, tracking_uri=uri, name=NAME, params={}, metrics={}, alias="live")
    html = Answer(body=b"<!doctype html><title>Sign in</title>", headers={"content-type": "text/html"})
    half = Answer(body=b'{"registered_model": {"name": "router", "aliases": [{"alias": "live", "vers', cut=60)
    odd = b'{"registered_model": {"name": "router", "aliases": [{"alias": "live", "version": "../../x"}]}}'
    faults = {
        "HTML": html,
        "a failure": Answer(500, b"oh no"),
        "half an answer": half,
        "half JSON": Answer(body=half.body),
        "JSON of another kind": Answer(body=b'["router"]'),
        "no version": Answer(body=odd),
        "no end": HANG,
        "hanging up": DIE,
    }
    with relay_to(mlflow_server) as relay, faulty(html) as bad:
        followed = {"model": f"{NAME}@live", "tracking_uri": relay.url, "cache": tmp_path / "cache"}
        with running(None, tmp_path / "store.db", **followed, poll_seconds=0.1) as live:
            assert version_of(narrow_bundle) == live.http.get("/readyz").json()["model_version"]
            failures = 0.0
            for name, fault in faults.items():
                bad.script[:] = [fault]
                relay.lead_to(int(bad.url.rpartition(":")[2]))
                problem = live.http.post("/admin/reload", json={})
                assert problem.status_code == 503, name
                assert degraded(live) == ["registry"], name
                assert live.metric("router_registry_failures_total") > failures, name
                failures = live.metric("router_registry_failures_total")
                assert live.http.post("/route", json=PROMPT).is_success, name
                relay.lead_to(mlflow_server)
                assert live.http.post("/admin/reload", json={}).is_success, name
                assert degraded(live) == [], name
            promote(uri, NAME, "1", "live")
            wait_for(lambda: live.http.get("/readyz").json()["model_version"] == version_of(tiny_bundle))
            assert live.metric("router_registry_restarts_total") == 0.0


def test_a_follower_that_does_not_answer_is_replaced(registry: str, served: Running, tmp_path: Path) -> None:
    promote(registry, NAME, GOOD, "frozen")
    download(registry, NAME, GOOD, tmp_path / "cache" / "versions" / GOOD)
    followed = Followed(uri=registry, name=NAME, alias="frozen", cache=tmp_path / "cache", poll_seconds=0.1)
    (tmp_path / "cache" / "versions").rename(tmp_path / "versions")
    follower = Follower(followed, answer_seconds=5.0)
    live = follower.boot(LiveRouter)
    follower.start(live)
    try:
        assert follower.last_error is None
        os.kill(pid_of(follower), signal.SIGSTOP)
        asked = follower.ask()
        with pytest.raises(Exception, match="has not answered for 5 s"):
            asked.result(60)
        assert follower.restarts == 1 and follower.last_error is not None
        wait_for(lambda: follower.last_error is None, 90)
    finally:
        follower.close()


def test_pauses_double_up_to_a_bound() -> None:
    backoff = Backoff(0.01)
    assert backoff.error("1") is None
    for _ in range(3):
        backoff.failed("1", "why")
    assert (backoff.error("1"), backoff.error("2")) == ("why", None)
    time.sleep(0.085)
    assert backoff.error("1") is None
    for _ in range(2000):
        backoff.failed("1", "why")
    backoff.succeeded("1")
    assert backoff.error("1") is None


def test_a_second_alias_is_followed_for_the_challenger(
    registry: str, narrow_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is scored beside the champion until its alias is gone, or it is the champion itself."""
    monkeypatch.setattr("serving.shadow.LATE_SECONDS", 30.0)
    promote(registry, NAME, GOOD, "live")
    promote(registry, NAME, OTHER, "next")
    following = {"model": f"{NAME}@live", "tracking_uri": registry, "cache": tmp_path / "cache", "poll_seconds": 0.3}
    with running(None, tmp_path / "store.db", **following, challenger_alias="next") as live:

        def state() -> tuple[str | None, list[str]]:
            ready = live.http.get("/readyz").json()
            return ready["challenger"], ready["degraded"]

        def scored() -> int:
            assert live.http.post("/route", json=PROMPT).status_code == 200
            live.http.get("/healthz")
            assert live.service.store.flush()
            return len(list(live.service.store.shadows()))

        version = version_of(narrow_bundle)
        wait_for(lambda: state() == (version, []), 60)
        assert scored() == 1
        (noted,) = (change for change in live.service.store.changes() if change["kind"] == "challenger")
        assert noted["who"] == f"registry {NAME}@next version {OTHER}"
        MlflowClient(registry).delete_registered_model_alias(NAME, "next")
        wait_for(lambda: state() == (None, []))
        assert scored() == 1
        promote(registry, NAME, OTHER, "next")
        wait_for(lambda: state() == (version, []))
        assert scored() == 2
        promote(registry, NAME, OTHER, "live")
        wait_for(lambda: live.http.get("/readyz").json()["model_version"] == version)
        assert scored() == 2 and state() == (version, [])
        promote(registry, NAME, GOOD, "next")  # it has a model that the champion does not know
        wait_for(lambda: state()[0] not in (version, None))
        assert live.http.put("/policy", json={"canary": {"share": 1.0}}).status_code == 200
        hard = {"prompt": "Prove rigorously that the tensor operator is bounded.", "min_probability": 0.6}
        answer = live.http.post("/route", json=hard).json()
        assert (answer["model"], answer["model_version"]) == ("mid", state()[0])
        told = {"decision_id": answer["decision_id"], "quality": 1.0}
        assert live.http.post("/outcomes", json=told | {"status": "ok"}).status_code == 200
        assert live.metric('router_outcomes_total{model="mid",status="ok"}') == 1.0
        assert live.service.health.states()["model", "mid"] == "closed"
        assert live.http.put("/models/mid/health", json={"state": "open"}).status_code == 200
