"""Time of `POST /route` as a gateway sees it, and what a deadline costs where the bundle has a transformer.

    python -m benchmarks.service --bundle BUNDLE --json OUT

The service runs in a process of its own, with its store; 1 and then 16 connections ask one request after the other over
loopback, each request another prompt of real ones, cut at a random place so that no text comes twice: the service
remembers texts. Of each run: milliseconds per answer, answers a second, the share that the bundle's static twin gave
(`degraded`), and what `/healthz` took meanwhile, asked for every 20 ms: it says how free the event loop is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from benchmarks.latency import real_prompts
from benchmarks.results import open_console, write_results

HEALTHZ_EVERY_S = 0.02


@contextlib.contextmanager
def service(bundle: Path, folder: Path, deadline_ms: float) -> Iterator[int]:
    """`router-ml serve` on a free port, ready; yields the port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    command = [sys.executable, "-m", "router_ml.cli", "serve", "--bundle", str(bundle), "--port", str(port)]
    command += ["--store", str(folder / "store.db"), "--embed-deadline-ms", str(deadline_ms)]
    with (folder / "service.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()  # bound when the bundle is loaded
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise click.ClickException(f"the service did not start: {(folder / 'service.log').read_text()}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(30)


async def load(port: int, prompts: list[str], connections: int, seconds: float) -> dict[str, Any]:
    """So many connections, each asking as fast as it is answered; the prompts are dealt out among them."""
    taken: list[float] = []
    healthz: list[float] = []
    degraded = 0
    began = time.perf_counter()
    until = began + seconds

    async def ask(texts: list[str]) -> None:
        nonlocal degraded
        async with connected(port) as say:
            for text in texts:
                started = time.perf_counter()
                if started > until:
                    break
                answer = await say("POST", "/route", json.dumps({"prompt": text}).encode())
                taken.append(time.perf_counter() - started)
                degraded += json.loads(answer)["degraded"]

    async def watch() -> None:
        async with connected(port) as say:
            while time.perf_counter() < until:
                started = time.perf_counter()
                await say("GET", "/healthz", b"")
                healthz.append(time.perf_counter() - started)
                await asyncio.sleep(HEALTHZ_EVERY_S)

    watcher = asyncio.create_task(watch())
    await asyncio.gather(*(ask(prompts[i::connections]) for i in range(connections)))
    lasted = time.perf_counter() - began
    await watcher
    return {
        "connections": connections,
        "answers": len(taken),
        "answers_per_s": len(taken) / lasted,
        "route_ms": _percentiles(taken),
        "healthz_ms": _percentiles(healthz),
        "degraded": degraded / len(taken),
    }


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Callable[[str, str, bytes], Awaitable[bytes]]]:
    """One connection that is kept: a function from method, path and body to the answer's body.

    Hardly more than the sockets, since a client's own time would count as the service's.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)

    async def say(method: str, path: str, body: bytes) -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        said = await reader.readuntil(b"\r\n\r\n")
        size = next(int(line[15:]) for line in said.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        answer = await reader.readexactly(size)
        if not said.startswith(b"HTTP/1.1 200"):
            raise click.ClickException(f"{path} answered {answer.decode()}")
        return answer

    try:
        yield say
    finally:
        writer.close()


def new_texts(prompts: list[str], count: int) -> list[str]:
    """`count` different texts of about the prompts' lengths."""
    rng = np.random.default_rng(0)
    texts = []
    for i in range(count):
        words = prompts[i % len(prompts)].split()
        at = int(rng.integers(len(words)))
        texts.append(" ".join([f"No. {i}:", *words[at:], *words[:at]]))
    return texts


def _percentiles(seconds: list[float]) -> dict[str, float]:
    values = np.array(seconds) * 1000.0
    return {
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
        "max": float(values.max()),
    }


@click.command(help=__doc__)
@click.option("--bundle", type=click.Path(path_type=Path, exists=True), required=True, help="A trained bundle.")
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--connections", multiple=True, default=(1, 16), show_default=True, type=click.IntRange(1))
@click.option("--deadline-ms", multiple=True, default=(50.0,), show_default=True, type=float)
@click.option("--seconds", default=10.0, show_default=True, help="Of each run.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
def main(
    bundle: Path,
    data: Path,
    connections: tuple[int, ...],
    deadline_ms: tuple[float, ...],
    seconds: float,
    json_path: Path | None,
) -> None:
    console = open_console()
    if not (data / "catalog.json").is_file():
        raise click.ClickException(f"no published outcomes in {data}: give --data DIR")
    prompts = real_prompts(data, 300)
    texts = new_texts(prompts, 40_000)
    runs = []
    for deadline in deadline_ms:
        with tempfile.TemporaryDirectory() as folder, service(bundle, Path(folder), deadline) as port:
            for count in connections:
                asyncio.run(load(port, texts[: 20 * count], count, seconds))  # a warm-up
                texts = texts[20 * count :]
                runs.append({"deadline_ms": deadline, **asyncio.run(load(port, texts, count, seconds))})
                texts = texts[runs[-1]["answers"] :]
    columns = ("deadline ms", "connections", "answers/s", "p50 ms", "p99 ms", "max ms", "degraded", "/healthz p99 ms")
    table = Table(*columns)
    for run in runs:
        took = (f"{run['route_ms'][name]:.1f}" for name in ("p50", "p99", "max"))
        table.add_row(
            f"{run['deadline_ms']:g}", str(run["connections"]), f"{run['answers_per_s']:.0f}", *took,
            f"{run['degraded']:.0%}", f"{run['healthz_ms']['p99']:.1f}",
        )  # fmt: skip
    console.print(table)
    if json_path:
        write_results(console, json_path, {"prompts": len(prompts), "runs": runs})


if __name__ == "__main__":
    main()
