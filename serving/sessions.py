"""The sessions of one process: which model each conversation is with, and what prompts its models were sent.

They are kept in memory, the most recent ones, under the API key and the tenant that they belong to: nobody's session
name reaches another's. Where another process has served a conversation meanwhile, its own text tells: there are answers
in it that this process has not asked for. Then, and only then, the store is asked for the session's latest decision.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from router_ml.session import Prefix, Session, answered_prefix, lengths
from router_ml.store import Store
from router_ml.types import RouteRequest

log = logging.getLogger(__name__)
Key = tuple[str | None, str | None, str]
WAITING = 16  # requests that may wait for the store at a time
PREFIXES = 4
"""Prompts that are remembered of a session: side tasks (a title, a summary) go between the turns of a conversation."""


@dataclass(slots=True)
class _Entry:
    model: str
    decision_id: str
    sent: tuple[Prefix, ...]  # newest last, `age` being the clock's time
    at: float


class Sessions:
    """At most `limit` sessions, each for `seconds` after its latest decision. `clock` gives monotonic seconds.

    Every method may be called from any thread.
    """

    def __init__(self, seconds: float, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self.limit = limit
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._of_decision: dict[str, Key] = {}  # each session's latest

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, request: RouteRequest) -> Session | None:
        """What is known of the request's session; None where nothing is."""
        if request.session is None:
            return None
        now = self._clock()
        with self._lock:
            entry = self._entries.get((request.key, request.tenant, request.session))
        if entry is None or now > entry.at + self.seconds:
            return None
        return Session(entry.model, tuple([p._replace(age=now - p.age) for p in entry.sent]))

    def decided(self, request: RouteRequest, decision_id: str, model: str) -> None:
        """Notes that a decision of the request's session goes to the model."""
        if request.session is None or not self.limit:
            return
        key, now = (request.key, request.tenant, request.session), self._clock()
        prefix = Prefix(model, len(request.messages), lengths(request)[-1], now)
        with self._lock:
            entry = self._entries.pop(key, None)
            sent: tuple[Prefix, ...] = ()
            if entry is not None:
                self._of_decision.pop(entry.decision_id, None)
                sent = entry.sent[1 - PREFIXES :]
            self._entries[key] = _Entry(model, decision_id, (*sent, prefix), now)
            self._of_decision[decision_id] = key
            while len(self._entries) > self.limit or now > next(iter(self._entries.values())).at + self.seconds:
                _, oldest = self._entries.popitem(last=False)
                self._of_decision.pop(oldest.decision_id, None)

    def served(self, decision_id: str, model: str | None) -> None:
        """Notes which model really served a session's latest decision; None: none did, nothing is cached of it."""
        with self._lock:
            key = self._of_decision.get(decision_id)
            if key is None:
                return
            entry = self._entries[key]
            if model is None:
                entry.sent = entry.sent[:-1]
            elif model != entry.model:
                entry.model = model
                entry.sent = (*entry.sent[:-1], entry.sent[-1]._replace(model=model))


def is_behind(request: RouteRequest, session: Session | None) -> bool:
    """Whether the conversation has answers that the session does not know of: somebody else has served it, too."""
    known = 0
    if session is not None:
        sizes = lengths(request)
        fitting = [p.messages for p in session.prefixes if p.messages < len(sizes) and sizes[p.messages] == p.chars]
        known = max(fitting, default=0)
    answers = sum([m.role == "assistant" for m in request.messages[known:]])
    return answers > (known > 0)  # the one that it was asked for itself


class StoredSessions:
    """Sessions as the store knows them, looked up off the event loop within `deadline` seconds (0: never).

    One thread, and a bounded number of requests that wait for it: a store that hangs costs these a deadline each.
    """

    def __init__(self, store: Store, deadline: float, seconds: float) -> None:
        self.store = store
        self.deadline = deadline
        self.seconds = seconds
        self._thread = ThreadPoolExecutor(1, "session-lookup")
        self._waiting = 0
        self._away = False

    async def get(self, request: RouteRequest, known: Session | None) -> Session | None:
        """The request's session as the store's latest decision has it, or as it is `known` where the store has none."""
        if self._waiting >= WAITING or not self.deadline or request.session is None:
            return known
        self._waiting += 1
        key = (request.key, request.tenant, request.session)
        since = time.time() - self.seconds
        looking = self._thread.submit(self.store.session_model, *key, since_us=int(since * 1e6))
        loop = asyncio.get_running_loop()
        looking.add_done_callback(lambda _: loop.call_soon_threadsafe(self._done))
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(looking), self.deadline)
        except Exception as error:  # noqa: BLE001 (routing goes on without)
            if not self._away:
                log.warning("sessions cannot be looked up in the store: %s", type(error).__name__)
            self._away = True
            return known
        self._away = False
        if found is None:
            return known
        model, time_us = found
        sent = answered_prefix(request, model, max(0.0, time.time() - time_us / 1e6))
        return Session(model, (*(known.prefixes if known else ()), *sent))

    def close(self) -> None:
        """Ends the thread; a look-up that hangs is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _done(self) -> None:
        self._waiting -= 1
