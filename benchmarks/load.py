"""The service under load, beside a bare FastAPI endpoint in the same run.

    python -m benchmarks.load --json OUT

`router-ml serve` in one process: 13 candidates (trained on MMLU-Pro), real prompts, an API key, every decision kept.
Beside it `benchmarks.bare`, the same schemas and a constant answer. Rounds of both in turn, 1 and 16 connections in a
closed loop (wrk; `benchmarks.arrivals --closed` where it is not installed: `apt-get install wrk`); a ratio is the
median over the rounds. Then open loops (`benchmarks.arrivals`) at half of the service's peak and at twice the peak. A
start to readiness, resident memory, and `paretobandit`'s decision beside ours, both in process.
A run fails when an answer was not 2xx, or when a decision that was answered is not in the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.latency import real_prompts, trained_bundle
from benchmarks.results import open_console, write_results
from features.load import load_router
from router_ml.conversation import request_of
from router_ml.store import Store

KEY = "a-key-of-the-load-benchmark"
CONNECTIONS = (1, 16)
WARM_UP_S = 2.0
RUNS = Path(__file__).parent


@dataclass(frozen=True)
class Server:
    """A process that answers POST /route."""

    url: str
    pid: int
    seconds_to_ready: float

    def memory_mb(self) -> float:
        """Resident memory."""
        return float(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * 4096 / 1e6


@contextlib.contextmanager
def started(command: list[str], ready: str) -> Iterator[Server]:
    """Runs `python -m … --port PORT`, waits until GET `ready` answers, ends it with SIGTERM and waits until it has."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", *command, "--port", str(port)], stdout=said, stderr=said)
        try:
            while True:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5):
                    break
                if process.poll() is not None:
                    said.seek(0)
                    raise click.ClickException(f"{command[0]} ended: {said.read()}")
                time.sleep(0.005)
            yield Server(f"http://127.0.0.1:{port}/route", process.pid, time.perf_counter() - began)
            process.terminate()
            process.wait(60)
        finally:
            process.kill()
            process.wait()


def closed_loop(server: Server, bodies: Path, connections: int, seconds: float) -> dict[str, float]:
    """One closed-loop run: requests a second and latencies."""
    if wrk := shutil.which("wrk"):
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", str(RUNS / "wrk.lua")]
        command = [wrk, *options, server.url, "--", str(bodies), KEY]
    else:
        command = [*_arrivals(server, bodies, seconds), "--closed", "--connections", str(connections)]
    return _checked(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def open_loop(server: Server, bodies: Path, rate: float, seconds: float) -> dict[str, float]:
    """One open-loop run at `rate` requests a second."""
    command = [*_arrivals(server, bodies, seconds), "--rate", str(rate)]
    return _checked(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def overload(server: Server, bodies: Path, rate: float, seconds: float) -> dict[str, Any]:
    """An open loop at a rate that is too high: what is answered, what is turned away, and how long either takes."""
    command = [*_arrivals(server, bodies, seconds), "--rate", str(rate), "--connections", "900"]
    found: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found | {"rate": rate}


def _arrivals(server: Server, bodies: Path, seconds: float) -> list[str]:
    options = ["--url", server.url, "--bodies", str(bodies), "--key", KEY, "--seconds", str(seconds)]
    return [sys.executable, "-m", "benchmarks.arrivals", *options]


def _checked(output: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    statuses = found.get("statuses", {"200": found["requests"]})
    if found.get("failed") or found.get("unanswered") or set(statuses) != {"200"}:
        raise click.ClickException(f"not every request was answered with 200: {found}")
    return found


def measure(bundle: Path, prompts: list[str], folder: Path, *, rounds: int, seconds: float) -> dict[str, Any]:
    """Both servers under both loops, and the service's start and memory."""
    bodies, keys, store = folder / "bodies.jsonl", folder / "keys.toml", folder / "store.db"
    asked = [json.dumps({"messages": [{"role": "user", "content": prompt}]}) for prompt in prompts]
    bodies.write_text("\n".join(asked) + "\n")
    keys.write_text(f'[gateway]\nsha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"\n')
    serve = ["router_ml.cli", "serve", "--bundle", str(bundle), "--store", str(store), "--api-keys", str(keys)]
    starts = []
    for _ in range(rounds):
        with started(serve, "/readyz") as ours:
            starts.append(ours.seconds_to_ready)
    with started(serve, "/readyz") as ours:
        idle_mb = ours.memory_mb()
        answer = folder / "answer.json"
        answer.write_bytes(_ask(ours, asked[0]))
        with started(["benchmarks.bare", "--answer", str(answer)], "/openapi.json") as bare:
            servers = {"ours": ours, "bare": bare}
            warm = {s: closed_loop(at, bodies, 16, WARM_UP_S) for s, at in servers.items()}
            runs = [
                {n: {s: closed_loop(at, bodies, n, seconds) for s, at in servers.items()} for n in CONNECTIONS}
                for _ in range(rounds)
            ]
            peak = statistics.median(run[16]["ours"]["rps"] for run in runs)
            opened = {s: open_loop(at, bodies, peak / 2, seconds) for s, at in servers.items()}
            over = overload(ours, bodies, 2 * peak, seconds)
        busy_mb = ours.memory_mb()
    stored = _stored(store)
    told = 1 + over["statuses"].get("200", 0)
    told += sum(loop["requests"] for run in [*runs, {"warm": warm}, {"open": opened}] for loop in _ours(run))
    if stored < told:  # a few more are there: wrk hangs up on the last ones
        raise click.ClickException(f"{told:.0f} decisions were answered, and {stored} are in the store")

    def ratio(connections: int, metric: str, of: str, to: str) -> float:
        return statistics.median(run[connections][of][metric] / run[connections][to][metric] for run in runs)

    return {
        "rps_ratio": ratio(16, "rps", "ours", "bare"),
        "p50_ratio": ratio(1, "p50_ms", "ours", "bare"),
        "p99_ratio": ratio(1, "p99_ms", "ours", "bare"),
        "closed_loop": {
            str(n): {s: {m: statistics.median(run[n][s][m] for run in runs) for m in runs[0][n][s]} for s in servers}
            for n in CONNECTIONS
        },
        "open_loop": {"rate": peak / 2, **opened["ours"], "bare": opened["bare"]},
        "overload": over,
        "cold_start_s": statistics.median(starts),
        "memory_mb": {"idle": idle_mb, "after_load": busy_mb},
        "decisions_stored": stored,
        "generator": "wrk" if shutil.which("wrk") else "benchmarks.arrivals",
    }


def _ask(server: Server, body: str) -> bytes:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    with urllib.request.urlopen(urllib.request.Request(server.url, body.encode(), headers), timeout=10) as answer:
        return bytes(answer.read())


def _ours(run: dict[Any, dict[str, dict[str, float]]]) -> list[dict[str, float]]:
    return [loop["ours"] for loop in run.values()]


def _stored(store: Path) -> int:
    """The decisions in the store after the service has ended."""
    opened = Store(str(store))
    try:
        return opened.counts()["decisions"]
    finally:
        opened.close()


def beside_paretobandit(bundle: Path, prompts: list[str], folder: Path) -> dict[str, float]:
    """Our decision and theirs on the same prompts, each in process."""
    router = load_router(bundle)
    requests = [request_of(prompt=prompt) for prompt in prompts]
    taken = []
    for turn in range(6):
        for request in requests:
            began = time.perf_counter_ns()
            router.decide(request)
            if turn:
                taken.append((time.perf_counter_ns() - began) / 1e3)
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "catalog.json").write_text(json.dumps(router.catalog.to_json()))
    options = ["--prompts", str(folder / "prompts.json"), "--catalog", str(folder / "catalog.json")]
    command = [sys.executable, "-m", "benchmarks.paretobandit", *options]
    theirs = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    ours = {"p50_us": float(np.percentile(taken, 50)), "p99_us": float(np.percentile(taken, 99))}
    return {"p50_ratio": theirs["p50_us"] / ours["p50_us"], "theirs": theirs, "ours": ours}


def show(console: Console, found: dict[str, Any]) -> None:
    """The table, and the ratios under it."""
    table = Table("", "server", "requests/s", "p50 ms", "p99 ms", title=f"{found['candidates']} candidates")
    rows = {f"{n} connections, closed": loop for n, loop in found["closed_loop"].items()}
    rows[f"open, {found['open_loop']['rate']:.0f} requests/s"] = {
        "ours": found["open_loop"],
        "bare": found["open_loop"]["bare"],
    }
    for name, loop in rows.items():
        for server in ("ours", "bare"):
            one = loop[server]
            table.add_row(name, server, f"{one['rps']:.0f}", f"{one['p50_ms']:.2f}", f"{one['p99_ms']:.2f}")
    console.print(table)
    console.print(
        f"rps_ratio {found['rps_ratio']:.2f}, p50_ratio {found['p50_ratio']:.2f}, p99_ratio {found['p99_ratio']:.2f}; "
        f"ready after {found['cold_start_s']:.2f} s; {found['memory_mb']['idle']:.0f} MB, after the load "
        f"{found['memory_mb']['after_load']:.0f} MB; {found['decisions_stored']} decisions stored"
    )
    over = found["overload"]
    statuses = ", ".join(f"{count} times {status}" for status, count in sorted(over["statuses"].items()))
    console.print(
        f"at {over['rate']:.0f} requests/s, twice the peak: {statuses}; p99 {over['p99_ms']:.0f} ms of those answered"
    )
    if "vs_paretobandit" in found:
        console.print(f"paretobandit takes {found['vs_paretobandit']['p50_ratio']:.0f} times as long to decide")


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option(
    "--bundle", type=click.Path(path_type=Path, exists=True), help="A trained bundle, instead of training one."
)
@click.option(
    "--prompts",
    "prompts_file",
    type=click.Path(path_type=Path, exists=True),
    help="A JSON array of texts of one's own.",
)
@click.option("--requests", "count", default=300, show_default=True, type=click.IntRange(3))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--seconds", default=8.0, show_default=True, type=float, help="Of every loop.")
@click.option("--peer/--no-peer", default=True, show_default=True, help="paretobandit beside our decision.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
def main(
    data: Path, bundle: Path | None, prompts_file: Path | None, count: int, rounds: int, seconds: float, peer: bool,
    json_path: Path | None,
) -> None:  # fmt: skip
    console = open_console()
    if (prompts_file is None or bundle is None) and not (data / "catalog.json").is_file():
        raise click.ClickException(f"no published outcomes in {data}: give --data DIR, or --bundle and --prompts")
    prompts = real_prompts(data, count) if prompts_file is None else json.loads(prompts_file.read_text())[:count]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if bundle is None:
            bundle = folder / "bundle"
            with console.status("training a router on MMLU-Pro"):
                trained_bundle(data, bundle, "static")
        found = measure(bundle, prompts, folder, rounds=rounds, seconds=seconds)
        found["candidates"] = len(load_router(bundle).catalog)
        found["prompts"] = {"count": len(prompts), "median_chars": float(np.median([len(p) for p in prompts]))}
        if peer:
            found["vs_paretobandit"] = beside_paretobandit(bundle, prompts[: min(count, 100)], folder)
    show(console, found)
    if json_path:
        write_results(console, json_path, found)


if __name__ == "__main__":
    main()
