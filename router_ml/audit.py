"""What changed, by whom, append-only; and the proof that no request went where its data may not.

The store notes each change of policy, keys and model beside its decisions. A note of a model holds its catalogue, so
the store alone can tell of every decision which models it offered and what these were cleared for at that time.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.router import new_id
from router_ml.tables import CHANGES, DECISIONS

KINDS = ("model", "policy", "keys", "challenger", "registry")
_NEWEST = (CHANGES.c.time_us.desc(), CHANGES.c.change_id.desc())
_PAGE = 1_000


@dataclass(frozen=True, slots=True)
class Violation:
    """One model that a decision offered, chosen or as a fallback, and the constraint that it broke."""

    decision_id: str
    time_us: int
    model: str
    role: str
    problem: str


def note(
    connection: sa.Connection, kind: str, who: str, time_us: int, after: Mapping[str, Any], reason: str | None = None
) -> bool:
    """Appends what `kind` is since `time_us`, with what it was before, and why; False where that is the same.

    No note is older than the one before it, whatever the clock says: the latest is what the next is held against.
    """
    if connection.dialect.name == "postgresql":  # another process must not note the same beside us
        connection.execute(sa.text("select pg_advisory_xact_lock(7205759404)"))
    latest = sa.select(CHANGES.c.after, CHANGES.c.time_us).where(CHANGES.c.kind == kind).order_by(*_NEWEST).limit(1)
    before, since = connection.execute(latest).one_or_none() or (None, -1)
    content = json.dumps(after, sort_keys=True)
    if before == content:
        return False
    row = {"change_id": new_id(), "time_us": max(time_us, since + 1), "kind": kind, "who": who, "reason": reason}
    connection.execute(CHANGES.insert(), {**row, "before": before, "after": content})
    return True


def changes(engine: sa.Engine) -> list[dict[str, Any]]:
    """All changes, oldest first: time_us, kind, who, before, after, reason."""
    with engine.connect() as connection:
        found = connection.execute(sa.select(CHANGES).order_by(CHANGES.c.time_us, CHANGES.c.change_id)).mappings().all()
    return [
        {
            **row,
            "before": None if row["before"] is None else json.loads(row["before"]),
            "after": json.loads(row["after"]),
        }
        for row in found
    ]


def catalogs(noted: Iterable[Mapping[str, Any]]) -> dict[str, list[Catalog]]:
    """By model version, the catalogues that it was served with, from the noted changes."""
    found: dict[str, list[Catalog]] = {}
    for change in noted:
        if change["kind"] in ("model", "challenger"):  # a canary is served by either
            catalog = Catalog.from_json({"models": change["after"]["models"]}, "the audit log")
            found.setdefault(change["after"]["model_version"], []).append(catalog)
    return found


def residency(engine: sa.Engine, known: Mapping[str, list[Catalog]], since_us: int = 0) -> Iterator[Violation]:
    """Every model that a stored decision offered against its data class or region; also what cannot be proven.

    A candidate is held against the clearances that its model version was served with: all of them, where there were
    several. `known` maps a model version to its catalogues; a decision of another version is a violation, since nothing
    proves that it is none, and so is one whose data class was not recorded.
    """
    columns = [
        DECISIONS.c[n]
        for n in ("decision_id", "time_us", "data_class", "region", "model", "candidates", "model_version")
    ]
    last, after = since_us, ""
    while True:
        later = sa.or_(
            DECISIONS.c.time_us > last, sa.and_(DECISIONS.c.time_us == last, DECISIONS.c.decision_id > after)
        )
        order = (DECISIONS.c.time_us, DECISIONS.c.decision_id)
        with engine.connect() as connection:
            page = connection.execute(sa.select(*columns).where(later).order_by(*order).limit(_PAGE)).mappings().all()
        for row in page:
            yield from _violations(dict(row), known.get(row["model_version"], []))
        if len(page) < _PAGE:
            return
        last, after = page[-1]["time_us"], page[-1]["decision_id"]


def _violations(row: Mapping[str, Any], known: list[Catalog]) -> Iterator[Violation]:
    for candidate in row["candidates"]:
        model = candidate["model"]
        role = "chosen" if model == row["model"] else "fallback"
        for problem in _problems(model, row["data_class"], row["region"], row["model_version"], known):
            yield Violation(row["decision_id"], row["time_us"], model, role, problem)


def _problems(model: str, data_class: str | None, region: str | None, version: str, known: list[Catalog]) -> list[str]:
    if not known:
        return [f"cannot be proven: the catalogue of bundle {version} is not known"]
    if data_class is None:
        return ["cannot be proven: the data class was not recorded"]
    found = []
    for catalog in known:
        try:
            card = catalog[model]
        except (KeyError, InputError):
            found.append(f"not in the catalogue of bundle {version}")
            continue
        if data_class not in card.data_classes:
            found.append(f"not cleared for data class {data_class!r}")
        if region is not None and region not in card.regions:
            found.append(f"not in region {region!r}")
    return sorted(set(found))
