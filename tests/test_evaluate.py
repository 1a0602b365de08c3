"""Scores, frontiers and their summaries, against hand-worked cases and the policy itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_ml.choice import choose
from training.evaluate import (
    aiq_log,
    choose_by_probability,
    choose_by_value,
    cost_at,
    frontier,
    scores,
    strong_weak,
)


@given(st.integers(0, 10_000), st.floats(0, 1), st.floats(0, 10))
def test_many_at_once_choose_as_the_policy_does(seed: int, dial: float, worth: float) -> None:
    rng = np.random.default_rng(seed)
    p, cost = rng.random((20, 5), dtype=np.float32), rng.random((20, 5), dtype=np.float32)
    every = np.ones(5, dtype=bool)
    by_probability = [choose(p[i], cost[i], every, dial).order[0] for i in range(20)]
    assert choose_by_probability(p, cost, dial).tolist() == by_probability
    by_value = [choose(p[i], cost[i], every, 0.0, willingness_to_pay_usd=worth).order[0] for i in range(20)]
    assert choose_by_value(p.astype(float), cost.astype(float), worth).tolist() == by_value


def test_frontier_of_the_oracle_and_of_ignorance() -> None:
    rng = np.random.default_rng(0)
    quality = (rng.random((4000, 2)) < [0.6, 0.8]).astype(float)
    cost = np.tile([1.0, 10.0], (4000, 1))
    oracle = frontier(quality, cost, cost, quality)
    assert oracle.quality.max() == pytest.approx((quality.max(axis=1)).mean())
    blind = frontier(np.tile([0.6, 0.8], (4000, 1)), cost, cost, quality)
    assert set(np.round(blind.cost_usd, 6)) == {1.0, 10.0}
    assert cost_at(blind)["1.0"] == 1.0
    assert cost_at(oracle)["1.0"] < 0.5
    assert aiq_log(oracle) > aiq_log(blind)
    assert blind.share.sum(axis=1) == pytest.approx(1.0)


def test_cost_at_is_the_cheapest_setting_that_is_good_enough() -> None:
    quality = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    cost = np.array([[1.0, 10.0]] * 4)
    p = np.array([[0.9, 0.95], [0.1, 0.9], [0.9, 0.95], [0.1, 0.2]])
    # The second request alone needs the dear model: 3 + 10 of 40.
    assert cost_at(frontier(p, cost, cost, quality))["1.0"] == pytest.approx(13 / 40)


def test_scores_by_hand() -> None:
    p = np.array([[0.9, 0.5], [0.1, 0.5], [0.8, 0.5], [0.3, 0.5]])
    y = np.array([[1, 1], [0, 1], [1, np.nan], [0, np.nan]])
    found = scores(p, y)
    assert found["auc"] == 1.0  # the second model has one class only
    assert found["brier"] == pytest.approx((np.mean([0.01, 0.01, 0.04, 0.09]) + 0.25) / 2)


def test_strong_weak_follows_routellm() -> None:
    strong, weak = np.array([1.0, 1.0, 1.0, 0.0]), np.array([1.0, 0.0, 0.0, 0.0])
    perfect = strong_weak(np.array([0.0, 2.0, 1.0, -1.0]), strong, weak)
    assert perfect == {"apgr": pytest.approx(0.75), "cpt50": 0.25, "cpt80": 0.5}
    worst = strong_weak(np.array([2.0, 0.0, 0.5, 3.0]), strong, weak)
    assert worst["apgr"] == pytest.approx(0.25)
    rng = np.random.default_rng(0)
    many = rng.random(20_000) < 0.5
    random = strong_weak(rng.random(20_000), many.astype(float), np.zeros(20_000))
    assert random["apgr"] == pytest.approx(0.5, abs=0.02)
    assert random["cpt80"] == pytest.approx(0.8, abs=0.02)
