"""The tests of a mean keep their level at the boundary, whatever the weights, and still see a difference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.risk import betting_p, binomial_bound, binomial_p, hoeffding_bentkus_p, lower_bound

LEAST, ALPHA, TIMES = 0.8, 0.1, 1500


def weighted(rng: np.random.Generator, n: int, true: float, graded: bool) -> tuple[np.ndarray, float]:
    """Terms w (x - LEAST) of a policy that agrees with the log's greedy model on half of the requests, exploration
    0.2 over four models: weights 1.18 or 20, quality as `true` on average but worse where the two disagree."""
    agree = rng.random(n) < 0.5
    propensity = np.where(agree, 0.8 + 0.05, 0.05)
    matched = rng.random(n) < propensity
    mean = np.where(agree, true + 0.1, true - 0.1)
    x = rng.beta(mean * 4, (1 - mean) * 4) if graded else (rng.random(n) < mean).astype(float)
    return matched / propensity * (x - LEAST), 20 * LEAST


@pytest.mark.parametrize("graded", [False, True])
def test_betting_keeps_its_level_under_uneven_weights_and_sees_a_difference(graded: bool) -> None:
    rng = np.random.default_rng(1)
    wrong = [betting_p(*weighted(rng, 400, LEAST, graded), ALPHA) <= ALPHA for _ in range(TIMES)]
    assert np.mean(wrong) <= ALPHA + 2.6 * np.sqrt(ALPHA * (1 - ALPHA) / TIMES)
    right = [betting_p(*weighted(rng, 20_000, LEAST + 0.08, graded), ALPHA) <= ALPHA for _ in range(50)]
    assert np.mean(right) > 0.8


@pytest.mark.parametrize("name", ["binomial", "hoeffding-bentkus", "betting"])
@pytest.mark.parametrize("graded", [False, True])
def test_equal_weights_keep_the_level(name: str, graded: bool) -> None:
    rng = np.random.default_rng(2)

    def p_value(n: int, true: float) -> float:
        x = rng.beta(true, 1 - true, n) if graded else (rng.random(n) < true).astype(float)
        if name == "binomial":
            return binomial_p(x, LEAST, rng.random(n))
        return hoeffding_bentkus_p(x, LEAST) if name == "hoeffding-bentkus" else betting_p(x - LEAST, LEAST, ALPHA)

    wrong = np.mean([p_value(200, LEAST) <= ALPHA for _ in range(TIMES)])
    assert wrong <= ALPHA + 2.6 * np.sqrt(ALPHA * (1 - ALPHA) / TIMES)
    if name == "binomial":
        assert wrong > 0.05, "the exact test is not that cautious"
    assert np.mean([p_value(2000, LEAST + 0.05) <= ALPHA for _ in range(50)]) > 0.9


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 300), st.floats(0.05, 0.95))
def test_bounds_are_where_the_test_turns(seed: int, n: int, true: float) -> None:
    rng = np.random.default_rng(seed)
    x, uniform = (rng.random(n) < true).astype(float), rng.random(n)
    exact = binomial_bound(x, ALPHA, uniform)
    searched = lower_bound(lambda least: binomial_p(x, least, uniform), ALPHA)
    assert searched == pytest.approx(exact, abs=2e-4)
    assert lower_bound(lambda least: hoeffding_bentkus_p(x, least), ALPHA) <= exact + 2e-4
    assert exact <= x.mean()


def test_nothing_is_shown_by_nothing() -> None:
    none = np.zeros(0)
    assert binomial_p(none, 0.5, none) == hoeffding_bentkus_p(none, 0.5) == betting_p(none, 1.0, 0.05) == 1.0
    assert binomial_bound(np.zeros(3), 0.05, np.full(3, 0.5)) == 0.0
