"""Embeddings off the event loop: one thread, a bounded queue, a deadline, and the twin for what misses it.

The thread embeds one text at a time, since in a batch the last bits of an embedding depend on the company. A text that
is waited for twice is embedded once, one that nobody waits for any more is dropped, and one that could not be ready in
time is not queued at all: under a flood its request is answered at once and the thread's work is all of use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from router_ml.router import Estimator, Router
from router_ml.types import FloatArray, RouteRequest
from serving.problems import ProblemError

if TYPE_CHECKING:
    from features.staged import Staged

log = logging.getLogger(__name__)
Tokens = npt.NDArray[np.int64]
Late = Literal["deadline", "busy", "failed"]
"""Why a request has no embedding: it did not come in time, the queue is too long, or the encoder raised."""
ROOM = 64
"""Texts that may wait for the thread."""
_OVERHEAD = 10
"""What a text costs beside its tokens, in tokens."""
_LEARN = 0.2


@dataclass(eq=False, slots=True)
class _Text:
    tokens: Tokens
    waiting: list[asyncio.Future[FloatArray | Late]] = field(default_factory=list)

    @property
    def size(self) -> int:
        return len(self.tokens) + _OVERHEAD

    @property
    def wanted(self) -> bool:
        return any(not waiter.done() for waiter in self.waiting)


class _Queue:
    """What the event loop and the thread share. It does not know the `Embedder`, whose end is the thread's end."""

    def __init__(self, embed: Callable[[Tokens], FloatArray]) -> None:
        self.embed = embed
        self.changed = threading.Condition()
        self.texts: dict[bytes, _Text] = {}  # in the order of their coming
        self.now: tuple[bytes, _Text, float] | None = None  # what the thread is at, and since when
        self.pace = 0.0  # seconds a token, of late
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def join(self, tokens: Tokens, waiter: asyncio.Future[FloatArray | Late], within: float) -> bool:
        """Queues a text for a waiter; False where it could not be ready within so many seconds."""
        key = tokens.tobytes()
        with self.changed:
            text = self.now[1] if self.now is not None and self.now[0] == key else self.texts.get(key)
            if text is None:
                text = _Text(tokens)
                if self.closed or not self._has_room(text, within):
                    return False
                self.texts[key] = text
                self.changed.notify()
            text.waiting.append(waiter)
        return True

    def _has_room(self, text: _Text, within: float) -> bool:
        if self.now is None and not self.texts:  # whatever it takes: how long that is has to be known
            return True
        for key in [key for key, other in self.texts.items() if not other.wanted]:
            del self.texts[key]
        ahead = sum([other.size for other in self.texts.values()])
        left = 0.0
        if self.now is not None:
            left = max(self.now[1].size * self.pace - (time.monotonic() - self.now[2]), 0.0)
        return len(self.texts) < ROOM and left + (ahead + text.size) * self.pace <= within

    def run(self) -> None:
        """The thread."""
        while True:
            with self.changed:
                while not self.closed and not self.texts:
                    self.changed.wait()
                if self.closed:
                    waiting = [waiter for text in self.texts.values() for waiter in text.waiting]
                    break
                key = next(iter(self.texts))
                text = self.texts.pop(key)
                if not text.wanted:
                    continue
                started = time.monotonic()
                self.now = key, text, started
            result: FloatArray | Late
            try:
                result = self.embed(text.tokens)
            except Exception as error:  # noqa: BLE001 (one text's failure is no other's; its words could be the prompt's)
                log.error("a text was not embedded: %s", type(error).__name__)
                result = "failed"
            with self.changed:
                self.now = None
                pace = (time.monotonic() - started) / text.size
                self.pace += (pace - self.pace) * (_LEARN if self.pace else 1.0)
            for waiter in text.waiting:
                _tell(waiter, result)
            del text, result
        for waiter in waiting:
            _tell(waiter, "busy")


def _tell(waiter: asyncio.Future[FloatArray | Late], result: FloatArray | Late) -> None:
    with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits
        waiter.get_loop().call_soon_threadsafe(_set, waiter, result)


def _set(waiter: asyncio.Future[FloatArray | Late], result: FloatArray | Late) -> None:
    if not waiter.done():
        waiter.set_result(result)


class Embedder:
    """The thread that embeds. It ends with this object, when nothing refers to it any more, or when it is closed."""

    def __init__(self, embed: Callable[[Tokens], FloatArray]) -> None:
        self._queue = _Queue(embed)
        self._thread = threading.Thread(target=self._queue.run, name="embedder", daemon=True)
        self._thread.start()
        self.close = weakref.finalize(self, self._queue.close)
        """Ends the thread; what is waited for then is not embedded."""

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """Texts that wait for the thread."""
        return len(self._queue.texts)

    async def embed(self, tokens: Tokens, within: float) -> FloatArray | Late:
        """The embedding of a text given as token ids, or why there is none within so many seconds."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[FloatArray | Late] = loop.create_future()
        if not self._queue.join(tokens, waiter, within):
            return "busy"
        timer = None if math.isinf(within) else loop.call_later(within, _set, waiter, "deadline")
        try:
            return await waiter
        finally:
            waiter.cancel()  # where the request itself was: its text is not wanted then
            if timer is not None:
                timer.cancel()


@dataclass(frozen=True, slots=True)
class Stand:
    """Who estimates for one request; `late` says why it is the twin."""

    estimator: Estimator
    late: Late | None = None


class Embedding:
    """Estimators of a router whose encoder is a transformer; the thread lives as long as this does."""

    def __init__(self, router: Router, staged: Staged) -> None:
        self.twin = router.twin
        self.staged = staged
        self.embedder = Embedder(staged.encoder.embed)

    @classmethod
    def of(cls, router: Router) -> Embedding | None:
        """None for a router that embeds in microseconds."""
        from features.staged import Staged

        staged = Staged.of(router.estimator)
        if staged is None:
            return None
        if router.twin is None:
            log.warning(
                "bundle %s has a transformer and no twin that stands in for it: requests wait for their embedding, "
                "and get a 503 when too many do; train it again to have one",
                router.model_version,
            )
        return cls(router, staged)

    async def estimator(self, request: RouteRequest, within: float) -> Stand:
        """Who estimates for a request: the learner where the embedding comes within so many seconds, else its twin.

        Without a twin it waits. Raises ProblemError (503) when there is then no embedding.
        """
        seen = self.staged.read(request)
        found: FloatArray | Late | None = self.staged.encoder.remembered(seen.tokens)
        if found is None:
            found = await self.embedder.embed(seen.tokens, within if self.twin is not None else math.inf)
        if not isinstance(found, str):
            return Stand(self.staged.rest(seen, found))
        if self.twin is None:
            why = "the request's text could not be embedded, and the bundle has no twin that stands in: train it again"
            raise ProblemError(503, "unavailable", why, headers={"retry-after": "1"})
        return Stand(self.twin, found)
