"""What a log can tell of a policy: where it overlaps with it, how much each row weighs, and where it says nothing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.intervals import cluster_sums, mean_and_error
from training.logged import Logged

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]

LEAST_PROPENSITY = 0.01
"""An estimated propensity below this counts as none: nothing shows that the model was ever really drawn there."""
CERTAIN = 1.0 - 1e-9
MOST_UNSUPPORTED = 0.01
"""The share of decisions that a log may say nothing of and yet count as identifying the value."""
LEAST_ESS = 10.0
FEW_ESS = 100.0
FEW_CLUSTERS = 40


@dataclass(frozen=True)
class Support:
    """How much of the log carries an estimate. Shares are of the target's decisions (of what it would change).

    `ess`: effective sample size, (sum of weights)^2 / sum of squares, in rows; `rows`: rows with a weight;
    `max_weight`; `mean_weight`: 1 where propensities are right and nothing is missing; `clipped_mass`: share cut off
    by a greatest weight; `unsupported_mass`: share of decisions that the log could not have made.
    """

    ess: float
    rows: int
    max_weight: float
    mean_weight: float
    clipped_mass: float
    unsupported_mass: float


def supported(logged: Logged, estimated: Array | None) -> BoolArray:
    """Which models each row's logging policy could have chosen, bool [n, m].

    A row of propensity 1 was not drawn: its model alone. A drawn one could have become every eligible model that the
    log's drawn rows hold at all. Where propensities are estimated, `estimated` [n, m], those of at least
    `LEAST_PROPENSITY`.
    """
    drawn = logged.propensity < CERTAIN
    ever = np.bincount(logged.action[drawn], minlength=logged.eligible.shape[1]) > 0
    can = logged.eligible & ever & drawn[:, None]
    if estimated is not None:
        missing = np.isnan(logged.propensity)
        can[missing] = logged.eligible[missing] & (estimated[missing] >= LEAST_PROPENSITY)
    can[np.arange(len(logged)), logged.action] = True
    return can


def unsupported_of(change: Array, target: Array, can: BoolArray) -> Array:
    """Share of each row's decision that the log could not have made, [n]; also where the target may not decide.

    `change` [n, m] is target minus baseline (or the target): where the two agree nothing needs to be known.
    """
    outside = np.where(can, 0.0, change)
    lost = np.maximum(np.maximum(outside, 0.0).sum(axis=1), np.maximum(-outside, 0.0).sum(axis=1))
    made: Array = np.maximum(lost, 1.0 - np.minimum(target.sum(axis=1), 1.0))
    return made


def identifiable_rows(
    logged: Logged, target: Array, baseline: Array | None = None, tolerance: float = 0.05
) -> BoolArray:
    """Rows, bool [n], where the log's policy could have made all but `tolerance` of the target's decision.

    For a log of which a part was not drawn (pinned by rules, later turns of sessions): `logged.take` these rows, and
    the value on this share of the traffic may be identifiable where that of all traffic is not. Which rows they are
    depends on the requests alone. Rows without a propensity count as not drawn.
    """
    change = target if baseline is None else target - baseline
    made: BoolArray = unsupported_of(change, target, supported(logged, None)) <= tolerance
    return made


def support_of(weight: Array, change: Array, clipped: Array, unsupported: Array) -> Support:
    """The summary of weights [n] on changes [n, m]; `clipped` [n] is what was cut off the weights."""
    size = np.abs(weight)
    squares = float(np.square(size).sum())
    changed = max(float(np.abs(change).sum(axis=1).mean()), 1e-12)
    used = size > 0
    return Support(
        ess=float(size.sum()) ** 2 / squares if squares else 0.0,
        rows=int(used.sum()),
        max_weight=float(size.max(initial=0.0)),
        mean_weight=float(size.mean()) / changed,
        clipped_mass=float(np.abs(clipped).mean()) / changed,
        unsupported_mass=float(unsupported.mean()),
    )


def overlap_table(
    logged: Logged, target: Array, can: BoolArray, propensity: Array, baseline: Array | None
) -> pl.DataFrame:
    """A row per model: shares of the log, the target and the baseline, least propensity of its rows, and what is out.

    `unsupported` is the share of all decisions that go to the model where the log could not have chosen it; `ess` the
    effective number of its rows that the target agrees with.
    """
    m = len(logged.catalog)
    rows = np.bincount(logged.action, minlength=m)
    least = np.full(m, np.nan)
    np.fmin.at(least, logged.action, propensity)
    weight = target[np.arange(len(logged)), logged.action] / propensity
    total, squares = np.bincount(logged.action, weight, m), np.bincount(logged.action, weight**2, m)
    columns = {
        "model": list(logged.catalog.ids),
        "rows": rows,
        "logged": rows / len(logged),
        "target": target.mean(axis=0),
        **({} if baseline is None else {"baseline": baseline.mean(axis=0)}),
        "least_propensity": least,
        "ess": np.divide(total**2, squares, out=np.zeros(m), where=squares > 0),
        "unsupported": np.where(can, 0.0, target).mean(axis=0),
    }
    return pl.DataFrame(columns).with_columns(pl.col("least_propensity").fill_nan(None))


def why_not_identifiable(
    support: Support, share: float, weight: Array, change: Array, unclipped: Array, seen: BoolArray, cluster: IntArray
) -> str:
    """Why no number can be given, in a sentence, or an empty string; `seen` [n] says where the outcome is known.

    The log has to be able to make the target's decisions (all but `MOST_UNSUPPORTED` of them), to hold as many as its
    propensities promise, and to have the outcomes of some. A change to fewer decisions than that needs nothing.
    """
    if support.unsupported_mass > MOST_UNSUPPORTED:
        return (
            f"not identifiable: {support.unsupported_mass:.1%} of the target's decisions are ones that this log's "
            f"policy could not have made, {share:.1%} are. Explore (exploration_rate), and log the propensities"
        )
    if np.abs(change).sum(axis=1).mean() < MOST_UNSUPPORTED:
        return ""
    if not seen.any():
        return "not identifiable: no row has an outcome"
    for sign in (1.0, -1.0):
        wanted = np.maximum(sign * change, 0.0).sum(axis=1)
        gap = np.maximum(sign * unclipped, 0.0) - wanted
        if gap.mean() < -0.05 * wanted.mean() and gap.mean() < -5 * _error(gap, cluster):
            return (
                f"not identifiable: the log holds {1 + gap.mean() / wanted.mean():.0%} of the target's decisions that "
                "its propensities promise, so that these are not what it was drawn with"
            )
    of_seen = np.abs(weight[seen])
    ess = float(of_seen.sum()) ** 2 / max(float(np.square(of_seen).sum()), 1e-300)
    if ess < LEAST_ESS:
        return (
            f"not identifiable: {ess:.1f} effective rows with an outcome agree with the target, and {LEAST_ESS:g} are "
            "the least; explore more, or wait"
        )
    return ""


def _error(values: Array, cluster: IntArray) -> float:
    """Standard error of the mean of the values [n] over clusters; infinite with one."""
    error = float(mean_and_error(*cluster_sums(values[:, None], cluster))[1][0])
    return float("inf") if np.isnan(error) else error


def doubts(support: Support, cluster: IntArray, interval: str, weight: Array, change: Array) -> list[str]:
    """What an estimate that is identifiable is to be read with."""
    found = []
    if support.unsupported_mass > 0:
        found.append(f"{support.unsupported_mass:.2%} of the decisions are out of the log's reach: they are guessed")
    if support.ess < FEW_ESS:
        found.append(f"an effective sample of {support.ess:.0f} rows: intervals hold from some {FEW_ESS:g} on")
    clusters = len(np.unique(cluster))
    if clusters < FEW_CLUSTERS and interval == "bootstrap":
        found.append(f"{clusters} clusters: a bootstrap over fewer than {FEW_CLUSTERS} is too sure of itself")
    gap = np.abs(weight) - np.abs(change).sum(axis=1)
    if abs(gap.mean()) > 3 * _error(gap, cluster) and support.clipped_mass == 0:
        found.append(
            f"weights have a mean of {support.mean_weight:.2f}, not 1: the propensities may not be those of the log"
        )
    return found
