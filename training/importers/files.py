"""Exported files in chunks of text columns, fast: polars reads, and Python only a chunk that polars refuses.

Numbers and times come as text, nested JSON as its JSON text, so that whoever maps them decides how to read them.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.csv as arrow_csv

from router_ml.errors import InputError
from router_ml.rawfiles import ORIGINAL, REJECT_SCHEMA, ROW, RawChunk, jsonl_chunk, read_csv
from training.importers.batch import no_rejects

CHUNK_BYTES = 1 << 26
_HEAD = 1 << 16


@dataclass(frozen=True, slots=True)
class Chunk:
    """Rows of a file: `frame` has `ROW` and every wanted column (text in CSV and JSONL, null where it is absent; as
    found in Parquet), `raw` the rows as they stood in the file; `cursor` goes on after them."""

    frame: pl.DataFrame
    raw: pl.DataFrame
    rejects: pl.DataFrame
    cursor: dict[str, Any]


def read_columns(
    file: str | Path, wanted: Iterable[str], *, cursor: Mapping[str, Any] | None = None, chunk_rows: int = 100_000
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
        yield from _csv(path, names, at, chunk_rows)
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
            data, rest = rest + block[:cut], block[cut:]
            if data:
                offset += len(data)
                frame, raw, rejects, read = _lines(data, names, row)
                row += read
                yield Chunk(frame, raw, rejects, _mark(path, row, offset))
        if rest.strip():
            # A last line without newline: where it is no JSON, its writer may be at it, so the cursor stays before it.
            frame, raw, rejects, read = _lines(rest, names, row)
            whole = frame.height > 0
            yield Chunk(frame, raw, rejects, _mark(path, row + whole, offset + len(rest) * whole))


def _lines(data: bytes, names: list[str], done: int) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, int]:
    """Some lines as (columns, their text, the lines that are no JSON object, how many there were)."""
    if done == 0:
        data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
        schema = dict.fromkeys(names, pl.String())
        frame = pl.read_ndjson(data, schema=schema) if data.strip() else pl.DataFrame(schema=schema)
        lines = pl.Series(ORIGINAL, [text], dtype=pl.String).str.split("\n").explode().str.strip_chars()
        lines = lines.filter(lines != "")
        if frame.height != len(lines):
            raise pl.exceptions.ComputeError("lines without an object")
    except (UnicodeDecodeError, pl.exceptions.PolarsError):
        return _by_line(data, names, done)
    rows = pl.int_range(done + 1, done + frame.height + 1, dtype=pl.Int64, eager=True).alias(ROW)
    return frame.with_columns(rows), lines.to_frame(), no_rejects(), frame.height


def _by_line(data: bytes, names: list[str], done: int) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, int]:
    lines = [line for line in data.split(b"\n") if line.strip()]
    chunk = jsonl_chunk(lines, done)
    kept = [line.encode() for line in chunk.originals or []]
    frame = (
        pl.read_ndjson(b"\n".join(kept), schema=dict.fromkeys(names, pl.String()))
        if kept
        else pl.DataFrame(schema=dict.fromkeys(names, pl.String()))
    )
    frame = frame.with_columns(pl.Series(ROW, chunk.rows, dtype=pl.Int64))
    return frame, pl.DataFrame({ORIGINAL: chunk.originals}), _broken(chunk), len(lines)


def _broken(chunk: RawChunk) -> pl.DataFrame:
    rows = [(row.row, row.reason, row.original) for row in chunk.broken]
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
        "read_options": arrow_csv.ReadOptions(use_threads=False, block_size=CHUNK_BYTES),
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
                    yield Chunk(_pick(raw, names).with_columns(rows), raw, rejects, _mark(path, done, 0))
    except (pa.ArrowInvalid, UnicodeDecodeError):
        yield from _slow_csv(path, names, done, chunk_rows)
        return
    if gone := [(n, "wrong number of fields", json.dumps(t)) for n, t in ragged if n > done]:
        last = gone[-1][0]
        empty = pl.DataFrame(schema=dict.fromkeys(header, pl.String()))
        none = pl.Series(ROW, [], dtype=pl.Int64)
        rejects = pl.DataFrame(gone, schema=REJECT_SCHEMA, orient="row")
        yield Chunk(_pick(empty, names).with_columns(none), empty, rejects, _mark(path, last, 0))


def _slow_csv(path: Path, names: list[str], done: int, chunk_rows: int) -> Iterator[Chunk]:
    for chunk in read_csv(path, chunk_rows):
        rows = pl.Series(ROW, chunk.rows, dtype=pl.Int64)
        raw = pl.DataFrame([pl.Series(n, v, dtype=pl.String) for n, v in chunk.columns.items()])
        rejects, keep = _broken(chunk).filter(pl.col("row") > done), rows > done
        last = max([done, *chunk.rows[-1:], *(line.row for line in chunk.broken[-1:])])
        if keep.any() or rejects.height:
            frame = _pick(raw, names).with_columns(rows).filter(keep)
            yield Chunk(frame, raw.filter(keep), rejects, _mark(path, last, 0))


def _header(path: Path) -> list[str]:
    """The names of a CSV file's columns. Raises InputError as `read_csv` does."""
    for chunk in read_csv(path, 1):
        return list(chunk.columns)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file), [])


def _parquet(path: Path, names: list[str], at: Mapping[str, Any], chunk_rows: int) -> Iterator[Chunk]:
    done = int(at.get("row", 0))
    try:
        scan = pl.scan_parquet(path).slice(done)
        for raw in scan.collect_batches(chunk_size=chunk_rows, maintain_order=True):
            rows = pl.int_range(done + 1, done + raw.height + 1, dtype=pl.Int64, eager=True).alias(ROW)
            done += raw.height
            yield Chunk(_pick(raw, names).with_columns(rows), raw, no_rejects(), _mark(path, done, 0))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{path} is not a readable .parquet, .csv or .jsonl file: {str(error).splitlines()[0]}"
        ) from None


def _pick(raw: pl.DataFrame, names: list[str]) -> pl.DataFrame:
    """The wanted columns; absent ones null, nested ones as JSON text."""
    columns: list[pl.Expr] = []
    for name in names:
        dtype = raw.schema.get(name)
        if dtype is None:
            columns.append(pl.lit(None, pl.String).alias(name))
        elif isinstance(dtype, pl.Struct):
            columns.append(pl.when(pl.col(name).is_not_null()).then(pl.col(name).struct.json_encode()).alias(name))
        elif isinstance(dtype, pl.List | pl.Array):
            inside = pl.struct(pl.col(name).alias("v")).struct.json_encode().str.slice(5).str.head(-1)
            columns.append(pl.when(pl.col(name).is_not_null()).then(inside).alias(name))
        else:
            columns.append(pl.col(name))
    return raw.select(columns) if columns else pl.DataFrame({}, height=raw.height)
