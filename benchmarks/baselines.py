"""The rows that a router has to beat, on the same encoder and the same training outcomes."""

from __future__ import annotations

from collections.abc import Iterator

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
_PRIOR = 5.0
_RIDGE = 10.0
_BLOCK = 512


def baselines(x: Array, y: Array, x_test: Array, *, seed: int) -> Iterator[tuple[str, Array]]:
    """P(ok) [n_test, m] of each baseline from embeddings `x` [n, d] and labels `y` [n, m], NaN where unknown."""
    for k in (40, 100):
        yield f"knn_{k}", knn(x, y, x_test, k)
    yield "ridge", ridge(x, y, x_test)
    yield "lightgbm_raw", lightgbm_raw(x, y, x_test, seed=seed)


def knn(x: Array, y: Array, x_test: Array, k: int) -> Array:
    """Mean outcome of the k most similar training requests per model; with partial outcomes, of those that have one.

    The mean is shrunk to the model's own by five rows' worth, so that a model without neighbours has its mean.
    """
    known = ~np.isnan(y)
    filled = np.where(known, y, 0.0)
    mean = filled.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    out = np.empty((len(x_test), y.shape[1]))
    for at in range(0, len(x_test), _BLOCK):
        nearest = np.argpartition(-(x_test[at : at + _BLOCK] @ x.T), min(k, len(x) - 1), axis=1)[:, :k]
        count = known[nearest].sum(axis=1)
        out[at : at + _BLOCK] = (filled[nearest].sum(axis=1) + _PRIOR * mean) / (count + _PRIOR)
    return out


def ridge(x: Array, y: Array, x_test: Array) -> Array:
    """A ridge regression per model on the embedding, penalty 10."""
    out = np.empty((len(x_test), y.shape[1]))
    for j in range(y.shape[1]):
        known = ~np.isnan(y[:, j])
        xj, yj = x[known].astype(np.float64), y[known, j].astype(np.float64)
        mean_x, mean_y = xj.mean(axis=0), yj.mean()
        gram = (xj - mean_x).T @ (xj - mean_x) + _RIDGE * np.eye(x.shape[1])
        out[:, j] = (x_test - mean_x) @ np.linalg.solve(gram, (xj - mean_x).T @ (yj - mean_y)) + mean_y
    return out


def lightgbm_raw(x: Array, y: Array, x_test: Array, *, seed: int) -> Array:
    """A LightGBM classifier per model on the raw embedding."""
    params = {
        "objective": "binary",
        "learning_rate": 0.05,
        "num_leaves": 15,
        "feature_fraction": 0.3,
        "min_data_in_leaf": 20,
        "verbosity": -1,
        "seed": seed,
    }
    out = np.empty((len(x_test), y.shape[1]))
    for j in range(y.shape[1]):
        known = ~np.isnan(y[:, j])
        out[:, j] = lgb.train(params, lgb.Dataset(x[known], y[known, j]), 100).predict(x_test)
    return out
