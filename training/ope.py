"""Off-policy evaluation: what a policy would earn and cost, from the log of another one, with honest intervals.

Per-row values of five estimators, one shared mean and interval. Where the log cannot tell, it says so and gives no
number. The way through: `logged_of`, `target_of` (and `predictions_of`), then `evaluate_policy` or `evaluate_slices`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from router_ml.errors import InputError
from router_ml.intervals import bootstrap_interval, sequence_interval
from training.estimators import Estimator, Parts, row_values, switch_threshold
from training.logged import Logged, logged_of, one_row_a_request, predictions_of, target_of
from training.nuisance import (
    LEAST_OBSERVED,
    cross_fit_feedback,
    cross_fit_outcomes,
    cross_fit_propensities,
    design_of,
    folds_by_cluster,
    inverse_feedback,
)
from training.policy_value import Estimate, Feedback, PolicyValue, SliceValues
from training.support import (
    LEAST_PROPENSITY,
    Support,
    doubts,
    identifiable_rows,
    overlap_table,
    support_of,
    supported,
    unsupported_of,
    why_not_identifiable,
)

__all__ = [
    "Estimate", "Feedback", "Logged", "PolicyValue", "SliceValues", "Support", "evaluate_policies", "evaluate_policy",
    "evaluate_slices", "identifiable_rows", "logged_of", "one_row_a_request", "predictions_of", "target_of",
]  # fmt: skip

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Interval = Literal["bootstrap", "sequence"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)


def evaluate_policy(
    logged: Logged,
    target: Array,
    *,
    metric: str = "quality",
    estimators: Sequence[Estimator] = ESTIMATORS,
    baseline: Array | None = None,
    confidence: float = 0.95,
    interval: Interval = "bootstrap",
    tightest_at: int = 1000,
    folds: int = 5,
    seed: int = 0,
    features: Array | None = None,
    predictions: Mapping[str, Array] | None = None,
    max_weight: float | None = None,
    feedback_ratio: float = 1.0,
) -> PolicyValue:
    """What the target policy would earn a request by `metric`, or, with a `baseline`, how much more than that one.

    `target` and `baseline` [n, m] hold the probabilities of each model a row (`target_of`), rows aligned with `logged`.
    `features` [n, d] describe the requests (embeddings) and `predictions` maps a metric to what a learner expects of
    each model [n, m] (`predictions_of`); both sharpen the model of outcomes and cannot bias dr as long as they were
    not made from these rows. The estimators:

    - `dm`: the model of outcomes alone; its interval knows nothing of the model's own error.
    - `ips`: outcomes weighted by target / propensity; unbiased, and wide.
    - `snips`: the same divided by the weights' mean (Swaminathan and Joachims, NeurIPS 2015); of a difference, what
      is gained and what is given up are each divided by their own.
    - `dr`: the model, corrected by the weighted errors that it makes (Dudík, Langford and Li, ICML 2011); each row's
      model is fitted on the other folds (Chernozhukov et al. 2018). The headline.
    - `switch-dr`: corrected only where the weight is below a threshold (Wang, Agarwal and Dudík, ICML 2017), which
      minimises its estimated squared error on this log; its interval is as wide as dr's.

    Missing outcomes are a second selection: weights then also have the probability of feedback given request and
    model, fitted out of fold. That takes feedback to depend on nothing else; if an outcome of 0 is known to bring
    feedback `feedback_ratio` times as often as one of 1, all else equal, that is corrected exactly. The log cannot
    show the ratio: vary it. Missing propensities are estimated, with a warning. `max_weight` clips weights.

    `interval` "bootstrap" is for one look at a fixed log; it draws whole clusters and does not fit again, since
    cross-fitted dr feels errors of its models in the second order only, and ips and snips have none where propensities
    are logged. "sequence" holds however often one looks as the log grows (`tightest_at` clusters: fixed beforehand).

    Raises InputError for arrays that do not fit, an unknown metric or estimator.
    """
    return evaluate_policies(
        logged, {"": target}, metric=metric, estimators=estimators, baseline=baseline, confidence=confidence,
        interval=interval, tightest_at=tightest_at, folds=folds, seed=seed, features=features, predictions=predictions,
        max_weight=max_weight, feedback_ratio=feedback_ratio,
    )[""]  # fmt: skip


def evaluate_policies(
    logged: Logged,
    targets: Mapping[str, Array],
    *,
    metric: str = "quality",
    estimators: Sequence[Estimator] = ("dr",),
    baseline: Array | None = None,
    confidence: float = 0.95,
    interval: Interval = "bootstrap",
    tightest_at: int = 1000,
    folds: int = 5,
    seed: int = 0,
    features: Array | None = None,
    predictions: Mapping[str, Array] | None = None,
    max_weight: float | None = None,
    feedback_ratio: float = 1.0,
) -> dict[str, PolicyValue]:
    """`evaluate_policy` for several policies by name; the models, which do not depend on a policy, are fitted once.

    Each interval has the given confidence by itself.
    """
    for target in targets.values():
        _check(logged, target, baseline, metric, estimators, confidence, folds, feedback_ratio)
    look = Look(tuple(estimators), confidence, interval, tightest_at, seed)
    with threadpool_limits(limits=1, user_api="blas"):  # threads that wait for a busy core only spin
        models = fit_models(logged, metric, folds, seed, features, predictions, feedback_ratio)
        return {name: value_of(models.rows(target, baseline, max_weight), look) for name, target in targets.items()}


def evaluate_slices(
    logged: Logged,
    target: Array,
    *,
    by: Sequence[str] = ("task", "tenant"),
    least_rows: int = 50,
    metric: str = "quality",
    estimator: Estimator = "dr",
    baseline: Array | None = None,
    confidence: float = 0.95,
    interval: Interval = "bootstrap",
    tightest_at: int = 1000,
    folds: int = 5,
    seed: int = 0,
    features: Array | None = None,
    predictions: Mapping[str, Array] | None = None,
    max_weight: float | None = None,
    feedback_ratio: float = 1.0,
) -> SliceValues:
    """`evaluate_policy` for every value of the columns `by` of `logged.slices` that has at least `least_rows` rows.

    The models are fitted once on all rows. With k slices each interval has the confidence 1 - (1 - confidence) / k
    (Bonferroni), so that the chance that any of them misses its value is at most 1 - confidence, however the slices
    overlap. Raises InputError as `evaluate_policy` does, and for an unknown column.
    """
    _check(logged, target, baseline, metric, [estimator], confidence, folds, feedback_ratio)
    if unknown := [name for name in by if name not in logged.slices.columns]:
        raise InputError(f"no slices by {unknown[0]!r}: there are {', '.join(logged.slices.columns)}")
    masks = {}
    for column in by:
        for name, count in logged.slices[column].value_counts(sort=True).iter_rows():
            if count >= least_rows:
                masks[column, name] = (logged.slices[column] == name).to_numpy()
    each = 1.0 - (1.0 - confidence) / max(len(masks), 1)
    look = Look((estimator,), each, interval, tightest_at, seed)
    with threadpool_limits(limits=1, user_api="blas"):
        models = fit_models(logged, metric, folds, seed, features, predictions, feedback_ratio)
        rows = models.rows(target, baseline, max_weight)
        values = {key: value_of(rows.take(np.flatnonzero(mask)), look) for key, mask in masks.items()}
    return SliceValues(metric, confidence, values)


@dataclass(frozen=True)
class Look:  # how a mean and its interval are taken
    estimators: tuple[Estimator, ...]
    confidence: float
    interval: Interval
    tightest_at: int
    seed: int


@dataclass(frozen=True)
class _Rows:
    """All that was fitted, row by row: slices are taken of it."""

    logged: Logged
    metric: str
    target: Array
    baseline: Array | None
    propensity: Array
    can: BoolArray  # [n, m]
    unsupported: Array
    unclipped: Array  # weights
    told: Array | None  # probability of feedback
    parts: Parts
    warnings: tuple[str, ...]

    def take(self, at: npt.NDArray[np.int64]) -> _Rows:
        arrays = {
            name: value[at]
            for name in ("target", "baseline", "propensity", "can", "unsupported", "unclipped", "told")
            if (value := getattr(self, name)) is not None
        }
        return replace(self, logged=self.logged.take(at), parts=self.parts.take(at), **arrays)


@dataclass(frozen=True)
class FittedModels:
    """What is fitted before any policy is named; arrays have a row a decision."""

    logged: Logged
    metric: str
    propensity: Array
    can: BoolArray  # [n, m]
    q: Array  # [n, m], out of fold
    told: Array | None  # probability of feedback
    known: Array  # 1 / that where the outcome is known, else 0
    warnings: tuple[str, ...]

    def rows(self, target: Array, baseline: Array | None, max_weight: float | None) -> _Rows:
        """One policy's rows, or the difference of it to `baseline`."""
        target = np.asarray(target, dtype=np.float64)
        change = target if baseline is None else target - np.asarray(baseline, dtype=np.float64)
        logged, action = self.logged, self.logged.action
        unclipped = change[np.arange(len(logged)), action] / self.propensity
        weight = unclipped if max_weight is None else np.clip(unclipped, -max_weight, max_weight)
        parts = Parts(change, action, weight, np.nan_to_num(logged.metrics[self.metric]), self.known, self.q)
        return _Rows(
            logged, self.metric, target, baseline, self.propensity, self.can,
            unsupported_of(change, target, self.can), unclipped, self.told, parts, self.warnings,
        )  # fmt: skip


def fit_models(
    logged: Logged, metric: str, folds: int, seed: int, features: Array | None,
    predictions: Mapping[str, Array] | None, feedback_ratio: float,
) -> FittedModels:  # fmt: skip
    n, m = logged.eligible.shape
    warnings = list(logged.notes)
    fold = folds_by_cluster(logged.cluster, folds, seed)
    design = design_of(logged.context, features)

    propensity, estimated = logged.propensity, None
    missing = np.isnan(propensity)
    if missing.any():
        estimated = cross_fit_propensities(design, logged.action, logged.eligible, fold, missing)
        guess = np.maximum(estimated[np.arange(n), logged.action], LEAST_PROPENSITY)
        propensity = np.where(missing, guess, propensity)
        warnings.append(
            f"{missing.mean():.1%} of the rows have no propensity: it was estimated from what is known of the request. "
            "Where the choice also depended on something else, every estimate is biased; see the overlap table"
        )
    can = supported(logged, estimated)
    outcome = logged.metrics[metric]
    seen = ~np.isnan(outcome)
    prediction = None if predictions is None else predictions.get(metric)
    # An outcome that brings feedback less often stands for more of its kind; scaled to at most 1.
    stands = np.where(seen, feedback_ratio ** (outcome - 1.0) / max(1.0, 1.0 / feedback_ratio), 0.0)
    # A failed call is known of without feedback, and may not stand for answers that nobody spoke of.
    free = ~logged.certain.get(metric, np.zeros(n, dtype=bool))
    stands[~free] = stands[free].mean() if free.any() else 1.0
    q = cross_fit_outcomes(design, logged.action, outcome, stands, prediction, fold, m)
    told, known = None, np.ones(n)
    if not seen.all():
        told = cross_fit_feedback(design, logged.action, stands, prediction, fold, m, free)
        known[free] = inverse_feedback(stands[free], told[free], logged.action[free], m)
    return FittedModels(logged, metric, propensity, can, q, told, known, tuple(warnings))


def value_of(rows: _Rows, look: Look) -> PolicyValue:
    logged, parts, told = rows.logged, rows.parts, rows.told
    n, m = parts.change.shape
    clusters = len(np.unique(logged.cluster))
    seen = ~np.isnan(logged.metrics[rows.metric])
    paired = rows.baseline is not None
    support = support_of(parts.weight, parts.change, rows.unclipped - parts.weight, rows.unsupported)
    share = 1.0 - support.unsupported_mass
    nothing = PolicyValue(
        metric=rows.metric, n=n, clusters=clusters, paired=paired, confidence=look.confidence, interval=look.interval,
        identifiable=False,
        why=why_not_identifiable(
            support, share, parts.weight, parts.change, rows.unclipped, seen, logged.cluster
        ),
        identifiable_share=share, estimates={}, support=support, feedback=None,
        overlap=overlap_table(logged, rows.target, rows.can, rows.propensity, rows.baseline), warnings=rows.warnings,
    )  # fmt: skip
    if nothing.why:
        return nothing
    threshold = switch_threshold(parts) if "switch-dr" in look.estimators else float("inf")
    values = [row_values(name, parts, threshold) for name in look.estimators]
    if told is not None:
        lot = replace(parts, known=seen / seen.mean())
        values += [row_values("dr", lot, threshold), row_values("dr", parts, threshold)]
    columns = np.stack(values, axis=1)
    if look.interval == "bootstrap":
        found = bootstrap_interval(columns, logged.cluster, confidence=look.confidence, seed=look.seed)
    else:
        found = sequence_interval(columns, logged.cluster, confidence=look.confidence, tightest_at=look.tightest_at)
    made = [Estimate(*map(float, one)) for one in zip(*found, strict=True)]
    warnings = [*rows.warnings, *doubts(support, logged.cluster, look.interval, parts.weight, parts.change)]
    feedback = None
    if told is not None:
        weight = parts.weight * parts.known
        cut = weight * (np.maximum(told, LEAST_OBSERVED) / np.maximum(told, 1e-6) - 1.0)
        never = np.bincount(logged.action[seen], minlength=m) == 0
        silent = np.abs(np.where(never, parts.change, 0.0)).sum(axis=1) / (2 if paired else 1)
        least = float(told.min())
        feedback = Feedback(
            float(seen.mean()), least, support_of(weight, parts.change, cut, silent), made[-2], made[-1]
        )
        if least < LEAST_OBSERVED:
            warnings.append(f"some requests hardly ever get feedback (probability {least:.3f}): their weights are cut")
    return replace(
        nothing,
        identifiable=True,
        estimates=dict(zip(look.estimators, made, strict=False)),
        feedback=feedback,
        warnings=tuple(warnings),
        switch_threshold=threshold if "switch-dr" in look.estimators else None,
    )


def _check(
    logged: Logged, target: Array, baseline: Array | None, metric: str, estimators: Sequence[str], confidence: float,
    folds: int, feedback_ratio: float,
) -> None:  # fmt: skip
    shape = logged.eligible.shape
    for name, policy in (("target", target), ("baseline", baseline)):
        if policy is None:
            continue
        if policy.shape != shape:
            raise InputError(f"the {name} has the shape {policy.shape}, and the log {shape}: a row a decision")
        if not (policy >= -1e-9).all() or (policy.sum(axis=1) > 1 + 1e-6).any():
            raise InputError(f"the {name}'s rows have to be probabilities, of a sum of at most 1")
    if metric not in logged.metrics:
        raise InputError(f"no metric {metric!r}: name it in logged_of; there are {', '.join(logged.metrics)}")
    if unknown := sorted(set(estimators) - set(ESTIMATORS)):
        raise InputError(f"unknown estimator {unknown[0]!r}: choose of {', '.join(ESTIMATORS)}")
    if not 0.5 <= confidence < 1:
        raise InputError(f"a confidence of {confidence} is not in [0.5, 1)")
    if folds < 2:
        raise InputError("at least 2 folds are needed: a model may not judge the rows that it was fitted on")
    outcome = logged.metrics[metric]
    if np.isinf(outcome).any():
        raise InputError(f"the metric {metric!r} has infinite values")
    if not feedback_ratio > 0 or (feedback_ratio != 1 and np.nanmax(np.abs(outcome - 0.5), initial=0.0) > 0.5):
        raise InputError("a feedback_ratio is a number above 0, and 1 for a metric that does not lie in [0, 1]")
