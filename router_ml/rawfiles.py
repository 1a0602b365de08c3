"""Parquet, CSV and JSONL files in chunks as found; a line that cannot be read is set aside and the rest is kept.

CSV and JSONL go through Python's own readers: polars is faster, but one broken byte or ragged line costs it the whole
file, and it does not say which row.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import polars as pl

from router_ml.errors import InputError

BROKEN_UTF8 = "broken UTF-8"
# A rejected row: its 1-based number in the file, every reason joined by "; ", and the whole row as JSON text.
REJECT_SCHEMA = pl.Schema({"row": pl.Int64(), "reason": pl.String(), "original": pl.String()})
# What a reader adds to a chunk: the row's number in its file, why it is already known to be bad, and its own text.
ROW, REASON, ORIGINAL = "__row", "__reason", "__original"
JSON_COLUMNS = ("messages", "tools")
CHUNK_ROWS = 100_000
DtypeOf = Callable[[str], pl.DataType | None]
# One field longer than this is a quote that was never closed, not a prompt.
_MAX_FIELD_CHARS = 1 << 26
_FIRST_US, _LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999  # the years 1 to 9999, since 1970


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row that could not be read. `original` is its JSON text; a byte that is not UTF-8 stands in it as `\\udcXX`."""

    row: int
    reason: str
    original: str


@dataclass(frozen=True, slots=True)
class RawChunk:
    """Readable rows as aligned columns (absent or empty is None), their 1-based numbers, and the unreadable rows.

    `originals` has the rows' text as it stood in the file where the columns do not already hold all of it (JSONL).
    """

    columns: dict[str, list[Any]]
    rows: list[int]
    originals: list[str] | None = None
    broken: list[BrokenRow] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RawFrame:
    """One chunk of a file: its readable rows as found (for `validate`) and the unreadable ones, already rejected."""

    frame: pl.DataFrame
    rejects: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=REJECT_SCHEMA))


def read_frames(file: str | Path, dtype_of: DtypeOf, *, chunk_rows: int = CHUNK_ROWS) -> Iterator[RawFrame]:
    """Reads a .parquet, .csv or .jsonl file in chunks as found, for `write_log`; unreadable lines come as rejects.

    `dtype_of` says of a column's name as what type it is wanted, or None; columns that are not wanted are kept only for
    a reject's original row. A chunk has the column `ROW`.
    Raises InputError for a file that is missing, of another kind or damaged as a whole.
    """
    path = Path(file)
    if not path.is_file():
        raise InputError(f"there is no file {path}: correct the path")
    kind = path.suffix.lower()
    done = 0
    try:
        if kind == ".parquet":
            for frame in pl.scan_parquet(path).collect_batches(chunk_size=chunk_rows, maintain_order=True):
                yield RawFrame(frame.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(ROW) + done))
                done += frame.height
        elif kind in (".csv", ".jsonl", ".ndjson"):
            for chunk in (read_csv if kind == ".csv" else read_jsonl)(path, chunk_rows):
                yield _raw_frame(chunk, dtype_of)
        else:
            raise InputError(f"{path} is neither .parquet nor .csv nor .jsonl: convert it to one of them")
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(f"{path} is not a readable {kind[1:]} file: {str(error).splitlines()[0]}") from None


def _raw_frame(chunk: RawChunk, dtype_of: DtypeOf) -> RawFrame:
    columns = []
    reasons: dict[int, list[str]] = {}
    for name, values in chunk.columns.items():
        dtype = dtype_of(name)
        if dtype is not None:
            column, wrong = _column(name, values, dtype)
            for at in wrong:
                reasons.setdefault(at, []).append(f"wrong type: {name}")
        elif chunk.originals is None:
            column = pl.Series(name, values, dtype=pl.String)
        else:
            continue
        columns.append(column)
    columns.append(pl.Series(ROW, chunk.rows, dtype=pl.Int64))
    if chunk.originals is not None:
        columns.append(pl.Series(ORIGINAL, chunk.originals, dtype=pl.String))
    if reasons:
        said = ["; ".join(reasons[at]) if at in reasons else None for at in range(len(chunk.rows))]
        columns.append(pl.Series(REASON, said, dtype=pl.String))
    broken = [(row.row, row.reason, row.original) for row in chunk.broken]
    return RawFrame(pl.DataFrame(columns), pl.DataFrame(broken, schema=REJECT_SCHEMA, orient="row"))


def _column(name: str, values: list[Any], dtype: pl.DataType) -> tuple[pl.Series, list[int]]:
    """Python values as a column that `convert` can cast, and the positions of those that it must not."""
    kinds = set(map(type, values)) - {type(None)}
    if kinds <= {str}:
        return pl.Series(name, values, dtype=pl.String), []
    if kinds <= {int, float} and dtype.is_numeric():
        try:
            return pl.Series(name, values, dtype=pl.Float64 if float in kinds else pl.Int64), []
        except OverflowError:
            pass
    if kinds == {list} and isinstance(dtype, pl.List) and all(set(map(type, v)) <= {str} for v in values if v):
        return pl.Series(name, values, dtype=dtype), []
    if kinds == {bool}:
        return pl.Series(name, values, dtype=pl.Boolean), []
    # Everything else goes as text: what is no number, time or list of names then fails its cast and names the column.
    wrong = []
    if dtype == pl.String and name not in JSON_COLUMNS:
        wrong = [at for at, value in enumerate(values) if isinstance(value, dict | list)]
    texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
    return pl.Series(name, texts, dtype=pl.String), wrong


def read_csv(path: Path, chunk_rows: int, text: TextIO | None = None) -> Iterator[RawChunk]:
    """Yields the records of a CSV file with a header, every value a non-empty string or None; of `text` where given.

    Records of another width than the header, and those with broken UTF-8, are set aside. Raises InputError for a file
    without a usable header or with a quote that is never closed.
    """
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_FIELD_CHARS))
    with text or path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file)
        try:
            header = next(reader, [])
            if not any(header):
                raise InputError(f"{path} has no header line: the first line has to name the columns")
            repeated = sorted({name for name in header if header.count(name) > 1})
            if repeated:
                raise InputError(f"{path}: the header names column {repeated[0]!r} twice: rename one of the two")
            if not _encodable("".join(header)):
                raise InputError(f"{path}: the header is not UTF-8: save the file as UTF-8")
            done = 0
            while batch := list(islice(reader, chunk_rows)):
                records = [record for record in batch if record]
                yield _csv_chunk(header, records, done)
                done += len(records)
        except csv.Error as error:
            raise InputError(f"{path}, line {reader.line_num}: {error}; is a quote never closed?") from None


def _csv_chunk(header: list[str], records: list[list[str]], done: int) -> RawChunk:
    broken: list[BrokenRow] = []
    numbers = list(range(done + 1, done + len(records) + 1))
    if any(len(record) != len(header) for record in records) or not _encodable("".join(map("".join, records))):
        kept, kept_numbers = [], []
        for number, record in zip(numbers, records, strict=True):
            reason = None if _encodable("".join(record)) else BROKEN_UTF8
            if len(record) != len(header):
                reason = "wrong number of fields"
            if reason is None:
                kept.append(record)
                kept_numbers.append(number)
                continue
            cells: dict[str, Any] = dict(zip(header, record, strict=False))
            if len(record) > len(header):
                cells[""] = record[len(header) :]
            broken.append(BrokenRow(number, reason, json.dumps(cells)))
        records, numbers = kept, kept_numbers
    cells_by_column = zip(*records, strict=True) if records else iter([()] * len(header))
    columns = {name: [cell or None for cell in cells] for name, cells in zip(header, cells_by_column, strict=True)}
    return RawChunk(columns, numbers, None, broken)


def read_jsonl(path: Path, chunk_rows: int) -> Iterator[RawChunk]:
    """Yields the objects of a JSONL file, each value as `json` reads it; empty lines are skipped.

    Lines with broken UTF-8 and lines that are not one JSON object are set aside. A key is a column from the first chunk
    that has it on.
    """
    done = 0
    names: dict[str, None] = {}
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        while batch := list(islice(lines, chunk_rows)):
            chunk = jsonl_chunk(batch, done)
            done += len(batch)
            names.update(dict.fromkeys(chunk.columns))
            height = len(chunk.rows)
            columns = {name: chunk.columns.get(name) or [None] * height for name in names}
            yield RawChunk(columns, chunk.rows, chunk.originals, chunk.broken)


def jsonl_chunk(batch: list[bytes], done: int) -> RawChunk:
    """Some lines of a JSONL file, none of them empty, after the first `done` ones; see `read_jsonl`."""
    objects: list[dict[str, Any]] = []
    numbers: list[int] = []
    originals: list[str] = []
    broken: list[BrokenRow] = []
    for number, line in enumerate(batch, start=done + 1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            value = json.loads(text)
            if "\\u" in text and not _encodable(json.dumps(value, ensure_ascii=False)):
                raise UnicodeError("an escape in the line is half a surrogate pair")
        except UnicodeError:
            broken.append(BrokenRow(number, BROKEN_UTF8, json.dumps(line.strip().decode("utf-8", "surrogateescape"))))
            continue
        except (ValueError, RecursionError):
            broken.append(BrokenRow(number, "not valid JSON", json.dumps(text)))
            continue
        if not isinstance(value, dict):
            broken.append(BrokenRow(number, "not a JSON object", text.strip()))
            continue
        objects.append(value)
        numbers.append(number)
        originals.append(text.strip())
    names = dict.fromkeys(name for value in objects for name in value)
    return RawChunk({name: [o.get(name) for o in objects] for name in names}, numbers, originals, broken)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def rejected(frame: pl.DataFrame, reasons: Mapping[str, pl.Series]) -> pl.DataFrame:
    """The rows of a chunk that have a reason to be rejected, as `REJECT_SCHEMA`.

    `reasons` maps each reason to the bool mask of its rows, beside what the reader itself found. `frame` has `ROW`.
    """
    known = pl.col(REASON) if REASON in frame.columns else pl.lit(None, pl.String)
    because = [known, *(pl.when(pl.lit(mask)).then(pl.lit(reason)) for reason, mask in reasons.items())]
    said = frame.with_columns(pl.concat_str(because, separator="; ", ignore_nulls=True).alias(REASON)).filter(
        pl.col(REASON) != ""
    )
    originals = said[ORIGINAL].to_list() if ORIGINAL in said.columns else [None] * said.height
    cells = [c for c in said.columns if not c.startswith("__")]
    # Times beyond Python's own (years 1 to 9999), as a wrong unit makes of numbers, cannot become Python's.
    said = said.with_columns(
        pl.col(c).dt.timestamp("us").cast(pl.String) for c in cells if not _has_pythons_times(said[c])
    )
    rows = said.select(cells).iter_rows(named=True) if cells else iter([{}] * said.height)
    texts = [
        text if text is not None else json.dumps(plain(row), ensure_ascii=False)
        for text, row in zip(originals, rows, strict=True)
    ]
    return pl.DataFrame([said[ROW], said[REASON], pl.Series(texts, dtype=pl.String)], schema=REJECT_SCHEMA)


def _has_pythons_times(column: pl.Series) -> bool:
    if not isinstance(column.dtype, pl.Datetime):
        return True
    within = column.dt.timestamp("us").is_between(_FIRST_US, _LAST_US)
    return bool(within.all())


def plain(value: Any) -> Any:
    """`value` as strict JSON can hold it: NaN and infinities, times and bytes become their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
