"""Models inside the estimators, fitted out of fold: of outcomes, of who gives feedback, of missing propensities.

Small and linear on purpose. Doubly robust estimates need them to be better than nothing, not to be right, and a
cross-fit over thousands of rows has to take a tenth of a second.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

PRIOR_ROWS = 5.0
"""A model's own mean and spread count as much as what is expected of it without rows at this many rows."""
MOST_FEATURES = 48
LEAST_OBSERVED = 0.02
"""The least probability of feedback that a weight is made of; what is cut off is reported as clipped."""
_FEEDBACK_PENALTIES = (10.0, 100.0, 1000.0)
_PENALTIES = np.array([3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0, np.inf])


def folds_by_cluster(cluster: IntArray, folds: int, seed: int) -> IntArray:
    """A fold number per row [n], whole clusters each; at most one fold a cluster."""
    _, code = np.unique(cluster, return_inverse=True)
    order = np.random.default_rng(seed).permutation(int(code.max()) + 1)
    fold: IntArray = (order % folds)[code]
    return fold


def design_of(context: Array, features: Array | None) -> Array:
    """Standardised columns [n, d] that describe the requests: context, and features in their main directions.

    No outcome enters it, so that it may see all rows.
    """
    parts = [_standardised(context)]
    if features is not None:
        columns = _standardised(np.asarray(features, dtype=np.float64))
        if columns.shape[1] > MOST_FEATURES:
            _, directions = np.linalg.eigh(columns.T @ columns)
            columns = _standardised(columns @ directions[:, -MOST_FEATURES:])
        parts.append(columns)
    return np.concatenate(parts, axis=1)


def _standardised(columns: Array) -> Array:
    spread = columns.std(axis=0)
    made: Array = (columns - columns.mean(axis=0)) / np.where(spread > 1e-12, spread, 1.0)
    return made[:, spread > 1e-12]


def cross_fit_outcomes(
    design: Array,
    action: IntArray,
    outcome: Array,
    weight: Array,
    prediction: Array | None,
    fold: IntArray,
    m: int,
) -> Array:
    """Expected outcome of every model for every row, by models that have not seen the row's fold; float64 [n, m].

    `outcome` [n] is NaN where unknown, `weight` [n] weighs the known ones, `prediction` [n, m] is what somebody else
    expects (NaN: nothing). Outcomes are taken relative to their model's mean and spread, which are shrunk. A ridge
    regression shared by all models comes first and each model's own of what that leaves after it; generalised
    cross-validation picks every penalty.
    """
    fitted = np.empty((len(action), m))
    for f in np.unique(fold):
        train, test = (fold != f) & ~np.isnan(outcome), fold == f
        if not train.any():
            fitted[test] = 0.0
            continue
        fitted[test] = _outcomes(design, action, outcome, weight, prediction, train, test, m)
    return fitted


def _outcomes(
    design: Array, action: IntArray, outcome: Array, weight: Array, prediction: Array | None,
    train: BoolArray, test: BoolArray, m: int,
) -> Array:  # fmt: skip
    a, r, w = action[train], outcome[train], weight[train]
    rows = np.bincount(a, w, m)
    prior = np.full(m, np.average(r, weights=w))
    if prediction is not None:
        told = ~np.isnan(prediction[train])
        expected = np.where(told, prediction[train], 0.0).sum(axis=0) / np.maximum(told.sum(axis=0), 1)
        prior = np.where(told.any(axis=0), expected, prior)
    mean = (np.bincount(a, w * r, m) + PRIOR_ROWS * prior) / (rows + PRIOR_ROWS)
    off = r - mean[a]
    size = np.maximum(np.abs(mean), 1e-12)
    relative = np.average(np.square(off / size[a]), weights=w)
    spread = np.sqrt((np.bincount(a, w * off * off, m) + PRIOR_ROWS * relative * size**2) / (rows + PRIOR_ROWS))
    spread = np.where(spread > 0, spread, 1.0)
    target = off / spread[a]

    hint = np.zeros((len(action), m))
    if prediction is not None:
        hint = np.nan_to_num(np.clip((prediction - mean) / spread, -6.0, 6.0))
    shared = np.column_stack([hint[train, a], design[train]])
    both = _ridge(shared, target, w)
    left = target - shared @ both
    z = hint[test] * both[0] + (design[test] @ both[1:])[:, None]
    for model in range(m):
        own = a == model
        if own.sum() < 2 * PRIOR_ROWS:
            continue
        coefficient = _ridge(shared[own], left[own], w[own])
        z[:, model] += hint[test, model] * coefficient[0] + design[test] @ coefficient[1:]
    made: Array = np.clip(mean + spread * z, r.min(), r.max())
    return made


def _ridge(columns: Array, target: Array, weight: Array) -> Array:
    """Coefficients [d] of the weighted ridge regression whose penalty generalised cross-validation picks.

    Degrees of freedom count 1.4 times (Cummins, Filloon and Nychka, JASA 2001): plain cross-validation is now and then
    content with hardly any penalty.
    """
    weighted = columns * weight[:, None]
    values, vectors = np.linalg.eigh(weighted.T @ columns)
    values = np.maximum(values, 0.0)
    along = vectors.T @ (weighted.T @ target)
    n, whole = weight.sum(), float(np.sum(weight * target**2))
    shrunk = 1.0 / (values[:, None] + _PENALTIES)
    freedom = (values[:, None] * shrunk).sum(axis=0)
    lost = whole - (along[:, None] ** 2 * (2 - values[:, None] * shrunk) * shrunk).sum(axis=0)
    room = n - 1.4 * freedom
    score = np.where(room > 0, lost / np.square(np.maximum(room, 1e-9)), np.inf)
    coefficient: Array = vectors @ (along * shrunk[:, int(score.argmin())])
    return coefficient


def cross_fit_feedback(
    design: Array, action: IntArray, seen: Array, prediction: Array | None, fold: IntArray, m: int, among: BoolArray
) -> Array:
    """Probability that the outcome of a row's decision becomes known, out of fold, float64 [n], unclipped.

    Fitted on the rows `among` [n] alone; the others, whose outcome is certain to be known, have 1.

    A logistic regression on the request, which model was chosen and what is predicted of it; its penalty is the one
    that does best out of fold. `seen` [n] is 1 where it
    is known and 0 elsewhere, or in [0, …) where known outcomes stand for others (`feedback_ratio`).
    """
    columns = [np.ones((len(action), 1)), np.eye(m)[action], design]
    if prediction is not None:
        hint = prediction[np.arange(len(action)), action]
        columns.append(_standardised(np.nan_to_num(hint, nan=float(np.nanmean(hint)))[:, None]))
    whole = np.concatenate(columns, axis=1)
    fitted = np.empty((len(_FEEDBACK_PENALTIES), len(action)))
    for f in np.unique(fold):
        train, test = among & (fold != f), fold == f
        for at, penalty in enumerate(_FEEDBACK_PENALTIES):
            fitted[at, test] = _sigmoid(whole[test] @ _logistic(whole[train], seen[train], penalty))
    p = np.clip(fitted, 1e-6, 1 - 1e-6)
    loss = -(seen * np.log(p) + (1 - seen) * np.log1p(-p))[:, among].sum(axis=1)
    chosen: Array = np.where(among, fitted[loss.argmin()], 1.0)
    return chosen


def inverse_feedback(seen: Array, told: Array, action: IntArray, m: int) -> Array:
    """What each known outcome stands for: `seen` / `told`, [n], of a mean of 1 among the rows of each model.

    The inverse of an estimated probability is too high on average; dividing by the mean, which ought to be 1, takes
    that off. A model's own mean counts as much as 1 does at `PRIOR_ROWS` rows.
    """
    raw = seen / np.maximum(told, LEAST_OBSERVED)
    mean = (np.bincount(action, raw, m) + PRIOR_ROWS) / (np.bincount(action, minlength=m) + PRIOR_ROWS)
    scaled: Array = raw / mean[action]
    return scaled


def _logistic(columns: Array, target: Array, penalty: float, steps: int = 25) -> Array:
    """Coefficients [d] of a ridge-penalised logistic quasi-likelihood by Newton steps; the first is not shrunk."""
    ridge = np.full(columns.shape[1], penalty)
    ridge[0] = 1e-6
    coefficient = np.zeros(columns.shape[1])
    share = float(np.clip(target.mean(), 1e-4, 1 - 1e-4))
    coefficient[0] = np.log(share / (1 - share))
    for _ in range(steps):
        p = _sigmoid(columns @ coefficient)
        curve = np.maximum(p * (1 - p), 1e-6)
        slope = columns.T @ (target - p) - ridge * coefficient
        step = np.linalg.solve((columns * curve[:, None]).T @ columns + np.diag(ridge), slope)
        coefficient += np.clip(step, -3.0, 3.0)
        if np.abs(step).max() < 1e-6:
            break
    return coefficient


def _sigmoid(x: Array) -> Array:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -35.0, 35.0))), dtype=np.float64)


def cross_fit_propensities(
    design: Array, action: IntArray, eligible: BoolArray, fold: IntArray, rows: BoolArray
) -> Array:
    """Probability of every model being chosen, for the rows [n] of the mask, out of fold; [n, m], NaN elsewhere.

    A multinomial logistic regression on the request among what was eligible. It knows nothing of what the choice
    depended on beside the request.
    """
    found = np.full(eligible.shape, np.nan)
    whole = np.column_stack([np.ones(len(design)), design])
    for f in np.unique(fold[rows]):
        train, test = rows & (fold != f), rows & (fold == f)
        seen = np.bincount(action[train], minlength=eligible.shape[1]) > 0
        allowed = eligible & seen
        coefficient = _multinomial(whole[train], action[train], allowed[train])
        found[test] = _softmax(whole[test] @ coefficient, allowed[test])
    return found


def _softmax(score: Array, allowed: BoolArray) -> Array:
    score = np.where(allowed, score, -np.inf)
    top = np.where(allowed.any(axis=1), score.max(axis=1), 0.0)
    share = np.exp(score - top[:, None])
    made: Array = share / np.maximum(share.sum(axis=1, keepdims=True), 1e-300)
    return made


def _multinomial(columns: Array, action: IntArray, allowed: BoolArray, penalty: float = 3.0) -> Array:
    """Coefficients [d, m] of a ridge-penalised multinomial logistic regression among each row's allowed models."""
    from scipy.optimize import minimize

    shape = columns.shape[1], allowed.shape[1]
    ridge = np.full((shape[0], 1), penalty)
    ridge[0] = 1e-3  # the intercepts
    chosen = np.eye(shape[1])[action]

    def loss(flat: Array) -> tuple[float, Array]:
        coefficient = flat.reshape(shape)
        share = _softmax(columns @ coefficient, allowed)
        likelihood = np.log(np.maximum(share[np.arange(len(action)), action], 1e-300)).sum()
        slope = columns.T @ (share - chosen) + ridge * coefficient
        return float(0.5 * (ridge * coefficient**2).sum() - likelihood), slope.ravel()

    found: Array = minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B", options={"maxiter": 200}).x
    return found.reshape(shape)
