"""Outcomes on their way in: acknowledged when they are safe, stored once however often they are sent."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from router_ml.drain import OUTCOME, encode, is_bad_row, refusal, store_outcomes
from router_ml.errors import InputError, RouterError
from router_ml.router import new_id
from router_ml.spool import Spool
from router_ml.types import MOST_TOKENS, MOST_USD, STATUSES, Outcome

log = logging.getLogger(__name__)
BATCH = 500  # outcomes a commit
SPOOLED = 200_000  # outcomes that may wait in the spool at once: each is remembered until it is in the database


class StoreError(RouterError):
    """The store cannot take an outcome now: it has no room for it. Sending it again is safe."""


class IdempotencyConflictError(RouterError):
    """An Idempotency-Key came a second time, with another outcome."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """The acknowledgement of a stored outcome: a repetition gets the first one's id."""

    outcome_id: str
    replayed: bool


@dataclass(frozen=True, slots=True)
class _Pending:
    row: dict[str, Any]
    receipt: Future[Receipt]


class OutcomeQueue:
    """Any thread adds, one writes. What the database refuses goes to the spool, and is remembered until it is drained:
    a repetition is answered from there, since the database does not know of it yet.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.stored = self.dropped = self.failures = 0
        self.last_spooled = -1
        """The place in the spool of the last outcome that the database refused; until it is drained that is away."""
        self._waiting: deque[_Pending] = deque()
        self._in_flight = 0
        self._spooled: dict[str, tuple[str, str, int]] = {}  # idempotency key to id, digest, place in the spool

    def __len__(self) -> int:
        return len(self._waiting) + self._in_flight

    def add(self, outcome: Outcome, *, idempotency_key: str | None, key: str | None, closing: bool) -> Future[Receipt]:
        """Queues an outcome; see `Store.add_outcome`."""
        check_outcome(outcome)
        if closing or len(self._waiting) >= self.limit:
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
        self._waiting.append(pending)
        return pending.receipt

    def write(self, engine: Callable[[], sa.Engine], spool: Spool, drained: int) -> None:
        """Commits what waits, `BATCH` at a time; what the database refuses goes to the spool, `drained` to there."""
        while self._spooled and self._spooled[first := next(iter(self._spooled))][2] < drained:  # places ascend
            del self._spooled[first]
        while self._waiting:
            self._in_flight = min(len(self._waiting), BATCH)
            taken = [self._waiting.popleft() for _ in range(self._in_flight)]
            try:
                if fresh := [one for one in taken if not self._answered(one)]:
                    self._commit(engine(), fresh)
            except Exception as error:  # noqa: BLE001 (whatever a driver raises must not end the writer)
                self.failures += 1
                log.error("the store's database refuses outcomes, which go to the spool: %s", refusal(error))
                for one in taken:
                    if not one.receipt.done() and not self._answered(one):
                        self._to_spool(one, spool)
            finally:
                self._in_flight = 0

    def refuse_all(self, why: str) -> None:
        """Refuses what still waits."""
        while self._waiting:
            _refuse(self._waiting.popleft(), why)

    def _answered(self, one: _Pending) -> bool:
        """Answers an outcome whose like waits in the spool."""
        if one.row["idempotency_key"] not in self._spooled:
            return False
        outcome_id, digest, _ = self._spooled[one.row["idempotency_key"]]
        _answer(one, outcome_id, digest)
        return True

    def _to_spool(self, one: _Pending, spool: Spool) -> None:
        row = one.row
        try:
            place = spool.append(encode((OUTCOME, row)), hold=False) if len(self._spooled) < SPOOLED else None
        except (ValueError, OverflowError):
            self._give_up(one)
            return
        if place is not None:
            self._spooled[row["idempotency_key"]] = (row["outcome_id"], row["digest"], place)
            self.last_spooled = place
            one.receipt.set_result(Receipt(row["outcome_id"], replayed=False))
        else:
            _refuse(one, "its database does not answer and its spool is full")

    def _commit(self, engine: sa.Engine, outcomes: Sequence[_Pending]) -> None:
        """One transaction. Rows that the database cannot hold are found by halving, and refused."""
        try:
            with engine.begin() as connection:
                stored = store_outcomes(connection, [p.row for p in outcomes])
        except Exception as error:
            if not is_bad_row(error):
                raise
            if len(outcomes) > 1:
                self._commit(engine, outcomes[: len(outcomes) // 2])
                self._commit(engine, outcomes[len(outcomes) // 2 :])
            else:
                self._give_up(outcomes[0])
            return
        for pending in outcomes:
            self.stored += _answer(pending, *stored[pending.row["idempotency_key"]])

    def _give_up(self, one: _Pending) -> None:
        self.dropped += 1
        log.error("the store dropped an outcome that cannot be stored")
        one.receipt.set_exception(InputError("the outcome holds a value that cannot be stored"))


def _answer(pending: _Pending, outcome_id: str, digest: str) -> bool:
    """Answers with what is stored under the outcome's idempotency key; whether that is this outcome itself."""
    if digest != pending.row["digest"]:
        pending.receipt.set_exception(
            IdempotencyConflictError("this Idempotency-Key was used for another outcome: use a new key")
        )
        return False
    new: bool = outcome_id == pending.row["outcome_id"]
    pending.receipt.set_result(Receipt(outcome_id, replayed=not new))
    return new


def _refuse(pending: _Pending, why: str) -> None:
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
    for name, most in (("cost_usd", MOST_USD), ("input_tokens", MOST_TOKENS), ("output_tokens", MOST_TOKENS)):
        if (getattr(outcome, name) or 0) > most:
            raise InputError(f"{name} of a call has to be at most {most:g}: check its unit")
