"""Feedback that is kept in files of its own: CSV, JSONL or Parquet, to frames of `batch.SIGNALS`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import polars as pl

from router_ml.errors import InputError
from training.importers.batch import SIGNALS
from training.importers.files import read_columns
from training.importers.values import moment, number, said

KEYS = ("request_id", "response_id", "trace_id")


def read_signals(
    file: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
    time_unit: str | None = None,
) -> Iterator[pl.DataFrame]:
    """The signals of a file, which has one in every row.

    `columns` gives the file's name of a column of `SIGNALS`, where it is another one. Needed are `value` or `label` (a
    value that is no number is taken for a label) and one of request_id, response_id, trace_id; `model` says whose
    answer is meant of a request that went to several. Without a column `source` all are of `source`, by default the
    file's name without its ending. `time_unit` as in `values.moment`. Raises InputError for a file without these, and
    as `read_columns` does.
    """
    names = {name: (columns or {}).get(name, name) for name in SIGNALS}
    if unknown := sorted(set(columns or {}) - set(SIGNALS)):
        raise InputError(f"feedback has no column {unknown[0]!r}: it has {', '.join(SIGNALS)}")
    for chunk in read_columns(file, names.values()):
        frame = chunk.frame
        has = {name: frame[column].null_count() < frame.height for name, column in names.items()}
        if frame.height and not any(has[key] for key in KEYS):
            raise InputError(f"{file} has none of {', '.join(KEYS)}: say which column is, with --feedback-column")
        if frame.height and not (has["value"] or has["label"]):
            raise InputError(f"{file} has neither value nor label: say which column is, with --feedback-column")
        word = pl.coalesce(said(names["label"]), said(names["value"]))
        name = said(names["source"]).fill_null(Path(file).stem if source is None else source)
        yield frame.select(
            *(said(names[key]).alias(key) for key in ("signal", *KEYS, "model")),
            moment(names["time"], time_unit).alias("time"),
            name.alias("source"),
            number(names["value"]).alias("value"),
            word.alias("label"),
            number(names["weight"]).alias("weight"),
        )
