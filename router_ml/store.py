"""Where decisions and outcomes are kept: any database that SQLAlchemy speaks, SQLite by default.

Routing never waits for the database. `record` appends a decision to the spool (`router_ml.spool`), and a drainer moves
it on (`router_ml.drain`): a killed process loses none, a power cut those of one interval. An outcome is acknowledged
after its commit, or, while the database is away, when it is in the spool; it is stored once however often it is sent.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from router_ml import audit
from router_ml.drain import DECISION, SHADOW, Progress, encode, is_bad_row
from router_ml.draining import Draining, DrainProcess, DrainThread
from router_ml.errors import InputError, UnreachableError
from router_ml.outcome_queue import OutcomeQueue, Receipt
from router_ml.spool import Spool
from router_ml.stored import counts, find_decision, log_rows, pages, session_model
from router_ml.stored_features import pack_features
from router_ml.tables import DECISIONS, OUTCOMES, SHADOWS, decision_row, open_database
from router_ml.types import CandidateFeatures, Outcome, RouteDecision, RouteRequest

log = logging.getLogger(__name__)
RETRY_SECONDS = 0.5  # between attempts to note a change while the database is away


@dataclass(frozen=True, slots=True)
class Counters:
    """What became of the rows since the start; `failures` counts what database and disk refused, retried or not."""

    decisions: int = 0
    outcomes: int = 0
    dropped: int = 0
    failures: int = 0


class Store:
    """Decisions and outcomes in one database; every method may be called from any thread.

    `url` is an SQLAlchemy URL or the path of an SQLite file. `interval` is how long a decision may wait for the
    database, and to be safe from a power cut, in seconds. `spool` is the folder of what is on its way, by default
    beside an SQLite file, and `spool_bytes` bounds it: past that, decisions are dropped and counted. `max_pending`
    bounds the outcomes that wait. `drain` says whether a thread or a process of its own moves the spool on.
    Raises InputError when the database cannot be opened or was written by another version. With `patient`, a server
    that does not answer is no error: it is waited for.
    """

    def __init__(
        self,
        url: str,
        *,
        interval: float = 0.05,
        max_pending: int = 20_000,
        spool: Path | None = None,
        spool_bytes: int = 1 << 30,
        drain: Literal["thread", "process"] = "thread",
        patient: bool = False,
    ) -> None:
        self.url, self.interval = url, interval
        self.spool_folder = default_spool(url) if spool is None else spool
        self._spool_bytes, self._drain = spool_bytes, drain
        self.spool: Spool | None = None
        self._draining: Draining | None = None
        self._opened: sa.Engine | None = None
        self._opening = threading.Lock()
        try:
            self._opened = open_database(url)
        except UnreachableError as error:
            if not patient:
                raise
            log.error("%s: decisions wait in the spool until it answers", error)
        self._dropped = 0
        self._outcomes = OutcomeQueue(max_pending)
        self._changes: deque[tuple[str, str, int, dict[str, Any]]] = deque()
        self._away = self._opened is None
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    def start(self) -> Store:
        """Starts spool, drainer and the outcomes' writer, and returns the store. Raises InputError for the spool."""
        if self._thread is None:
            spool = self.spool = Spool(
                self.spool_folder, owner=_fingerprint(self.url), interval=self.interval, max_bytes=self._spool_bytes
            )
            if self._drain == "process":
                self._draining = DrainProcess(self.url, spool.folder, self.interval, spool.lock)
            else:
                self._draining = DrainThread(self.url, spool.folder, self.interval)
            self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)
            self._thread.start()
        return self

    def close(self, timeout: float = 10.0) -> None:
        """Commits what waits, for at most `timeout` seconds. What the database does not take stays in the spool."""
        self._closing = True
        self._wake.set()
        deadline = time.monotonic() + timeout
        if self._thread is not None and self.spool is not None and self._draining is not None:
            self._thread.join(timeout)
            self.spool.close()
            self._draining.say("close")
            self._draining.join(max(0.0, deadline - time.monotonic()))
            waiting = self.spool.counters.appended - self._draining.progress.position
            if waiting > 0:
                log.error("%d rows wait in the spool %s for the next start", waiting, self.spool.root)
            self.spool.release()
        self._outcomes.refuse_all("the service is closing")
        if self._opened is not None:
            self._opened.dispose()

    def flush(self, timeout: float = 10.0) -> bool:
        """Waits until what is queued is committed; False when `timeout` seconds were not enough."""
        deadline = time.monotonic() + timeout
        while self.pending:
            if time.monotonic() > deadline:
                return False
            self._wake.set()
            if self._draining is not None:
                self._draining.say("flush")
            time.sleep(0.005)
        return True

    @property
    def pending(self) -> int:
        """Rows that wait for their commit."""
        spooled = 0 if self.spool is None else self.spool.counters.appended + self.spool.held - self._progress.position
        return spooled + len(self._outcomes) + len(self._changes)

    @property
    def counters(self) -> Counters:
        """What became of the rows since the start."""
        moved, spool = self._progress, None if self.spool is None else self.spool.counters
        lost, refused = (0, 0) if spool is None else (spool.dropped, spool.failures)
        return Counters(
            decisions=moved.decisions,
            outcomes=self._outcomes.stored + moved.outcomes,
            dropped=self._dropped + self._outcomes.dropped + moved.dropped + moved.torn + lost,
            failures=self._outcomes.failures + moved.failures + refused,
        )

    @property
    def degraded(self) -> list[str]:
        """What does not work just now while routing goes on, of "store" (the database) and "spool" (the disk)."""
        if self.spool is None or self._draining is None or self._thread is None:
            return ["store"]
        working = self._thread.is_alive() and self._draining.alive
        away = (
            self._away
            or self._outcomes.last_spooled >= self._progress.position
            or self._progress.error is not None
            or not working
        )
        return ["store"] * away + ["spool"] * (self.spool.full or self.spool.failing)

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
        """Appends a decision to the spool; False when it was dropped because that has no room.

        `provider` is the chosen model's; `prompt`, `messages` and `tools` (JSON text) are stored only when given. So
        are `features`, which explain the decision later.
        """
        if self._closing or self.spool is None:
            self._dropped += 1
            return False
        row = decision_row(request, decision)
        row["provider"], row["prompt"], row["messages"], row["tools"] = provider, prompt, messages, tools
        row["features"] = None if features is None else pack_features(features)
        return self._append(self.spool, DECISION, row)

    def record_shadow(self, row: Mapping[str, Any]) -> bool:
        """Appends a `shadow.shadow_row` to the spool; False when it was dropped because that has no room."""
        if self._closing or self.spool is None:
            self._dropped += 1
            return False
        return self._append(self.spool, SHADOW, row)

    def _append(self, spool: Spool, kind: str, row: Mapping[str, Any]) -> bool:
        try:
            packed = encode((kind, row))
        except (ValueError, OverflowError) as error:  # half a character, a number without bounds
            self._dropped += 1
            log.error("dropped a %s that cannot be stored: %s", kind, type(error).__name__)
            return False
        return spool.append(packed) is not None

    def add_outcome(
        self, outcome: Outcome, *, idempotency_key: str | None = None, key: str | None = None
    ) -> Future[Receipt]:
        """Queues an outcome; the future resolves after its commit, or, while the database is away, in the spool.

        `key` is the name of the caller's API key: idempotency keys of different callers never meet. Without an
        idempotency key the outcome's own content is one. A decision that is not known (yet) is no error.
        The future raises IdempotencyConflictError, or StoreError when there is no room. Raises InputError for a value
        out of range, StoreError when the queue is full.
        """
        pending = self._outcomes.add(outcome, idempotency_key=idempotency_key, key=key, closing=self._closing)
        self._wake.set()
        return pending

    def note_change(self, kind: str, who: str, after: Mapping[str, Any]) -> None:
        """Queues what `kind` (of `audit.KINDS`) is from now on for the audit log, which leaves out what is the same."""
        self._changes.append((kind, who, time.time_ns() // 1000, dict(after)))
        self._wake.set()

    def changes(self) -> list[dict[str, Any]]:
        """The audit log, oldest first: see `audit.changes`."""
        return audit.changes(self.engine)

    def decisions(self, since_us: int = 0) -> Iterator[dict[str, Any]]:
        """The decisions from `since_us` (microseconds since 1970) on, oldest first, as the table's columns."""
        return (row for page in pages(self.engine, DECISIONS, since_us) for row in page)

    def shadows(self, since_us: int = 0) -> Iterator[dict[str, Any]]:
        """What the other bundle would have decided, from `since_us` on, oldest first, as the table's columns."""
        return (row for page in pages(self.engine, SHADOWS, since_us) for row in page)

    def decision(self, decision_id: str) -> dict[str, Any] | None:
        """One stored decision as the table's columns; None where it is not known."""
        return find_decision(self.engine, decision_id)

    def session_model(self, key: str | None, tenant: str | None, session: str, since_us: int) -> tuple[str, int] | None:
        """The model that a session is with, and since when: see `stored.session_model`."""
        return session_model(self.engine, key, tenant, session, since_us)

    def outcomes(self, since_us: int = 0) -> Iterator[dict[str, Any]]:
        """The outcomes that arrived from `since_us` on, oldest first, as the table's columns."""
        return (row for page in pages(self.engine, OUTCOMES, since_us) for row in page)

    def iter_log_rows(self, since_us: int = 0) -> Iterator[dict[str, Any]]:
        """One row per decision with what its outcomes reported, oldest first; see `router_ml.stored.log_row`."""
        return log_rows(self.engine, since_us)

    def counts(self) -> dict[str, int]:
        """How many decisions and outcomes are stored, and how many outcomes belong to no stored decision."""
        return counts(self.engine)

    @property
    def engine(self) -> sa.Engine:
        """The database, opened when it is first needed. Raises InputError while it is away."""
        with self._opening:
            if self._opened is None:
                self._opened = open_database(self.url)
            return self._opened

    @property
    def _progress(self) -> Progress:
        return Progress() if self._draining is None else self._draining.progress

    def _run(self) -> None:
        assert self.spool is not None
        ending = False
        while not ending:
            self._wake.wait(RETRY_SECONDS if self._changes else None)
            self._wake.clear()
            ending = self._closing
            self._outcomes.write(lambda: self.engine, self.spool, self._progress.position)
            self._note_changes()

    def _note_changes(self) -> None:
        """Appends what waits for the audit log, unless the database is away."""
        while self._changes:
            try:
                with self.engine.begin() as connection:
                    audit.note(connection, *self._changes[0])
            except Exception as error:  # noqa: BLE001 (whatever a driver raises must not end the writer)
                if not is_bad_row(error) or isinstance(error, InputError):  # a server that only reads, for one
                    self._away = True
                    return
                self._dropped += 1  # one that can never be kept must not hold up the others
                log.error("a change of %s cannot be noted: %s", self._changes[0][0], type(error).__name__)
            self._away = False
            self._changes.popleft()


_WHERE = ("host", "hostaddr", "port", "dbname", "service")  # what a URL's query may say of the place


def _fingerprint(url: str) -> str:
    """Names the database, without its password, so that services of two may share a folder for their spools."""
    parsed = sa.make_url(url if "://" in url else f"sqlite:///{url}")
    at = Path(parsed.database or "").resolve() if parsed.get_backend_name() == "sqlite" else parsed.database
    where = {name: value for name, value in sorted(parsed.query.items()) if name in _WHERE}
    return hashlib.sha256(f"{parsed.host}:{parsed.port}/{at}{where or ''}".encode()).hexdigest()[:12]


def default_spool(url: str) -> Path:
    """Where the spool is when nothing else is said: beside an SQLite file, otherwise in the working directory."""
    path = url.removeprefix("sqlite:///").partition("?")[0]
    return Path("router-ml.spool") if "://" in path else Path(f"{path}.spool")
