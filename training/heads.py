"""Fits the linear heads from sufficient statistics: one pass over the data serves every fold and every penalty.

A head predicts all models at once. Where every model's outcome is known for every request, the outcomes are rotated to
their principal directions before the ridge regression and back after it, each direction with a penalty of its own:
how hard a request is for all models is easy to predict, and the *differences between models*, on which the choice
lives, need far more shrinkage than each model's own success would get. (The idea of Breiman & Friedman's "curds and
whey", JRSS B 1997; the penalties by generalised cross-validation, Golub, Heath & Wahba 1979.) Where one outcome a
request is known, a shared regression over all models comes first and each model's residual after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
PENALTIES = np.logspace(-2, 6, 41)
_PRIOR_ROWS = 10.0
_LEAST_ROWS = 30
_CHUNK = 16_384


@dataclass(frozen=True)
class Moments:
    """Sums over rows of one design: per model if outcomes are partial, shared (first axis 1) if they are full.

    `n` [k], `x` [k, d], `xx` [k, d, d], `xy` [m, d], `y` [m], `yy` [m, m] (only its diagonal where partial).
    """

    n: Array
    x: Array
    xx: Array
    xy: Array
    y: Array
    yy: Array

    @property
    def full(self) -> bool:
        """Whether all models share their rows."""
        return len(self.n) == 1

    def plus(self, other: Moments) -> Moments:
        """The moments of both parts together."""
        return total([self, other])

    def minus(self, other: Moments) -> Moments:
        """The moments without another part of the same data."""
        return Moments(*(getattr(self, f) - getattr(other, f) for f in self.__dataclass_fields__))


def moments(design: npt.NDArray[np.floating], target: npt.NDArray[np.floating], *, full: bool) -> Moments:
    """Moments of `design` [n, d] against `target` [n, m], whose NaN are what is not known."""
    d, m = design.shape[1], target.shape[1]
    k = 1 if full else m
    out = Moments(np.zeros(k), np.zeros((k, d)), np.zeros((k, d, d)), np.zeros((m, d)), np.zeros(m), np.zeros((m, m)))
    for start in range(0, len(design), _CHUNK):
        x = design[start : start + _CHUNK].astype(np.float64)
        y = target[start : start + _CHUNK].astype(np.float64)
        if full:
            out.n[0] += len(x)
            out.x[0] += x.sum(axis=0)
            out.xx[0] += x.T @ x
            out.xy[:] += y.T @ x
            out.y[:] += y.sum(axis=0)
            out.yy[:] += y.T @ y
            continue
        for j in range(m):
            known = ~np.isnan(y[:, j])
            xj, yj = x[known], y[known, j]
            out.n[j] += len(xj)
            out.x[j] += xj.sum(axis=0)
            out.xx[j] += xj.T @ xj
            out.xy[j] += yj @ xj
            out.y[j] += yj.sum()
            out.yy[j, j] += yj @ yj
    return out


def total(parts: Sequence[Moments]) -> Moments:
    """The sum of several parts."""
    return Moments(*(np.sum([getattr(p, f) for p in parts], axis=0) for f in Moments.__dataclass_fields__))


def model_means(stats: Moments) -> Array:
    """Mean outcome per model [m], shrunk to the mean of all: a model with few rows has no 0 or 1."""
    n = np.broadcast_to(stats.n, stats.y.shape)
    overall = stats.y.sum() / max(float(n.sum()), 1.0)
    shrunk: Array = (stats.y + _PRIOR_ROWS * overall) / (n + _PRIOR_ROWS)
    return shrunk


def fit_head(stats: Moments) -> tuple[Array, Array]:
    """Weights [d, m] and intercepts [m] of one head."""
    return _fit_rotated(stats) if stats.full else _fit_shared_then_own(stats)


def _fit_rotated(stats: Moments) -> tuple[Array, Array]:
    n = float(stats.n[0])
    mean_x, mean_y = stats.x[0] / n, stats.y / n
    gram = stats.xx[0] - n * np.outer(mean_x, mean_x)
    cross = stats.xy - n * np.outer(mean_y, mean_x)
    scatter = stats.yy - n * np.outer(mean_y, mean_y)
    spectrum, basis = _spectrum(gram)
    variance, rotation = np.linalg.eigh(scatter)
    projected = rotation.T @ cross @ basis
    weights = np.stack(
        [_ridge(spectrum, projected[j], max(float(variance[j]), 1e-12), n) for j in range(len(variance))]
    )
    w = basis @ weights.T @ rotation.T
    return w, mean_y - mean_x @ w


def _fit_shared_then_own(stats: Moments) -> tuple[Array, Array]:
    means = model_means(stats)
    n = float(stats.n.sum())
    d = stats.x.shape[1]
    if n < 2:
        return np.zeros((d, len(means))), means
    # Shared: every model's deviation from its own mean against one set of weights.
    mean_x = stats.x.sum(axis=0) / n
    gram = stats.xx.sum(axis=0) - n * np.outer(mean_x, mean_x)
    cross = (stats.xy - means[:, None] * stats.x).sum(axis=0)
    offset = float((stats.y - means * stats.n).sum()) / n
    cross = cross - n * offset * mean_x
    own_squares = np.diag(stats.yy) - 2 * means * stats.y + means**2 * stats.n
    squares = float(own_squares.sum()) - n * offset**2
    spectrum, basis = _spectrum(gram)
    shared = basis @ _ridge(spectrum, basis.T @ cross, max(squares, 1e-12), n)
    weights = np.repeat(shared[:, None], len(means), axis=1)
    intercepts = means + offset - mean_x @ weights
    # Own: what the shared weights leave, per model, where it has rows enough for a penalty to be chosen.
    for j in np.flatnonzero(stats.n >= _LEAST_ROWS):
        nj = float(stats.n[j])
        mean_j, mean_yj = stats.x[j] / nj, float(stats.y[j]) / nj
        gram_j = stats.xx[j] - nj * np.outer(mean_j, mean_j)
        cross_j = stats.xy[j] - nj * mean_yj * mean_j
        left = cross_j - gram_j @ shared
        squares_j = (
            float(stats.yy[j, j]) - nj * mean_yj**2 - 2 * float(shared @ cross_j) + float(shared @ gram_j @ shared)
        )
        spectrum, basis = _spectrum(gram_j)
        own = basis @ _ridge(spectrum, basis.T @ left, max(squares_j, 1e-12), nj)
        weights[:, j] += own
        intercepts[j] = means[j] - mean_j @ weights[:, j]
    return weights, intercepts


def _spectrum(gram: Array) -> tuple[Array, Array]:
    values, basis = np.linalg.eigh(gram)
    return np.maximum(values, 1e-9), basis


def _ridge(spectrum: Array, projected: Array, squares: float, n: float) -> Array:
    """Ridge weights in the design's eigenbasis with the penalty that generalised cross-validation prefers."""
    best, weights = np.inf, np.zeros_like(projected)
    energy = projected**2 / spectrum
    for penalty in PENALTIES:
        shrink = spectrum / (spectrum + penalty)
        freedom = float(shrink.sum()) + 1.0
        if freedom >= 0.9 * n:
            continue
        residual = squares - float(((2.0 - shrink) * shrink * energy).sum())
        score = max(residual, 1e-12) / (1.0 - freedom / n) ** 2
        if score < best:
            best, weights = score, projected / (spectrum + penalty)
    return weights
