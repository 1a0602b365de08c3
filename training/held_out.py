"""Which rows of a log a bundle has not learnt from: what it may be judged on, or tuned with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import polars as pl

from router_ml.errors import InputError
from router_ml.logs import log_sha256

_TEXT = ("prompt", "messages", "tools")


def held_out(
    log: pl.DataFrame, manifest: Mapping[str, Any], *, since: datetime | None = None
) -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """(rows that the bundle of this `manifest` has not learnt from, the other rows, how that is known).

    Of the log that the bundle was trained on, these are the newest requests that training held out, without those that
    a model was onboarded with later. Of another log the rows after training and onboarding ended, without sessions that
    began and texts that came before that, so `log` has to hold the earlier rows too. `since` (UTC where it has no zone)
    takes the later rows only, and stands in for bundles that do not say when their training or an onboarding ended.
    Raises InputError where nothing is left, and where it cannot be known what the bundle has learnt from.
    """
    if since is not None and since.tzinfo is None:
        since = since.replace(tzinfo=UTC)
    sha = log_sha256(log)
    joined = [(entry["model"], _joined_until(log, sha, entry, since)) for entry in manifest.get("onboarded", ())]
    until = manifest.get("trained_until")
    if sha == manifest.get("log_sha256"):
        holdout = float(manifest.get("holdout", 0.0))
        if holdout <= 0.0:
            raise InputError(
                "the bundle was trained on every row of this log (holdout 0): train again with --holdout 0.2, or give "
                "rows that are newer"
            )
        later = {model for model, _ in joined}
        trained = [card["id"] for card in manifest["catalog"]["models"] if card["id"] not in later]
        fresh = pl.col("request_id").is_in(held_out_ids(log, trained, holdout).implode())
        for model, end in joined:
            if end is not None:  # of other models it has learnt nothing then
                fresh &= ~_touched((pl.col("model") == model) & (pl.col("time") <= end))
        how = f"the newest {holdout:.0%} of the training log, which training held out"
    else:
        ends = [end for _, end in joined if end is not None]
        start = since if until is None else datetime.fromisoformat(until)
        if start is None:
            raise InputError(
                "the bundle does not say until when it was trained, and this is not its training log: give --since, "
                "a time after its last training row"
            )
        start = max([start, *ends])
        fresh = ~_touched(pl.col("time") <= start)
        how = f"rows after {start:%Y-%m-%d %H:%M:%S}, where training ended"
        if until is None:
            how = f"rows after {start:%Y-%m-%d %H:%M:%S}, as you said"
    if since is not None:
        fresh &= pl.col("time") > since
    kept = log.select(fresh.alias("fresh")).to_series()
    rows = log.filter(kept)
    if rows.is_empty():
        raise InputError(f"no row of the log is left to judge on: it has no {how}; give newer rows")
    return rows, log.filter(~kept), how


def held_out_ids(log: pl.DataFrame, models: Sequence[str], holdout: float) -> pl.Series:
    """The ids of the requests that `dataset.split_by_time` holds out of `dataset.build_dataset`, in that order.

    From the columns alone, without a request being built: what it comes to is tested against those two. `models` are
    those of the bundle's catalogue when it was trained.
    """
    usable = pl.col("prompt").is_not_null() | pl.col("messages").is_not_null()
    first = (
        log.lazy()
        .filter(usable & pl.col("model").is_in(list(models)))
        .select("request_id", "session", *_TEXT)
        .unique(_TEXT, keep="first", maintain_order=True)
        .select("request_id", "session")
        .collect()
    )
    cut = len(first) - round(len(first) * holdout)
    began = first["session"].head(cut).drop_nulls().unique()
    late = first.slice(cut)
    return late.filter(pl.col("session").is_null() | ~pl.col("session").is_in(began.implode()))["request_id"]


def _touched(old: pl.Expr) -> pl.Expr:
    """The `old` rows, and all that share a session or a text with one of them."""
    has_text = pl.col("prompt").is_not_null() | pl.col("messages").is_not_null()
    same_session = old.any().over("session") & pl.col("session").is_not_null()
    return old | same_session | (old.any().over(_TEXT) & has_text)


def _joined_until(log: pl.DataFrame, sha: str, entry: Mapping[str, Any], since: datetime | None) -> datetime | None:
    """The time of the newest row that a model was onboarded with, or what stands in for it; None without a row."""
    if entry.get("until") is not None:
        return datetime.fromisoformat(entry["until"])
    if entry.get("log_sha256") is None:
        return None
    if entry["log_sha256"] == sha:
        newest = log.filter(pl.col("model") == entry["model"])["time"].max()
        return newest if isinstance(newest, datetime) else None
    if since is None:
        raise InputError(
            f"the bundle does not say until when {entry['model']} was onboarded, nor is this the log that it was "
            "onboarded with: give --since, a time after the last row of that, or onboard it again"
        )
    return since
