"""A small HTTP server that answers as a script says: in time or not, whole or cut off."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Answer:
    """What to do with a request: wait, then answer; with `cut` only so many bytes of the body, then hang up."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0
    cut: int | None = None
    drip_s: float = 0.0


HANG = Answer(after_s=3.0)
DIE = Answer(status=0)  # hangs up without a word


@dataclass
class Faulty:
    """The script (its last answer is repeated), and what was asked."""

    url: str
    script: list[Answer]
    seen: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    connections: int = 0


@contextlib.contextmanager
def faulty(*script: Answer) -> Iterator[Faulty]:
    """Serves the script on a free port of 127.0.0.1."""
    state = Faulty("", list(script))
    ends = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            state.connections += 1

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            state.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            answer = state.script.pop(0) if len(state.script) > 1 else state.script[0]
            ends.wait(answer.after_s)
            if answer.status == 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            with contextlib.suppress(OSError):
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(answer.body)))
                self.end_headers()
                for i in range(len(answer.body) if answer.drip_s else 0):
                    self.wfile.write(answer.body[i : i + 1])
                    time.sleep(answer.drip_s)
                if not answer.drip_s:
                    self.wfile.write(answer.body[: answer.cut])
                if answer.cut is not None:
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True

        do_GET = do_POST  # noqa: N815 (the base class names it)

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        ends.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
