"""Whether a router's probabilities hold on a log: per model where it was asked, and for what the router would do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.intervals import bootstrap_interval
from training.evaluate import calibration_error
from training.logged import Decided, Logged
from training.ope import PolicyValue, evaluate_policy

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
RESIDUAL = "residual"
LEAST_OUTCOMES = 30
SCHEMA = {
    "model": pl.String, "n": pl.Int64, "promised": pl.Float64, "observed": pl.Float64, "residual": pl.Float64,
    "low": pl.Float64, "high": pl.Float64, "ece": pl.Float64,
}  # fmt: skip


def residuals(logged: Logged, decided: Decided, threshold: float, answered: BoolArray) -> Array:
    """Success less the promised probability, of each row's logged model, float64 [n]; NaN where either is not known.

    Success is a quality of at least `threshold`. p_ok is learnt from a model's own answers and promises nothing else:
    only rows that are `answered` count, bool [n] (see `own_answers`).
    """
    quality = logged.metrics["quality"]
    promised = decided.p_ok[np.arange(len(logged)), logged.action]
    return np.where(answered & ~np.isnan(quality), (quality >= threshold) - promised, np.nan)


def own_answers(rows: pl.DataFrame) -> BoolArray:
    """Which rows of a log have the chosen model's own answer, with a quality, bool [n]; not failures, not fallbacks.

    A call that failed is always known of, an answer only with feedback: together they would say how rare feedback is.
    """
    told = rows.select(pl.col("quality").is_not_null() & pl.col("fallback_from").is_null()).to_series()
    return np.asarray(told.to_numpy(), dtype=bool)


def calibration_by_model(
    logged: Logged,
    decided: Decided,
    threshold: float,
    answered: BoolArray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> pl.DataFrame:
    """A row a model with outcomes (`SCHEMA`): promised and observed mean, the residual with its interval, and the ECE.

    On the rows where the log asked that model: it says how the probabilities hold where the log's policy chose it. The
    intervals of all models hold together with the given confidence (Bonferroni); fewer than 30 outcomes have none.
    `answered` as in `residuals`.
    """
    off = residuals(logged, decided, threshold, answered)
    promised = decided.p_ok[np.arange(len(logged)), logged.action]
    masks = {model: (logged.action == j) & ~np.isnan(off) for j, model in enumerate(logged.catalog.ids)}
    asked = {model: mask for model, mask in masks.items() if mask.any()}
    judged = sum(mask.sum() >= LEAST_OUTCOMES for mask in asked.values())
    each = 1.0 - (1.0 - confidence) / max(judged, 1)
    rows = []
    for model, mask in asked.items():
        p, e, n = promised[mask], off[mask], int(mask.sum())
        low = high = None
        if n >= LEAST_OUTCOMES:
            found = bootstrap_interval(e[:, None], logged.cluster[mask], confidence=each, seed=seed)
            low, high = float(found[1][0]), float(found[2][0])
        rows.append((model, n, p.mean(), (p + e).mean(), e.mean(), low, high, calibration_error(p, p + e)))
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def promise_of(
    logged: Logged,
    decided: Decided,
    threshold: float,
    answered: BoolArray,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> PolicyValue:
    """The mean residual of the router's own decisions, off-policy: below 0 it promises more than comes.

    What a probability promises matters where the router acts on it, and it acts on the ones that err upwards most often
    (the optimiser's curse), so this is weighted to its own choices, doubly robust. `promise` of a live service is the
    same number (`training.watch`). `answered` as in `residuals`.
    """
    off = residuals(logged, decided, threshold, answered)
    with_residuals = replace(logged, metrics={**logged.metrics, RESIDUAL: off})
    return evaluate_policy(
        with_residuals, decided.target, metric=RESIDUAL, estimators=("dr",), confidence=confidence, seed=seed
    )
