"""Does the champion keep its promise? Live outcomes held against p_ok, at every look, without false alarms piling up.

Of each decision with an outcome the residual is (quality >= the decision's threshold) - promise, where the promise is
p_ok of the chosen model, times the share of its calls that answer at all: where another model had to answer, the call
failed, and is no success whatever that answer was worth. A confidence sequence over sessions bounds the mean residual
at all looks at once, so one may look as often as one likes, and stop at the first that breaks it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.errors import InputError
from router_ml.intervals import cluster_sequence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


class OfModel(NamedTuple):
    """The same for the choices of one model; `fell` says that they broke the promise by themselves."""

    model: str
    n: int
    promised: float
    observed: float
    residual: float
    low: float
    high: float
    fell: bool


@dataclass(frozen=True)
class Watched:
    """What n outcomes of c `clusters` (sessions) say of the promise; NaN where there is none.

    `promised` and `observed` are mean probability and share of acceptable answers, `residual` their difference, `low`
    and `high` its confidence sequence now. `time_us`, `outcomes`, `mean`, `lower` and `upper` [c] are the same after
    each session, in the order of their first decisions (microseconds since 1970). `decisions` counts also those without
    an outcome. `models` hold all at once (Bonferroni), as information: the promise is that of all answers together.
    """

    n: int
    clusters: int
    decisions: int
    promised: float
    observed: float
    residual: float
    low: float
    high: float
    tolerance: float
    confidence: float
    tightest_at: int
    broken: bool
    why: str
    assumptions: tuple[str, ...]
    models: tuple[OfModel, ...]
    time_us: IntArray
    outcomes: IntArray
    mean: Array
    lower: Array
    upper: Array

    def to_frame(self) -> pl.DataFrame:
        """A row a session: its time, what is known with it, and whether that breaks the promise."""
        frame = pl.DataFrame(
            {
                "time": pl.Series(self.time_us).cast(pl.Datetime("us", "UTC")),
                "clusters": np.arange(1, len(self.time_us) + 1),
                "n": self.outcomes,
                "residual": self.mean,
                "low": self.lower,
                "high": self.upper,
            }
        )
        return frame.with_columns(broken=pl.col("high") < -self.tolerance)

    def plot(self) -> Figure:
        """The mean residual with its confidence sequence by number of outcomes, and what is tolerated."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        shown = np.isfinite(self.upper)
        axes.plot(self.outcomes, self.mean, color="tab:blue", label="observed - promised")
        axes.fill_between(
            self.outcomes[shown], self.lower[shown], self.upper[shown], color="tab:blue", alpha=0.2,
            label=f"{self.confidence:.0%} confidence sequence",
        )  # fmt: skip
        axes.axhline(-self.tolerance, color="tab:red", linewidth=1, label="tolerance")
        axes.axhline(0.0, color="tab:gray", linewidth=1)
        axes.set_ylim(-0.5, 0.5)
        axes.set_xlabel("outcomes")
        axes.set_ylabel("mean residual")
        axes.legend(loc="lower right")
        return figure


def watch(
    rows: Iterable[Mapping[str, Any]],
    *,
    tolerance: float = 0.03,
    confidence: float = 0.95,
    tightest_at: int = 1000,
) -> Watched:
    """Holds outcomes against the promise, from rows as `router_ml.stored.told_decisions` gives them.

    The promise is broken when the upper bound of the mean residual is below -`tolerance`. Only the chosen model's own
    answers with a quality count: a call that failed or fell back says nothing of how good answers are, and would count
    always where answers count only with feedback; the service's circuits watch it. `tightest_at` is the number of
    sessions at which the bounds are best; it has to be the same at every look. Raises InputError for numbers out of
    their range.
    """
    if not 0.0 <= tolerance < 1.0 or not 0.0 < confidence < 1.0 or tightest_at < 20:
        raise InputError("a watch needs a tolerance in [0, 1), a confidence in (0, 1) and tightest_at of 20 or more")
    told = _told(rows)
    residual = told.ok - told.promise
    last, outcomes, mean, lower, upper = _sequence(residual, told.cluster, confidence, tightest_at)
    asked = sorted(set(told.model))
    share = 1.0 - (1.0 - confidence) / max(len(asked), 1)
    found = []
    for name in asked:
        of = told.model == name
        _, _, *sequence = _sequence(residual[of], told.cluster[of], share, tightest_at)
        m, a, b = (float(x[-1]) for x in sequence)
        means = float(told.promise[of].mean()), float(told.ok[of].mean())
        found.append(OfModel(name, int(of.sum()), *means, m, a, b, b < -tolerance))
    n = len(residual)
    promised, observed = (float(x.mean()) if n else math.nan for x in (told.promise, told.ok))
    now, low, high = (float(x[-1]) if n else math.nan for x in (mean, lower, upper))
    return Watched(
        n=n, clusters=len(last), decisions=told.decisions, promised=promised, observed=observed, residual=now, low=low,
        high=high, tolerance=tolerance, confidence=confidence, tightest_at=tightest_at, broken=high < -tolerance,
        why=_why(n, len(last), promised, observed, high, tolerance, confidence, found),
        assumptions=_assumptions(n, told.decisions, tightest_at), models=tuple(found),
        time_us=told.began[last], outcomes=outcomes, mean=mean, lower=lower, upper=upper,
    )  # fmt: skip


class _Told(NamedTuple):
    """The outcomes as arrays [n]; `began` [clusters] of all decisions."""

    decisions: int
    cluster: IntArray
    model: npt.NDArray[np.object_]
    promise: Array
    ok: Array
    began: IntArray


def _told(rows: Iterable[Mapping[str, Any]]) -> _Told:
    index: dict[tuple[Any, ...], int] = {}
    began: list[int] = []
    found: list[tuple[int, str, float, float]] = []
    decisions = 0
    for row in sorted(rows, key=lambda r: (r["time_us"], r["decision_id"])):
        decisions += 1
        alone = row["session"] is None
        unit = (row["decision_id"],) if alone else (row["key"], row["tenant"], row["session"])
        # By its first decision, with or without an outcome: when feedback comes does not order the sessions.
        cluster = index.setdefault(unit, len(index))
        if cluster == len(began):
            began.append(int(row["time_us"]))
        quality, threshold, p_ok = row["quality"], row["quality_threshold"], row["p_ok"]
        if quality is None or p_ok is None or threshold is None or row["served"] != row["model"]:
            continue
        found.append((cluster, row["model"], float(p_ok), float(quality >= threshold)))
    return _Told(
        decisions,
        np.array([row[0] for row in found], dtype=np.int64),
        np.array([row[1] for row in found], dtype=object),
        np.array([row[2] for row in found], dtype=np.float64),
        np.array([row[3] for row in found], dtype=np.float64),
        np.array(began, dtype=np.int64),
    )


def _sequence(
    residual: Array, cluster: IntArray, confidence: float, tightest_at: int
) -> tuple[IntArray, IntArray, Array, Array, Array]:
    """(clusters [c] in order, rows up to each, running mean, low, high) of the residuals [n] with clusters [n]."""
    order, code = np.unique(cluster, return_inverse=True)
    sums = np.bincount(code, residual, len(order)).astype(np.float64)
    sizes = np.bincount(code, minlength=len(order)).astype(np.float64)
    mean, low, high = cluster_sequence(sums, sizes, confidence=confidence, tightest_at=tightest_at)
    return order, np.cumsum(sizes).astype(np.int64), mean, low, high


def _why(
    n: int, clusters: int, promised: float, observed: float, high: float, tolerance: float, confidence: float,
    models: Sequence[OfModel],
) -> str:  # fmt: skip
    if not n:
        return "no outcome of this version yet"
    said = f"of {n:,} outcomes in {clusters:,} sessions {observed:.3f} are acceptable, {promised:.3f} were promised"
    if high < -tolerance:
        fell = ", ".join(f"{of.model} {of.residual:+.3f}" for of in models if of.fell)
        return (
            f"{said}: with {confidence:.0%} confidence at least {-high:.3f} too few, and {tolerance:g} are tolerated"
            + (f"; by model {fell}" if fell else "")
        )
    if math.isinf(high):
        return f"{said}: bounds are known from 20 sessions on"
    return f"{said}: not shown to be more than {tolerance:g} too few"


def _assumptions(n: int, decisions: int, tightest_at: int) -> tuple[str, ...]:
    return (
        f"{n:,} of {decisions:,} decisions have an answer of the chosen model with a quality; the promise was learnt "
        "under the same feedback, so who gives none is taken to be as likely content as when it was learnt",
        "outcomes of good answers come as soon as those of bad ones",
        "sessions are independent of each other, and a request without one is a session of its own",
        "calls that failed or fell back are left out: the circuits of the service watch these",
        "the bounds are asymptotic: they hold at all looks at once from some tens of sessions on, and are best at "
        f"{tightest_at:,}",
        "the mean is over all outcomes since the version became champion, so a late drop shows the later",
    )
