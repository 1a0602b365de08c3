"""Where a segment's requests could go: which of them would move, and what is estimated of that, row by row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.intervals import bootstrap_interval
from training.barred import Bars
from training.estimators import Parts, row_values
from training.logged import Logged
from training.ope import FittedModels
from training.policy_value import Estimate
from training.segments import Segment
from training.support import CERTAIN, FEW_ESS, support_of, why_not_identifiable

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
_DRAWS = 20_000_000


class Moves:
    """One segment: which requests would move to each model, and the values a row whose means are the estimates.

    Of the requests that `may` go to a model those are `moved` whose model was drawn; those that are sure to have it
    already stay and need no evidence. What the log did not draw is no random part of the rest, as far as a log can
    show (later turns of sessions, what rules pin), so nothing of it is inferred from the part that was drawn: `rest` is
    its share of the requests that may go. bool [n, m] each, [m].

    `columns` has a value a row of the segment for (what, model): "quality" and "cost_usd" of -1, today's; of model j
    "quality" and "quality change" a moved request (`_among`), "cost_usd" and "cost_usd change" of the segment with
    these moved; "hosted cost" of what could go to `hosted` (`hosts`, bool [n]) where what may go to j is there, or (-1)
    as it is today.
    """

    def __init__(
        self, log: pl.DataFrame, logged: Logged, bars: Bars, models: dict[str, FittedModels], segment: Segment,
        hosted: int | None,
    ) -> None:  # fmt: skip
        self.segment, self.bars, self.catalog = segment, bars, logged.catalog
        self.rows = log[segment.rows]
        self.logged = logged.take(segment.rows)
        self.may = bars.may[segment.rows]
        self.drawn: BoolArray = self.logged.propensity < CERTAIN
        self.why: list[str] = []
        self.columns: dict[tuple[str, int], Array] = {}
        at, a, m = segment.rows, self.logged.action, len(self.catalog)
        can = next(iter(models.values())).can[at] if models else np.zeros_like(self.may)
        own = np.eye(m)[a]
        self.moved: BoolArray = self.may & self.drawn[:, None] & can
        sure = (self.rows["propensity"].fill_null(0.0) >= CERTAIN).to_numpy()
        self.goes: BoolArray = self.moved | (self.may & sure[:, None] & (own > 0.0))
        allowed = np.maximum(self.may.sum(axis=0), 1)
        self.rest: Array = 1.0 - self.goes.sum(axis=0) / allowed
        for metric, fitted in models.items():
            outcome, known, q = np.nan_to_num(self.logged.metrics[metric]), fitted.known[at], fitted.q[at]
            self.columns[metric, -1] = row_values("dr", Parts(own, a, np.ones(len(a)), outcome, known, q), 0.0)
        self.why = [self._unknown(j) for j in range(m)]
        self.hosts = None
        if hosted is not None:
            self.hosts = self.may[:, hosted] if self.why[hosted] else self.goes[:, hosted]
        for j in range(m):
            if self.why[j] or self.may[:, j].mean() < 0.5:
                continue
            moved = self.moved[:, j]
            for metric, fitted in models.items():
                target = np.where(moved[:, None], np.eye(m)[j], own)
                weight = moved * ((a == j) / self.logged.propensity - 1.0)
                outcome, known, q = np.nan_to_num(self.logged.metrics[metric]), fitted.known[at], fitted.q[at]
                change = row_values("dr", Parts(target - own, a, weight, outcome, known, q), 0.0)
                after = self.columns[metric, -1] + change
                if metric == "quality":
                    change, after = _among(change, moved), _among(after, moved)
                self.columns[f"{metric} change", j], self.columns[metric, j] = change, after
        if self.hosts is not None:
            costs = {j: values for (what, j), values in self.columns.items() if what == "cost_usd"}
            self.columns |= {("hosted cost", j): self.hosts * values for j, values in costs.items() if j != hosted}

    def _unknown(self, j: int) -> str:
        """Why the log does not identify what model j would do here; empty where it does."""
        moved, share = self.moved[:, j], 1.0 - self.rest[j]
        if share < 0.5:
            return f"the log drew the model of {share:.0%} of the requests that may go to it"
        if not moved.any():
            return "all requests that may go to it go there already"
        logged = self.logged.take(moved)
        target = np.zeros((len(logged), len(self.catalog)))
        target[:, j] = 1.0
        weight = (logged.action == j) / logged.propensity
        seen = told(logged, "quality")
        support = support_of(weight, target, np.zeros(len(logged)), np.zeros(len(logged)))
        if why := why_not_identifiable(support, 1.0, weight, target, weight, seen, logged.cluster):
            return why
        ess = float(weight[seen].sum()) ** 2 / float(np.square(weight[seen]).sum())
        if ess < FEW_ESS:
            return f"{ess:.0f} effective rows with a quality agree with it, and {FEW_ESS:g} are needed"
        return ""

    def estimates(self, each: float, seed: int) -> dict[tuple[str, int], Estimate]:
        """All of the segment's estimates, each interval missing its value with a probability of `each`.

        Sessions are put into random groups for the bootstrap, as independent as they are: tails this far out take many
        replicates.
        """
        if not self.columns:
            return {}
        _, code = np.unique(self.logged.cluster, return_inverse=True)
        groups = int(np.clip(_DRAWS * each / 20.0, 200, 1000))
        if code.max() >= groups:
            code = (np.random.default_rng(seed).permutation(int(code.max()) + 1) % groups)[code]
        found = bootstrap_interval(np.stack(list(self.columns.values()), 1), code, confidence=1.0 - each, seed=seed)
        values = (Estimate(*map(float, one)) for one in zip(*found, strict=True))
        return dict(zip(self.columns, values, strict=True))


def told(logged: Logged, metric: str) -> BoolArray:
    """Rows that tell of an answer, [n]: that a failed call is known to be worth nothing tells of none."""
    return ~(np.isnan(logged.metrics[metric]) | logged.certain.get(metric, np.zeros(len(logged), dtype=bool)))


def _among(values: Array, rows: BoolArray) -> Array:
    """Values a row of all whose mean is that of the rows alone, and whose spread is that of this ratio; [n]."""
    mean = float(values[rows].mean())
    made: Array = np.where(rows, (values - mean) / rows.mean(), 0.0) + mean
    return made
