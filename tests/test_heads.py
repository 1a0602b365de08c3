"""Heads from sufficient statistics, checked against scikit-learn and against what they are for."""

from __future__ import annotations

import numpy as np
import pytest

from training.heads import PENALTIES, fit_head, model_means, moments, total


def _problem(n: int = 800, d: int = 20, m: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Outcomes with a strong shared part and weak differences: x [n, d], y [n, m], and the true mean [n, m]."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    shared, own = rng.normal(size=d), rng.normal(size=(d, m)) * 0.2
    truth = x @ (shared[:, None] + own) * 0.3 + np.linspace(-0.5, 0.5, m)
    return x, truth + rng.normal(size=(n, m)), truth


def test_moments_add_up_and_subtract() -> None:
    x, y, _ = _problem()
    parts = [moments(x[i::3], y[i::3], full=True) for i in range(3)]
    whole = moments(x, y, full=True)
    for name in whole.__dataclass_fields__:
        assert np.allclose(getattr(total(parts), name), getattr(whole, name))
        assert np.allclose(getattr(whole.minus(parts[0]), name), getattr(total(parts[1:]), name))


def test_one_outcome_is_ridge_regression_with_the_penalty_of_generalised_cross_validation() -> None:
    from sklearn.linear_model import Ridge

    x, y, _ = _problem(n=300)
    y = y[:, :1]
    w, b = fit_head(moments(x, y, full=True))
    n = len(x)
    centred = x - x.mean(axis=0)
    scores = []
    for penalty in PENALTIES:
        model = Ridge(penalty).fit(x, y[:, 0])
        freedom = 1 + np.trace(centred @ np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T))
        scores.append(np.sum((y[:, 0] - model.predict(x)) ** 2) / (1 - freedom / n) ** 2)
    best = Ridge(PENALTIES[int(np.argmin(scores))]).fit(x, y[:, 0])
    assert np.allclose(w[:, 0], best.coef_, atol=1e-6)
    assert b[0] == pytest.approx(best.intercept_, abs=1e-6)


def test_rotation_predicts_differences_between_models_better_than_a_ridge_each() -> None:
    gains = []
    for seed in range(5):
        x, y, truth = _problem(n=250, d=60, m=8, seed=seed)
        w, b = fit_head(moments(x, y, full=True))
        each = [fit_head(moments(x, y[:, [j]], full=True)) for j in range(y.shape[1])]
        w_each = np.concatenate([e[0] for e in each], axis=1)
        b_each = np.concatenate([e[1] for e in each])

        def error(weights: np.ndarray, bias: np.ndarray, truth: np.ndarray = truth, x: np.ndarray = x) -> float:
            left = x @ weights + bias - truth
            return float(np.mean((left - left.mean(axis=1, keepdims=True)) ** 2))

        gains.append(error(w, b) / error(w_each, b_each))
    assert np.mean(gains) < 0.8


def test_partial_outcomes_share_what_models_have_in_common() -> None:
    x, y, truth = _problem(n=3000, d=30, m=6)
    rng = np.random.default_rng(1)
    seen = np.full(y.shape, np.nan)
    at = rng.integers(0, 6, len(x))
    seen[np.arange(len(x)), at] = y[np.arange(len(x)), at]
    w, b = fit_head(moments(x, seen, full=False))
    each = []
    for j in range(6):
        rows = at == j
        wj, bj = fit_head(moments(x[rows], y[rows][:, [j]], full=True))
        each.append(x @ wj[:, 0] + bj[0])
    alone = np.mean((np.stack(each, axis=1) - truth) ** 2)
    together = np.mean((x @ w + b - truth) ** 2)
    assert together < 0.75 * alone


def test_a_model_without_rows_gets_the_shared_part() -> None:
    x, y, _ = _problem()
    y[:, 2] = np.nan
    w, b = fit_head(moments(x, y, full=False))
    assert np.isfinite(w).all() and np.isfinite(b).all()
    others = (x @ w[:, [0, 1, 3]]).mean(axis=1)
    assert np.corrcoef(x @ w[:, 2], others)[0, 1] > 0.9


def test_few_rows_are_not_believed() -> None:
    target = np.full((100, 2), np.nan)
    target[:, 0] = np.arange(100) % 2
    target[:3, 1] = 1.0
    means = model_means(moments(np.zeros((100, 1)), target, full=False))
    assert means[0] == pytest.approx(0.5, abs=0.02)
    assert 0.5 < means[1] < 0.7


def test_constant_outcomes_and_constant_features_do_not_break() -> None:
    w, b = fit_head(moments(np.ones((50, 3)), np.ones((50, 2)), full=True))
    assert np.allclose(np.ones((1, 3)) @ w + b, 1.0)
