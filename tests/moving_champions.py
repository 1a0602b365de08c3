"""Registries for tests that move the champion: real MLflow stores made once and copied, and a real MLflow server."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from live_service import free_port, wait_for
from mlflow import MlflowClient

from router_ml.bundle import MANIFEST, read_bundle, write_bundle
from router_ml.registry import connect, ensure_store
from router_ml.rollout import promote

NAME = "router"


def registry_with(factory: pytest.TempPathFactory, to: Path, *bundles: str, champions: str = "") -> str:
    """A new registry whose versions 1, 2, … are these bundles; each of `champions` was promoted in turn."""
    to.mkdir(parents=True, exist_ok=True)
    shutil.copy(_template(factory.getbasetemp() / "empty-registry"), to / "mlflow.db")
    uri = f"sqlite:///{to}/mlflow.db"
    add_versions(uri, *bundles)
    for version in champions:
        promote(uri, NAME, version, who="setup")
    return uri


def add_versions(uri: str, *bundles: str) -> None:
    client = connect(uri)
    client.create_registered_model(NAME)
    for bundle in bundles:
        client.create_model_version(NAME, source="s3://nowhere/router", tags={"bundle_version": bundle})


@functools.cache
def _template(folder: Path) -> Path:
    folder.mkdir()
    ensure_store(f"sqlite:///{folder}/mlflow.db")
    return folder / "mlflow.db"


def aliases(uri: str) -> tuple[str | None, str | None]:
    """(champion, previous)."""
    found = MlflowClient(uri, uri).get_registered_model(NAME).aliases
    return tuple(None if v is None else str(v) for v in (found.get("champion"), found.get("previous")))  # type: ignore[return-value]


def another(bundle: Path, to: Path) -> Path:
    """The same learner under another version."""
    was = read_bundle(bundle)
    files = {p.name: p.read_bytes() for p in bundle.iterdir() if p.name not in (MANIFEST, "manifest.sha256")}
    manifest = {k: v for k, v in was.manifest.items() if k not in ("format", "files", "sha256")}
    write_bundle(to, manifest | {"log_sha256": "cd" * 32}, files)
    assert read_bundle(to).version != was.version
    return to


class MlflowServer:
    """`mlflow server` on a folder; it may be killed and started again."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--workers", "1"]
        command += ["--artifacts-destination", f"file://{self.folder}/artifacts"]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        def up() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{self.uri}/health").is_success
            return False

        wait_for(up, 90)

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its workers, too
            self._process.wait()
            self._process = None
