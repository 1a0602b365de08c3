"""Intervals for means of per-row values: a cluster bootstrap, and confidence sequences for who looks repeatedly."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

REPLICATES = 999
MOST_CLUSTERS = 10_000
"""Above this many clusters the bootstrap draws random groups of clusters: they are as independent as the clusters."""
_BLOCK = 4_000_000  # counts that are held at a time


def cluster_sums(values: Array, cluster: IntArray) -> tuple[Array, Array]:
    """(sums [c, k], sizes [c]) of the values [n, k] by cluster; `cluster` [n] holds any whole numbers."""
    _, code = np.unique(cluster, return_inverse=True)
    count = int(code.max()) + 1
    sums = np.stack([np.bincount(code, column, count) for column in values.T], axis=1)
    return np.asarray(sums, dtype=np.float64), np.bincount(code, minlength=count).astype(np.float64)


def mean_and_error(sums: Array, sizes: Array) -> tuple[Array, Array]:
    """(mean over rows [k], its standard error [k]) from cluster sums [c, k] and sizes [c].

    The mean is a ratio of two sums over clusters; its error is the usual linearisation (Cochran, Sampling Techniques,
    section 6.4). With one cluster it is NaN.
    """
    clusters, total = len(sizes), sizes.sum()
    mean = sums.sum(axis=0) / total
    if clusters < 2:
        return mean, np.full(len(mean), np.nan)
    residual = sums - mean * sizes[:, None]
    return mean, np.sqrt(clusters / (clusters - 1) * np.square(residual).sum(axis=0)) / total


def bootstrap_interval(
    values: Array,
    cluster: IntArray,
    *,
    confidence: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> tuple[Array, Array, Array, Array]:
    """(mean, low, high, standard error), each [k], of the columns' means over rows; whole clusters are drawn anew.

    The bootstrap of the studentised mean (Efron and Tibshirani 1993, section 12.5): weights are skewed, and a
    percentile or a normal interval is then too short on one side. Resampling clusters is resampling their sums, so a
    replicate is a row of counts in one matrix product, and all columns share the draws. More than `MOST_CLUSTERS` are
    first put into that many random groups. For tails that the replicates could not show, there are more of them.

    Where few rows hold most of the variance it would still be short, in two ways that are mended and that vanish as
    rows become many. It corrects for a skewness that it estimates from the same rows as the mean: `skewness_allowance`
    moves both ends outwards. And the side that skewness shortens is shortened most just when an outlier has raised the
    mean: neither end is nearer to the mean than the normal interval's. docs/log.md has the simulations.
    """
    sums, sizes = cluster_sums(values, cluster)
    mean, error = mean_and_error(sums, sizes)
    alpha = 1.0 - confidence
    normal = NormalDist().inv_cdf(1 - alpha / 2)
    allowance = normal * skewness_allowance(sums - mean * sizes[:, None], normal)
    rng = np.random.default_rng(seed)
    if len(sizes) > MOST_CLUSTERS:
        group = rng.permutation(len(sizes)) % MOST_CLUSTERS
        grouped, _ = cluster_sums(np.column_stack([sums, sizes]), group)
        sums, sizes = grouped[:, :-1], grouped[:, -1]
    if len(sizes) < 2:
        return mean, np.full_like(mean, -np.inf), np.full_like(mean, np.inf), error
    replicates = max(replicates, math.ceil(20 / alpha) - 1)
    pivot = _studentised(sums, sizes, mean, replicates, rng)
    below = np.maximum(np.quantile(pivot, 1 - alpha / 2, axis=0) + allowance, normal)
    above = np.maximum(allowance - np.quantile(pivot, alpha / 2, axis=0), normal)
    return mean, mean - below * error, mean + above * error, error


def skewness_allowance(residual: Array, z: float) -> Array:
    """How much further out, as a share of z, the ends of a studentised bootstrap at z standard errors have to be, [k].

    The bootstrap estimates the skewness s by the same residuals [c, k] as the mean. The covariance of the two,
    e - 3/2 s^2 with the kurtosis e in excess of a normal's, takes (e - 3/2 s^2) z (1 + 2 z^2) phi(z) / (6 c) off each
    end's coverage (Hall, Theoretical Comparison of Bootstrap Confidence Intervals, Annals of Statistics 16, 1988,
    table 1), which this gives back. Never below 0: no end is drawn in on the word of moments that are so unsure.
    """
    square = np.square(residual).mean(axis=0)
    scaled = residual / np.sqrt(np.where(square > 0, square, 1.0))
    skewness, excess = np.power(scaled, 3).mean(axis=0), np.power(scaled, 4).mean(axis=0) - 3.0
    share: Array = np.maximum(excess - 1.5 * np.square(skewness), 0.0) * (1 + 2 * z * z) / (6 * len(residual))
    return share


def _studentised(sums: Array, sizes: Array, mean: Array, replicates: int, rng: np.random.Generator) -> Array:
    """(replicate's mean - mean) / the replicate's standard error, [replicates, k]."""
    clusters, k = sums.shape
    residual = sums - mean * sizes[:, None]
    scale = np.sqrt(np.square(residual).mean(axis=0))
    residual = residual / np.where(scale > 0, scale, 1.0)
    parts = np.column_stack([residual, np.square(residual), residual * sizes[:, None], sizes, np.square(sizes)])
    step = max(1, _BLOCK // clusters)
    drawn = []
    for at in range(0, replicates, step):
        rows = min(step, replicates - at)
        draws = rng.integers(0, clusters, (rows, clusters)) + np.arange(rows)[:, None] * clusters
        counts = np.bincount(draws.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        drawn.append(counts.astype(np.float64) @ parts)
    found = np.concatenate(drawn)
    e, ee, en, n, nn = found[:, :k], found[:, k : 2 * k], found[:, 2 * k : 3 * k], found[:, [-2]], found[:, [-1]]
    shift = e / n
    variance = np.maximum(ee - 2 * shift * en + np.square(shift) * nn, 0.0) / np.square(n)
    # A replicate that drew none of the few rows that matter has no error to be measured by.
    least = 0.05 * math.sqrt(clusters) / sizes.sum()
    pivot: Array = shift / np.maximum(np.sqrt(variance * clusters / (clusters - 1)), least)
    return pivot


def sequence_radius(n: npt.ArrayLike, sd: npt.ArrayLike, *, confidence: float, tightest_at: int) -> Array:
    """Half the width of a confidence sequence for a mean after n values of standard deviation `sd`.

    The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas (Annals of Statistics 2024,
    arXiv 2103.06476, theorem 2.2): with the given confidence it holds at all n at once, from some tens on. It is
    tightest at `tightest_at` values, which must be fixed before the first look.
    """
    n, alpha = np.asarray(n, dtype=np.float64), 1.0 - confidence
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / tightest_at
    scale = n * rho2 + 1
    radius: Array = np.asarray(sd) * np.sqrt(2 * scale / (n * n * rho2) * np.log(np.sqrt(scale) / alpha))
    return radius


def confidence_sequence(
    values: Array, *, confidence: float = 0.95, tightest_at: int = 1000
) -> tuple[Array, Array, Array]:
    """(running mean, low, high), each [n], of independent values [n] in their order; see `sequence_radius`.

    The bounds hold at every n at once, so one may stop at any. Before the 20th value they are infinite.
    """
    n = np.arange(1, len(values) + 1)
    mean = np.cumsum(values) / n
    # About the first value, so that a large common part does not cost the digits of the variance.
    moved = values - values[:1]
    variance = np.maximum(np.cumsum(np.square(moved)) / n - np.square(np.cumsum(moved) / n), 0.0)
    radius = sequence_radius(n, np.sqrt(variance), confidence=confidence, tightest_at=tightest_at)
    radius[:19] = np.inf
    return mean, mean - radius, mean + radius


def sequence_interval(
    values: Array, cluster: IntArray, *, confidence: float = 0.95, tightest_at: int = 1000
) -> tuple[Array, Array, Array, Array]:
    """(mean, low, high, standard error), each [k]: the confidence sequence over clusters after all of them."""
    sums, sizes = cluster_sums(values, cluster)
    mean, error = mean_and_error(sums, sizes)
    clusters = len(sizes)
    if clusters < 20:
        return mean, np.full_like(mean, -np.inf), np.full_like(mean, np.inf), error
    radius = sequence_radius(clusters, error * math.sqrt(clusters), confidence=confidence, tightest_at=tightest_at)
    return mean, mean - radius, mean + radius, error


def cluster_sequence(
    sums: Array, sizes: Array, *, confidence: float = 0.95, tightest_at: int = 1000
) -> tuple[Array, Array, Array]:
    """(running mean over rows, low, high), each [c], after each of c clusters in their order; see `sequence_radius`.

    `sums` [c] and `sizes` [c] are the clusters' own. The last bounds are those of `sequence_interval`; before the 20th
    cluster they are infinite.
    """
    c, total = np.arange(1, len(sizes) + 1, dtype=np.float64), np.cumsum(sizes)
    mean = np.cumsum(sums) / total
    squares = np.cumsum(sums * sums) - 2 * mean * np.cumsum(sums * sizes) + mean * mean * np.cumsum(sizes * sizes)
    error = np.sqrt(np.maximum(squares, 0.0) * c / np.maximum(c - 1.0, 1.0)) / total
    radius = sequence_radius(c, error * np.sqrt(c), confidence=confidence, tightest_at=tightest_at)
    radius[:19] = np.inf
    return mean, mean - radius, mean + radius
