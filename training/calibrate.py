"""Platt scaling per model, shrunk to the scaling of all models together, with what is not known of it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from router_ml.quality import Calibration, logit

Array = npt.NDArray[np.float64]
PRIOR_ROWS = 100.0
"""A model that joins a fitted learner counts as much as what was expected of it at this many rows."""
LEVEL_SD, SLOPE_SD = 0.2, 0.15
"""How far a model's scaling is expected to lie from that of all models: its log odds at its mean score, its slope."""
LEVEL_VARIANCE = 1.0
"""Variance of models' levels, in log odds, before any is known: how far one without outcomes may be from its scores."""
LEAST_REQUESTS = 50
"""No claim is above what this many requests of the log have reached."""
_LARGEST_WEIGHT = 20.0
_LEAST_EVIDENCE = 3.0
_MEAN_PRIOR = 10.0
_LEVEL_PRIOR_MODELS = 4.0


def calibrate(
    score: npt.NDArray[np.floating],
    label: npt.NDArray[np.floating],
    weight: Array | None = None,
    threshold: float = 0.5,
) -> Calibration:
    """Fits p_ok = sigmoid(slope * logit(score) + intercept) per model (Platt 1999), for one quality threshold.

    `score` and `label` are [n, m], NaN labels are unknown. `weight` [n, m] is 1 / propensity where the log has it, so
    that requests which the logging policy sent elsewhere count too; it is capped at 20 times a model's least value and
    then scaled to the model's effective number of rows (Kish 1965). Models with few rows keep close to the pooled
    scaling, a model with none has exactly that: its level and its slope are normal around the pooled ones, a
    hierarchical model with known variances. Scores that out of fold do not predict the labels (less than 3 standard
    errors of evidence) are not used: each model then has its own mean, so that a router which has learnt nothing claims
    nothing.

    The variances are those of the Laplace approximation (MacKay 1992). The level's prior is there as wide as the models
    differ from each other, not `LEVEL_SD`: what a model without rows will be like is not known from its scores.
    """
    known = ~np.isnan(label)
    x = logit(np.asarray(score))
    y = np.where(known, label, 0.0).astype(np.float64)
    w = _effective(known, weight)
    n, ones = w.sum(axis=0), (w * y).sum(axis=0)
    means = (ones + _MEAN_PRIOR * ones.sum() / n.sum()) / (n + _MEAN_PRIOR)
    learnt = _evidence(x, y, w) >= _LEAST_EVIDENCE
    pooled = _fit(x[known], y[known], w[known], np.array([1.0, 0.0]), prior=1.0)
    m = x.shape[1]
    slope, intercept, center = np.zeros(m), logit(means), x.mean(axis=0)
    for j in np.flatnonzero(n > 0):
        at = known[:, j]
        center[j] = np.average(x[at, j], weights=w[at, j])
        if learnt:
            slope[j], intercept[j] = _shrunk(x[at, j], y[at, j], w[at, j], pooled, center[j])
            if slope[j] <= 0.0:  # where a model's scores order its requests the wrong way, it has its mean
                slope[j], intercept[j] = 0.0, logit(means[j : j + 1])[0]
    if learnt:
        slope[n == 0], intercept[n == 0] = pooled

    p = 1.0 / (1.0 + np.exp(-np.clip(slope * x + intercept, -30, 30)))
    information = w * p * (1.0 - p)
    level_var = 1.0 / (1.0 / _level_variance(means, n) + information.sum(axis=0))
    slope_var = 1.0 / (1.0 / SLOPE_SD**2 + (information * (x - center) ** 2).sum(axis=0))
    made = Calibration(
        slope, intercept, center, level_var, np.where(slope > 0.0, slope_var, 0.0), thresholds=np.array([threshold])
    )
    return made.with_ceiling(_ceiling(made.estimate(score).p_claim, known))


def scale_one(score: Array, label: Array, weight: Array, prior: tuple[float, float]) -> tuple[float, float]:
    """(slope, intercept) of one model from its own scores and labels [n], shrunk to those given as `prior`.

    `weight` [n] is 1 / propensity, NaN where it is not known. For a model that joins a fitted learner.
    """
    w = np.where(np.isnan(weight), 1.0, weight)
    w = np.minimum(w, _LARGEST_WEIGHT * w.min())
    slope, intercept = _fit(logit(score), label, w / w.mean(), np.array(prior), prior=PRIOR_ROWS)
    return float(slope), float(intercept)


def uncertainty_of(score: Array, slope: float, intercept: float) -> tuple[float, float, float]:
    """(center, level_var, slope_var) of one model from the scores [n] of its rows; of no rows, the prior's."""
    x = logit(score)
    center = float(x.mean()) if len(x) else 0.0
    p = 1.0 / (1.0 + np.exp(-np.clip(slope * x + intercept, -30, 30)))
    level = 1.0 / (1.0 / LEVEL_VARIANCE + float((p * (1.0 - p)).sum()))
    return center, level, 1.0 / (1.0 / SLOPE_SD**2 + float((p * (1.0 - p) * (x - center) ** 2).sum()))


def _effective(known: npt.NDArray[np.bool_], weight: Array | None) -> Array:
    """Weights [n, m], 0 where unknown, that sum per model to its effective number of rows."""
    w = np.where(known, 1.0, 0.0)
    if weight is not None:
        w = np.where(known, np.where(np.isnan(weight), 1.0, weight), np.inf)
        w = np.where(known, np.minimum(w, _LARGEST_WEIGHT * w.min(axis=0)), 0.0)
    total, squares = w.sum(axis=0), (w**2).sum(axis=0)
    scaled: Array = w * np.divide(total, squares, out=np.zeros_like(total), where=squares > 0)
    return scaled


def _level_variance(means: Array, n: Array) -> float:
    """How much models' mean log odds differ beyond chance, shrunk to `LEVEL_VARIANCE` where there are few models."""
    seen = n > 0
    level = logit(means[seen])
    chance = 1.0 / (n[seen] * means[seen] * (1.0 - means[seen]))
    excess = np.maximum((level - level.mean()) ** 2 - np.minimum(chance, LEVEL_VARIANCE), 0.0).sum()
    return float((_LEVEL_PRIOR_MODELS * LEVEL_VARIANCE + excess) / (_LEVEL_PRIOR_MODELS + seen.sum()))


def _ceiling(claim: npt.NDArray[np.float32], known: npt.NDArray[np.bool_]) -> float:
    """The claim that `LEAST_REQUESTS` requests reached, each by the best of its logged models; of few, a quarter."""
    best = np.sort(np.where(known, claim, -1.0).max(axis=1))
    best = best[best >= 0.0]
    return float(best[-min(LEAST_REQUESTS, max(len(best) // 4, 1))])


def _evidence(x: Array, y: Array, w: Array) -> float:
    """Do the scores order a model's requests? Score test of the slope within models, in standard errors.

    A request's outcomes on several models are one cluster (Liang & Zeger 1986), because what is hard for one model
    tends to be hard for all. Arrays [n, m], weight 0 where unknown.
    """
    n = np.maximum(w.sum(axis=0), 1e-12)
    within = w * (x - (w * x).sum(axis=0) / n) * (y - (w * y).sum(axis=0) / n)
    per_request = within.sum(axis=1)
    return float(per_request.sum() / max(np.sqrt((per_request**2).sum()), 1e-12))


def _shrunk(x: Array, y: Array, w: Array, pooled: Array, center: float) -> tuple[float, float]:
    """(slope, intercept) of one model, its level at `center` and its slope each shrunk to the pooled scaling's."""
    mean = np.array([pooled[0], pooled[1] + pooled[0] * center])
    slope, level = _newton(x - center, y, w, mean, np.diag([SLOPE_SD**-2, LEVEL_SD**-2]))
    return float(slope), float(level - slope * center)


def _fit(x: Array, y: Array, w: Array, prior_mean: Array, *, prior: float) -> Array:
    """(slope, intercept) whose prior is worth `prior` rows of average information."""
    # A row's information is at most 1/4; the slope's is measured in the spread of the scores.
    precision = prior * 0.25 * np.diag([max(float(np.mean(x**2)), 0.1), 1.0])
    return _newton(x, y, w, prior_mean, precision)


def _newton(x: Array, y: Array, w: Array, prior_mean: Array, precision: Array) -> Array:
    """(slope, intercept) by Newton's method on the log-likelihood, penalised by a normal prior."""
    design = np.stack([x, np.ones_like(x)], axis=1)
    beta = prior_mean.copy()
    for _ in range(50):
        p = 1.0 / (1.0 + np.exp(-np.clip(design @ beta, -30, 30)))
        gradient = design.T @ (w * (p - y)) + precision @ (beta - prior_mean)
        hessian = (design * (w * p * (1 - p))[:, None]).T @ design + precision
        step = np.linalg.solve(hessian, gradient)
        beta = beta - np.clip(step, -2.0, 2.0)
        if float(np.abs(step).max()) < 1e-8:
            break
    return beta
