"""A table of a Postgres, read in pages of its own order: only the wanted columns, in transactions that cannot write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

import polars as pl
import psycopg
from psycopg import sql

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA, convert
from training.importers.batch import ROW, ReadOptions, no_rejects
from training.importers.files import Chunk

OVERLAP_S = 3600.0
# A page is held whole, and rows have a hundred bytes or a megabyte: the first is short, the next as long as fits.
PAGE_ROWS, FIRST_ROWS, PAGE_BYTES = 20_000, 2_000, 1 << 25
MOST_UNTIMED = 10_000
# Of a URL's parameters those that are Prisma's or SQLAlchemy's own: libpq refuses what it does not know.
_FOREIGN = ("schema", "connection_limit", "pool_timeout", "pgbouncer", "socket_timeout", "statement_cache_size",
            "sslaccept", "sslidentity", "sslpassword")  # fmt: skip


def read_table(
    url: str,
    table: str,
    columns: Sequence[str],
    *,
    order: tuple[str, str],
    options: ReadOptions,
    keys: Mapping[str, Sequence[str]] | None = None,
) -> Iterator[Chunk]:
    """The columns of a table, as text, in the order of two of them, a column of times and one of ids (`order`).

    A column that the table lacks is null. Settings: `overlap_s`, `since` and `until`, ISO times that bound what is read
    (the second is left out). The cursor has the newest time and `from` where on all is read: nothing is taken for read
    that a `since` left out. A source's rows are often written after their time, at a request's end and in batches, so
    reading goes on `overlap_s` seconds (an hour) before the cursor, and what was read before is known by its id. Rows
    without a time, which have no place in the order, come last, each once. `keys` says of columns with JSON objects
    which keys are wanted: the rest stays in the database. Raises InputError where database or table cannot be read.
    """
    address, schema = _address(url)
    plan = _plan(options)
    try:
        with psycopg.connect(address, autocommit=True, connect_timeout=10, application_name="router-ml import") as db:
            db.execute("set default_transaction_read_only = on")
            db.execute("set timezone = 'UTC'")
            found = db.execute(
                "select column_name, data_type from information_schema.columns where table_name = %s "
                "and table_schema = coalesce(%s, current_schema())",
                (table, schema),
            ).fetchall()
            has: dict[str, str] = dict(found)
            if lost := [name for name in order if name not in has]:
                raise InputError(f"the database has no table {table!r} with a column {lost[0]!r}: check URL and schema")
            names = [name for name in columns if name in has]
            wanted = {name: inner for name, inner in (keys or {}).items() if has.get(name) in ("json", "jsonb")}
            shown = [_object(name, wanted[name]) if name in wanted else sql.Identifier(name) for name in names]
            pages = _Pages(
                db, sql.SQL(", ").join(shown), sql.Identifier(schema, table) if schema else sql.Identifier(table), order
            )
            nulls = [pl.lit(None, pl.String).alias(name) for name in columns if name not in has]
            # A clock that was wrong must not hide what comes after.
            (now,) = db.execute("select now() at time zone 'UTC'").fetchone() or (datetime.max,)
            at, done = plan, 0
            for raw in pages.read(plan, min(options.chunk_rows, PAGE_ROWS)):
                at = _behind(at, raw, order, now)
                rows = pl.int_range(done + 1, done + raw.height + 1, dtype=pl.Int64, eager=True).alias(ROW)
                done += raw.height
                yield Chunk(raw.with_columns(*nulls, rows), _numbered(raw, rows), no_rejects(), at.cursor())
    except psycopg.Error as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot read {table!r} of the Postgres: {said}") from None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to read, rows of [`since`, `until`) behind `after`, and what is read: all of [`start`, `newest`].

    `start` is None where there is no first, `newest` where there is none yet. `kept` holds the cursor where it is, as
    what is read does not join it. `untimed` are ids of the rows without a time that were read.
    """

    since: datetime | None
    until: datetime | None
    after: datetime | None
    start: datetime | None
    newest: datetime | None
    kept: bool
    untimed: tuple[str, ...]

    def cursor(self) -> dict[str, Any]:
        """The cursor that says so."""
        times = {"time": self.newest, "from": self.start}
        return {name: at and at.isoformat() for name, at in times.items()} | {"untimed": list(self.untimed)}


def _plan(options: ReadOptions) -> _Plan:
    said, settings = dict(options.cursor or {}), options.settings
    overlap = timedelta(seconds=float(settings.get("overlap_s", OVERLAP_S)))
    if overlap < timedelta():
        raise InputError("the overlap cannot be negative: give the seconds that rows may be written late")
    since, until = (_time(settings[name], name) if settings.get(name) else None for name in ("since", "until"))
    start, newest = (datetime.fromisoformat(said[name]) if said.get(name) else None for name in ("from", "time"))
    untimed = tuple(said.get("untimed", ()))
    if newest is None or (start is not None and (since is None or since < start)):
        # Nothing was read, or not what is older than `since` was then: it is read from there.
        return _Plan(since, until, None, since, None, False, untimed)
    return _Plan(since, until, newest - overlap, start, newest, since is not None and since > newest, untimed)


def _behind(at: _Plan, raw: pl.DataFrame, order: tuple[str, str], now: datetime) -> _Plan:
    """The plan after a page."""
    times = convert(raw.select(order[0]), {order[0]: LOG_SCHEMA["time"]})[0][order[0]]
    without = raw.filter(pl.col(order[0]).is_null())[order[1]].drop_nulls().to_list()
    newest = times.filter((times <= now.replace(tzinfo=UTC)).fill_null(False)).max()
    if not at.kept and isinstance(newest, datetime):
        # The times of the table have no zone; a literal with one would be turned into the session's.
        last = newest.replace(tzinfo=None)
        at = replace(at, newest=last if at.newest is None else max(at.newest, last))
    return replace(at, untimed=(*at.untimed, *without)[-MOST_UNTIMED:])


@dataclass(frozen=True, slots=True)
class _Pages:
    """A table in pages of some PAGE_BYTES: text columns `names` of `place` by `order`."""

    db: psycopg.Connection[Any]
    names: sql.Composable
    place: sql.Composable
    order: tuple[str, str]

    def read(self, plan: _Plan, most_rows: int) -> Iterator[pl.DataFrame]:
        """The rows of a plan in their order, and then those without a time."""
        time, identity = map(sql.Identifier, self.order)
        bounds = [sql.SQL("{} is not null").format(time)] + [
            sql.SQL("{} {} {}").format(time, sql.SQL(sign), sql.Literal(bound))
            for sign, bound in ((">=", plan.since), ("<", plan.until))
            if bound is not None
        ]
        # In a comparison with a null nothing is true: rows without a time are asked for by themselves.
        known = sql.SQL("{} is null and {} <> all({})").format(time, identity, sql.Literal(list(plan.untimed)))
        first: tuple[Any, ...] | None = None if plan.after is None else (plan.after, "")
        rows = min(FIRST_ROWS, most_rows)
        for key, where, after in ((list(self.order), bounds, first), ([self.order[1]], [known], None)):
            while True:
                by = sql.SQL(", ").join(map(sql.Identifier, key))
                behind = [] if after is None else [
                    sql.SQL("({}) > ({})").format(by, sql.SQL(", ").join(map(sql.Literal, after)))
                ]  # fmt: skip
                text = self._page([*where, *behind], by, rows)
                if text is None:
                    rows = max(1, rows // 8)
                    continue
                raw = pl.read_csv(text, infer_schema=False)
                if not raw.height:
                    break
                after = tuple(raw[name][-1] for name in key)
                rows = min(most_rows, 4 * rows, max(1, raw.height * PAGE_BYTES // len(text)))
                yield raw

    def _page(self, where: Sequence[sql.Composable], by: sql.Composable, rows: int) -> bytes | None:
        """Some rows as CSV; None where they are far more than a page."""
        query = sql.SQL(
            "copy (select {names} from {place} where {where} order by {by} limit {rows}) to stdout "
            "(format csv, header true)"
        ).format(names=self.names, place=self.place, where=sql.SQL(" and ").join(where), by=by, rows=sql.Literal(rows))
        blocks: list[bytes] = []
        size = 0
        with self.db.cursor() as reader, reader.copy(query) as copied:
            for block in copied:  # to its end: a cancelled query could take the next one with it
                size += len(block)
                if size > 4 * PAGE_BYTES and rows > 1:
                    blocks.clear()
                else:
                    blocks.append(bytes(block))
        return None if size > 4 * PAGE_BYTES and rows > 1 else b"".join(blocks)


def _numbered(raw: pl.DataFrame, rows: pl.Series) -> Callable[[], pl.DataFrame]:
    return lambda: raw.with_columns(rows)


def _object(column: str, keys: Sequence[str]) -> sql.Composable:
    """The column with no other keys than these; an empty object for what is none."""
    # By a record: each -> of a long value would decompress it once more, which takes three times as long.
    text = (
        "(select jsonb_strip_nulls(to_jsonb(x)) from jsonb_to_record(case when jsonb_typeof({name}::jsonb) = 'object' "
        "then {name}::jsonb else '{{}}' end) as x({fields})) as {name}"
    )
    fields = sql.SQL(", ").join(sql.SQL("{} jsonb").format(sql.Identifier(key)) for key in keys)
    return sql.SQL(text).format(name=sql.Identifier(column), fields=fields)


def _time(text: Any, name: str) -> datetime:
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError:
        raise InputError(f"{name} is {text!r}: give an ISO time such as 2026-01-31 or 2026-01-31T12:00") from None
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def _address(url: str) -> tuple[str, str | None]:
    """What libpq takes of a URL that SQLAlchemy or Prisma takes, and the schema that it names."""
    parts = urlsplit(url)
    asked = parse_qsl(parts.query)
    kept = urlencode([(name, value) for name, value in asked if name not in _FOREIGN])
    return urlunsplit(("postgresql", parts.netloc, parts.path, kept, "")), dict(asked).get("schema")
