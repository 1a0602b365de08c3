"""Intervals hold what they promise: on skewed values, on clusters, and however often one looks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from router_ml.intervals import (
    MOST_CLUSTERS,
    bootstrap_interval,
    cluster_sequence,
    cluster_sums,
    confidence_sequence,
    mean_and_error,
    sequence_interval,
    sequence_radius,
    skewness_allowance,
)


def test_the_mean_is_over_rows_and_its_error_over_clusters() -> None:
    values, cluster = np.array([[1.0], [2.0], [6.0], [7.0]]), np.array([5, 5, 9, -1])
    sums, sizes = cluster_sums(values, cluster)
    assert sums.ravel().tolist() == [7.0, 3.0, 6.0] and sizes.tolist() == [1, 2, 1]
    mean, error = mean_and_error(sums, sizes)
    residuals = [7 - 4, 3 - 2 * 4, 6 - 4]
    assert mean[0] == 4.0 and math.isclose(error[0], math.sqrt(3 / 2 * sum(r * r for r in residuals)) / 4)


def test_copies_of_a_row_within_a_cluster_tell_nothing_new() -> None:
    values, cluster = np.random.default_rng(0).exponential(size=(300, 2)), np.arange(300)
    once = bootstrap_interval(values, cluster, seed=3)
    tenfold = bootstrap_interval(np.repeat(values, 10, axis=0), np.repeat(cluster, 10), seed=3)
    alone = bootstrap_interval(np.repeat(values, 10, axis=0), np.arange(3000), seed=3)
    np.testing.assert_allclose(tenfold, once, rtol=1e-9)
    assert ((alone[2] - alone[1]) < 0.4 * (once[2] - once[1])).all(), "ten times as many independent rows are narrower"


def test_a_shift_and_a_scale_of_the_values_are_those_of_the_interval() -> None:
    values, cluster = np.random.default_rng(1).normal(size=(200, 1)), np.arange(200) // 2
    plain = np.array(bootstrap_interval(values, cluster))
    moved = np.array(bootstrap_interval(1e6 + 1e-3 * values, cluster))
    np.testing.assert_allclose(moved[:3], 1e6 + 1e-3 * plain[:3], rtol=1e-12)
    assert math.isclose(moved[3][0], 1e-3 * plain[3][0], rel_tol=1e-5)


@pytest.mark.parametrize("clusters", [400, MOST_CLUSTERS + 5000])
def test_of_normal_values_it_is_the_textbook_interval(clusters: int) -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, (clusters, 1))
    mean, low, high, error = (float(x[0]) for x in bootstrap_interval(values, np.arange(clusters)))
    assert math.isclose(error, float(values.std(ddof=1)) / math.sqrt(clusters), rel_tol=1e-9)
    assert math.isclose(high - mean, 1.96 * error, rel_tol=0.12) and math.isclose(
        mean - low, 1.96 * error, rel_tol=0.12
    )


def test_it_covers_the_mean_of_skewed_clusters() -> None:
    rng, held, normal = np.random.default_rng(4), 0, 0
    for seed in range(400):
        shared = np.repeat(rng.lognormal(0.0, 1.0, 80), 3)
        values = (shared * rng.lognormal(0.0, 0.5, 240))[:, None]
        mean, low, high, error = bootstrap_interval(values, np.arange(240) // 3, seed=seed, replicates=399)
        truth = math.exp(0.5 + 0.125)
        held += bool(low[0] <= truth <= high[0])
        normal += bool(abs(mean[0] - truth) <= 1.96 * error[0])
    assert 0.92 <= held / 400 <= 0.985
    assert held > normal, "what the studentised bootstrap is for"


def weighted_errors(kind: str, rng: np.random.Generator) -> np.ndarray:
    """Corrections of dr, [2000, 250] of mean 0: one row in 13 matches the target and has the weight 13."""
    n, columns = 2000, 250
    if kind == "long answers":  # one in a hundred is two to six times as long as others
        long = np.where(rng.random((n, columns)) < 0.01, rng.uniform(2, 6, (n, columns)), 1.0)
        error = rng.gamma(9, 1 / 9, (n, columns)) * long - 1.03
    elif kind == "lognormal":
        error = rng.lognormal(0.0, 1.0, (n, columns)) - math.exp(0.5)
    else:
        error = (rng.random((n, columns)) < 0.7) - 0.7
    return np.where(rng.random((n, columns)) < 1 / 13, 13 * error, 0.0)


@pytest.mark.parametrize(
    ("kind", "least", "most"), [("long answers", 0.935, 0.965), ("lognormal", 0.925, 0.965), ("binary", 0.935, 0.965)]
)
def test_it_covers_where_few_weighted_rows_hold_the_variance(kind: str, least: float, most: float) -> None:
    rng, held, longer = np.random.default_rng(8), [], []
    for seed in range(8):
        mean, low, high, error = bootstrap_interval(weighted_errors(kind, rng), np.arange(2000), seed=seed)
        held += ((low <= 0) & (high >= 0)).tolist()
        longer += ((high - low) / error / 3.92).tolist()
        assert (np.minimum(mean - low, high - mean) >= 1.9599 * error).all()
    assert least <= np.mean(held) <= most
    if kind == "binary":
        assert np.mean(longer) < 1.04, "nothing to mend there"


def test_the_allowance_for_an_estimated_skewness_by_hand() -> None:
    symmetric, skewed = np.array([-3.0, -1, -1, 0, 0, 0, 0, 1, 1, 3]), np.array([-1.0] * 9 + [9.0])
    excess = (2 * 81 + 4) / 10 / 2.2**2 - 3
    by_hand = excess * (1 + 2 * 4) / (6 * 10)
    found = skewness_allowance(np.stack([symmetric, 7 * symmetric, skewed, np.zeros(10)], axis=1), 2.0)
    np.testing.assert_allclose(found, [by_hand, by_hand, 0.0, 0.0])


def test_one_cluster_is_no_evidence() -> None:
    for interval in (bootstrap_interval, sequence_interval):
        mean, low, high, error = interval(np.array([[1.0], [3.0]]), np.zeros(2, dtype=np.int64))
        assert (mean[0], low[0], high[0]) == (2.0, -np.inf, np.inf) and np.isnan(error[0])


def test_a_constant_is_known_exactly() -> None:
    found = bootstrap_interval(np.full((50, 1), 0.25), np.arange(50))
    assert [float(x[0]) for x in found] == [0.25, 0.25, 0.25, 0.0]


def test_the_sequence_is_the_published_formula() -> None:
    alpha, n, at = 0.05, 700, 500
    rho2 = (-2 * math.log(alpha) + math.log(-2 * math.log(alpha) + 1)) / at
    by_hand = 1.5 * math.sqrt(2 * (n * rho2 + 1) / (n**2 * rho2) * math.log(math.sqrt(n * rho2 + 1) / alpha))
    assert math.isclose(float(sequence_radius(n, 1.5, confidence=0.95, tightest_at=at)), by_hand)
    scaled = [float(sequence_radius(at, 1.0, confidence=0.95, tightest_at=t)) for t in (at // 8, at, at * 8)]
    assert scaled[1] < min(scaled[0], scaled[2]), "tightest where it was asked to be"


def test_the_sequence_holds_at_every_look_where_an_interval_does_not() -> None:
    rng, held, fooled = np.random.default_rng(6), 0, 0
    for _ in range(300):
        values = (rng.random(2000) < 0.3).astype(float)
        mean, low, high = confidence_sequence(values, tightest_at=500)
        held += bool(((low <= 0.3) & (high >= 0.3)).all())
        n = np.arange(1, 2001)
        radius = 1.96 * np.sqrt(np.maximum(mean * (1 - mean), 1e-9) / n)
        fooled += bool((np.abs(mean - 0.3) > radius)[100:].any())
    assert held / 300 >= 0.95
    assert fooled / 300 > 0.2, "the control: an interval for one look misses when looked at again and again"


def test_sequence_over_rows_and_over_clusters_of_one_row_agree() -> None:
    values = np.random.default_rng(7).random(400)
    mean, low, high = (float(x[-1]) for x in confidence_sequence(values, tightest_at=300))
    found = [float(x[0]) for x in sequence_interval(values[:, None], np.arange(400), tightest_at=300)]
    np.testing.assert_allclose(found[:3], [mean, low, high], rtol=1e-3)


def test_a_sequence_over_clusters_ends_where_the_interval_does_and_looks_not_ahead() -> None:
    rng = np.random.default_rng(4)
    cluster = np.sort(rng.integers(0, 90, 400))
    values = rng.normal(1.0, 2.0, (400, 1)) + rng.normal(0.0, 1.0, 90)[cluster][:, None]
    sums, sizes = cluster_sums(values, cluster)
    mean, low, high = cluster_sequence(sums[:, 0], sizes, confidence=0.9, tightest_at=200)
    for c in (20, 50, len(sizes)):
        first = cluster <= np.unique(cluster)[c - 1]
        m, a, b, _ = sequence_interval(values[first], cluster[first], confidence=0.9, tightest_at=200)
        assert [mean[c - 1], low[c - 1], high[c - 1]] == pytest.approx([m[0], a[0], b[0]])
    assert np.isinf(high[:19]).all() and np.isfinite(high[19:]).all()
    ones = cluster_sequence(values[:, 0], np.ones(400))
    assert np.allclose(ones[0], confidence_sequence(values[:, 0])[0])
    assert np.allclose(ones[2][19:], confidence_sequence(values[:, 0])[2][19:], rtol=0.03)
