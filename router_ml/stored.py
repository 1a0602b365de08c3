"""Reading the store back: decisions, their outcomes, and both together as rows of the request log."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from router_ml.tables import DECISIONS, OUTCOMES
from router_ml.types import Arm, Candidate, Outcome, RouteDecision

PAGE = 500
REPORTED = (
    *("status", "input_tokens", "output_tokens", "cost_usd", "latency_ms", "retries", "quality", "quality_source"),
    "served_model",
)
FEEDBACK = {"quality", "quality_source", "status", "retries"}
_KNOWN = ("key", "tenant", "time_us", "expected_cost_usd")
_OUTCOME_ID = OUTCOMES.c.outcome_id
_SAME_KEY = DECISIONS.c.key.is_not_distinct_from(OUTCOMES.c.key)


def pages(engine: sa.Engine, table: sa.Table, since_us: int, *, without: str = "") -> Iterator[list[dict[str, Any]]]:
    """The rows of `table` from `since_us` (microseconds since 1970) on, oldest first, some hundred at a time.

    The column `without` is not read.
    """
    (identity,) = table.primary_key
    after: tuple[int, str] = (since_us, "")
    while True:
        query = (
            sa.select(*(column for column in table.columns if column.name != without))
            .where(sa.tuple_(table.c.time_us, identity) > sa.tuple_(*after))
            .order_by(table.c.time_us, identity)
            .limit(PAGE)
        )
        with engine.connect() as connection:
            page = [dict(row) for row in connection.execute(query).mappings()]
        if not page:
            return
        yield page
        after = (page[-1]["time_us"], page[-1][identity.name])


def find_decision(engine: sa.Engine, decision_id: str) -> dict[str, Any] | None:
    """The row of one decision; None where there is none."""
    with engine.connect() as connection:
        row = connection.execute(sa.select(DECISIONS).where(DECISIONS.c.decision_id == decision_id)).mappings().first()
    return None if row is None else dict(row)


def known_decisions(engine: sa.Engine, outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any] | None]:
    """By id those of the outcomes (some hundred) that belong to a stored decision, as `log_rows` joins them.

    The value is of the decision that an outcome names: `key`, `tenant`, `models` in order, `time_us`,
    `expected_cost_usd`, and whether the outcome is
    the `first` that the decision's key has sent of its call. It is None where the outcome names a request only.
    """
    named = {o.decision_id for o in outcomes.values()} - {None}
    decisions = sa.select(*(DECISIONS.c[n] for n in ("decision_id", "candidates", *_KNOWN)))
    said = sa.select(OUTCOMES).where(OUTCOMES.c.decision_id.in_(named)).order_by(OUTCOMES.c.time_us, _OUTCOME_ID)
    bare = [i for i, o in outcomes.items() if o.decision_id is None]
    of_request = (
        sa.select(_OUTCOME_ID)
        .join(DECISIONS, sa.and_(DECISIONS.c.request_id == OUTCOMES.c.request_id, _SAME_KEY))
        .where(_OUTCOME_ID.in_(bare))
    )
    with engine.connect() as connection:
        rows = connection.execute(decisions.where(DECISIONS.c.decision_id.in_(named))).mappings().all()
        told = connection.execute(said).mappings().all() if rows else ()
        found: dict[str, dict[str, Any] | None] = (
            dict.fromkeys(connection.execute(of_request).scalars()) if bare else {}
        )
    stored = {row["decision_id"]: row for row in rows}
    first: dict[str, str] = {}
    for row in told:
        of = stored.get(row["decision_id"])
        if of is not None and row["key"] == of["key"] and not _feedback_alone(row):
            first.setdefault(row["decision_id"], row["outcome_id"])
    for identity, outcome in outcomes.items():
        if (of := stored.get(outcome.decision_id or "")) is not None:
            models = tuple(candidate["model"] for candidate in of["candidates"])
            is_first = first.get(of["decision_id"], identity) == identity  # it may be on its way itself
            found[identity] = {**{name: of[name] for name in _KNOWN}, "models": models, "first": is_first}
    return found


def _feedback_alone(row: sa.RowMapping) -> bool:
    """Whether an outcome speaks of the answer's quality and not of the call."""
    said = {name for name in REPORTED if row[name] is not None}
    return row["quality"] is not None and said <= FEEDBACK and row["status"] == "ok" and not row["retries"]


def session_model(
    engine: sa.Engine, key: str | None, tenant: str | None, session: str, since_us: int
) -> tuple[str, int] | None:
    """The model that a session is with, and since when (microseconds since 1970); None where `since_us` knows none.

    It is that of the session's latest decision, or the one that served instead, where an outcome says so.
    """
    d, o = DECISIONS.c, OUTCOMES.c
    whose = (d.session == session, d.key.is_not_distinct_from(key), d.tenant.is_not_distinct_from(tenant))
    latest = sa.select(d.decision_id, d.model, d.time_us).where(*whose, d.time_us >= since_us)
    with engine.connect() as connection:
        row = connection.execute(latest.order_by(d.time_us.desc()).limit(1)).first()
        if row is None:
            return None
        told = sa.select(o.served_model).where(o.decision_id == row.decision_id, o.served_model.is_not(None))
        return connection.scalar(told.order_by(o.time_us.desc()).limit(1)) or row.model, row.time_us


def decision_of_row(row: Mapping[str, Any]) -> RouteDecision:
    """The decision that a row of the table holds; a number that was not finite when it was stored is NaN."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    candidates = tuple(
        Candidate(c["model"], *(number(c.get(name)) for name in Candidate._fields[1:])) for c in row["candidates"]
    )
    kept = {field.name: row[field.name] for field in fields(RouteDecision) if field.name in row}
    named = row["arm"] is not None
    arm = Arm(row["arm"], *(row[f"arm_{name}"] for name in Arm._fields[1:])) if named else None
    return RouteDecision(**kept | {"candidates": candidates, "degraded": bool(row["degraded"]), "arm": arm})


def counts(engine: sa.Engine) -> dict[str, int]:
    """How many decisions and outcomes are stored, and how many outcomes belong to no stored decision."""
    same_request = sa.exists().where(DECISIONS.c.request_id == OUTCOMES.c.request_id, _SAME_KEY)
    known = sa.or_(
        sa.exists().where(DECISIONS.c.decision_id == OUTCOMES.c.decision_id),
        sa.and_(OUTCOMES.c.decision_id.is_(None), same_request),
    )
    queries = {
        "decisions": sa.select(sa.func.count()).select_from(DECISIONS),
        "outcomes": sa.select(sa.func.count()).select_from(OUTCOMES),
        "unmatched_outcomes": sa.select(sa.func.count()).select_from(OUTCOMES).where(~known),
    }
    with engine.connect() as connection:
        return {name: int(connection.execute(query).scalar_one()) for name, query in queries.items()}


def log_rows(engine: sa.Engine, since_us: int = 0) -> Iterator[dict[str, Any]]:
    """One `log_row` per decision from `since_us` on, oldest first.

    An outcome belongs to the decision it names; one that names only a request belongs to the latest decision that the
    same API key asked for under that id. Later outcomes add to the earlier ones, and override them where both report
    the same thing.
    """
    for row, reported in _told(engine, since_us):
        yield log_row(row, reported)


def spend_rows(engine: sa.Engine, baseline: str | None = None, since_us: int = 0) -> Iterator[dict[str, Any]]:
    """The same rows with what each decision was expected to cost: `expected_cost_usd` of the chosen model,
    `baseline_expected_usd` of the model `baseline` where it was eligible, `reserve_usd`; None where not known.
    """
    for row, reported in _told(engine, since_us):
        costs = {candidate["model"]: candidate["expected_cost_usd"] for candidate in row["candidates"]}
        yield log_row(row, reported) | {
            "expected_cost_usd": costs.get(row["model"]),
            "baseline_expected_usd": costs.get(baseline),
            "reserve_usd": row["reserve_usd"],
        }


def _told(engine: sa.Engine, since_us: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Each decision from `since_us` on, oldest first, and what its outcomes reported."""
    for page in pages(engine, DECISIONS, since_us, without="features"):
        reported = _reported(engine, page)
        for row in page:
            yield row, reported.get(row["decision_id"], {})


def told_decisions(engine: sa.Engine, model_version: str, since_us: int = 0) -> Iterator[dict[str, Any]]:
    """The decisions that the bundle `model_version` itself made (not its twin) from `since_us` on, oldest first.

    Each with what outcomes reported of it: decision_id, time_us, key, tenant, session, model (the choice), p_ok of it
    (None where it is not known), quality_threshold, served (the model that answered), status and quality.
    """
    names = ("decision_id", "time_us", "request_id", "key", "tenant", "session", "model", "candidates")
    columns = [DECISIONS.c[name] for name in (*names, "quality_threshold")]
    own = (DECISIONS.c.model_version == model_version, sa.func.coalesce(DECISIONS.c.degraded, sa.false()).is_(False))
    after: tuple[int, str] = (since_us, "")
    while True:
        later = sa.tuple_(DECISIONS.c.time_us, DECISIONS.c.decision_id) > sa.tuple_(*after)
        order = (DECISIONS.c.time_us, DECISIONS.c.decision_id)
        with engine.connect() as connection:
            query = sa.select(*columns).where(later, *own).order_by(*order).limit(PAGE)
            page = [dict(row) for row in connection.execute(query).mappings()]
        if not page:
            return
        reported = _reported(engine, page)
        for row in page:
            said = reported.get(row["decision_id"], {})
            of = {candidate["model"]: candidate.get("p_ok") for candidate in row.pop("candidates")}
            told = {"served": said.get("served_model") or row["model"], "status": said.get("status")}
            yield {**row, "p_ok": of.get(row["model"]), **told, "quality": said.get("quality")}
        after = (page[-1]["time_us"], page[-1]["decision_id"])


def log_row(decision: Mapping[str, Any], reported: Mapping[str, Any]) -> dict[str, Any]:
    """A stored decision and what was reported of it, in the columns of `router_ml.logs.LOG_SCHEMA`.

    `request_id` is the decision's id, since a request that was sent twice has two decisions. `model` is the one that
    served; where that is not the policy's choice, `fallback_from` names the choice and `provider` is None. What no
    outcome reported is None, the status too.
    """
    served = reported.get("served_model") or decision["model"]
    fell_back = served != decision["model"]
    return {
        "request_id": decision["decision_id"],
        "time": datetime.fromtimestamp(decision["time_us"] / 1e6, UTC),
        **{name: decision[name] for name in ("session", "tenant", "key", "task", "prompt", "messages", "tools")},
        "candidates": [candidate["model"] for candidate in decision["candidates"]],
        "model": served,
        "provider": None if fell_back else decision["provider"],
        "propensity": decision["propensity"],
        "policy_version": decision["policy_version"],
        **{name: reported.get(name) for name in REPORTED if name != "served_model"},
        "fallback_from": decision["model"] if fell_back else None,
        "cluster": decision["arm_cluster"],
    }


def _reported(engine: sa.Engine, page: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the outcomes of a page of decisions reported, per decision id."""
    ids = [row["decision_id"] for row in page]
    requests = {row["request_id"] for row in page} - {None}
    by_decision = sa.select(OUTCOMES.c.decision_id.label("owner"), OUTCOMES).where(OUTCOMES.c.decision_id.in_(ids))
    newest = sa.func.row_number().over(
        partition_by=(DECISIONS.c.key, DECISIONS.c.request_id),
        order_by=(DECISIONS.c.time_us.desc(), DECISIONS.c.decision_id.desc()),
    )
    of_request = (
        sa.select(DECISIONS.c.request_id, DECISIONS.c.key, DECISIONS.c.decision_id.label("owner"), newest.label("age"))
        .where(DECISIONS.c.request_id.in_(requests))
        .subquery()
    )
    by_request = (
        sa.select(of_request.c.owner, OUTCOMES)
        .join(
            of_request,
            sa.and_(
                of_request.c.request_id == OUTCOMES.c.request_id,
                of_request.c.key.is_not_distinct_from(OUTCOMES.c.key),
            ),
        )
        .where(OUTCOMES.c.decision_id.is_(None), of_request.c.age == 1, of_request.c.owner.in_(ids))
    )
    with engine.connect() as connection:
        rows = [row for query in (by_decision, by_request) for row in connection.execute(query).mappings()]
    merged: dict[str, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda r: (r["time_us"], r["outcome_id"])):
        said = {name: row[name] for name in REPORTED if row[name] is not None}
        into = merged.setdefault(row["owner"], {})
        if said.keys() <= FEEDBACK and row["status"] == "ok" and not row["retries"]:
            # Feedback alone does not unsay how the call went.
            said |= {name: into[name] for name in ("status", "retries") if name in into}
        into.update(said)
    return merged
