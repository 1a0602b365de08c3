"""Writes a request log as a directory that appears whole or not at all, with the bad rows set aside and counted."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA, ValidationState, validate
from router_ml.rawfiles import CHUNK_ROWS, RawFrame

LOG_FORMAT = 1


@dataclass(frozen=True, slots=True)
class LogSummary:
    """What a finished log holds: row counts, rejects by reason, content hash, first and last time.

    A log that grows has no hash (None): each import would read all of it again. `logs.log_sha256` tells it.
    """

    path: Path
    rows: int
    rejected: int
    reject_reasons: Mapping[str, int]
    sha256: str | None
    first: datetime | None
    last: datetime | None


class LogWriter:
    """Streams chunks through `validate` into a new log directory, which appears under its name only when it is whole.

    Use as a context manager: leaving it without an exception finishes the log (`summary` then holds the result),
    leaving it with one removes everything that was written. `tmp` is the directory while it is being written; what is
    added there becomes part of the log. Finishing raises InputError when more than `max_reject_share` of the rows were
    rejected, after keeping them as `OUT.rejects.parquet`, or when no row was good.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        catalog: Catalog,
        logging: str | None = None,
        max_reject_share: float = 0.05,
        max_disorder_s: float = 0.0,
        meta: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        now: datetime | None = None,
        part_rows: int = CHUNK_ROWS,
    ) -> None:
        self.out = Path(out)
        self.catalog, self.logging, self.meta = catalog, logging, dict(meta or {})
        self.max_reject_share, self.max_disorder_s, self.now = max_reject_share, max_disorder_s, now
        self.overwrite, self.part_rows = overwrite, part_rows
        _refuse_existing(self.out, overwrite)
        self.tmp = self.out.with_name(f".{self.out.name}.{secrets.token_hex(4)}.tmp")
        self.summary: LogSummary | None = None
        self._state = ValidationState()
        self._hash = LogHash()
        self._pending: list[pl.DataFrame] = []
        self._parts: list[dict[str, Any]] = []
        self._rejects: list[pl.DataFrame] = []
        self._reject_files: list[Path] = []
        self._reasons: Counter[str] = Counter()
        self._unknown: Counter[str] = Counter()
        self._rejected = 0
        self._first: datetime | None = None
        self._last: datetime | None = None

    def __enter__(self) -> LogWriter:
        try:
            self.tmp.mkdir(parents=True)
        except OSError as error:
            raise InputError(f"cannot write beside {self.out}: {error.strerror}: choose another --out") from None
        except BaseException:  # an interruption just then: nobody leaves what was not entered
            shutil.rmtree(self.tmp, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.summary = self._finish()
        finally:
            shutil.rmtree(self.tmp, ignore_errors=True)

    @property
    def seen(self) -> int:
        """Rows taken so far, rejected ones included."""
        return self._hash.rows + self._rejected

    def write(self, chunk: pl.DataFrame | RawFrame) -> None:
        """Validates one chunk and writes its good rows. Chunks have to come in the order of the file."""
        if isinstance(chunk, RawFrame):
            self.set_aside(chunk.rejects)
            chunk = chunk.frame
        if not chunk.height:
            return
        good, rejects = validate(
            chunk, catalog=self.catalog, state=self._state, max_disorder_s=self.max_disorder_s, now=self.now
        )
        self.set_aside(rejects)
        unknown = rejects.filter(pl.col("reason").str.contains("unknown model", literal=True))
        if unknown.height and chunk["model"].dtype == pl.String:
            self._unknown.update(chunk["model"].filter(~chunk["model"].is_in(list(self.catalog.ids))).drop_nulls())
        if good.height:
            first, last = good.select(pl.col("time").min().alias("first"), pl.col("time").max().alias("last")).row(0)
            self._first = first if self._first is None else min(first, self._first)
            self._last = last if self._last is None else max(last, self._last)
            self._hash.update(good)
            self._pending.append(good)
            if sum(frame.height for frame in self._pending) >= self.part_rows:
                self._flush()

    def set_aside(self, rejects: pl.DataFrame) -> None:
        """Adds rows (`REJECT_SCHEMA`) that were found to be bad before they came here."""
        if not rejects.height:
            return
        self._rejected += rejects.height
        counts = rejects["reason"].str.split("; ").explode().value_counts()
        self._reasons.update(dict(counts.iter_rows()))
        self._rejects.append(rejects)
        if sum(frame.height for frame in self._rejects) >= CHUNK_ROWS:
            self._flush_rejects()

    def write_file(self, frame: pl.DataFrame, name: str) -> None:
        """Writes a frame as one parquet file of the log. Raises InputError when the disk does not take it."""
        try:
            frame.write_parquet(self.tmp / name, compression="zstd", compression_level=1)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(
                f"cannot write {self.out}: {error}; nothing of it was kept: free some space, or choose another --out"
            ) from None

    def _flush(self) -> None:
        if self._pending:
            part = pl.concat(self._pending)
            name = f"part-{len(self._parts):05d}.parquet"
            self.write_file(part, name)
            self._parts.append({"file": name, "rows": part.height})
            self._pending = []

    def _flush_rejects(self) -> None:
        if self._rejects:
            name = f".rejects-{len(self._reject_files):05d}.parquet"
            self.write_file(pl.concat(self._rejects), name)
            self._reject_files.append(self.tmp / name)
            self._rejects = []

    def _finish(self) -> LogSummary:
        self._flush()
        self._flush_rejects()
        rejects = self.tmp / "rejects.parquet"
        if self._reject_files:
            pl.scan_parquet(self._reject_files).sort("row").sink_parquet(rejects)
            for path in self._reject_files:
                path.unlink()
        if self._rejected > self.max_reject_share * self.seen:
            kept = keep_rejects(rejects, self.out)
            raise InputError(
                too_many_rejects(self._rejected, self.seen, self.max_reject_share, self._reasons, kept, self._unknown)
            )
        if not self._hash.rows:
            raise InputError(f"no rows to write to {self.out}: the input is empty")
        summary = LogSummary(
            path=self.out,
            rows=self._hash.rows,
            rejected=self._rejected,
            reject_reasons=dict(self._reasons.most_common()),
            sha256=self._hash.hexdigest(),
            first=self._first,
            last=self._last,
        )
        info = {
            "format": LOG_FORMAT,
            "rows": summary.rows,
            "rejected": summary.rejected,
            "reject_reasons": summary.reject_reasons,
            "logging": self.logging,
            "first": summary.first and summary.first.isoformat(),
            "last": summary.last and summary.last.isoformat(),
            "sha256": summary.sha256,
            "parts": self._parts,
            "catalog": self.catalog.to_json(),
            "meta": self.meta,
        }
        (self.tmp / "log.json").write_text(json.dumps(info, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _swap_in(self.tmp, self.out, self.overwrite)
        return summary


def write_log(
    chunks: Iterable[pl.DataFrame | RawFrame],
    out: str | Path,
    *,
    catalog: Catalog,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> LogSummary:
    """Writes chunks of rows, in file order, as a log at `out`; see `LogWriter` for the options and what is raised.

    `progress` is called with the number of rows taken so far.
    """
    with LogWriter(out, catalog=catalog, **options) as writer:
        for chunk in chunks:
            writer.write(chunk)
            if progress is not None:
                progress(writer.seen)
    assert writer.summary is not None
    return writer.summary


def keep_rejects(rejects: pl.DataFrame | Path, out: str | Path) -> Path:
    """Keeps rejects (a frame, or a file that is moved) beside a log that was not written, as `OUT.rejects.parquet`."""
    kept = Path(out).with_name(Path(out).name + ".rejects.parquet")
    if isinstance(rejects, pl.DataFrame):
        aside = kept.with_name(f".{kept.name}.{secrets.token_hex(4)}.tmp")
        kept.parent.mkdir(parents=True, exist_ok=True)
        rejects.write_parquet(aside)
        rejects = aside
    rejects.replace(kept)
    return kept


def too_many_rejects(
    rejected: int,
    seen: int,
    share: float,
    reasons: Counter[str],
    kept: Path | None,
    unknown: Counter[str] | None = None,
) -> str:
    """What to tell of an import that was given up: counts, main reasons, and where the rejected rows were kept."""
    main = "; ".join(f"{reason}: {count:,}" for reason, count in reasons.most_common(5))
    named = ", ".join(name for name, _ in unknown.most_common(5)) if unknown else ""
    return (
        f"{rejected:,} of {seen:,} rows were rejected, more than the allowed share of {share:g}; nothing was written. "
        f"Main reasons: {main}. "
        + (f"Not in the catalogue: {named}. " if named else "")
        + (f"The rejected rows are in {kept}. " if kept is not None else "")
        + "Correct the input, or allow a larger share with --max-reject-share"
    )


def _refuse_existing(out: Path, overwrite: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not overwrite:
        raise InputError(f"{out} exists already: choose another --out, or replace it with --overwrite")
    if not (out / "log.json").is_file():
        raise InputError(f"{out} is not a log, so it is not overwritten: choose another --out")


def _swap_in(tmp: Path, out: Path, overwrite: bool) -> None:
    _refuse_existing(out, overwrite)
    old = out.with_name(f".{out.name}.{secrets.token_hex(4)}.old")
    if out.exists():
        out.rename(old)
    try:
        tmp.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


class LogHash:
    """Hashes frames of `LOG_SCHEMA` column by column, so that where the chunks are cut makes no difference."""

    def __init__(self) -> None:
        self.rows = 0
        self._columns = {name: (hashlib.sha256(), hashlib.sha256(), hashlib.sha256()) for name in LOG_SCHEMA}

    def update(self, frame: pl.DataFrame) -> None:
        """Takes up the next rows."""
        self.rows += frame.height
        for name, (outer, inner, data) in self._columns.items():
            values = frame[name]
            if isinstance(values.dtype, pl.List):
                outer.update(_lengths(values.list.len()))
                values = values.drop_nulls()
                inner.update(_lengths(values.filter(values.list.len() > 0).explode().str.len_bytes()))
                data.update(_text(values.list.join("")))
            elif values.dtype == pl.String:
                inner.update(_lengths(values.str.len_bytes()))
                data.update(_text(values))
            else:
                inner.update(values.is_null().cast(pl.UInt8).to_numpy().tobytes())
                data.update(np.ascontiguousarray(values.to_physical().drop_nulls().to_numpy()).tobytes())

    def hexdigest(self) -> str:
        """The hash of everything taken up so far."""
        digests = {name: [part.hexdigest() for part in parts] for name, parts in self._columns.items()}
        return hashlib.sha256(json.dumps([LOG_FORMAT, self.rows, digests], sort_keys=True).encode()).hexdigest()


def _lengths(lengths: pl.Series) -> bytes:
    return lengths.cast(pl.Int64).fill_null(-1).to_numpy().astype("<i8").tobytes()


def _text(values: pl.Series) -> bytes:
    return str(values.drop_nulls().str.join("").item() or "").encode()
