"""Where decisions and outcomes are kept: any database that SQLAlchemy speaks, SQLite by default.

Routing never waits for the database. `record` puts a decision on a bounded queue; one writer thread commits what has
gathered every `interval` seconds (group commit), so a killed process or a power cut loses at most the decisions of one
interval and one commit. An outcome is acknowledged only after its commit, and is stored once however often it is sent.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from router_ml import audit
from router_ml.errors import InputError, RouterError
from router_ml.router import new_id
from router_ml.stored import counts, find_decision, log_rows, pages
from router_ml.tables import DECISIONS, OUTCOMES, decision_row, insert_decisions, insert_new, open_database
from router_ml.types import STATUSES, CandidateFeatures, Outcome, RouteDecision, RouteRequest

log = logging.getLogger(__name__)
BATCH = 500  # rows a commit
FEATURES_PENDING = 2_000  # with more decisions waiting, new ones wait without their features, which take memory
RETRY_SECONDS = (0.1, 5.0)  # the first and the longest pause after the database refused a batch


class StoreError(RouterError):
    """The store cannot take an outcome now: its database is away, or its queue is full. Sending it again is safe."""


class IdempotencyConflictError(RouterError):
    """An Idempotency-Key came a second time, with another outcome."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The acknowledgement of a stored outcome: a repetition gets the first one's id."""

    outcome_id: str
    replayed: bool


@dataclass(slots=True)
class Counters:
    """What became of the rows since the start; `failures` counts the commits that the database refused."""

    decisions: int = 0
    outcomes: int = 0
    dropped: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class _Pending:
    row: dict[str, Any]
    receipt: Future[Receipt]


class Store:
    """Decisions and outcomes in one database; every method may be called from any thread.

    `url` is an SQLAlchemy URL or the path of an SQLite file. `interval` is how long a decision may wait for its commit,
    in seconds; `max_pending` bounds the rows that wait and `max_pending_chars` the prompt text in them. What is past a
    bound is dropped and counted (decisions), or refused with StoreError (outcomes).
    Raises InputError when the database cannot be opened or was written by another version.
    """

    def __init__(
        self, url: str, *, interval: float = 0.05, max_pending: int = 20_000, max_pending_chars: int = 64_000_000
    ) -> None:
        self.interval = interval
        self.max_pending = max_pending
        self.max_pending_chars = max_pending_chars
        self.counters = Counters()
        self._engine = open_database(url)
        self._decisions: deque[dict[str, Any]] = deque()
        self._outcomes: deque[_Pending] = deque()
        self._changes: deque[tuple[str, str, int, dict[str, Any]]] = deque()
        self._in_flight = 0
        self._text = 0  # characters of prompt text that wait for their commit
        self._text_lock = threading.Lock()
        self._wake = threading.Event()
        self._urgent = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> Store:
        """Starts the writer thread and returns the store."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
            self._thread.start()
        return self

    def close(self, timeout: float = 10.0) -> None:
        """Commits what is queued, for at most `timeout` seconds, and ends the writer."""
        self._closing = True
        self._hurry()
        if self._thread is not None:
            self._thread.join(timeout)
        if self._decisions:
            self.counters.dropped += len(self._decisions)
            log.error("the store is closed with %d decisions not written", len(self._decisions))
        self._refuse([self._outcomes.popleft() for _ in range(len(self._outcomes))], "the service is closing")
        self._engine.dispose()

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until what is queued is committed; False when `timeout` seconds were not enough."""
        deadline = time.monotonic() + timeout
        while self.pending:
            if time.monotonic() > deadline:
                return False
            self._hurry()
            time.sleep(0.002)
        return True

    @property
    def pending(self) -> int:
        """Rows that wait for their commit."""
        return len(self._decisions) + len(self._outcomes) + len(self._changes) + self._in_flight

    @property
    def healthy(self) -> bool:
        """Whether the writer runs and the queue has room."""
        return self._thread is not None and self._thread.is_alive() and len(self._decisions) < self.max_pending

    def record(
        self,
        request: RouteRequest,
        decision: RouteDecision,
        *,
        provider: str,
        prompt: str | None = None,
        messages: str | None = None,
        tools: str | None = None,
        features: CandidateFeatures | None = None,
    ) -> bool:
        """Queues a decision without waiting; False when it was dropped because the queue is full.

        `provider` is the chosen model's; `prompt`, `messages` and `tools` (JSON text) are stored only when given. So
        are `features`, which explain the decision later; while the queue is long they are left out.
        """
        text = len(prompt or "") + len(messages or "") + len(tools or "")
        if self._closing or len(self._decisions) >= self.max_pending or self._text + text > self.max_pending_chars:
            self.counters.dropped += 1
            return False
        if text:
            with self._text_lock:
                self._text += text
        row = decision_row(request, decision)
        row |= {"provider": provider, "prompt": prompt, "messages": messages, "tools": tools}
        row["features"] = features if len(self._decisions) < FEATURES_PENDING else None
        self._decisions.append(row)
        if not self._wake.is_set():
            self._wake.set()
        return True

    def add_outcome(
        self, outcome: Outcome, *, idempotency_key: str | None = None, key: str | None = None
    ) -> Future[Receipt]:
        """Queues an outcome; the future resolves after its commit.

        `key` is the name of the caller's API key: idempotency keys of different callers never meet. Without an
        idempotency key the outcome's own content is one. A decision that is not known (yet) is no error.
        The future raises IdempotencyConflictError, or StoreError when the database is away. Raises InputError for a
        value out of range, StoreError when the queue is full.
        """
        check_outcome(outcome)
        if self._closing or len(self._outcomes) >= self.max_pending:
            raise StoreError("the store cannot take outcomes at the moment: send this one again later")
        content = asdict(outcome)
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        identity = ["content", key, digest] if idempotency_key is None else ["given", key, idempotency_key]
        row = content | {
            "outcome_id": new_id(),
            "idempotency_key": hashlib.sha256(json.dumps(identity).encode()).hexdigest(),
            "digest": digest,
            "time_us": time.time_ns() // 1000,
            "key": key,
        }
        pending = _Pending(row, Future())
        pending.receipt.set_running_or_notify_cancel()  # a caller that goes away cannot cancel what the writer holds
        self._outcomes.append(pending)
        self._hurry()
        return pending.receipt

    def note_change(self, kind: str, who: str, after: Mapping[str, Any]) -> None:
        """Queues what `kind` (of `audit.KINDS`) is from now on for the audit log, which leaves out what is the same."""
        self._changes.append((kind, who, time.time_ns() // 1000, dict(after)))
        self._hurry()

    def changes(self) -> list[dict[str, Any]]:
        """The audit log, oldest first: see `audit.changes`."""
        return audit.changes(self._engine)

    def decisions(self, since_us: int = 0) -> Iterator[dict[str, Any]]:
        """The decisions from `since_us` (microseconds since 1970) on, oldest first, as the table's columns."""
        return (row for page in pages(self._engine, DECISIONS, since_us) for row in page)

    def decision(self, decision_id: str) -> dict[str, Any] | None:
        """One stored decision as the table's columns; None where it is not known."""
        return find_decision(self._engine, decision_id)

    def outcomes(self, since_us: int = 0) -> Iterator[dict[str, Any]]:
        """The outcomes that arrived from `since_us` on, oldest first, as the table's columns."""
        return (row for page in pages(self._engine, OUTCOMES, since_us) for row in page)

    def iter_log_rows(self, since_us: int = 0) -> Iterator[dict[str, Any]]:
        """One row per decision with what its outcomes reported, oldest first; see `router_ml.stored.log_row`."""
        return log_rows(self._engine, since_us)

    def counts(self) -> dict[str, int]:
        """How many decisions and outcomes are stored, and how many outcomes belong to no stored decision."""
        return counts(self._engine)

    def _hurry(self) -> None:
        self._urgent.set()
        self._wake.set()

    def _run(self) -> None:
        pause = RETRY_SECONDS[0]
        while True:
            self._wake.wait()
            self._urgent.wait(self.interval)
            self._wake.clear()
            while self._decisions or self._outcomes or self._changes:
                self._urgent.clear()
                if self._write_batch():
                    pause = RETRY_SECONDS[0]
                elif self._closing:
                    return
                else:
                    self._urgent.wait(pause)
                    pause = min(2 * pause, RETRY_SECONDS[1])
            if self._closing:
                return

    def _write_batch(self) -> bool:
        """Commits the oldest rows. False when the database is away: decisions go back to the queue, outcomes fail."""
        self._in_flight = min(len(self._decisions), BATCH) + min(len(self._outcomes), BATCH)
        decisions = [self._decisions.popleft() for _ in range(min(len(self._decisions), BATCH))]
        outcomes = [self._outcomes.popleft() for _ in range(min(len(self._outcomes), BATCH))]
        try:
            self._commit(decisions, outcomes)
        except Exception as error:  # noqa: BLE001 (whatever a driver raises must not end the writer)
            self.counters.failures += 1
            # Only an operational error's text is sure to hold no value of a row.
            said = error.orig if isinstance(error, sa.exc.OperationalError) else type(error).__name__
            log.error("the store's database refuses: %s; %d rows wait", said, len(self._decisions) + len(decisions))
            self._decisions.extendleft(reversed(decisions))
            self._refuse(outcomes, "its database does not answer")
            return False
        finally:
            self._in_flight = 0
        with self._text_lock:
            self._text -= sum(len(row[name] or "") for row in decisions for name in ("prompt", "messages", "tools"))
        return self._note_changes()

    def _note_changes(self) -> bool:
        """Appends what waits for the audit log; False when the database is away."""
        while self._changes:
            try:
                with self._engine.begin() as connection:
                    audit.note(connection, *self._changes[0])
            except sa.exc.OperationalError:
                return False
            except Exception as error:  # noqa: BLE001 (one that can never be kept must not hold up the others)
                self.counters.dropped += 1
                log.error("a change of %s cannot be noted: %s", self._changes[0][0], type(error).__name__)
            self._changes.popleft()
        return True

    def _commit(self, decisions: Sequence[dict[str, Any]], outcomes: Sequence[_Pending]) -> None:
        """One transaction. Rows that the database cannot hold are found by halving, dropped and counted."""
        try:
            with self._engine.begin() as connection:
                if decisions:
                    insert_decisions(connection, decisions)
                stored = self._store_outcomes(connection, [p.row for p in outcomes]) if outcomes else {}
        except Exception as error:
            if not _is_bad_row(error):
                raise
            if decisions and outcomes:
                self._commit(decisions, [])
                self._commit([], outcomes)
                return
            if (size := len(decisions) + len(outcomes)) > 1:
                self._commit(decisions[: size // 2], outcomes[: size // 2])
                self._commit(decisions[size // 2 :], outcomes[size // 2 :])
                return
            self.counters.dropped += 1
            log.error("the store dropped a row that its database cannot hold: %s", type(error).__name__)
            for pending in outcomes:
                pending.receipt.set_exception(InputError("the outcome holds a value that cannot be stored"))
            return
        self.counters.decisions += len(decisions)
        for pending in outcomes:
            outcome_id, digest = stored[pending.row["idempotency_key"]]
            if digest != pending.row["digest"]:
                pending.receipt.set_exception(
                    IdempotencyConflictError("this Idempotency-Key was used for another outcome: use a new key")
                )
                continue
            new = outcome_id == pending.row["outcome_id"]
            self.counters.outcomes += new
            pending.receipt.set_result(Receipt(outcome_id, replayed=not new))

    def _store_outcomes(self, connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
        """Inserts what is new; per idempotency key the (outcome_id, digest) that is stored, whoever stored it."""
        first: dict[str, dict[str, Any]] = {}
        for row in rows:
            first.setdefault(row["idempotency_key"], row)
        connection.execute(insert_new(connection.dialect, OUTCOMES), list(first.values()))
        columns = (OUTCOMES.c.idempotency_key, OUTCOMES.c.outcome_id, OUTCOMES.c.digest)
        found = connection.execute(sa.select(*columns).where(OUTCOMES.c.idempotency_key.in_(first)))
        return {unique: (outcome_id, digest) for unique, outcome_id, digest in found}

    def _refuse(self, outcomes: Sequence[_Pending], why: str) -> None:
        for pending in outcomes:
            if not pending.receipt.done():
                pending.receipt.set_exception(StoreError(f"the outcome is not stored, {why}: send it again later"))


def check_outcome(outcome: Outcome) -> None:
    """Raises InputError when the outcome names no decision or a value is out of its range."""
    if outcome.decision_id is None and outcome.request_id is None:
        raise InputError("an outcome needs the 'decision_id' or the 'request_id' that it belongs to")
    if outcome.status not in STATUSES:
        raise InputError(f"status has to be one of {', '.join(STATUSES)}")
    if outcome.quality is not None and not 0.0 <= outcome.quality <= 1.0:
        raise InputError("quality has to lie in [0, 1]")
    for name in ("input_tokens", "output_tokens", "cost_usd", "latency_ms", "retries"):
        value = getattr(outcome, name)
        if value is not None and not 0 <= value < 2**53:
            raise InputError(f"{name} has to be a number of 0 or more")


def _is_bad_row(error: Exception) -> bool:
    if isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, sa.exc.DataError | sa.exc.IntegrityError)
    return isinstance(error, sa.exc.StatementError | ValueError | TypeError | OverflowError)
