"""Calibration, and the refusal to use scores that say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from router_ml.quality import logit
from training.calibrate import calibrate
from training.evaluate import calibration_error


def _scores(n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True probabilities and labels."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(size=(n, m))))
    return p, (rng.random((n, m)) < p).astype(np.float32)


def test_distorted_scores_are_put_right() -> None:
    p, y = _scores(6000, 2, 0)
    distorted = 1 / (1 + np.exp(-(0.4 * logit(p) + 1.0)))
    fixed = calibrate(distorted[:3000], y[:3000]).apply(distorted[3000:].astype(np.float32))
    for j in range(2):
        assert calibration_error(fixed[:, j], y[3000:, j]) < 0.04
        assert calibration_error(distorted[3000:, j], y[3000:, j]) > 0.1


def test_scores_that_order_nothing_are_not_used() -> None:
    p, y = _scores(4000, 3, 1)
    y[:, 0] = np.random.default_rng(2).random(4000) < 0.9
    shuffled = y[np.random.default_rng(3).permutation(4000)]
    flat = calibrate(p, shuffled).apply(p.astype(np.float32))
    assert np.ptp(flat, axis=0).max() == 0.0
    assert flat[0] == pytest.approx(shuffled.mean(axis=0), abs=0.01)


def test_models_with_few_rows_stay_near_the_others() -> None:
    p, y = _scores(3000, 2, 4)
    y[5:, 1] = np.nan
    y[:5, 1] = 1.0
    made = calibrate(p, y)
    assert made.slope[0, 1] == pytest.approx(made.slope[0, 0], abs=0.15)
    assert abs(made.intercept[0, 1] - made.intercept[0, 0]) < 0.6
    y[:, 1] = np.nan
    none = calibrate(p, y)
    assert none.slope[0, 1] == pytest.approx(none.slope[0, 0], abs=0.2)


def test_one_class_models_do_not_promise_certainty() -> None:
    p, y = _scores(500, 2, 5)
    y[:, 1] = 1.0
    promised = calibrate(p, y).apply(p.astype(np.float32))[:, 1]
    assert 0.5 < promised.mean() < 0.999


def test_weights_undo_the_logging_policys_preference() -> None:
    """The log sends a model mostly requests that are easier than their scores say; 1 / propensity undoes it."""
    rng = np.random.default_rng(6)
    n = 40_000
    easy = rng.random(n) < 0.5
    p_true = np.where(easy, 0.8, 0.4)
    score = np.clip(0.6 + 0.1 * rng.normal(size=n) + 0.05 * easy, 0.05, 0.95)
    propensity = np.where(easy, 0.9, 0.1)
    y = np.where(rng.random(n) < propensity, (rng.random(n) < p_true).astype(float), np.nan)
    weighted = calibrate(score[:, None], y[:, None], (1 / propensity)[:, None]).apply(score[:, None].astype(np.float32))
    plain = calibrate(score[:, None], y[:, None]).apply(score[:, None].astype(np.float32))
    assert abs(weighted.mean() - p_true.mean()) < 0.02
    assert abs(plain.mean() - p_true.mean()) > 0.08


def test_a_model_whose_scores_are_upside_down_has_its_mean() -> None:
    p, y = _scores(3000, 3, 7)
    y[:, 2] = np.random.default_rng(8).random(3000) < 0.6 * (1 - p[:, 2])
    promised = calibrate(p, y).apply(p.astype(np.float32))
    assert np.ptp(promised[:, 2]) == 0.0
    assert promised[0, 2] == pytest.approx(y[:, 2].mean(), abs=0.01)
    assert np.ptp(promised[:, 0]) > 0.5
