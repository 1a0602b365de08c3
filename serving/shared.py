"""Several processes on one database as one service: they share what they know of models' health, and the policy.

A thread beside the event loop tells the others what became of circuits here and reads what is new there, once a second
with one small query; and it looks up the decisions of other processes whose outcomes came here. Where the database is
away, routing goes on with what the process knows itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from router_ml.errors import InputError, RouterError
from router_ml.outcome_queue import StoreError
from router_ml.policy import Policy
from router_ml.shared import publish, put_policy, read, read_spent, tell_spent
from router_ml.stored import known_decisions
from router_ml.tables import open_database
from router_ml.types import Outcome
from serving.budgets import Budgets
from serving.health import Health

log = logging.getLogger(__name__)
POLL_SECONDS = 1.0
PAUSE_SECONDS = 0.2  # between two rounds at least
READ_ALL = 60  # rounds
GRACE_SECONDS = 5.0  # in which a decision's own process may be late with its commit
NEWS_SECONDS = 600.0  # an outcome of an older decision says nothing of how the models answer now
_AWAITED = 10_000
_PAGE = 500


@dataclass(frozen=True, slots=True)
class Unclear:
    """A stored outcome whose decision this process does not know, from the API key named `key`.

    `call` says whether it speaks of the call and not of the answer's quality alone; `at` is when it came, or when its
    decision was first looked for in vain (`missed`).
    """

    outcome_id: str
    outcome: Outcome
    key: str | None
    call: bool
    at: float
    missed: bool = False


class Shared:
    """What this process shares with the others on the database at `url`; every method may be called from any thread.

    The file `cache` keeps the policy that was last read, for a start while the database is away.
    """

    def __init__(self, url: str, health: Health, cache: Path) -> None:
        self.policy: Policy | None = None
        """The policy that is stored for all processes, as far as it is known; None where none is."""
        self.policy_error: str | None = None
        """Why what is stored cannot be read as a policy: another version of this program may have written it."""
        self.policy_changed: Callable[[Policy], None] = lambda policy: None
        """Told of another stored policy, or of the default one when that is taken away. May raise RouterError."""
        self.heard: Callable[[Outcome, tuple[str, ...]], None] = lambda outcome, models: None
        """Told of an outcome that speaks of a call, with the models of its decision in order."""
        self.unmatched = 0
        """Outcomes since the start whose decision is not stored."""
        self.failures = 0
        self.budgets = Budgets()
        """What budgets have spent, here and in the other processes."""
        self._process = uuid.uuid4().hex
        self._url = url
        self._cache = cache
        self._whose = hashlib.sha256(url.encode()).hexdigest()[:16]  # the cache is of no use to another database
        self._health = health
        self._engine: sa.Engine | None = None
        self._seen = 0
        self._rounds = 0
        self._read_at = -float("inf")
        self._unclear: deque[Unclear] = deque(maxlen=_AWAITED)
        self._turn = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shared", daemon=True)
        health.changed = self._wake.set

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self, timeout: float = 5.0) -> None:
        """Tells what is untold and ends the thread, in at most `timeout` seconds."""
        self._closing.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout)
        if self._engine is not None:
            self._engine.dispose()

    @property
    def current(self) -> bool:
        """Whether the database was read within the last few seconds."""
        return time.monotonic() < self._read_at + 5 * POLL_SECONDS

    def look_up(self, outcome_id: str, outcome: Outcome, key: str | None, *, call: bool) -> None:
        """Looks for the decision of a stored outcome, soon and elsewhere."""
        self._unclear.append(Unclear(outcome_id, outcome, key, call, time.monotonic()))
        self._wake.set()

    def put_policy(
        self, policy: Policy, who: str, expected: frozenset[str] | None = None, reason: str | None = None
    ) -> None:
        """Stores the policy for all processes and takes it up here. Blocks: call it off the event loop.

        Raises StaleVersionError when another than one of the `expected` versions is stored, StoreError when the
        database does not answer.
        """
        try:
            with self._turn:
                put_policy(self._open(), policy, who, expected, reason)
            self.round()
        except (sa.exc.SQLAlchemyError, InputError) as error:
            log.error("the policy is not stored: %s", type(error).__name__)
            raise StoreError(
                "the policy's database does not answer: see GET /policy, and send it again later"
            ) from None

    def round(self) -> None:
        """Tells the others what is new here and takes in what is new there.

        Raises InputError or SQLAlchemy's errors when the database is away; what was to be told is told later.
        """
        with self._turn:
            told = self._health.take()
            try:
                engine = self._open()
                if told:
                    publish(engine, told)
                self._rounds += 1
                # Now and then everything: a database that was restored has gone back behind the serial that was seen.
                news = read(engine, 0 if self._rounds % READ_ALL == 0 else self._seen)
            except BaseException:
                self._health.give_back(told)
                raise
            for circuit in news.circuits:
                self._health.adopt(circuit)
            if news.policy is not None:
                self._take_policy(news.policy)
                self._remember(news.policy)
            self._seen, self._read_at = news.serial, time.monotonic()
            self._match(engine)
            self._share_spent(engine)

    def recall(self) -> None:
        """Takes up the policy that was last read from this database, on this machine."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._cache.read_text(encoding="utf-8"))
            if kept["whose"] == self._whose:
                self._take_policy(kept["policy"])

    def _remember(self, stored: str) -> None:
        aside = self._cache.with_name(f".{self._cache.name}.{os.getpid()}")
        try:
            aside.write_text(json.dumps({"whose": self._whose, "policy": stored}), encoding="utf-8")
            aside.replace(self._cache)
        except OSError as error:
            log.error("the policy is not kept for a start without the database: %s", error.strerror)

    def _run(self) -> None:
        failing = False
        while not self._closing.is_set():
            self._wake.wait(0.0 if self._unclear else POLL_SECONDS - PAUSE_SECONDS)
            self._wake.clear()
            try:
                self.round()
                failing = False
            except Exception as error:  # noqa: BLE001 (whatever a driver raises must not end the thread)
                self.failures += 1
                if not failing:
                    log.error("what processes share is not read, routing goes on: %s", type(error).__name__)
                failing = True
            self._closing.wait(POLL_SECONDS if failing else PAUSE_SECONDS)
        with contextlib.suppress(Exception):  # what came since the last round
            self.round()

    def _open(self) -> sa.Engine:
        if self._engine is None:
            self._engine = open_database(self._url)
        return self._engine

    def _take_policy(self, stored: str) -> None:
        content = json.loads(stored)
        try:
            self.policy = None if content is None else Policy.from_json(content["policy"], "the stored policy")
            self.policy_error = None
        except InputError as error:
            self.policy_error = str(error)
            log.error("kept the policy: %s", error)
            return
        try:
            self.policy_changed(self.policy or Policy())
        except RouterError as error:
            log.error("the stored policy does not fit the bundle, the one before stays in force: %s", error)

    def _share_spent(self, engine: sa.Engine) -> None:
        if not self.budgets.active:
            return
        sums, now = self.budgets.untold(), datetime.now(UTC)
        if sums:
            tell_spent(engine, self._process, sums)
        self.budgets.told(sums, read_spent(engine, self._process, (f"{now:%Y-%m-%d}", f"{now:%Y-%m}")))

    def _match(self, engine: sa.Engine) -> None:
        """Finds the decisions of outcomes that came here; those of the last moment wait for news of their circuits."""
        now, kept = time.monotonic(), []
        for _ in range(min(len(self._unclear), _PAGE)):
            if self._unclear[0].at > now - PAUSE_SECONDS:
                break
            kept.append(self._unclear.popleft())
        if not kept:
            return
        try:
            found = known_decisions(engine, {each.outcome_id: each.outcome for each in kept})
        except sa.exc.OperationalError:
            self._unclear.extendleft(reversed(kept))
            raise
        for each in kept:
            if each.outcome_id in found:
                of = found[each.outcome_id]
                if of is None or not each.call or not of["first"] or of["key"] != each.key:
                    continue
                if of["time_us"] / 1e6 > time.time() - NEWS_SECONDS:
                    self.heard(each.outcome, of["models"])
                if each.outcome.cost_usd is not None:
                    self.budgets.settled_elsewhere(of, each.outcome.cost_usd)
            elif not each.missed:
                self._unclear.append(replace(each, at=now, missed=True))
            elif now < each.at + GRACE_SECONDS:
                self._unclear.append(each)
            else:
                self.unmatched += 1
