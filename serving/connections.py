"""Connections that no client can hold on to: what uvicorn leaves unbounded of a request gets a length and a time."""

from __future__ import annotations

import re
from asyncio import TimerHandle, Transport
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.problems import MEDIA_TYPE, ProblemError

MAX_HEAD_BYTES = 64 * 1024
# The parser takes what follows an upgrade for another protocol's, the body with it; Java's client always offers h2c.
_UPGRADE = re.compile(rb"\r\n[Uu][Pp][Gg][Rr][Aa][Dd][Ee]:")


class BoundedProtocol(HttpToolsProtocol):
    """Uvicorn's connection, closed on a request whose head or body is too long or too slow.

    A head has `seconds` and `MAX_HEAD_BYTES`, beside what one read brings. The body after it has `seconds` again and as
    many bytes as one of `max_body_bytes` takes in the smallest chunks: endpoints bound what they read, this bounds what
    nobody reads (the rest of a refused body, trailers, extensions of chunks). What is not HTTP is told so.
    """

    def __init__(self, *args: Any, seconds: float, max_body_bytes: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._seconds = seconds
        self._max_bytes = MAX_HEAD_BYTES + 6 * max_body_bytes
        self._bytes = 0
        self._since: float | None = None  # when the head, or the body, that has not ended began; None between requests
        self._in_body = False
        self._timer: TimerHandle | None = None
        self._stalled: TimerHandle | None = None  # ends a connection whose client does not read

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """Starts the clock: a connection on which nothing comes is a slow head."""
        super().connection_made(transport)
        self._since = self.loop.time()
        self._timer = self.loop.call_later(self._seconds, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops the clock."""
        for timer in (self._timer, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read its answers; one that does not for so long is cut off."""
        super().pause_writing()
        self._stalled = self.loop.call_later(self._seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """It reads again."""
        if self._stalled is not None:
            self._stalled.cancel()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Counts the bytes of the request that is coming in."""
        if self._since is None:
            self._since, self._bytes = self.loop.time(), 0
        self._bytes += len(data)
        if not self._in_body and _UPGRADE.search(data):
            head, end, rest = data.partition(b"\r\n\r\n")
            data = _UPGRADE.sub(b"\r\nignored:", head) + end + rest
        super().data_received(data)
        if self._since is None or self.transport.is_closing():
            return
        if not self._in_body and self._bytes > MAX_HEAD_BYTES:
            self._refuse(
                ProblemError(
                    431, "head-too-large", f"path and headers may have {MAX_HEAD_BYTES} bytes: send shorter ones"
                )
            )
        elif self._bytes > self._max_bytes:
            self.transport.close()

    def on_headers_complete(self) -> None:
        """The head is here; the body has a time of its own."""
        self._since, self._in_body = self.loop.time(), True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is here. How long its answer takes is no client's doing."""
        self._since, self._in_body = None, False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP is told so, and the connection closed."""
        self._refuse(ProblemError(400, "invalid-request", "this is not an HTTP/1.1 request: send one"))

    def _look(self) -> None:
        """Whether the request is late; looked at once in `seconds`, so that requests in time cost no timer."""
        if self.transport.is_closing():
            return
        left = self._seconds if self._since is None else self._since + self._seconds - self.loop.time()
        if left > 0.0:
            self._timer = self.loop.call_later(left, self._look)
        else:
            what = "body" if self._in_body else "head"
            self._refuse(ProblemError(408, "timeout", f"the request's {what} was not here within {self._seconds:g} s"))

    def _refuse(self, problem: ProblemError) -> None:
        """Answers in the place of an endpoint, and closes; where one has a whole request, its answer comes first."""
        cycle = self.cycle
        if cycle is not None and not (cycle.response_complete or cycle.more_body):
            cycle.keep_alive = False
            self.pipeline.clear()
            self.flow.pause_reading()
            return
        if cycle is None or not (cycle.response_started and self._in_body):  # the request has no answer yet
            body = problem.response().body
            head = f"content-type: {MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(b"".join([STATUS_LINE[problem.status], head.encode(), bytes(body)]))
        self.transport.close()
