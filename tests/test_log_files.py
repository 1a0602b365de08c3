"""Logs where they lie: partitioned folders and URLs are the same log as the frame that was written."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, log_sha256, read_log, write_log
from training.train import train


@pytest.fixture(scope="module")
def log(tiny_log: pl.DataFrame) -> pl.DataFrame:
    """The tiny log over several days, with tenants whose names are numbers."""
    n = tiny_log.height
    return tiny_log.with_columns(
        time=pl.col("time") + pl.duration(days=pl.int_range(n) * 3 // n),
        tenant=pl.Series(np.where(np.arange(n) % 3 == 0, "007", "acme & co")),
    ).sort("time", maintain_order=True)


def partitioned(log: pl.DataFrame, folder: Path) -> Path:
    """`date=…/tenant=…/part.parquet`, without the columns that the folders name."""
    days = log.with_columns(date=pl.col("time").dt.date().cast(pl.String))
    for (date, tenant), part in days.group_by("date", "tenant", maintain_order=True):
        place = folder / f"date={date}" / f"tenant={str(tenant).replace(' ', '%20')}"
        place.mkdir(parents=True)
        part.drop("date", "tenant").write_parquet(place / "part-0.parquet")
    return folder


def by_id(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.sort("request_id", "model")


def test_partitioned_folders_are_a_log(log: pl.DataFrame, tmp_path: Path) -> None:
    folder = partitioned(log, tmp_path / "log")
    (folder / "_SUCCESS").write_text("")
    found = read_log(folder)
    assert found.schema == LOG_SCHEMA
    assert_frame_equal(by_id(found), by_id(log.select(LOG_SCHEMA.names())))
    assert found["time"].dt.date().is_sorted()
    assert_frame_equal(read_log(f"file://{folder}"), found)
    assert log_sha256(f"file://{folder}") == log_sha256(found)


def test_files_come_in_the_order_of_time_whatever_they_are_called(log: pl.DataFrame, tmp_path: Path) -> None:
    half = log.height // 2
    for name, part in (("b", log[:half]), ("a", log[half:])):
        (tmp_path / f"run={name}").mkdir()
        part.write_parquet(tmp_path / f"run={name}" / "x.parquet")
    assert read_log(tmp_path)["time"].is_sorted()


def test_columns_that_later_files_lack_are_null(log: pl.DataFrame, tmp_path: Path) -> None:
    half = log.height // 2
    for name, part in (("a", log[:half]), ("b", log[half:].drop("output_tokens"))):
        (tmp_path / f"run={name}").mkdir()
        part.write_parquet(tmp_path / f"run={name}" / "x.parquet")
    assert read_log(tmp_path)["output_tokens"].is_null().sum() == log.height - half


def test_partitions_without_an_order_in_time_are_refused(log: pl.DataFrame, tmp_path: Path) -> None:
    for (tenant,), part in log.group_by("tenant"):
        (tmp_path / f"tenant={tenant}").mkdir()
        part.write_parquet(tmp_path / f"tenant={tenant}" / "x.parquet")
    with pytest.raises(InputError, match="partition the log by time"):
        read_log(tmp_path)


def test_what_is_not_there_or_not_a_log_says_so(tmp_path: Path) -> None:
    for url, message in (
        (f"file://{tmp_path}/absent.parquet", "no log at"),
        (f"file://{tmp_path}", "no log.json"),
        ("memory://nowhere", "no log.json"),
        ("nosuchstore://bucket/log", "nosuchstore"),
    ):
        with pytest.raises(InputError, match=message):
            read_log(url)
    (tmp_path / "day=1").mkdir()
    pl.DataFrame({"a": [1]}).write_parquet(tmp_path / "day=1" / "x.parquet")
    with pytest.raises(InputError, match="no column 'time'"):
        read_log(tmp_path)
    (tmp_path / "day=1" / "x.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="not a readable parquet"):
        read_log(tmp_path)


def test_training_gives_the_same_bundle_wherever_the_log_lies(
    log: pl.DataFrame, catalog: Catalog, tmp_path: Path
) -> None:
    write_log([log.select(LOG_SCHEMA.names())], tmp_path / "log", catalog=catalog, max_disorder_s=1e9)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "log"), "/logs", recursive=True)
    try:
        ways: list[str | Path | pl.DataFrame] = [
            log.select(LOG_SCHEMA.names()), tmp_path / "log", f"file://{tmp_path}/log", "memory://logs",
        ]  # fmt: skip
        versions = {train(w, catalog, out=tmp_path / str(i), encoder="lexical").version for i, w in enumerate(ways)}
    finally:
        memory.rm("/logs", recursive=True)
    assert len(versions) == 1
