"""Logs to matrices: one row per distinct request, one column per model of the catalogue, NaN where nothing is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.catalog import Catalog
from router_ml.costs import Reliability
from router_ml.errors import InputError
from router_ml.logs import LogFiles, scan_log
from router_ml.types import RouteRequest
from training.requests import TEXT, LoggedRequests

Matrix = npt.NDArray[np.float32]
FAILURES = ("error", "timeout", "rate_limited")
PRIOR_CALLS = 20.0
"""A model's own rates count as much as those of all models together at this many calls."""


@dataclass(frozen=True)
class Dataset:
    """What a log says of n distinct requests and m models.

    `quality`, `output_tokens` and `propensity` are float32 [n, m] with NaN where the log has nothing; `input_tokens`
    is float32 [n]. Requests that share a `group` [n] (a session) never fall on both sides of a split.
    Rows are in order of first arrival; `ids` are the request ids of those first arrivals. `requests` may be
    `LoggedRequests`, whose texts are still in the log.
    """

    catalog: Catalog
    ids: list[str]
    requests: Sequence[RouteRequest]
    quality: Matrix
    output_tokens: Matrix
    input_tokens: npt.NDArray[np.float32]
    propensity: Matrix
    group: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def observed(self) -> npt.NDArray[np.bool_]:
        """Where a quality is known, bool [n, m]."""
        return ~np.isnan(self.quality)

    def labels(self, threshold: float) -> Matrix:
        """1 where quality is at least `threshold`, 0 where below, NaN where unknown; [n, m]."""
        return np.where(self.observed, (self.quality >= threshold).astype(np.float32), np.float32(np.nan))

    def take(self, rows: npt.NDArray[np.int64]) -> Dataset:
        """The data set restricted to some rows."""
        return Dataset(
            self.catalog,
            [self.ids[i] for i in rows],
            self.requests.take(rows) if isinstance(self.requests, LoggedRequests) else [self.requests[i] for i in rows],
            self.quality[rows],
            self.output_tokens[rows],
            self.input_tokens[rows],
            self.propensity[rows],
            self.group[rows],
        )


def build_dataset(log: pl.DataFrame | LogFiles, catalog: Catalog) -> Dataset:
    """Gathers the log's rows that have a prompt by distinct request; of files it reads no text into memory.

    Several outcomes of one model on one request are averaged. Rows without a prompt or messages cannot be learnt from
    and are left out (they still count for cost and volume elsewhere). Texts are told apart by 64-bit hashes: among ten
    million requests the chance that two different ones are taken for the same is 3 in a million. Raises InputError when
    nothing remains, and as `scan_log` does.
    """
    frame = log.lazy() if isinstance(log, pl.DataFrame) else scan_log(log)
    usable = (
        frame.with_row_index("_at")
        .filter(
            (pl.col("prompt").is_not_null() | pl.col("messages").is_not_null())
            & pl.col("model").is_in(list(catalog.ids))
        )
        .select(
            pl.col("_at").cast(pl.Int64),
            *("request_id", "session", "input_tokens", "model", "quality"),
            output_tokens=pl.when(pl.col("status").is_null() | (pl.col("status") == "ok")).then("output_tokens"),
            # After a fallback the propensity is that of the choice that failed, not of the model that served.
            propensity=pl.when(pl.col("fallback_from").is_null()).then("propensity"),
            _content=pl.struct(TEXT).hash(),
        )
        .collect(engine="streaming")
        .sort("_at")
    )
    if usable.is_empty():
        rows = frame.select(pl.len()).collect().item()
        raise InputError(
            f"none of the log's {rows} rows has both a prompt (or messages) and a model of the catalogue: "
            "log prompts, or check the catalogue's model ids"
        )
    first = usable.group_by("_content", maintain_order=True).agg(
        *(pl.col(c).first() for c in ("_at", "request_id", "session")), pl.col("input_tokens").mean()
    )
    first = first.with_row_index("_row")
    cells = (
        usable.join(first.select("_content", "_row"), on="_content", maintain_order="left")
        .group_by("_row", "model", maintain_order=True)
        .agg(pl.col("quality").mean(), pl.col("output_tokens").mean(), pl.col("propensity").mean())
    )
    n, m = len(first), len(catalog)
    at = (
        cells["_row"].to_numpy(),
        cells["model"].replace_strict(list(catalog.ids), list(range(m)), return_dtype=pl.Int64).to_numpy(),
    )

    def matrix(column: str) -> Matrix:
        out = np.full((n, m), np.nan, dtype=np.float32)
        out[at] = cells[column].cast(pl.Float32).fill_null(float("nan")).to_numpy()
        return out

    session = first.select(
        pl.when(pl.col("session").is_null())
        .then(pl.format("request {}", "_row"))
        .otherwise(pl.format("session {}", "session"))
        .rank("dense")
        .cast(pl.Int64)
    ).to_series()
    return Dataset(
        catalog,
        first["request_id"].to_list(),
        LoggedRequests(log, first["_at"].to_numpy()),
        matrix("quality"),
        matrix("output_tokens"),
        first["input_tokens"].cast(pl.Float32).fill_null(float("nan")).to_numpy(),
        matrix("propensity"),
        session.to_numpy(),
    )


def reliability(log: pl.DataFrame | pl.LazyFrame, catalog: Catalog) -> Reliability:
    """Attempts a call and share of calls without an answer per model, shrunk to those of all models together.

    Rows without a prompt count, too. A row after a fallback is two calls: one of `fallback_from` that failed, to which
    its retries belong (a gateway retries the model that it chose before it falls back), and one of the model that
    served. A row of which nothing is reported says nothing, nor does a cancelled one of failures. With n calls the
    estimate is (sum + `PRIOR_CALLS` * mean of all) / (n + `PRIOR_CALLS`), the posterior mean under a prior of that
    weight; without any calls there are no retries and no failures.
    """
    ids, rows_of = list(catalog.ids), log.lazy()
    answered = (pl.col("status") == "ok") | (pl.col("status").is_null() & pl.col("quality").is_not_null())
    served = rows_of.select(
        "model",
        attempts=pl.when(pl.col("fallback_from").is_null()).then(1 + pl.col("retries")).cast(pl.Float64),
        failed=pl.when(pl.col("status").is_in(FAILURES)).then(1.0).when(answered).then(0.0),
    )
    fell = rows_of.filter(pl.col("fallback_from").is_not_null()).select(
        model="fallback_from", attempts=(1 + pl.col("retries")).cast(pl.Float64), failed=pl.lit(1.0)
    )
    calls = pl.concat([served, fell]).filter(pl.col("model").is_in(ids))
    per_model = (
        calls.group_by("model")
        .agg(
            *(
                f
                for name in ("attempts", "failed")
                for f in (pl.col(name).sum(), pl.col(name).count().alias(f"{name}_n"))
            )
        )
        .collect(engine="streaming")
    )
    rows = {row["model"]: row for row in per_model.iter_rows(named=True)}

    def shrunk(name: str, unknown: float) -> tuple[float, ...]:
        sums = [(rows[m][name], rows[m][f"{name}_n"]) if m in rows else (0.0, 0) for m in ids]
        count = sum(n for _, n in sums)
        prior = sum(total for total, _ in sums) / count if count else unknown
        return tuple((total + PRIOR_CALLS * prior) / (n + PRIOR_CALLS) for total, n in sums)

    return Reliability(shrunk("attempts", 1.0), shrunk("failed", 0.0))


def split_by_time(data: Dataset, holdout: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row numbers for training and for holding out: the newest `holdout` share, whole groups only.

    A group that began before the cut stays in training, so that no conversation is on both sides.
    """
    n = len(data)
    cut = n - round(n * holdout)
    early = np.isin(data.group, data.group[:cut])
    return np.flatnonzero(early), np.flatnonzero(~early)


def folds_of(data: Dataset, count: int, seed: int) -> npt.NDArray[np.int64]:
    """A fold number in [0, count) per request; groups stay whole, drawn under `seed`."""
    _, group = np.unique(data.group, return_inverse=True)
    order = np.random.default_rng(seed).permutation(int(group.max()) + 1)
    return (order % count)[group]
