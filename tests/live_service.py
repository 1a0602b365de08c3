"""The service as tests meet it: the real app behind a real HTTP server, in a thread or in a process of its own."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import uvicorn

from serving.app import configured, create_app
from serving.service import Service
from serving.settings import Settings

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Running:
    """A running service: its insides, and a client for its port."""

    service: Service
    http: httpx.Client

    def decisions(self) -> list[dict[str, Any]]:
        assert self.service.store.flush()
        return list(self.service.store.decisions())

    def metric(self, line: str) -> float:
        """The value of the metric whose line begins so; 0 where it was never counted."""
        for found in self.http.get("/metrics").text.splitlines():
            if found.startswith(line + " "):
                return float(found.rsplit(" ", 1)[1])
        return 0.0


@contextlib.contextmanager
def running(bundle: Path | None, store: Path | str, **settings: Any) -> Iterator[Running]:
    """Serves the bundle on a free port of 127.0.0.1, in a thread of this process."""
    chosen = Settings(bundle=bundle, store=str(store), **{"drain": "thread"} | settings)
    app = create_app(chosen)
    server = uvicorn.Server(configured(app, chosen, log_level="warning"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        wait_for(lambda: server.started)
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=30) as http:
            yield Running(app.state.service, http)
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


# What the command line does with `serve`: settings in, an error's text on stderr and exit code 2.
PROCESS = """
import json, sys
from pathlib import Path
from router_ml.errors import RouterError
try:
    from serving.app import serve
    from serving.settings import Settings
    from serving.health import HealthSettings
    values = json.loads(sys.argv[1])
    values["health"] = HealthSettings(**values.get("health", {}))
    paths = ("bundle", "challenger", "policy", "cache", "spool", "release_logs")
    serve(Settings(**{k: Path(v) if k in paths else v for k, v in values.items()}))
except RouterError as error:
    print(f"Error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def start_process(
    *,
    python: str = sys.executable,
    cwd: Path = ROOT,
    env: dict[str, str] | None = None,
    output: int | IO[str] = subprocess.PIPE,
    **settings: Any,
) -> subprocess.Popen[str]:
    """The service in a process of its own. A pipe that nobody reads stops it after 64 kB of log."""
    values = json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})
    return subprocess.Popen(
        [python, "-c", PROCESS, values],
        cwd=cwd,
        env=os.environ | (env or {}),
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


@contextlib.contextmanager
def process(port: int | None = None, **settings: Any) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A process that serves, ready, by default on a free port; it is killed at the end if it still runs."""
    port = port or free_port()
    started = start_process(port=port, **settings)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

            def ready() -> bool:
                assert started.poll() is None, started.communicate()[0]
                with contextlib.suppress(httpx.TransportError):
                    return http.get("/readyz").status_code == 200
                return False

            wait_for(ready, 60)
            yield started, http
    finally:
        started.kill()
        started.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(condition: Callable[[], bool], timeout: float = 15.0) -> None:
    """Waits until the condition holds; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
