"""The real service on this machine for as long as it is needed: a process of its own on a free port of the loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from router_ml.errors import RouterError

STARTS_WITHIN_S = 60.0


@contextmanager
def local_service(options: Sequence[str], log: Path) -> Iterator[str]:
    """`router-ml serve` with these options, ready; gives its URL. What it says goes into the file `log`.

    It is asked to end afterwards, and so stores what it has still in hand. Raises RouterError with its last words where
    it does not become ready.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "router_ml.cli", "serve", *options, "--port", str(port)]
    with log.open("wb") as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_ready(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()


def send(url: str, body: dict[str, Any], *, method: str = "POST") -> dict[str, Any]:
    """What the service answers to a JSON body. Raises RouterError with its words for any other status than 200."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            decoded: dict[str, Any] = json.load(answer)
            return decoded
    except urllib.error.HTTPError as error:
        raise RouterError(f"the service answered {error.code}: {error.read().decode()[:500]}") from None


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + STARTS_WITHIN_S
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=2) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RouterError(f"the service did not become ready; its last words, from {log}:\n{log.read_text()[-1000:]}")
