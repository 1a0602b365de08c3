"""Platt scaling per model, shrunk to the scaling of all models together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from router_ml.quality import Calibration, logit

Array = npt.NDArray[np.float64]
PRIOR_ROWS = 100.0
"""A model's own scaling counts as much as the pooled one at this many rows."""
_LARGEST_WEIGHT = 20.0
_LEAST_EVIDENCE = 3.0
_MEAN_PRIOR = 10.0


def calibrate(
    score: npt.NDArray[np.floating], label: npt.NDArray[np.floating], weight: Array | None = None
) -> Calibration:
    """Fits p_ok = sigmoid(slope * logit(score) + intercept) per model (Platt 1999).

    `score` and `label` are [n, m], NaN labels are unknown. `weight` [n, m] is 1 / propensity where the log has it, so
    that requests which the logging policy sent elsewhere count too; it is capped at 20 times its least value. Models
    with few rows keep close to the pooled scaling, a model with none has exactly that. Scores that out of fold do not
    predict the labels (less than 3 standard errors of evidence) are not used: each model then has its own mean, so
    that a router which has learnt nothing claims nothing.
    """
    known = ~np.isnan(label)
    x = logit(np.asarray(score))
    w = np.ones_like(x) if weight is None else np.where(np.isnan(weight), 1.0, weight)
    w = np.minimum(w, _LARGEST_WEIGHT * w[known].min())
    w = w / w[known].mean()
    y = np.where(known, label, 0.0).astype(np.float64)
    pooled = _fit(x[known], y[known], w[known], np.array([1.0, 0.0]), prior=1.0)
    m = x.shape[1]
    used = np.where(known, w, 0.0)
    n, ones = used.sum(axis=0), (used * y).sum(axis=0)
    means = (ones + _MEAN_PRIOR * ones.sum() / n.sum()) / (n + _MEAN_PRIOR)
    if _evidence(x, y, used) < _LEAST_EVIDENCE:
        return Calibration(np.zeros(m), logit(means))
    scalings = [
        _fit(x[at, j], y[at, j], w[at, j], pooled, prior=PRIOR_ROWS) if (at := known[:, j]).any() else pooled
        for j in range(m)
    ]
    slope, intercept = np.array(scalings).T
    useless = slope <= 0.0  # where a model's scores order its requests the wrong way, it has its mean
    return Calibration(np.where(useless, 0.0, slope), np.where(useless, logit(means), intercept))


def _evidence(x: Array, y: Array, w: Array) -> float:
    """Do the scores order a model's requests? Score test of the slope within models, in standard errors.

    A request's outcomes on several models are one cluster (Liang & Zeger 1986), because what is hard for one model
    tends to be hard for all. Arrays [n, m], weight 0 where unknown.
    """
    n = np.maximum(w.sum(axis=0), 1e-12)
    within = w * (x - (w * x).sum(axis=0) / n) * (y - (w * y).sum(axis=0) / n)
    per_request = within.sum(axis=1)
    return float(per_request.sum() / max(np.sqrt((per_request**2).sum()), 1e-12))


def _fit(x: Array, y: Array, w: Array, prior_mean: Array, *, prior: float) -> Array:
    """Newton's method on the penalised log-likelihood; the prior is worth `prior` rows of average information."""
    design = np.stack([x, np.ones_like(x)], axis=1)
    # A row's information is at most 1/4; the slope's is measured in the spread of the scores.
    precision = prior * 0.25 * np.diag([max(float(np.mean(x**2)), 0.1), 1.0])
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
