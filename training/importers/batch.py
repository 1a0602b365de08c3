"""What a reader of a gateway's log gives: batches of rows in the log's columns, signals of quality, rejects, a cursor.

A reader is a function `read(source, options) -> Iterator[Batch]`. It maps columns with polars expressions, and walks
over rows in Python only to read JSON (`jsontext`). It neither validates nor sorts nor drops what was read before:
`importing.import_log` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import polars as pl

from router_ml.log_schema import LOG_SCHEMA
from router_ml.rawfiles import CHUNK_ROWS, REJECT_SCHEMA, ROW

__all__ = ["JOINS", "ROW", "SIGNALS", "Batch", "ReadOptions", "Reader", "no_rejects", "no_signals"]

# By what feedback finds a row beside its request_id. Kept beside the log, whose schema has no room for them.
JOINS = pl.Schema({"trace_id": pl.String(), "response_id": pl.String()})
# One thing that someone or something said of an answer. `request_id` or `response_id` name one answer (of a request
# that was sent to several models that of `model`, or of the trace), `trace_id` alone a whole trace (`training.feedback`
# says which answer gets it, so that it never multiplies). `source` is what a rule of the feedback file is about;
# `value` is a number as found, `label` a word as found, `weight` the signal's own weight where it has one; `signal` is
# an id that is the same when the signal is read again (null: its content is it).
SIGNALS = pl.Schema(
    {
        "signal": pl.String(),
        "time": LOG_SCHEMA["time"],
        "request_id": pl.String(),
        "trace_id": pl.String(),
        "response_id": pl.String(),
        "model": pl.String(),
        "source": pl.String(),
        "value": pl.Float64(),
        "label": pl.String(),
        "weight": pl.Float64(),
    }
)


def no_rejects() -> pl.DataFrame:
    """No reject."""
    return pl.DataFrame(schema=REJECT_SCHEMA)


def no_signals() -> pl.DataFrame:
    """No signal."""
    return pl.DataFrame(schema=SIGNALS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Some of a source's rows, in its order.

    `rows` has `ROW` (Int64, the row's 1-based number in the source), columns of `LOG_SCHEMA` and of `JOINS`; text is
    cast value by value later, what is absent is null, other columns are left out. `raw` says what each row was in the
    source, for a reject's original: a frame with as many rows, or a function that makes one that has `ROW`. `rejects`
    are rows that could not be read at all. `signals` (`SIGNALS`) is feedback that stands in the source itself, of these
    rows or of others. `cursor` is JSON: given back as `ReadOptions.cursor`, reading goes on after this batch (it may
    read some rows again: they are known by their ids). `skipped` counts rows that are no request at all, by why (an
    embedding, a health check, a tool's span).
    """

    rows: pl.DataFrame
    cursor: Mapping[str, Any]
    raw: pl.DataFrame | Callable[[], pl.DataFrame] | None = None
    rejects: pl.DataFrame = field(default_factory=no_rejects)
    signals: pl.DataFrame = field(default_factory=no_signals)
    skipped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """What a reader is told. `cursor` is that of the last batch that was kept, None at first.

    `settings` are the kind's own, as given on the command line (`{"columns": {...}}` for a table).
    """

    cursor: Mapping[str, Any] | None = None
    chunk_rows: int = CHUNK_ROWS
    settings: Mapping[str, Any] = field(default_factory=dict)


class Reader(Protocol):
    """A kind of source. Raises InputError for a source that is missing, of another kind or damaged as a whole."""

    def __call__(self, source: str, options: ReadOptions) -> Iterator[Batch]:
        """The source's batches from the options' cursor on."""
        ...
