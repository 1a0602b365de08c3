"""The spool's other end: moves its records to the database, in group commits, and takes over what a dead process left.

`Drainer` does the work. A service runs it in a process of its own, `python -m router_ml.drain`, so that neither SQL nor
packing rows takes the interpreter that decides; tests and small uses run it in a thread. The process ends when what it
has read from its standard input ends: with its parent, however that ended, after a last round.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from router_ml import log_lines
from router_ml.spool import Reader, abandoned
from router_ml.tables import OUTCOMES, SHADOWS, insert_decisions, insert_new, open_database

log = logging.getLogger(__name__)
BATCH = 500  # records a commit
RETRY_SECONDS = (0.1, 5.0)  # the first and the longest pause after the database refused a batch
ADOPT_SECONDS = 30.0
DECISION, OUTCOME, SHADOW = "decision", "outcome", "shadow"
encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[str, dict[str, Any]]).decode


@dataclass
class Progress:
    """What became of a process's records: `position` of them are done with; `failures` counts refused commits."""

    position: int = 0
    decisions: int = 0
    outcomes: int = 0
    dropped: int = 0
    failures: int = 0
    torn: int = 0
    error: str | None = None


class Drainer:
    """Drains one folder of a spool, and those beside it whose owners are gone, into the database at `url`.

    The database may be away: it is opened when it answers. Not for several threads.
    """

    def __init__(self, url: str, folder: Path, engine: sa.Engine | None = None) -> None:
        self.url, self.folder, self._engine = url, folder, engine
        self.progress = Progress()
        self._own = Reader(folder)

    def round(self, *, final: bool = False) -> bool:
        """Moves everything that waits in its own folder; False when the database refused.

        `final` says that the folder's owner appends no more.
        """
        return self._drain(self._own, final=final)

    def adopt(self) -> bool:
        """Moves what dead processes left beside it; False when the database refused."""
        for folder in abandoned(self.folder.parent, self.folder.name.rpartition("-")[0]):
            reader = Reader(folder)
            if not self._drain(reader, final=True):
                return False
            log.info("took over %d records that another process had left in the spool", reader.position)
        return True

    def _drain(self, reader: Reader, *, final: bool) -> bool:
        own = reader is self._own
        while True:
            records = reader.take(BATCH, final=final)
            self.progress.torn += reader.torn
            reader.torn = 0
            if not records:
                return True
            rows: dict[str, list[dict[str, Any]]] = {DECISION: [], OUTCOME: [], SHADOW: []}
            for record in records:
                try:
                    kind, row = _decode(record)
                    rows[kind].append(row)
                except (msgspec.DecodeError, KeyError):
                    self._drop("a record that this version does not know")
            try:
                if self._engine is None:
                    self._engine = open_database(self.url)
                for kind, found in rows.items():
                    self._commit(self._engine, kind, found)
            except Exception as error:  # noqa: BLE001 (whatever a driver raises must not end the draining)
                self.progress.failures += 1
                said = refusal(error)
                if said != self.progress.error:
                    log.error("the store's database refuses, the spool keeps what comes: %s", said)
                self.progress.error = said
                return False
            reader.done()
            if self.progress.error is not None:
                log.info("the store's database takes rows again")
                self.progress.error = None
            if own:
                self.progress.position = reader.position

    def _commit(self, engine: sa.Engine, kind: str, rows: Sequence[dict[str, Any]]) -> None:
        """One transaction. Rows that the database cannot hold are found by halving, dropped and counted."""
        if not rows:
            return
        try:
            with engine.begin() as connection:
                stored: Mapping[str, tuple[str, str]] = {}
                if kind == DECISION:
                    insert_decisions(connection, rows)
                elif kind == OUTCOME:
                    stored = store_outcomes(connection, rows)
                else:
                    connection.execute(insert_new(connection.dialect, SHADOWS), rows)
        except Exception as error:
            if not is_bad_row(error):
                raise
            if len(rows) > 1:
                self._commit(engine, kind, rows[: len(rows) // 2])
                self._commit(engine, kind, rows[len(rows) // 2 :])
            else:
                self._drop(f"a row that the database cannot hold: {type(error).__name__}")
            return
        if kind == DECISION:
            self.progress.decisions += len(rows)
        for row in rows if kind == OUTCOME else ():
            outcome_id, digest = stored[row["idempotency_key"]]
            if digest != row["digest"]:
                self._drop("an outcome whose idempotency key had been used for another one")
            else:
                self.progress.outcomes += outcome_id == row["outcome_id"]

    def _drop(self, what: str) -> None:
        self.progress.dropped += 1
        log.error("dropped %s", what)


def store_outcomes(connection: sa.Connection, rows: Sequence[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Inserts the outcomes that are new; per idempotency key the (outcome_id, digest) stored, whoever stored it."""
    first: dict[str, dict[str, Any]] = {}
    for row in rows:
        first.setdefault(row["idempotency_key"], row)
    connection.execute(insert_new(connection.dialect, OUTCOMES), list(first.values()))
    columns = (OUTCOMES.c.idempotency_key, OUTCOMES.c.outcome_id, OUTCOMES.c.digest)
    found = connection.execute(sa.select(*columns).where(OUTCOMES.c.idempotency_key.in_(first)))
    return {unique: (outcome_id, digest) for unique, outcome_id, digest in found}


def is_bad_row(error: Exception) -> bool:
    """Whether it is the row and not the database that is at fault."""
    if isinstance(error, sa.exc.DBAPIError):
        return isinstance(error, sa.exc.DataError | sa.exc.IntegrityError)
    return isinstance(error, sa.exc.StatementError | ValueError | TypeError | OverflowError)


def refusal(error: Exception) -> str:
    """What a refusing database said, where that is sure to hold no value of a row: an operational error's own text."""
    if isinstance(error, sa.exc.OperationalError):
        return str(error.orig).strip()
    return str(error) if isinstance(error, OSError) else type(error).__name__


def run(
    drainer: Drainer,
    interval: float,
    command: Callable[[float], str | None],
    report: Callable[[Progress], None],
) -> None:
    """Drains every `interval` seconds until `command`, which waits up to so many seconds, says "close" or "orphaned".

    Its other words: "flush" (now), None (nothing was said). `report` is told of each round that changed something.
    """
    pause, adopt_at, told = RETRY_SECONDS[0], 0.0, Progress()
    wait = 0.0
    while True:
        word = command(wait)
        ending = word in ("close", "orphaned")
        done = drainer.round(final=ending)
        if done and (ending or time.monotonic() >= adopt_at):
            adopt_at = time.monotonic() + ADOPT_SECONDS
            done = drainer.adopt()
        if asdict(drainer.progress) != asdict(told) or word == "flush":
            told = Progress(**asdict(drainer.progress))
            report(told)
        if ending:
            return
        wait = interval if done else pause
        pause = RETRY_SECONDS[0] if done else min(2 * pause, RETRY_SECONDS[1])


def main() -> None:
    """The process: its first line of input is JSON (`url`, `folder`, `interval`, `log`); words follow, a line each.

    It writes its progress as a line of JSON after every round that changed it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the service, which ends this process when it is done itself
    os.nice(5)  # whoever waits for an answer comes first
    lines = _Lines(sys.stdin.fileno())
    settings = json.loads(lines.wait(None) or "{}")
    log_lines.configure(settings["log"])
    log_lines.log_uncaught()

    def report(progress: Progress) -> None:
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(asdict(progress)), flush=True)

    run(Drainer(settings["url"], Path(settings["folder"])), settings["interval"], lines.wait, report)
    os._exit(0)  # at exit Python would flush to a parent that may be gone


class _Lines:
    """Lines from a pipe, waited for a while."""

    def __init__(self, fd: int) -> None:
        self._fd, self._buffer, self._ended = fd, b"", False

    def wait(self, seconds: float | None) -> str | None:
        """The next line within `seconds` (None: however long), None where none came, "orphaned" at the end."""
        while b"\n" not in self._buffer and not self._ended:
            if not select.select([self._fd], [], [], seconds)[0]:
                return None
            chunk = os.read(self._fd, 65536)
            self._buffer += chunk
            self._ended = not chunk
        line, found, rest = self._buffer.partition(b"\n")
        if not found:
            return "orphaned"
        self._buffer = rest
        return line.decode()


if __name__ == "__main__":
    main()
