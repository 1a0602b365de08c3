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
    """One segment: what each model may be estimated on, and the values a row whose means are the estimates."""

    def __init__(
        self, log: pl.DataFrame, logged: Logged, bars: Bars, models: dict[str, FittedModels], segment: Segment
    ) -> None:
        self.segment, self.bars, self.catalog = segment, bars, logged.catalog
        self.rows = log[segment.rows]
        self.logged = logged.take(segment.rows)
        self.may = bars.may[segment.rows]
        self.drawn: BoolArray = self.logged.propensity < CERTAIN  # NaN is not
        self.why: list[str] = []
        self.moved = np.zeros_like(self.may)
        self.columns: dict[tuple[str, int], Array] = {}
        at, a = segment.rows, self.logged.action
        for metric, fitted in models.items():
            outcome, known, q = np.nan_to_num(self.logged.metrics[metric]), fitted.known[at], fitted.q[at]
            own = np.eye(len(self.catalog))[a]
            self.columns[metric, -1] = row_values("dr", Parts(own, a, np.ones(len(a)), outcome, known, q), 0.0)
        for j in range(len(self.catalog)):
            self.moved[:, j] = self.may[:, j] & self.drawn & next(iter(models.values())).can[at, j] if models else False
            self.why.append(self._unknown(j))
            if self.why[j] or self.may[:, j].mean() < 0.5:
                continue
            for metric, fitted in models.items():
                target = np.where(self.moved[:, [j]], np.eye(len(self.catalog))[j], own)
                weight = self.moved[:, j] * ((a == j) / self.logged.propensity - 1.0)
                outcome, known, q = np.nan_to_num(self.logged.metrics[metric]), fitted.known[at], fitted.q[at]
                change = row_values("dr", Parts(target - own, a, np.nan_to_num(weight), outcome, known, q), 0.0)
                self.columns[f"{metric} change", j] = change
                self.columns[metric, j] = self.columns[metric, -1] + change

    def _unknown(self, j: int) -> str:
        """Why the log does not identify what model j would do here; empty where it does."""
        moved, may = self.moved[:, j], self.may[:, j]
        if moved.sum() < 0.5 * max(may.sum(), 1):
            return f"the log drew the model of {moved.sum() / max(may.sum(), 1):.0%} of the requests that may go to it"
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
