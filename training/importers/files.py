"""Exported files in chunks of text columns, fast; Python's own readers take only what the fast ones refuse.

Numbers and times come as text, nested JSON as its JSON text, so that whoever maps them decides how to read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from router_ml.errors import InputError
from router_ml.log_schema import convert
from router_ml.rawfiles import BROKEN_UTF8, ORIGINAL, REJECT_SCHEMA, ROW, BrokenRow, jsonl_chunk, rejected
from training.importers.batch import no_rejects
from training.importers.csv_rows import BLOCK_BYTES, read_rows
from training.importers.jsontext import fields_of
from training.importers.resume import Place, place, tail_of

CHUNK_BYTES = 1 << 26
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

    A file that grew is read from where the cursor was, one of which what was read has changed from its first row; of a
    last line without newline `resume` says what becomes. Raises InputError for a file that is missing, of another kind
    or damaged as a whole.
    """
    path, names = Path(file), list(dict.fromkeys(wanted))
    if not path.is_file():
        raise InputError(f"there is no file {path}: correct the path")
    at = place(path, cursor)
    kind = path.suffix.lower()
    if at.same:
        return
    if kind in (".jsonl", ".ndjson"):
        yield from _jsonl(path, names, at)
    elif kind == ".csv":
        yield from _csv(path, names, at, chunk_rows)
    else:
        yield from _parquet(path, names, at, chunk_rows)


def _jsonl(path: Path, names: list[str], at: Place) -> Iterator[Chunk]:
    row, offset = at.row, at.offset
    with path.open("rb") as file:
        file.seek(offset)
        rest = b""
        while block := file.read(min(CHUNK_BYTES, at.end - file.tell())):
            cut = block.rfind(b"\n") + 1 if file.tell() < at.end else len(block)
            if not cut:
                rest += block
                continue
            data, rest = b"".join((rest, memoryview(block)[:cut])), block[cut:]
            offset += len(data)
            frame, raw_of, rejects, read = _lines(data, names, row)
            row += read
            yield Chunk(frame, raw_of, rejects, at.mark(row, offset))
    if tail := tail_of(path, at).strip():
        frame, raw_of, rejects, _ = _lines(b"", names, row)
        yield Chunk(frame, raw_of, rejects, at.mark(row, at.end, half=len(tail)))


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


def _csv(path: Path, names: list[str], at: Place, chunk_rows: int) -> Iterator[Chunk]:
    """Rows as fewer chunks of CHUNK_BYTES: each costs its reader some 30 ms, however many rows it has."""
    pending: list[Chunk] = []
    size = 0
    for rows in read_rows(path, at, chunk_rows=chunk_rows, block_bytes=min(BLOCK_BYTES, CHUNK_BYTES)):
        frame = _pick(rows.raw.with_columns(rows.numbers), [*names, ROW])
        raw_of = _numbered(rows.raw, rows.numbers)
        if rows.last and pending:
            yield _one(pending)
            pending, size = [], 0
        pending.append(Chunk(frame, raw_of, rows.rejects, rows.cursor, tuple(rows.raw.columns)))
        size += int(frame.estimated_size())
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


def _numbered(raw: pl.DataFrame, rows: pl.Series) -> Callable[[], pl.DataFrame]:
    return partial(raw.with_columns, rows)


def _parquet(path: Path, names: list[str], at: Place, chunk_rows: int) -> Iterator[Chunk]:
    """By pyarrow: polars holds eight row groups ahead, and rows of 8 kB make gigabytes of these."""
    done = at.row
    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            columns = file.schema_arrow.names
            for raw in _whole(_from_row(file, [name for name in columns if name in names], done), chunk_rows):
                rows = pl.int_range(done + 1, done + raw.height + 1, dtype=pl.Int64, eager=True).alias(ROW)
                raw_of = partial(_rows_of, path, done, rows)
                done += raw.height
                frame, rejects = _texts(_pick(raw.with_columns(rows), [*names, ROW]), raw_of)
                yield Chunk(frame, raw_of, rejects, at.mark(done), tuple(columns))
    except (OSError, pa.ArrowException, pl.exceptions.PolarsError) as error:
        raise InputError(
            f"{path} is not a readable .parquet, .csv or .jsonl file: {str(error).splitlines()[0]}"
        ) from None


def _texts(frame: pl.DataFrame, raw_of: Callable[[], pl.DataFrame]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Binary columns as text; rows in which one is none are rejects."""
    binary = [name for name, dtype in frame.schema.items() if dtype == pl.Binary]
    if not binary:
        return frame, no_rejects()
    cast, lost = convert(frame, dict.fromkeys(binary, pl.String()))
    texts = frame.with_columns(cast)
    if not lost:
        return texts, no_rejects()
    broken = pl.DataFrame(list(lost.values())).select(pl.any_horizontal(pl.all())).to_series()
    raw = raw_of().join(texts.filter(broken).select(ROW), on=ROW, how="semi", maintain_order="left")
    return texts.filter(~broken), rejected(raw, {BROKEN_UTF8: pl.repeat(True, raw.height, eager=True)})


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
