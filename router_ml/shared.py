"""What the processes on one database tell each other: circuits that open and close, and the policy that was put.

One small table with a row a circuit and one for the policy. A serial rises with every change, in the order of the
commits, so that a process asks for what is newer than it has seen: one small query. No host's clock is trusted: what
lies in the past is told as an age, and the database's clock turns ages into times and back.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import sqlalchemy as sa

from router_ml import audit
from router_ml.errors import RouterError
from router_ml.policy import Policy
from router_ml.tables import SHARED, SPENT

How = Literal["opened", "closed", "probe", "hand"]
POLICY = "policy"
_PROBES = 20  # that a row keeps: those that nobody reports must not make it grow


class StaleVersionError(RouterError):
    """The policy has changed since the caller read it."""


@dataclass(frozen=True, slots=True)
class Circuit:
    """A circuit as it is told of: `of` is "model" or "provider"; `age` is how many seconds ago it opened.

    `how` says what happened: only what was done by hand ("hand") undoes what is `forced`. `probes` maps the decisions
    that may try an open one to their ages in seconds.
    """

    of: str
    name: str
    how: How
    opened: bool
    why: str = ""
    age: float = 0.0
    forced: bool = False
    probes: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class News:
    """What has changed: circuits, the JSON of the policy (None: unchanged, "null": the default), the newest serial."""

    circuits: tuple[Circuit, ...]
    policy: str | None
    serial: int


def publish(engine: sa.Engine, circuits: Sequence[Circuit]) -> None:
    """Writes what became of circuits here, for the others to read."""
    with _writing(engine) as connection:
        now, serial = _now(connection), _serial(connection)
        for circuit in circuits:
            there = json.loads(_value(connection, circuit.of, circuit.name) or "{}")
            if there.get("forced") and circuit.how != "hand":
                continue
            probes = {i: now - round(age * 1e6) for i, age in circuit.probes.items()}
            if circuit.how == "probe" and there:
                value = there | {"probes": dict([*there["probes"].items(), *probes.items()][-_PROBES:])}
            else:
                opened = {"opened_us": now - round(circuit.age * 1e6), "why": circuit.why, "forced": circuit.forced}
                value = {"open": circuit.opened, **opened, "probes": probes}
            if not value["open"] and not there.get("open"):
                continue  # closed it was, too
            serial += 1
            _put(connection, circuit.of, circuit.name, serial, json.dumps(value))


def read(engine: sa.Engine, since: int) -> News:
    """What has changed after the serial `since`; 0 reads everything."""
    with engine.connect() as connection:
        columns = (SHARED.c.kind, SHARED.c.name, SHARED.c.serial, SHARED.c.value, _clock(engine.dialect).label("now"))
        rows = connection.execute(sa.select(*columns).where(SHARED.c.serial > since).order_by(SHARED.c.serial)).all()
    policy, circuits = None, []
    for kind, name, _, value, now in rows:
        if kind == POLICY:
            policy = value
            continue
        told = json.loads(value)
        probes = {i: (now - at) / 1e6 for i, at in told["probes"].items()}
        age = (now - told["opened_us"]) / 1e6
        how: How = "opened" if told["open"] else "closed"
        circuits.append(Circuit(kind, name, how, told["open"], told["why"], age, told["forced"], probes))
    return News(tuple(circuits), policy, rows[-1][2] if rows else since)


def put_policy(
    engine: sa.Engine, policy: Policy, who: str, expected: frozenset[str] | None = None, reason: str | None = None
) -> None:
    """Stores the policy of all processes, and notes in the audit log `who` did it and why; the default takes it away.

    Raises StaleVersionError when the version that is stored is none of `expected` (None: whatever it is).
    """
    default = Policy().version
    with _writing(engine) as connection:
        there = json.loads(_value(connection, POLICY, "") or "null")
        version = default if there is None else there["version"]
        if expected is not None and version not in expected:
            raise StaleVersionError(f"the policy is of version {version} by now: GET /policy, and change that one")
        content: dict[str, Any] = {"version": policy.version, "policy": policy.to_json()}
        _put(
            connection,
            POLICY,
            "",
            _serial(connection) + 1,
            "null" if policy.version == default else json.dumps(content),
        )
        audit.note(connection, "policy", who, time.time_ns() // 1000, content, reason)


def tell_spent(engine: sa.Engine, process: str, sums: Mapping[tuple[str, str], int]) -> None:
    """Writes what a process has spent of budgets in all, nano-dollars by budget and period."""
    with engine.begin() as connection:
        for (budget, period), nano in sums.items():
            key = {"budget": budget, "period": period, "process": process}
            there = sa.update(SPENT).where(*(SPENT.c[name] == value for name, value in key.items()))
            if connection.execute(there.values(nano_usd=nano)).rowcount == 0:
                connection.execute(SPENT.insert(), {**key, "nano_usd": nano})


def read_spent(engine: sa.Engine, process: str, periods: Sequence[str]) -> dict[tuple[str, str], int]:
    """What all the other processes have spent in these periods, nano-dollars by budget and period."""
    query = (
        sa.select(SPENT.c.budget, SPENT.c.period, sa.func.sum(SPENT.c.nano_usd))
        .where(SPENT.c.period.in_(periods), SPENT.c.process != process)
        .group_by(SPENT.c.budget, SPENT.c.period)
    )
    with engine.connect() as connection:
        return {(budget, period): int(nano) for budget, period, nano in connection.execute(query)}


@contextlib.contextmanager
def _writing(engine: sa.Engine) -> Iterator[sa.Connection]:
    """A transaction that no other one of these overlaps, so that serials become visible in their order."""
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("select pg_advisory_xact_lock(7205759406)")
        else:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        yield connection


def _serial(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(sa.func.coalesce(sa.func.max(SHARED.c.serial), 0))).scalar_one())


def _value(connection: sa.Connection, kind: str, name: str) -> str | None:
    query = sa.select(SHARED.c.value).where(SHARED.c.kind == kind, SHARED.c.name == name)
    return connection.execute(query).scalar_one_or_none()


def _put(connection: sa.Connection, kind: str, name: str, serial: int, value: str) -> None:
    fields = {"serial": serial, "value": value}
    there = sa.update(SHARED).where(SHARED.c.kind == kind, SHARED.c.name == name).values(fields)
    if connection.execute(there).rowcount == 0:
        connection.execute(SHARED.insert(), {"kind": kind, "name": name, **fields})


def _now(connection: sa.Connection) -> int:
    return int(connection.execute(sa.select(_clock(connection.dialect))).scalar_one())


def _clock(dialect: sa.Dialect) -> sa.ColumnElement[int]:
    """The database's clock: microseconds since 1970."""
    if dialect.name == "postgresql":
        return sa.cast(sa.extract("epoch", sa.func.clock_timestamp()) * 1_000_000, sa.BigInteger)
    return sa.cast((sa.func.julianday("now") - 2440587.5) * 86_400_000_000.0, sa.BigInteger)
