"""Which rows of a log a bundle has not learnt from: what it may be judged on, or tuned with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.logs import log_sha256
from training.dataset import build_dataset, split_by_time


def held_out(
    log: pl.DataFrame, manifest: Mapping[str, Any], *, since: datetime | None = None
) -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """(rows that the bundle of this `manifest` has not learnt from, the other rows, how that is known).

    Of the log that the bundle was trained on, these are the newest requests that training held out. Of another log the
    rows after training ended, without sessions that began and texts that came before that. `since` (UTC where it has no
    zone) takes the later rows only, and stands in for bundles that do not say when their training ended. Raises
    InputError where nothing is left, and where it cannot be known what the bundle has learnt from.
    """
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    until = manifest.get("trained_until")
    if log_sha256(log) == manifest.get("log_sha256"):
        holdout = float(manifest.get("holdout", 0.0))
        if holdout <= 0.0:
            raise InputError(
                "the bundle was trained on every row of this log (holdout 0): train again with --holdout 0.2, or give "
                "rows that are newer"
            )
        ids = _held_out_ids(log, Catalog.from_json(manifest["catalog"]), holdout)
        fresh = pl.col("request_id").is_in(ids)
        how = f"the newest {holdout:.0%} of the training log, which training held out"
    else:
        start = since if until is None else datetime.fromisoformat(until)
        if start is None:
            raise InputError(
                "the bundle does not say until when it was trained, and this is not its training log: give --since, "
                "a time after its last training row"
            )
        old = pl.col("time") <= start
        text = pl.struct("prompt", "messages", "tools")
        has_text = pl.col("prompt").is_not_null() | pl.col("messages").is_not_null()
        fresh = ~old & ~(old.any().over("session") & pl.col("session").is_not_null())
        fresh &= ~(old.any().over(text) & has_text)
        how = f"rows after {start:%Y-%m-%d %H:%M:%S}, where training ended"
        if until is None:
            how = f"rows after {start:%Y-%m-%d %H:%M:%S}, as you said"
    if since is not None:
        fresh &= pl.col("time") > since
    rows = log.filter(fresh)
    if rows.is_empty():
        raise InputError(f"no row of the log is left to judge on: it has no {how}; give newer rows")
    return rows, log.filter(~fresh), how


def _held_out_ids(log: pl.DataFrame, catalog: Catalog, holdout: float) -> list[str]:
    data = build_dataset(log, catalog)
    _, newest = split_by_time(data, holdout)
    return [data.ids[i] for i in newest]
