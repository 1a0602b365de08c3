"""The store's tables, and opening the database that holds them."""

from __future__ import annotations

import functools
import json
import math
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from router_ml.addresses import redacted, shown
from router_ml.errors import InputError, UnreachableError
from router_ml.types import Candidate, RouteDecision, RouteRequest

SCHEMA_VERSION = "1"  # raised by what an older program cannot live with; a new column that may be null is none of that
_dump = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
METADATA = sa.MetaData()
INFO = sa.Table("store_info", METADATA, sa.Column("name", sa.String, primary_key=True), sa.Column("value", sa.String))
DECISIONS = sa.Table(
    "decisions",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("time_us", sa.BigInteger, nullable=False, index=True),  # microseconds since 1970, UTC
    sa.Column("request_id", sa.String, index=True),
    *(sa.Column(name, sa.String) for name in ("session", "tenant", "key", "task", "data_class", "region", "tier")),
    sa.Column("needs", sa.JSON, nullable=False),
    sa.Column("max_cost_usd", sa.Float),
    sa.Column("willingness_to_pay_usd", sa.Float),
    sa.Column("candidates", sa.JSON, nullable=False),
    sa.Column("excluded", sa.JSON, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("provider", sa.String, nullable=False),
    sa.Column("propensity", sa.Float, nullable=False),
    sa.Column("explored", sa.Boolean, nullable=False),
    sa.Column("meets_threshold", sa.Boolean, nullable=False),
    sa.Column("min_probability", sa.Float, nullable=False),
    sa.Column("quality_threshold", sa.Float),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("model_version", sa.String, nullable=False),
    sa.Column("policy_version", sa.String, nullable=False),
    *(sa.Column(name, sa.Text) for name in ("prompt", "messages", "tools")),
    sa.Column("features", sa.LargeBinary),  # of `stored_features.pack_features`
    sa.Column("incumbent", sa.String),  # of the session, by which the propensity is conditional
    sa.Column("stayed", sa.Boolean),
    sa.Column("cached_tokens", sa.Float),
    sa.Column("degraded", sa.Boolean),  # whether the twin estimated
    sa.Column("arm", sa.String),  # of a canary, see `types.Arm`
    sa.Column("arm_unit", sa.String),
    sa.Column("arm_share", sa.Float),
    sa.Column("arm_propensity", sa.Float),
    sa.Column("arm_cluster", sa.String),
    sa.Column("expected_cost_usd", sa.Float),  # of the chosen model, as in `candidates`
    sa.Column("reserve_usd", sa.Float),
)
_NO_VALUES = dict.fromkeys(DECISIONS.columns.keys())  # for what an earlier version has left in its spool
_IN_SESSION = DECISIONS.c.session.is_not(None)
sa.Index(
    "ix_decisions_session", DECISIONS.c.session, DECISIONS.c.time_us,
    sqlite_where=_IN_SESSION, postgresql_where=_IN_SESSION,
)  # fmt: skip
SHADOWS = sa.Table(  # what the other bundle would have decided, see `shadow.shadow_row`
    "shadows",
    METADATA,
    sa.Column("decision_id", sa.String, primary_key=True),
    sa.Column("time_us", sa.BigInteger, nullable=False, index=True),
    sa.Column("bundle", sa.String, nullable=False),
    sa.Column("model_version", sa.String, nullable=False),
    sa.Column("policy_version", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("p_ok", sa.Float),
    sa.Column("expected_cost_usd", sa.Float),
    sa.Column("expected_total_cost_usd", sa.Float),
    sa.Column("propensity", sa.Float, nullable=False),
    sa.Column("meets_threshold", sa.Boolean, nullable=False),
    sa.Column("served_probability", sa.Float, nullable=False),
    sa.Column("served_p_ok", sa.Float),
    sa.Column("degraded", sa.Boolean, nullable=False),
)
OUTCOMES = sa.Table(
    "outcomes",
    METADATA,
    sa.Column("outcome_id", sa.String, primary_key=True),
    sa.Column("idempotency_key", sa.String, nullable=False, unique=True),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("time_us", sa.BigInteger, nullable=False, index=True),  # when it arrived
    sa.Column("key", sa.String),
    sa.Column("decision_id", sa.String, index=True),
    sa.Column("request_id", sa.String, index=True),
    sa.Column("status", sa.String),
    sa.Column("served_model", sa.String),
    sa.Column("input_tokens", sa.BigInteger),
    sa.Column("output_tokens", sa.BigInteger),
    sa.Column("cost_usd", sa.Float),
    sa.Column("latency_ms", sa.Float),
    sa.Column("retries", sa.BigInteger),
    sa.Column("quality", sa.Float),
    sa.Column("quality_source", sa.String),
)
CHANGES = sa.Table(
    "changes",
    METADATA,
    sa.Column("change_id", sa.String, primary_key=True),
    sa.Column("time_us", sa.BigInteger, nullable=False, index=True),
    sa.Column("kind", sa.String, nullable=False),  # of `audit.KINDS`
    sa.Column("who", sa.String, nullable=False),
    sa.Column("before", sa.Text),
    sa.Column("after", sa.Text, nullable=False),
    sa.Column("reason", sa.Text),  # why, where who did it said so
)
SHARED = sa.Table(
    "shared",
    METADATA,
    sa.Column("kind", sa.String, primary_key=True),  # "model" or "provider": a circuit; "policy"
    sa.Column("name", sa.String, primary_key=True),
    sa.Column("serial", sa.BigInteger, nullable=False, index=True),  # of the latest change; rises from change to change
    sa.Column("value", sa.Text),  # JSON, see `router_ml.shared`
)
SPENT = sa.Table(  # what budgets have spent, as each process counts its own decisions, see `router_ml.shared`
    "spent",
    METADATA,
    sa.Column("budget", sa.String, primary_key=True),  # `Budget.name`
    sa.Column("period", sa.String, primary_key=True),
    sa.Column("process", sa.String, primary_key=True),
    sa.Column("nano_usd", sa.BigInteger, nullable=False),
)


# A server that is gone without a word is given up after seconds, not after TCP's quarter of an hour.
_PATIENCE = {"connect_timeout": 3, "tcp_user_timeout": 5000, "keepalives_idle": 10, "keepalives_interval": 5}


def existing(store: str) -> str:
    """The same address; SQLite would make an empty store of a mistyped path. Raises InputError where no file is."""
    if "://" not in store and not Path(store).is_file():
        raise InputError(f"there is no store at {store}: give the one of the service, --store FILE or URL")
    return store


def open_database(url: str) -> sa.Engine:
    """An engine on `url` (an SQLAlchemy URL or the path of an SQLite file) whose tables exist, with all their columns.

    Raises InputError when it cannot be opened, or holds the tables of another version; UnreachableError when it is a
    server that does not answer.
    """
    try:
        parsed = sa.make_url(url if "://" in url else f"sqlite:///{url}")
    except sa.exc.ArgumentError:
        raise InputError("the store's URL is not valid: use sqlite:///PATH or postgresql+psycopg://…") from None
    name = shown(parsed.set(query={}).render_as_string(hide_password=True))
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InputError("the store needs a file: an SQLite database in memory is gone with the process")
    try:
        if parsed.get_backend_name() == "sqlite":
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        # Without hide_parameters an error's text would hold the row, and so the prompt.
        options: dict[str, Any] = {}
        if parsed.get_backend_name() == "postgresql":
            libpq = parsed.get_driver_name() in ("psycopg", "psycopg2")
            patience = {k: v for k, v in _PATIENCE.items() if libpq and k not in parsed.query}
            options = {"connect_args": patience, "pool_pre_ping": True}
        engine = sa.create_engine(parsed, hide_parameters=True, **options)
        if engine.dialect.name not in ("sqlite", "postgresql"):
            raise InputError(f"the store {name} is neither SQLite nor Postgres: use one of these")
        if engine.dialect.name == "sqlite":
            sa.event.listen(engine, "connect", _sqlite_settings)
        with engine.begin() as connection:
            if engine.dialect.name == "postgresql":  # its IF NOT EXISTS is no protection from a second process
                connection.execute(sa.text("select pg_advisory_xact_lock(7205759403)"))
            else:  # a second process must not look at the columns before the first has added them
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            connection.execute(sa.schema.CreateTable(INFO, if_not_exists=True))
            connection.execute(insert_new(engine.dialect, INFO).values(name="schema", value=SCHEMA_VERSION))
            version = connection.execute(sa.select(INFO.c.value).where(INFO.c.name == "schema")).scalar_one()
            if version == SCHEMA_VERSION:
                _make_tables(connection)
    except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
        reason = redacted(str(getattr(error, "orig", None) or error), url)
        away = isinstance(error, sa.exc.OperationalError) and parsed.get_backend_name() == "postgresql"
        kind = UnreachableError if away else InputError
        raise kind(f"the store {name} cannot be opened: {reason}") from None
    if version != SCHEMA_VERSION:
        raise InputError(f"the store {name} has tables of version {version}, not {SCHEMA_VERSION}: use another store")
    return engine


def _make_tables(connection: sa.Connection) -> None:
    """Makes the tables, or gives those of an earlier program the columns that have come since, empty."""
    for table in METADATA.sorted_tables:
        connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
        there = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
        for column in table.columns:
            if column.name not in there:
                kind = column.type.compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {column.name} {kind}")
        for index in sorted(table.indexes, key=lambda i: str(i.name)):
            connection.execute(sa.schema.CreateIndex(index, if_not_exists=True))
    for statement in _APPEND_ONLY[connection.dialect.name]:
        connection.exec_driver_sql(statement)


# The database itself refuses to alter a noted change: whoever wants to has to remove the trigger first.
_APPEND_ONLY = {
    "sqlite": [
        f"CREATE TRIGGER IF NOT EXISTS changes_no_{what} BEFORE {what} ON changes "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
        for what in ("update", "delete")
    ]
    + [  # INSERT OR REPLACE deletes without the triggers for it
        "CREATE TRIGGER IF NOT EXISTS changes_no_replace BEFORE INSERT ON changes "
        "WHEN EXISTS (SELECT 1 FROM changes WHERE change_id = NEW.change_id OR rowid = NEW.rowid) "
        "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    ],
    "postgresql": [
        "CREATE OR REPLACE FUNCTION changes_append_only() RETURNS trigger AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$ LANGUAGE plpgsql",
        "CREATE OR REPLACE TRIGGER changes_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON changes "
        "FOR EACH STATEMENT EXECUTE FUNCTION changes_append_only()",
    ],
}


def insert_new(dialect: sa.Dialect, table: sa.Table) -> sqlite.Insert | postgresql.Insert:
    """An INSERT that leaves rows alone that are there already."""
    if dialect.name == "postgresql":
        return postgresql.insert(table).on_conflict_do_nothing()
    return sqlite.insert(table).on_conflict_do_nothing()


def decision_row(request: RouteRequest, decision: RouteDecision) -> dict[str, Any]:
    """A row for `insert_decisions`, of a decision made now, without its text, features and provider."""
    row = {
        "decision_id": decision.decision_id,
        "time_us": time.time_ns() // 1000,
        "request_id": request.request_id,
        "session": request.session,
        "tenant": request.tenant,
        "key": request.key,
        "task": request.task,
        "data_class": request.data_class if decision.data_class is None else decision.data_class,
        "region": request.region,
        "tier": request.tier,
        "needs": request.needs,
        "max_cost_usd": request.max_cost_usd,
        "willingness_to_pay_usd": request.willingness_to_pay_usd,
        "candidates": decision.candidates,
        "excluded": decision.excluded,
        "model": decision.model,
        "propensity": decision.propensity,
        "explored": decision.explored,
        "meets_threshold": decision.meets_threshold,
        "min_probability": decision.min_probability,
        "quality_threshold": decision.quality_threshold,
        "reason": decision.reason,
        "model_version": decision.model_version,
        "policy_version": decision.policy_version,
        "incumbent": decision.incumbent,
        "stayed": decision.stayed,
        "cached_tokens": decision.cached_tokens,
        "degraded": decision.degraded,
        "reserve_usd": decision.reserve_usd,
    }
    if decision.arm is not None:
        row |= {"arm": decision.arm.name} | {f"arm_{n}": v for n, v in decision.arm._asdict().items() if n != "name"}
    return row


def insert_decisions(connection: sa.Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Inserts rows of `decision_row` as they come out of the spool, skipping those that are there already.

    The statement goes to the driver as it is: SQLAlchemy's handling of every value would take as long again, on the
    interpreter that the event loop waits for.
    """
    sql, order = _insert_statement(connection.dialect)
    full = [
        {
            **_NO_VALUES,
            **row,
            "needs": _dump(sorted(row["needs"])),
            "candidates": _candidates_json(row["candidates"]),
            "expected_cost_usd": _known(Candidate(*row["candidates"][0]).expected_cost_usd),
            "excluded": _dump(dict(row["excluded"])),
        }
        for row in rows
    ]
    if order is None:
        connection.exec_driver_sql(sql, full)
    else:
        connection.exec_driver_sql(sql, [tuple(row[name] for name in order) for row in full])


@functools.cache
def _insert_statement(dialect: sa.Dialect) -> tuple[str, tuple[str, ...] | None]:
    """The INSERT as the driver takes it, and the order of its parameters where they go by position."""
    compiled = insert_new(dialect, DECISIONS).compile(dialect=dialect, column_keys=DECISIONS.columns.keys())
    return str(compiled), None if compiled.positiontup is None else tuple(compiled.positiontup)


def _candidates_json(candidates: Iterable[Sequence[Any]]) -> str:
    """A JSON array; nine digits hold a float32, and what is not finite becomes null."""
    items = [
        f'{{"model":{_dump(c.model)},"p_ok":{_number(c.p_ok)},"expected_cost_usd":{_number(c.expected_cost_usd)},'
        f'"expected_total_cost_usd":{_number(c.expected_total_cost_usd)}}}'
        for c in (Candidate(*fields) for fields in candidates)
    ]
    return f"[{','.join(items)}]"


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value:.9g}" if math.isfinite(value) else "null"


def _sqlite_settings(connection: sqlite3.Connection, _record: Any) -> None:
    cursor = connection.cursor()
    cursor.execute("PRAGMA busy_timeout=5000")
    deadline = time.monotonic() + 5.0
    while True:  # while another process turns the same new file to WAL, SQLite refuses at once, whatever the timeout
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            break
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    cursor.execute("PRAGMA synchronous=FULL")  # one flush a group commit, so a power cut loses one interval at most
    cursor.close()
