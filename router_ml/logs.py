"""The request log: one schema, one door in (`validate`, `write_log`), polars frames out. Serving never imports it.

A log is a directory: `part-00000.parquet` and on, `rejects.parquet` where rows were set aside, and `log.json`.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from router_ml.errors import InputError
from router_ml.log_files import LogFiles, is_url, log_files, read_log_info
from router_ml.log_schema import LOG_SCHEMA, REQUIRED, ValidationState, convert, validate
from router_ml.log_writer import LOG_FORMAT, LogHash, LogSummary, LogWriter, keep_rejects, write_log
from router_ml.rawfiles import CHUNK_ROWS, REASON, REJECT_SCHEMA, ROW, RawFrame, read_frames

__all__ = [
    "LOG_FORMAT",
    "LOG_SCHEMA",
    "REJECT_SCHEMA",
    "REQUIRED",
    "LogFiles",
    "LogSummary",
    "LogWriter",
    "RawFrame",
    "ValidationState",
    "keep_rejects",
    "log_files",
    "log_sha256",
    "read_frames",
    "read_log",
    "read_log_info",
    "scan_log",
    "validate",
    "write_log",
]


def scan_log(path: str | Path | LogFiles) -> pl.LazyFrame:
    """A log as a lazy frame with exactly `LOG_SCHEMA`: a log directory, partitioned folders or a single file.

    A file is .parquet, .csv or .jsonl; Parquet may be at a URL (`log_files`). Missing optional columns come as nulls,
    unknown ones are ignored. The rows of files that were not written as a log are not validated, only their types are.
    Raises InputError that names the column, or for text files the first row, that does not fit.
    """
    if not isinstance(path, LogFiles) and (is_url(path) or Path(path).is_dir() or _suffix(path) == ".parquet"):
        path = log_files(path)
    if isinstance(path, LogFiles):
        return path.scan() if path.whole else _fit(path)
    path = Path(path)
    frames = []
    for chunk in read_frames(path, LOG_SCHEMA.get):
        _check_columns(path, [c for c in chunk.frame.columns if not c.startswith("__")])
        frame, wrong = convert(chunk.frame, LOG_SCHEMA)
        first = [(chunk.frame[ROW].filter(mask)[0], f"wrong type: {name}") for name, mask in wrong.items()]
        first += list(chunk.rejects.select("row", "reason").head(1).iter_rows())
        if REASON in chunk.frame.columns:
            first += list(chunk.frame.select(ROW, REASON).drop_nulls().head(1).iter_rows())
        if first:
            row, reason = min(first)
            raise InputError(f"{path}, row {row}: {reason}; import the file as a log to set such rows aside")
        frames.append(frame)
    return pl.concat(frames).lazy() if frames else pl.LazyFrame(schema=LOG_SCHEMA)


def _suffix(path: str | Path) -> str:
    return Path(path).suffix.lower()


def _fit(files: LogFiles) -> pl.LazyFrame:
    path, frame = files.name, files.scan()
    found = frame.collect_schema()
    _check_columns(path, found.names())
    columns = []
    for name, dtype in LOG_SCHEMA.items():
        has = found.get(name, pl.Null())
        if has == pl.Null:
            columns.append(pl.lit(None, dtype).alias(name))
        elif has == dtype:
            columns.append(pl.col(name))
        elif isinstance(dtype, pl.Datetime) and isinstance(has, pl.Datetime):
            moment = pl.col(name).dt.cast_time_unit("us")
            zoned = moment.dt.replace_time_zone if has.time_zone is None else moment.dt.convert_time_zone
            columns.append(zoned("UTC"))
        elif (dtype.is_numeric() and has.is_numeric() and not (dtype.is_integer() and has.is_float())) or (
            dtype == pl.String and isinstance(has, pl.Categorical | pl.Enum)
        ):
            columns.append(pl.col(name).cast(dtype))
        else:
            raise InputError(f"{path}: column {name!r} is {has}, it has to be {dtype}; import the file as a log")
    return frame.select(columns)


def _check_columns(path: str | Path, names: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise InputError(f"{path} is not a log: it has no column {missing[0]!r}; it has {', '.join(names)}")


def read_log(path: str | Path | LogFiles) -> pl.DataFrame:
    """The whole log in memory; see `scan_log` for what `path` may be and what is raised."""
    return scan_log(path).collect()


def log_sha256(log: str | Path | LogFiles | pl.DataFrame) -> str:
    """SHA-256 of a log's content: its columns' values in row order, whatever the files, parts and compression are."""
    digest = LogHash()
    if isinstance(log, pl.DataFrame):
        digest.update(log.select(LOG_SCHEMA.names()))
    else:
        for frame in scan_log(log).collect_batches(chunk_size=CHUNK_ROWS, maintain_order=True):
            digest.update(frame)
    return digest.hexdigest()
