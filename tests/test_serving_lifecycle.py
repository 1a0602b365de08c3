"""Starting, swapping bundles, draining and dying: the last good bundle serves, and what was acknowledged is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from live_service import ROOT, Running, free_port, process, running, sha256, start_process, wait_for

from features.load import load_router, save_router
from router_ml.errors import BundleError, InputError
from router_ml.quality import LearnedEstimator
from router_ml.store import Store
from serving.live import LiveRouter
from serving.settings import KEYS_VARIABLE

PROMPT = {"prompt": "What is the plural of river cloud engine?"}


@pytest.fixture(scope="module")
def other_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same learner under another version: its manifest says something else."""
    estimator = load_router(tiny_bundle).estimator
    assert isinstance(estimator, LearnedEstimator)
    out = tmp_path_factory.mktemp("other") / "bundle"
    save_router(out, estimator, {"quality_threshold": 0.5, "log_sha256": "f" * 64, "metrics": {"note": 1.0}})
    return out


def files_of(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.iterdir() if path.is_file())


def flip(path: Path, byte: int) -> None:
    """Changes one byte of the file, in place."""
    data = bytearray(path.read_bytes())
    data[byte] ^= 0x01
    path.write_bytes(data)


def test_one_changed_byte_in_any_file_is_refused_by_name(tiny_bundle: Path, tmp_path: Path) -> None:
    names = [path.name for path in files_of(tiny_bundle)]
    assert len(names) >= 5
    for name in names:
        bundle = tmp_path / f"with-{name}"
        shutil.copytree(tiny_bundle, bundle)
        size = (bundle / name).stat().st_size
        for byte in (0, size // 2, size - 1):
            flip(bundle / name, byte)
            with pytest.raises(BundleError, match=name):
                LiveRouter(bundle)
            flip(bundle / name, byte)
        assert LiveRouter(bundle).live.router.model_version
        (bundle / name).rename(tmp_path / "away")
        with pytest.raises(BundleError, match=name):
            LiveRouter(bundle)
        (tmp_path / "away").unlink()


def start_fails(bundle: Path, store: Path, *options: str) -> str:
    """What `router-ml serve` says when it must not come up; its exit code is 2."""
    command = [sys.executable, "-c", "from router_ml.cli import main; main()", "serve", "--port", str(free_port())]
    environment = {k: v for k, v in os.environ.items() if k != KEYS_VARIABLE}
    done = subprocess.run(
        [*command, "--bundle", str(bundle), "--store", str(store), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_service_does_not_start_on_an_altered_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    # One process a file would take long: the two kinds, what the manifest lists and the manifest itself.
    for name in ("booster.txt", "manifest.json"):
        shutil.copytree(tiny_bundle, tmp_path / f"with-{name}")
        flip(tmp_path / f"with-{name}" / name, 10)
        said = start_fails(tmp_path / f"with-{name}", tmp_path / "store.db")
        assert name in said and "altered" in said
    assert "no bundle at" in start_fails(tmp_path / "nowhere", tmp_path / "store.db")


def test_a_service_does_not_start_beyond_loopback_without_keys(tiny_bundle: Path, tmp_path: Path) -> None:
    said = start_fails(tiny_bundle, tmp_path / "store.db", "--host", "0.0.0.0")
    assert "no API keys are configured" in said


def test_beyond_loopback_with_keys(tiny_bundle: Path, tmp_path: Path) -> None:
    keys = {"gateway": sha256("k")}
    with process(bundle=tiny_bundle, store=tmp_path / "store.db", host="0.0.0.0", api_keys=keys) as (_, http):
        assert http.post("/route", json=PROMPT).status_code == 401
        assert http.post("/route", json=PROMPT, headers={"x-api-key": "k"}).json()["model"] == "local"


def test_a_bad_policy_or_store_is_refused_at_start(tiny_bundle: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("default_model = 'gone'")
    with pytest.raises(InputError, match="'gone'"):
        LiveRouter(tiny_bundle, policy)
    (tmp_path / "text.db").write_text("this is no database at all, only text that is long enough")
    assert "not a database" in start_fails(tiny_bundle, tmp_path / "text.db")


@contextlib.contextmanager
def following(path: Path, store: Path, **settings: object):
    with running(path, store, watch_seconds=0.02, **settings) as live:
        yield live


def version(live: Running) -> str:
    return str(live.http.post("/route", json=PROMPT).json()["model_version"])


def test_the_running_service_keeps_the_last_good_bundle(tiny_bundle: Path, other_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    with following(bundle, tmp_path / "store.db") as live:
        good = version(live)
        for path in files_of(bundle):
            failures = live.service.live.failures
            flip(path, 5)
            wait_for(lambda failures=failures: live.service.live.failures > failures)
            assert version(live) == good
            assert path.name in (live.service.live.last_error or "")
            assert live.http.get("/readyz").json()["degraded"] == ["bundle"]
            assert live.metric("router_bundle_reload_failures_total") == live.service.live.failures
            with pytest.raises(BundleError, match=path.name):
                live.service.live.reload()
            flip(path, 5)
            wait_for(lambda: live.service.live.last_error is None)
        shutil.rmtree(bundle)
        time.sleep(0.1)
        assert version(live) == good
        shutil.copytree(other_bundle, bundle)
        wait_for(lambda: version(live) != good)
        assert live.http.get("/readyz").json()["degraded"] == []


def test_a_link_that_moves_swaps_the_bundle_and_no_request_notices(
    tiny_bundle: Path, other_bundle: Path, tmp_path: Path
) -> None:
    link = tmp_path / "current"
    link.symlink_to(tiny_bundle)
    versions = {b: load_router(b).model_version for b in (tiny_bundle, other_bundle)}
    assert len(set(versions.values())) == 2
    answers: list[tuple[int, str]] = []
    stop = threading.Event()
    with following(link, tmp_path / "store.db") as live:

        def load() -> None:
            with httpx.Client(base_url=live.http.base_url, timeout=30) as http:
                while not stop.is_set():
                    response = http.post("/route", json=PROMPT)
                    answers.append((response.status_code, response.json().get("model_version", "")))

        with ThreadPoolExecutor(2) as pool:
            clients = [pool.submit(load) for _ in range(2)]
            for i in range(10):
                target = (other_bundle, tiny_bundle)[i % 2]
                aside = tmp_path / "next"
                aside.symlink_to(target)
                aside.replace(link)
                wait_for(lambda target=target: live.service.live.live.router.model_version == versions[target])
            stop.set()
            for client in clients:
                client.result()
        assert live.service.live.reloads == 10 and live.service.live.failures == 0
        stored = live.decisions()
    counted = Counter(answers)
    assert {status for status, _ in counted} == {200}
    assert {found for _, found in counted} == set(versions.values())
    assert Counter(row["model_version"] for row in stored) == Counter(found for _, found in answers)


def test_a_policy_file_is_followed_and_a_bad_one_kept_out(tiny_bundle: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[tiers]\nstandard = 0.5")
    with following(tiny_bundle, tmp_path / "store.db", policy=policy) as live:
        before = live.http.get("/policy").json()
        policy.write_text("[tiers]\nstandard = 5.0")
        wait_for(lambda: live.service.live.last_error is not None)
        assert str(policy) in str(live.service.live.last_error)
        assert live.http.get("/policy").json() == before
        policy.write_text("[tiers]\nstandard = 0.6")
        wait_for(lambda: live.http.get("/policy").json() != before)
        assert live.http.post("/route", json=PROMPT).json()["min_probability"] == 0.6


def test_sigterm_finishes_and_writes_what_was_answered(tiny_bundle: Path, tmp_path: Path) -> None:
    answered: list[str] = []
    with process(bundle=tiny_bundle, store=tmp_path / "store.db", commit_seconds=0.5) as (started, http):
        stop = threading.Event()

        def load() -> None:
            while not stop.is_set():
                try:
                    response = http.post("/route", json=PROMPT)
                except httpx.ConnectError:
                    return  # the port is closed: nothing was taken
                assert response.status_code == 200
                answered.append(response.json()["decision_id"])

        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(load) for _ in range(4)]
            wait_for(lambda: len(answered) >= 50)
            started.send_signal(signal.SIGTERM)
            started.wait(30)
            stop.set()
            errors = [client.exception() for client in clients]
    # A kept connection may be closed between two requests; an answer that had begun is never cut.
    assert all(error is None or isinstance(error, httpx.RemoteProtocolError | httpx.ReadError) for error in errors)
    stored = {row["decision_id"] for row in Store(str(tmp_path / "store.db")).decisions()}
    assert set(answered) <= stored and len(answered) >= 50


def test_readiness_goes_off_before_the_port_closes(tiny_bundle: Path, tmp_path: Path) -> None:
    with process(bundle=tiny_bundle, store=tmp_path / "store.db", drain_seconds=1.5) as (started, http):
        started.send_signal(signal.SIGTERM)
        wait_for(lambda: http.get("/readyz").status_code == 503)
        assert http.get("/readyz").headers["content-type"] == "application/problem+json"
        assert http.get("/healthz").is_success
        assert http.post("/route", json=PROMPT).is_success
        said, _ = started.communicate(timeout=30)
    assert "Traceback" not in said


def test_kill_loses_no_acknowledged_outcome_and_one_interval_of_decisions(tiny_bundle: Path, tmp_path: Path) -> None:
    with process(bundle=tiny_bundle, store=tmp_path / "store.db") as (started, http):
        early = [http.post("/route", json=PROMPT).json()["decision_id"] for _ in range(20)]
        time.sleep(1.0)  # many intervals
        outcomes = [http.post("/outcomes", json={"decision_id": i, "quality": 1.0}).json() for i in early]
        os.kill(started.pid, signal.SIGKILL)
        started.wait(10)
    store = Store(str(tmp_path / "store.db")).start()  # what the drain had not moved yet is in the spool
    assert store.flush(60)
    assert {row["outcome_id"] for row in store.outcomes()} == {o["outcome_id"] for o in outcomes}
    assert {row["decision_id"] for row in store.decisions()} >= set(early)


def test_logs_of_a_process_hold_no_prompt(tiny_bundle: Path, tmp_path: Path) -> None:
    with process(bundle=tiny_bundle, store=tmp_path / "store.db") as (started, http):
        for body in ({"prompt": "hush-4711"}, {"prompt": ["hush-4711"]}, {"messages": [{"role": "hush-4711"}]}):
            http.post("/route?hush-4711", json=body)
        started.send_signal(signal.SIGTERM)
        said, _ = started.communicate(timeout=30)
    assert "Uvicorn running" in said and "hush" not in said


def test_a_taken_port_is_an_error(tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "a.db") as live:
        assert live.http.base_url.port
        started = start_process(bundle=tiny_bundle, store=tmp_path / "b.db", port=live.http.base_url.port)
        said, _ = started.communicate(timeout=60)
        assert started.returncode not in (0, None) and "address already in use" in said


def test_ctrl_c_ends_it_in_order(tiny_bundle: Path, tmp_path: Path) -> None:
    with process(bundle=tiny_bundle, store=tmp_path / "store.db") as (started, http):
        decision = http.post("/route", json=PROMPT).json()["decision_id"]
        started.send_signal(signal.SIGINT)
        said, _ = started.communicate(timeout=30)
    assert started.returncode == 0 and "Traceback" not in said
    assert decision in {row["decision_id"] for row in Store(str(tmp_path / "store.db")).decisions()}
