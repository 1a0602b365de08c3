"""A plain CSV, JSONL or Parquet file whose columns are named on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA, REQUIRED
from training.importers.batch import JOINS, ROW, SIGNALS, Batch, ReadOptions
from training.importers.conversations import read_messages
from training.importers.files import Chunk, read_columns
from training.importers.values import UNITS, json_said, moment, said, scaled, status

NAMES = (*LOG_SCHEMA, *JOINS)


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """Rows of a table. Settings, each a mapping of names to texts and all optional:

    `columns`: the file's name of a log column, where it is another one; `units`: the unit of `time` (numbers since
    1970: s, ms, us, ns), `cost_usd` (usd, cents, ...) and `latency_ms` (ms, s, ...); `constants`: what a log column is
    in every row; `signals`: feedback, the file's column by the name of the source that a rule is about. Statuses may be
    words or HTTP's numbers. Raises InputError for a setting that names no column, and as `read_columns` does.
    """
    columns, units, constants, signals = (
        _texts(options.settings, name) for name in ("columns", "units", "constants", "signals")
    )
    for name in (*columns, *constants):
        if name not in NAMES:
            raise InputError(f"the log has no column {name!r}: it has {', '.join(NAMES)}")
    if unknown := sorted(set(units) - set(UNITS)):
        raise InputError(f"{unknown[0]!r} has no unit to choose: there are {', '.join(UNITS)}")
    names = {name: columns.get(name, name) for name in NAMES if name not in constants}
    wanted = [*names.values(), *signals.values()]
    for chunk in read_columns(source, wanted, cursor=options.cursor, chunk_rows=options.chunk_rows):
        # In JSONL each row has its own keys; elsewhere a name that is wrong is told at once.
        given = chunk.names
        for name in (*(c for n, c in names.items() if n in columns or n in REQUIRED), *signals.values()):
            if given is not None and name not in given:
                raise InputError(
                    f"{source} has no column {name!r}; it has {', '.join(sorted(given))}: name the right one with "
                    "--column request_id=NAME and the like"
                )
        rows = chunk.frame.select(
            ROW,
            *(_column(name, column, units.get(name)).alias(name) for name, column in names.items()),
            *(pl.lit(value).alias(name) for name, value in constants.items()),
        )
        rows = rows.with_columns(read_messages(rows["messages"].cast(pl.String)))
        yield Batch(
            rows=rows,
            cursor=chunk.cursor,
            raw=chunk.raw_of,
            rejects=chunk.rejects,
            signals=_signals(chunk, rows, signals),
        )


def _texts(settings: Mapping[str, Any], name: str) -> dict[str, str]:
    return {str(k): str(v) for k, v in settings.get(name, {}).items()}


def _column(name: str, column: str, unit: str | None) -> pl.Expr:
    if name == "time":
        return moment(column, unit)
    if unit is not None:
        return scaled(column, name, unit)
    if name == "status":
        return status(column)
    return json_said(column) if name in ("messages", "tools") else pl.col(column)


def _signals(chunk: Chunk, rows: pl.DataFrame, signals: Mapping[str, str]) -> pl.DataFrame:
    ids, models = (rows.select(pl.col(name).cast(pl.String))[name] for name in ("request_id", "model"))
    frames = []
    for source, column in signals.items():
        text = chunk.frame.select(said(column)).to_series()
        frames.append(
            pl.DataFrame(
                {
                    "request_id": ids,
                    "model": models,
                    "signal": ids,
                    "source": [source] * len(ids),
                    "value": text.cast(pl.Float64, strict=False),
                    "label": text,
                }
            ).filter(text.is_not_null())
        )
    return pl.concat(frames) if frames else pl.DataFrame(schema=SIGNALS)
