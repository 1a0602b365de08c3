"""CSV files in chunks: by pyarrow, which says which row has another width; from the first broken byte on by Python.

pyarrow holds some ten blocks, so these are small; a row that is longer than one takes the slow way.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as arrow_csv

from router_ml.rawfiles import REJECT_SCHEMA, ROW, read_csv
from training.importers.batch import no_rejects
from training.importers.resume import Place, Span, header_of, sha256, tail_of, text_of

BLOCK_BYTES = 1 << 23


@dataclass(frozen=True, slots=True)
class Rows:
    """Some rows: text columns as in the file, their numbers (`ROW`), rejects, the cursor after them.

    `last` says that they are a last row without newline, which is to be a chunk of its own.
    """

    raw: pl.DataFrame
    numbers: pl.Series
    rejects: pl.DataFrame
    cursor: dict[str, Any]
    last: bool = False


def read_rows(path: Path, at: Place, *, chunk_rows: int, block_bytes: int) -> Iterator[Rows]:
    """The rows of a CSV file from a place on. Raises InputError as `rawfiles.read_csv` does."""
    header = _header(path)
    row = at.row
    if at.end > at.offset:
        for rows in _by_arrow(path, header, at, chunk_rows, block_bytes):
            row = rows.cursor["row"]
            yield rows
    tail = tail_of(path, at)
    if not tail.strip() or at.end == 0:
        return
    cursor = at.mark(row, at.end)
    text = tail.decode("utf-8", "surrogateescape")
    records: list[list[str]] = []
    try:
        text.encode()
        records = [record for record in csv.reader(io.StringIO(text, newline=""), strict=True) if record]
        whole = len(records) == 1 and len(records[0]) == len(header)
    except (UnicodeEncodeError, csv.Error):
        whole = False
    cells = records[0] if whole else []
    raw = pl.DataFrame({n: [v or None] for n, v in zip(header, cells, strict=True)} if whole else None,
                       schema=dict.fromkeys(header, pl.String()))  # fmt: skip
    numbers = pl.Series(ROW, [row + 1] if whole else [], dtype=pl.Int64)
    said = {"tail": {"sha256": sha256(tail)}} if whole else {"half": len(tail)}
    yield Rows(raw, numbers, no_rejects(), cursor | said, last=True)


def _by_arrow(path: Path, header: list[str], at: Place, chunk_rows: int, block_bytes: int) -> Iterator[Rows]:
    done, seen = at.row, at.base
    ragged: list[tuple[int, str]] = []

    def note(line: Any) -> str:
        ragged.append((at.base + line.number - 1, line.text))
        return "skip"

    options = {
        "read_options": arrow_csv.ReadOptions(use_threads=False, block_size=block_bytes),
        "parse_options": arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
    }
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.large_string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    try:
        with arrow_csv.open_csv(
            pa.PythonFile(io.BufferedReader(_span(path, at), block_bytes), "r"), convert_options=convert, **options
        ) as reader:
            for batch in reader:
                raw = pl.DataFrame(pl.from_arrow(batch))
                lines = dict(ragged)
                numbers = np.setdiff1d(np.arange(seen + 1, seen + raw.height + len(lines) + 1), list(lines))
                numbers = numbers[: raw.height]
                last = int(numbers[-1]) if raw.height else seen
                gone = [(n, "wrong number of fields", json.dumps(t)) for n, t in ragged if done < n <= last]
                ragged[:] = [line for line in ragged if line[0] > last]
                seen = last
                keep = numbers > done
                raw = raw.filter(pl.Series(keep))
                rows = pl.Series(ROW, numbers[keep], dtype=pl.Int64)
                if raw.height or gone:
                    rejects = pl.DataFrame(gone, schema=REJECT_SCHEMA, orient="row")
                    done = max(done, last)
                    yield Rows(raw, rows, rejects, at.mark(done))
    except (pa.ArrowInvalid, UnicodeDecodeError):
        for rows_ in _slow(path, at, done, chunk_rows):
            done = rows_.cursor["row"]
            yield rows_
    else:
        if gone := [(n, "wrong number of fields", json.dumps(t)) for n, t in ragged if n > done]:
            done = gone[-1][0]
            rejects = pl.DataFrame(gone, schema=REJECT_SCHEMA, orient="row")
            yield _none(header, rejects, at.mark(done))
    # All is read: from here on nothing in front of the end is parsed again.
    yield _none(header, no_rejects(), at.mark(done, at.end))


def _none(header: list[str], rejects: pl.DataFrame, cursor: dict[str, Any]) -> Rows:
    empty = pl.DataFrame(schema=dict.fromkeys(header, pl.String()))
    return Rows(empty, pl.Series(ROW, [], dtype=pl.Int64), rejects, cursor)


def _span(path: Path, at: Place) -> Span:
    """What is to be parsed, with the header in front of it."""
    return Span(path, header_of(path) if at.offset else b"", at.offset, at.end)


def _slow(path: Path, at: Place, done: int, chunk_rows: int) -> Iterator[Rows]:
    for chunk in read_csv(path, chunk_rows, text_of(_span(path, at), "utf-8-sig")):
        rows = pl.Series(ROW, chunk.rows, dtype=pl.Int64) + at.base
        raw = pl.DataFrame([pl.Series(n, v, dtype=pl.String) for n, v in chunk.columns.items()])
        broken = [(line.row + at.base, line.reason, line.original) for line in chunk.broken]
        rejects = pl.DataFrame(broken, schema=REJECT_SCHEMA, orient="row").filter(pl.col("row") > done)
        keep = rows > done
        last = max([done, *rows[-1:], *(row for row, _, _ in broken[-1:])])
        if keep.any() or rejects.height:
            yield Rows(raw.filter(keep), rows.filter(keep), rejects, at.mark(last))


def _header(path: Path) -> list[str]:
    """The names of a CSV file's columns. Raises InputError as `read_csv` does."""
    for chunk in read_csv(path, 1):
        return list(chunk.columns)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])
