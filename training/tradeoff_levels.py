"""What one policy is worth on some rows of a log, as the trade-off shows it; and the best that could be had."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from training.logged import Decided, Logged
from training.ope import FittedModels, Look, fit_models, value_of

Array = npt.NDArray[np.float64]
METRICS = ("quality", "cost_usd", "latency_ms")
LEAST_ROWS = 50
Oracle = Callable[[pl.Series], tuple[tuple[float, float] | None, str | None]]


@dataclass(frozen=True)
class Level:
    """A policy on some rows of the log: each metric as (value, low, high), None where it is not identifiable and then
    `why` says so; `shares` of the models in the catalogue's order, which need no estimate.
    """

    values: Mapping[str, tuple[float, float, float] | None]
    why: Mapping[str, str]
    shares: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """For JSON; numbers as they are."""
        return {**self.values, "why": dict(self.why), "shares": list(self.shares)}


def models_of(logged: Logged, metric: str, seed: int, today: Decided) -> FittedModels | None:
    """The fitted models of a metric; None where the log hardly knows it."""
    if (~np.isnan(logged.metrics[metric])).sum() < LEAST_ROWS:
        return None
    return fit_models(logged, metric, 5, seed, None, today.predictions, 1.0)


@dataclass(frozen=True)
class Judge:
    """Values policies on one log by its fitted `models`, a metric each."""

    logged: Logged
    models: Mapping[str, FittedModels]
    look: Look

    def level(self, target: Array, mask: npt.NDArray[np.bool_]) -> Level:
        """What a policy of these probabilities [n, m] is worth on the rows of the mask [n]."""
        rows = np.flatnonzero(mask)
        values: dict[str, tuple[float, float, float] | None] = {}
        why = {}
        for metric in METRICS:
            values[metric] = None
            if metric not in self.models:
                why[metric] = f"fewer than {LEAST_ROWS} rows of the log have it"
                continue
            found = value_of(self.models[metric].rows(target, None, None).take(rows), self.look)
            if found.headline is None:
                why[metric] = found.why
            else:
                values[metric] = found.headline[:3]
        return Level(values, why, tuple(map(float, target[rows].mean(axis=0))))


def oracle_of(rows: pl.DataFrame, ids: Sequence[str]) -> Oracle:
    """A function of requests' ids: ((mean quality, mean cost) of the best answer at the least cost, or None; why)."""
    best = (
        rows.with_columns(
            n=pl.col("quality").is_not_null().sum().over("request_id"), of=pl.col("candidates").list.len()
        )
        .filter(pl.col("n") >= pl.col("of").fill_null(len(ids)))
        .sort("quality", "cost_usd", descending=[True, False], nulls_last=True)
        .unique("request_id", keep="first")
    )

    def of(requests: pl.Series) -> tuple[tuple[float, float] | None, str | None]:
        known = best.filter(pl.col("request_id").is_in(requests.implode()))
        if len(known) < len(requests) or known["cost_usd"].null_count():
            return None, "not identifiable: the log has not every model's outcome of every request"
        return (float(known["quality"].mean()), float(known["cost_usd"].mean())), None  # type: ignore[arg-type]

    return of
