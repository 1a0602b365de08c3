"""The request log: one schema, one door in (`validate`, `write_log`), polars frames out. Serving never imports it.

A log is a directory: `part-00000.parquet` and on, `rejects.parquet` where rows were set aside, and `log.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA, REQUIRED, ValidationState, convert, validate
from router_ml.log_writer import LOG_FORMAT, LogHash, LogSummary, LogWriter, keep_rejects, write_log
from router_ml.rawfiles import CHUNK_ROWS, REASON, REJECT_SCHEMA, ROW, RawFrame, read_frames

__all__ = [
    "LOG_FORMAT",
    "LOG_SCHEMA",
    "REJECT_SCHEMA",
    "REQUIRED",
    "LogSummary",
    "LogWriter",
    "RawFrame",
    "ValidationState",
    "keep_rejects",
    "log_sha256",
    "read_frames",
    "read_log",
    "read_log_info",
    "scan_log",
    "validate",
    "write_log",
]


def read_log_info(path: str | Path) -> dict[str, Any]:
    """The `log.json` of a log directory. Raises InputError when it is missing, unreadable or of another format."""
    file = Path(path) / "log.json"
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} is not a log: it has no log.json; write one with `router-ml import` or `simulate`"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(info, dict) or info.get("format") != LOG_FORMAT:
        raise InputError(f"{file} is not of log format {LOG_FORMAT}: write the log again with this version")
    return info


def scan_log(path: str | Path) -> pl.LazyFrame:
    """A log as a lazy frame with exactly `LOG_SCHEMA`: a log directory, or a single .parquet, .csv or .jsonl file.

    Missing optional columns come as nulls, unknown ones are ignored. The rows of a single file are not validated, only
    their types are. Raises InputError that names the column, or for text files the first row, that does not fit.
    """
    path = Path(path)
    if path.is_dir():
        files = [path / part["file"] for part in read_log_info(path)["parts"]]
        lost = [file.name for file in files if not file.is_file()]
        if lost:
            raise InputError(f"{path} is incomplete: {lost[0]} is missing; write the log again")
        return pl.scan_parquet(files, schema=LOG_SCHEMA)
    if path.suffix.lower() == ".parquet":
        return _fit(path)
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


def _fit(path: Path) -> pl.LazyFrame:
    if not path.is_file():
        raise InputError(f"there is no log at {path}: correct the path")
    try:
        frame = pl.scan_parquet(path)
        found = frame.collect_schema()
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path} is not a readable parquet file: {str(error).splitlines()[0]}") from None
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


def _check_columns(path: Path, names: list[str]) -> None:
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise InputError(f"{path} is not a log: it has no column {missing[0]!r}; it has {', '.join(names)}")


def read_log(path: str | Path) -> pl.DataFrame:
    """The whole log in memory; see `scan_log` for what `path` may be and what is raised."""
    return scan_log(path).collect()


def log_sha256(log: str | Path | pl.DataFrame) -> str:
    """SHA-256 of a log's content: its columns' values in row order, whatever the files, parts and compression are."""
    digest = LogHash()
    if isinstance(log, pl.DataFrame):
        digest.update(log.select(LOG_SCHEMA.names()))
    else:
        for frame in scan_log(log).collect_batches(chunk_size=CHUNK_ROWS, maintain_order=True):
            digest.update(frame)
    return digest.hexdigest()
