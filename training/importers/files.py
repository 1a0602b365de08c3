"""Exported files in chunks of text columns, fast; Python's own readers take only what the fast ones refuse.

Numbers and times come as text, nested JSON as its JSON text, so that whoever maps them decides how to read them.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as pq

from router_ml.errors import InputError
from router_ml.rawfiles import ORIGINAL, REJECT_SCHEMA, ROW, BrokenRow, jsonl_chunk, read_csv
from training.importers.batch import no_rejects
from training.importers.jsontext import fields_of

CHUNK_BYTES = 1 << 26
CSV_BYTES = 1 << 23  # pyarrow holds some ten blocks; a row that is longer takes the slow way
_HEAD = 1 << 16
_READ_ROWS = 1_024


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a file. `frame` has `ROW` and every wanted column: text in CSV and JSONL, as found in Parquet, null where
    it is absent. `cursor` goes on after them.

    `raw_of` gives the rows as they stood in the file, with `ROW`; it costs, and few chunks have rejects. `names` are
    the file's columns, None where each row has its own.
    """

    frame: pl.DataFrame
    raw_of: Callable[[], pl.DataFrame]
    rejects: pl.DataFrame
    cursor: dict[str, Any]
    names: tuple[str, ...] | None = None

    @property
    def raw(self) -> pl.DataFrame:
        """The rows as they stood in the file, one for each of `frame`."""
        return self.raw_of().drop(ROW)


def read_columns(
    file: str | Path,
    wanted: Iterable[str],
    *,
    cursor: Mapping[str, Any] | None = None,
    chunk_rows: int = 100_000,
) -> Iterator[Chunk]:
    """Reads the wanted columns of a .parquet, .csv, .jsonl or .ndjson file, from a chunk's cursor on.

    A file that grew is read from where the cursor was; one whose beginning has changed from its first row. Raises
    InputError for a file that is missing, of another kind or damaged as a whole.
    """
    path, names = Path(file), list(dict.fromkeys(wanted))
    if not path.is_file():
        raise InputError(f"there is no file {path}: correct the path")
    at = dict(cursor or {})
    if not _same(path, at):
        at = {}
    kind = path.suffix.lower()
    if kind in (".jsonl", ".ndjson"):
        yield from _jsonl(path, names, at)
    elif kind == ".csv":
        yield from _together(_csv(path, names, at, chunk_rows))
    else:
        yield from _parquet(path, names, at, chunk_rows)


def _mark(path: Path, row: int, offset: int) -> dict[str, Any]:
    with path.open("rb") as file:
        head = file.read(min(_HEAD, offset) if offset else _HEAD)
    return {"row": row, "offset": offset, "head": len(head), "sha256": hashlib.sha256(head).hexdigest()}


def _same(path: Path, at: Mapping[str, Any]) -> bool:
    if not at or path.stat().st_size < max(at["offset"], at["head"]):
        return False
    with path.open("rb") as file:
        return bool(hashlib.sha256(file.read(at["head"])).hexdigest() == at["sha256"])


def _jsonl(path: Path, names: list[str], at: Mapping[str, Any]) -> Iterator[Chunk]:
    row, offset = at.get("row", 0), at.get("offset", 0)
    with path.open("rb") as file:
        file.seek(offset)
        rest = b""
        while block := file.read(CHUNK_BYTES):
            cut = block.rfind(b"\n") + 1
            if not cut:
                rest += block
                continue
            data, rest = b"".join((rest, memoryview(block)[:cut])), block[cut:]
            offset += len(data)
            frame, raw_of, rejects, read = _lines(data, names, row)
            row += read
            yield Chunk(frame, raw_of, rejects, _mark(path, row, offset))
        if rest.strip():
            # A last line without newline: where it is no JSON, its writer may be at it, so the cursor stays before it.
            frame, raw_of, rejects, read = _lines(rest, names, row)
            whole = frame.height > 0
            yield Chunk(frame, raw_of, rejects, _mark(path, row + whole, offset + len(rest) * whole))


def _lines(
    data: bytes, names: list[str], done: int
) -> tuple[pl.DataFrame, Callable[[], pl.DataFrame], pl.DataFrame, int]:
    """Some lines as (columns, their text, the lines that are no JSON object, how many there were)."""
    if done == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    sound = _is_utf8(data)
    lines = [line for line in data.split(b"\n") if line and not line.isspace()]
    read, kept, found, broken = fields_of(tuple(names)), [], [], []
    for at, line in enumerate(lines):
        if sound or _is_utf8(line):
            values = read(line)
            if values is not None:
                kept.append(at)
                found.append(values)
                continue
        refused = jsonl_chunk([line], done + at).broken
        broken += refused or [BrokenRow(done + at + 1, "not valid JSON", json.dumps(line.decode()))]
    columns = zip(*found, strict=True) if found else [()] * len(names)
    texts = [pl.Series(name, values, dtype=pl.String) for name, values in zip(names, columns, strict=True)]
    rows = pl.Series(ROW, kept, dtype=pl.Int64) + (done + 1)
    return pl.DataFrame([*texts, rows]), partial(_text_of, lines, kept, rows), _broken(broken), len(lines)


def _is_utf8(data: bytes) -> bool:
    try:
        return data.isascii() or bool(data.decode())
    except UnicodeDecodeError:
        return False


def _text_of(lines: list[bytes], kept: list[int], rows: pl.Series) -> pl.DataFrame:
    return pl.DataFrame([pl.Series(ORIGINAL, [lines[at].decode().strip() for at in kept], dtype=pl.String), rows])


def _broken(lines: list[BrokenRow]) -> pl.DataFrame:
    rows = [(row.row, row.reason, row.original) for row in lines]
    return pl.DataFrame(rows, schema=REJECT_SCHEMA, orient="row")


def _csv(path: Path, names: list[str], at: Mapping[str, Any], chunk_rows: int) -> Iterator[Chunk]:
    """By pyarrow, which says which line has another width; from the first broken byte on by Python."""
    done = int(at.get("row", 0))
    seen = 0
    ragged: list[tuple[int, str]] = []

    def note(line: Any) -> str:
        ragged.append((line.number - 1, line.text))
        return "skip"

    options = {
        "read_options": arrow_csv.ReadOptions(use_threads=False, block_size=min(CSV_BYTES, CHUNK_BYTES)),
        "parse_options": arrow_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
    }
    header = _header(path)
    convert = arrow_csv.ConvertOptions(
        column_types=dict.fromkeys(header, pa.large_string()),
        null_values=[""],
        strings_can_be_null=True,
        quoted_strings_can_be_null=True,
    )
    try:
        with arrow_csv.open_csv(path, convert_options=convert, **options) as reader:
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
                    frame = _pick(raw, names).with_columns(rows)
                    yield Chunk(frame, _numbered(raw, rows), rejects, _mark(path, done, 0), tuple(raw.columns))
    except (pa.ArrowInvalid, UnicodeDecodeError):
        yield from _slow_csv(path, names, done, chunk_rows)
        return
    if gone := [(n, "wrong number of fields", json.dumps(t)) for n, t in ragged if n > done]:
        last = gone[-1][0]
        empty = pl.DataFrame(schema=dict.fromkeys(header, pl.String()))
        none = pl.Series(ROW, [], dtype=pl.Int64)
        rejects = pl.DataFrame(gone, schema=REJECT_SCHEMA, orient="row")
        frame = _pick(empty, names).with_columns(none)
        yield Chunk(frame, _numbered(empty, none), rejects, _mark(path, last, 0), tuple(header))


def _together(chunks: Iterable[Chunk]) -> Iterator[Chunk]:
    """Small chunks as fewer of CHUNK_BYTES: each costs its reader some 30 ms, however many rows it has."""
    pending: list[Chunk] = []
    size = 0
    for chunk in chunks:
        pending.append(chunk)
        size += int(chunk.frame.estimated_size())
        if size >= CHUNK_BYTES:
            yield _one(pending)
            pending, size = [], 0
    if pending:
        yield _one(pending)


def _one(chunks: list[Chunk]) -> Chunk:
    raws = [chunk.raw_of for chunk in chunks]
    return Chunk(
        pl.concat([chunk.frame for chunk in chunks]),
        lambda: pl.concat([raw() for raw in raws]),
        pl.concat([chunk.rejects for chunk in chunks]),
        chunks[-1].cursor,
        chunks[-1].names,
    )


def _slow_csv(path: Path, names: list[str], done: int, chunk_rows: int) -> Iterator[Chunk]:
    for chunk in read_csv(path, chunk_rows):
        rows = pl.Series(ROW, chunk.rows, dtype=pl.Int64)
        raw = pl.DataFrame([pl.Series(n, v, dtype=pl.String) for n, v in chunk.columns.items()])
        rejects, keep = _broken(chunk.broken).filter(pl.col("row") > done), rows > done
        last = max([done, *chunk.rows[-1:], *(line.row for line in chunk.broken[-1:])])
        if keep.any() or rejects.height:
            raw, rows = raw.filter(keep), rows.filter(keep)
            frame = _pick(raw, names).with_columns(rows)
            yield Chunk(frame, _numbered(raw, rows), rejects, _mark(path, last, 0), tuple(raw.columns))


def _numbered(raw: pl.DataFrame, rows: pl.Series) -> Callable[[], pl.DataFrame]:
    return partial(raw.with_columns, rows)


def _header(path: Path) -> list[str]:
    """The names of a CSV file's columns. Raises InputError as `read_csv` does."""
    for chunk in read_csv(path, 1):
        return list(chunk.columns)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _parquet(path: Path, names: list[str], at: Mapping[str, Any], chunk_rows: int) -> Iterator[Chunk]:
    """By pyarrow: polars holds eight row groups ahead, and rows of 8 kB make gigabytes of these."""
    done = int(at.get("row", 0))
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = file.schema_arrow.names
            for raw in _whole(_from_row(file, [name for name in columns if name in names], done), chunk_rows):
                rows = pl.int_range(done + 1, done + raw.height + 1, dtype=pl.Int64, eager=True).alias(ROW)
                raw_of = partial(_rows_of, path, done, rows)
                done += raw.height
                frame = _pick(raw, names).with_columns(rows)
                yield Chunk(frame, raw_of, no_rejects(), _mark(path, done, 0), tuple(columns))
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{path} is not a readable .parquet, .csv or .jsonl file: {str(error).splitlines()[0]}"
        ) from None


def _from_row(file: pq.ParquetFile, columns: list[str], first: int) -> Iterator[pl.DataFrame]:
    """The file's rows from one on, some at a time."""
    ends = np.cumsum([file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)])
    group = int(np.searchsorted(ends, first, side="right"))
    skip = first - (int(ends[group - 1]) if group else 0)
    groups = list(range(group, file.num_row_groups))
    for batch in file.iter_batches(_READ_ROWS, row_groups=groups, columns=columns, use_threads=False):
        rows = batch.slice(min(skip, batch.num_rows))
        skip -= batch.num_rows - rows.num_rows
        if rows.num_rows:
            yield pl.DataFrame(pl.from_arrow(rows)) if columns else pl.DataFrame({}, height=rows.num_rows)


def _whole(frames: Iterable[pl.DataFrame], most_rows: int) -> Iterator[pl.DataFrame]:
    """The frames put together to chunks of at most `most_rows` rows, or of CHUNK_BYTES and one frame's more."""
    pending: list[pl.DataFrame] = []
    size = rows = 0
    for frame in frames:
        for part in frame.iter_slices(most_rows):
            if pending and rows + part.height > most_rows:
                yield pl.concat(pending)
                pending, size, rows = [], 0, 0
            pending.append(part)
            size, rows = size + int(part.estimated_size()), rows + part.height
            if size >= CHUNK_BYTES:
                yield pl.concat(pending)
                pending, size, rows = [], 0, 0
    if pending:
        yield pl.concat(pending)


def _rows_of(path: Path, first: int, rows: pl.Series) -> pl.DataFrame:
    return pl.scan_parquet(path).slice(first, len(rows)).collect().with_columns(rows)


def _pick(raw: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """The wanted columns; absent ones null, nested ones as JSON text."""
    columns: list[pl.Expr] = []
    for name in names:
        dtype = raw.schema.get(name)
        if dtype is None:
            columns.append(pl.lit(None, pl.String).alias(name))
        elif isinstance(dtype, pl.Struct):
            columns.append(pl.when(pl.col(name).is_not_null()).then(pl.col(name).struct.json_encode()).alias(name))
        elif isinstance(dtype, pl.List) and _is_map(dtype.inner):
            key, value = (_as_json(pl.element().struct.field(name)) for name in ("key", "value"))
            pairs = pl.col(name).list.eval(key + pl.lit(":") + value).list.join(",")
            columns.append((pl.lit("{") + pairs + pl.lit("}")).alias(name))
        elif isinstance(dtype, pl.List | pl.Array):
            columns.append(pl.when(pl.col(name).is_not_null()).then(_as_json(pl.col(name))).alias(name))
        else:
            columns.append(pl.col(name))
    return raw.select(columns) if columns else pl.DataFrame({}, height=raw.height)


def _is_map(dtype: object) -> bool:
    """Whether a list's items are pairs: what polars makes of Parquet's maps."""
    return isinstance(dtype, pl.Struct) and [field.name for field in dtype.fields] == ["key", "value"]


def _as_json(value: pl.Expr) -> pl.Expr:
    return pl.struct(value.alias("v")).struct.json_encode().str.slice(5).str.head(-1)
