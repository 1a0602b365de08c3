"""Where a log's Parquet lies: a log directory, one file or partitioned folders, on this disk or at a URL of fsspec.

Partitioned folders are Hive's: `date=2026-01-31/part-0.parquet`, whatever the keys are; a key that is a column of the
log gives its values. URLs are those of any file system that fsspec knows (`s3://`, `gs://`, `abfs://`, `file://`,
`memory://`; https://filesystem-spec.readthedocs.io), with the credentials of its environment. Object stores that polars
reads itself are read by it, a column at a time; other files are fetched whole.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from router_ml.log_writer import LOG_FORMAT

_NATIVE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl")
_ALIKE = 0.5
"""Share of a log's time by which files may overlap: with more, the order of the files is not that of the requests."""


def is_url(path: str | Path) -> bool:
    """Whether a path names its file system."""
    return "://" in str(path)


@dataclass(frozen=True)
class LogFiles:
    """The Parquet files of a log in the order of time, as paths or URLs; small enough to be sent to other processes.

    `keys` are the partitions' keys. `whole` says that the files were written as a log, with exactly `LOG_SCHEMA`.
    """

    name: str
    files: tuple[str, ...]
    keys: tuple[str, ...] = ()
    whole: bool = False

    @property
    def here(self) -> bool:
        """Whether only this process can read it."""
        return self.name.startswith("memory://")

    def scan(self) -> pl.LazyFrame:
        """The files as one lazy frame with their own columns and the partitions' keys.

        Columns are those of the first file; what later ones lack is null in them. Raises InputError for what is not
        Parquet.
        """
        sources: Any = list(self.files)
        if is_url(self.name) and _scheme(self.name) not in _NATIVE:
            sources = [_filesystem(self.name).cat_file(file) for file in self.files]
        try:
            if self.whole:
                return pl.scan_parquet(sources, schema=LOG_SCHEMA)
            frame = pl.scan_parquet(
                sources,
                glob=False,
                missing_columns="insert",
                extra_columns="ignore",
                hive_partitioning=False,
            )
            if not self.keys:
                frame.collect_schema()
                return frame
            # By file and not by polars' own reading of the folders, which would take the tenant "42" for a number.
            parts = [
                pl.scan_parquet(
                    source, missing_columns="insert", extra_columns="ignore", hive_partitioning=False
                ).with_columns(pl.lit(value, pl.String).alias(key) for key, value in _partition(file).items())
                for source, file in zip(sources, self.files, strict=True)
            ]
            columns: dict[str, None] = {}
            for part in parts:
                columns |= dict.fromkeys(part.collect_schema().names())
            return pl.concat(parts, how="diagonal_relaxed").select(list(columns))
        except pl.exceptions.PolarsError as error:
            raise InputError(f"{self.name} is not a readable parquet file: {str(error).splitlines()[0]}") from None


def log_files(path: str | Path) -> LogFiles:
    """The Parquet files of the log at `path`, which is a directory, a .parquet file or the URL of either.

    Raises InputError where there is none, where a log directory lacks a part, and where partitions overlap in time so
    much that no order of them is that of the requests.
    """
    name = str(path)
    if name.lower().endswith(".parquet") and not (not is_url(name) and Path(name).is_dir()):
        if not (_exists(name) if is_url(name) else Path(name).is_file()):
            raise InputError(f"there is no log at {path}: correct the path")
        return LogFiles(name, (name,))
    if _exists(joined(name, "log.json")):
        parts = [part["file"] for part in read_log_info(name)["parts"]]
        files = [joined(name, part) for part in parts]
        for file, part in zip(files, parts, strict=True):
            if not _exists(file):
                raise InputError(f"{path} is incomplete: {part} is missing; write the log again")
        return LogFiles(name, tuple(files), whole=True)
    found = sorted(_below(name))
    keys = tuple(dict.fromkeys(key for file in found for key in _partition(file)))
    if not keys:
        read_log_info(name)  # says what is missing
    return _in_order(LogFiles(name, tuple(found), keys))


def read_log_info(path: str | Path) -> dict[str, Any]:
    """The `log.json` of a log directory. Raises InputError when it is missing, unreadable or of another format."""
    file = joined(str(path), "log.json")
    try:
        if is_url(file):
            info = json.loads(_filesystem(file).cat_file(file))
        else:
            info = json.loads(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{path} is not a log: it has no log.json; write one with `router-ml import` or `simulate`"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file} is not readable JSON: {error}") from None
    if not isinstance(info, dict) or info.get("format") != LOG_FORMAT:
        raise InputError(f"{file} is not of log format {LOG_FORMAT}: write the log again with this version")
    return info


def joined(folder: str, name: str) -> str:
    """The path or URL of a file in a folder."""
    return f"{folder.rstrip('/')}/{name}" if is_url(folder) else str(Path(folder) / name)


def _in_order(files: LogFiles) -> LogFiles:
    """The files by their first time."""
    spans = []
    for file in files.files:
        scan = LogFiles(files.name, (file,), files.keys).scan()
        if "time" not in scan.collect_schema():
            raise InputError(f"{file} is not part of a log: it has no column 'time'")
        first, last = scan.select(pl.col("time").min().alias("a"), pl.col("time").max().alias("b")).collect().row(0)
        if first is not None:
            spans.append((first, last, file))
    spans.sort()
    if not spans:
        raise InputError(f"{files.name} holds no row with a time: correct the path")
    until, whole = spans[0][1], max(last for _, last, _ in spans) - spans[0][0]
    for first, last, file in spans[1:]:
        if whole and (min(until, last) - first) / whole > _ALIKE:
            raise InputError(
                f"{files.name}: {file} begins long before the files in front of it end, so the files have no order in "
                "time; partition the log by time (date=...), or import it as one log"
            )
        until = max(until, last)
    return LogFiles(files.name, tuple(file for _, _, file in spans), files.keys)


def _partition(file: str) -> dict[str, str]:
    """Keys and values that a file's folders name."""
    from urllib.parse import unquote

    pairs = [folder.split("=", 1) for folder in PurePosixPath(file.replace("\\", "/")).parts[:-1] if "=" in folder]
    return {key: unquote(value) for key, value in pairs}


def _below(folder: str) -> list[str]:
    """All Parquet files below a folder, but for hidden ones."""
    if is_url(folder):
        scheme = _scheme(folder)
        found = [f"{scheme}://{path.lstrip('/')}" for path in _filesystem(folder).find(folder)]
        found = [f"file:///{path.removeprefix('file://')}" for path in found] if scheme == "file" else found
    else:
        found = [path.as_posix() for path in Path(folder).rglob("*.parquet")]
    return [file for file in found if file.endswith(".parquet") and PurePosixPath(file).name[0] not in "._"]


def _exists(path: str) -> bool:
    return bool(_filesystem(path).exists(path)) if is_url(path) else Path(path).exists()


def _scheme(url: str) -> str:
    return url.partition("://")[0].lower()


def _filesystem(url: str) -> Any:
    try:
        import fsspec

        return fsspec.filesystem(_scheme(url))
    except ImportError as error:
        raise InputError(f"{url} cannot be read: {error}; pip install fsspec and its package for that store") from None
    except ValueError as error:
        raise InputError(f"{url} cannot be read: {error}") from None
