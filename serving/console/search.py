"""Finding stored decisions, the newest first, a page at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from router_ml.errors import InputError
from router_ml.tables import DECISIONS, OUTCOMES

PAGE = 50
FILTERS = ("id", "tenant", "task", "model", "tier", "key", "session", "explored", "missed", "text")
_SHOWN = (
    *("decision_id", "time_us", "request_id", "tenant", "key", "task", "tier", "model", "reason", "explored"),
    *("meets_threshold", "min_probability", "model_version", "policy_version", "expected_cost_usd", "propensity"),
)


def found_decisions(engine: sa.Engine, asked: Mapping[str, str]) -> dict[str, Any]:
    """The decisions that match all of `asked` (of `FILTERS`), and `after`, from where the next page goes on.

    `id` is a decision's or a request's, whole or its beginning; `text` stands in the stored prompt; `explored` and
    `missed` (no candidate met the dial) are flags. Raises InputError for an `after` that is none.
    """
    d, where = DECISIONS.c, []
    for name in ("tenant", "task", "model", "tier", "key", "session"):
        if asked.get(name):
            where.append(d[name] == asked[name])
    if asked.get("id"):
        begins = asked["id"]
        where.append(sa.or_(*(d[n].startswith(begins, autoescape=True) for n in ("decision_id", "request_id"))))
    if asked.get("explored"):
        where.append(d.explored.is_(True))
    if asked.get("missed"):
        where.append(d.meets_threshold.is_(False))
    if asked.get("text"):
        where.append(sa.or_(*(d[n].contains(asked["text"], autoescape=True) for n in ("prompt", "messages"))))
    if asked.get("after"):
        at, _, identity = asked["after"].partition("-")
        if not at.isdecimal() or len(at) > 18:
            raise InputError("'after' has to be what the last page said")
        where.append(sa.or_(d.time_us < int(at), sa.and_(d.time_us == int(at), d.decision_id < identity)))
    query = (
        sa.select(*(d[name] for name in _SHOWN))
        .where(*where)
        .order_by(d.time_us.desc(), d.decision_id.desc())
        .limit(PAGE + 1)
    )
    with engine.connect() as connection:
        rows = [dict(row) for row in connection.execute(query).mappings()]
        total = connection.scalar(sa.select(sa.func.count()).select_from(DECISIONS).where(*where))
    more = len(rows) > PAGE
    last = rows[PAGE - 1] if more else None
    return {
        "decisions": rows[:PAGE],
        "total": total,
        "after": None if last is None else f"{last['time_us']}-{last['decision_id']}",
    }


def outcomes_of(engine: sa.Engine, row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was reported of a decision, in order; also what names only its request, from the key that asked for it."""
    o = OUTCOMES.c
    named = o.decision_id == row["decision_id"]
    if row["request_id"] is not None:
        bare = (o.decision_id.is_(None), o.request_id == row["request_id"], o.key.is_not_distinct_from(row["key"]))
        named = sa.or_(named, sa.and_(*bare))
    hidden = ("idempotency_key", "digest")
    columns = [column for column in o if column.name not in hidden]
    with engine.connect() as connection:
        return [dict(r) for r in connection.execute(sa.select(*columns).where(named).order_by(o.time_us)).mappings()]
