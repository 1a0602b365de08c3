"""A table of a Postgres, read in pages of its own order: only the wanted columns, in transactions that cannot write."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
PAGE_ROWS = 20_000
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

    A column that the table lacks is null. The cursor is the newest time. A source's rows are often written after their
    time, at a request's end and in batches, so reading goes on `overlap_s` seconds (an hour) before the cursor, and
    what was read before is known by its id. `keys` says of columns with JSON objects which keys are wanted: the rest
    stays in the database. Settings: `overlap_s`, `since` and `until`, ISO times that bound what is read (the second is
    left out). Raises InputError where database or table cannot be read.
    """
    address, schema = _address(url)
    cursor, settings = dict(options.cursor or {}), options.settings
    overlap = timedelta(seconds=float(settings.get("overlap_s", OVERLAP_S)))
    if overlap < timedelta():
        raise InputError("the overlap cannot be negative: give the seconds that rows may be written late")
    after, newest = None, datetime.min
    if cursor:
        newest = datetime.fromisoformat(cursor["time"])
        after = (newest - overlap, "")
    done = 0
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
            place = sql.Identifier(schema, table) if schema else sql.Identifier(table)
            names = [name for name in columns if name in has]
            wanted = {name: inner for name, inner in (keys or {}).items() if has.get(name) in ("json", "jsonb")}
            shown = [_object(name, wanted[name]) if name in wanted else sql.Identifier(name) for name in names]
            page = sql.SQL(
                "copy (select {names} from {place} where {where} order by {order} limit {limit}) to stdout "
                "(format csv, header true)"
            )
            key = sql.SQL(", ").join(map(sql.Identifier, order))
            bounds: list[sql.Composable] = [
                sql.SQL("{} {} {}").format(
                    sql.Identifier(order[0]), sql.SQL(sign), sql.Literal(_time(settings[name], name))
                )
                for name, sign in (("since", ">="), ("until", "<"))
                if settings.get(name)
            ]
            while True:
                where = list(bounds)
                if after is not None:
                    where.append(sql.SQL("({}) > ({}, {})").format(key, *map(sql.Literal, after)))
                query = page.format(
                    names=sql.SQL(", ").join(shown),
                    place=place,
                    where=sql.SQL(" and ").join(where or [sql.SQL("true")]),
                    order=key,
                    limit=sql.Literal(min(options.chunk_rows, PAGE_ROWS)),
                )
                with db.cursor() as reader, reader.copy(query) as copied:
                    text = b"".join(bytes(block) for block in copied)
                raw = pl.read_csv(text, infer_schema=False)
                if not raw.height:
                    return
                times = convert(raw.select(order[0]).tail(1), {order[0]: LOG_SCHEMA["time"]})[0][order[0]]
                # The times of the table have no zone; a literal with one would be turned into the session's.
                after = (times[0].replace(tzinfo=None), raw[order[1]][-1])
                rows = pl.int_range(done + 1, done + raw.height + 1, dtype=pl.Int64, eager=True).alias(ROW)
                done += raw.height
                nulls = [pl.lit(None, pl.String).alias(name) for name in columns if name not in has]
                newest = max(newest, after[0])
                frame = raw.with_columns(*nulls, rows)
                yield Chunk(frame, _numbered(raw, rows), no_rejects(), {"time": newest.isoformat()})
    except psycopg.Error as error:
        said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot read {table!r} of the Postgres: {said}") from None


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
