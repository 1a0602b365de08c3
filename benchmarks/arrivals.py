"""An open-loop load generator: requests leave at their time, whether or not earlier ones were answered.

    python -m benchmarks.arrivals --url http://127.0.0.1:8000/route --bodies bodies.jsonl --rate 500 --seconds 10

A closed loop waits for an answer before it asks again, so a server that stalls is asked less and its stall is one slow
request among many ("coordinated omission", Tene 2013). Here the gaps are drawn from an exponential distribution (a
Poisson process), and a request's latency runs from the moment when it was due, its wait for a free connection included.
With `--closed` each connection asks again as soon as it was answered, as wrk does, for machines without it.
Prints JSON: latencies in milliseconds (those of 503 apart), requests a second, and the answers by status.
"""

from __future__ import annotations

import json
import random
import select
import socket
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import click
import numpy as np

GRACE_S = 10.0
"""How long after the last arrival answers may still come."""


@dataclass(slots=True, eq=False)
class _Connection:
    socket: socket.socket
    due: float | None = None
    received: bytearray = field(default_factory=bytearray)

    def fileno(self) -> int:
        return self.socket.fileno()


def wire_requests(url: str, bodies: list[bytes], key: str | None) -> list[bytes]:
    """The bodies as HTTP/1.1 POST requests, ready to send."""
    parts = urlsplit(url)
    auth = f"authorization: Bearer {key}\r\n" if key else ""
    head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\n{auth}content-type: application/json\r\n"
    return [f"{head}content-length: {len(body)}\r\n\r\n".encode() + body for body in bodies]


def run(
    url: str, bodies: list[bytes], *, key: str | None, rate: float | None, seconds: float, connections: int
) -> dict[str, Any]:
    """Sends the bodies in turn at `rate` a second (None: closed loop) and measures every answer."""
    parts = urlsplit(url)
    wire, rng = wire_requests(url, bodies, key), random.Random(0)
    pool = [_Connection(socket.create_connection((parts.hostname, parts.port))) for _ in range(connections)]
    for connection in pool:
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    idle, waiting = deque(pool), deque[float]()
    taken: list[float] = []
    turned_away: list[float] = []
    statuses: Counter[str] = Counter()
    started = time.perf_counter()
    end, due, sent = started + seconds, started, 0
    while True:
        now = time.perf_counter()
        while rate is not None and due <= now and due < end:
            waiting.append(due)
            due += rng.expovariate(rate)
        while idle and (waiting or (rate is None and now < end)):
            connection = idle.popleft()
            connection.due = waiting.popleft() if rate is not None else time.perf_counter()
            connection.socket.sendall(wire[sent % len(wire)])
            sent += 1
        busy = [c for c in pool if c.due is not None]
        if (not busy and not waiting and now >= end) or now > end + GRACE_S:
            break
        pause = due - time.perf_counter() if rate is not None and due < end else 0.1
        for connection in select.select(busy, [], [], max(0.0, pause))[0]:
            status = _receive(connection)
            if status is None:
                continue
            if connection.due is not None:
                (turned_away if status == "503" else taken).append(time.perf_counter() - connection.due)
            statuses[status] += 1
            connection.due = None
            if status == "closed":
                connection.socket.close()
                connection.socket = socket.create_connection((parts.hostname, parts.port))
            idle.append(connection)
    wall = time.perf_counter() - started
    unanswered = sum(c.due is not None for c in pool) + len(waiting)
    for connection in pool:
        connection.socket.close()
    return {
        "rps": len(taken) / wall,
        "requests": sent,
        "unanswered": unanswered,
        "statuses": dict(statuses),
        **{f"p{p:g}_ms": float(np.percentile(taken, p)) * 1e3 for p in (50, 99, 99.9)},
        "max_ms": max(taken) * 1e3,
        "turned_away_p99_ms": float(np.percentile(turned_away, 99)) * 1e3 if turned_away else None,
    }


def _receive(connection: _Connection) -> str | None:
    """Reads what has come; the answer's status when it is whole, "closed" where the server hung up, None before."""
    try:
        chunk = connection.socket.recv(1 << 16)
    except ConnectionError:
        chunk = b""
    if not chunk:
        connection.received.clear()
        return "closed"
    connection.received += chunk
    head, found, body = bytes(connection.received).partition(b"\r\n\r\n")
    if not found:
        return None
    length = next(int(h[15:]) for h in head.lower().split(b"\r\n") if h.startswith(b"content-length:"))
    if len(body) < length:
        return None
    connection.received.clear()
    return head[9:12].decode()


@click.command(help=__doc__)
@click.option("--url", required=True)
@click.option("--bodies", required=True, type=click.Path(path_type=Path, exists=True), help="A JSON body a line.")
@click.option("--key", help="Sent as a bearer token.")
@click.option("--rate", type=float, default=500.0, show_default=True, help="Requests a second.")
@click.option("--closed", is_flag=True, help="No rate: ask again as soon as answered.")
@click.option("--seconds", type=float, default=10.0, show_default=True)
@click.option("--connections", type=click.IntRange(1, 1000), default=64, show_default=True)
def main(url: str, bodies: Path, key: str | None, rate: float, closed: bool, seconds: float, connections: int) -> None:
    found = run(
        url, bodies.read_bytes().splitlines(), key=key, rate=None if closed else rate, seconds=seconds,
        connections=connections,
    )  # fmt: skip
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
