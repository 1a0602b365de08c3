"""What off-policy evaluation answers with: small frozen results that become frames and plots."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from training.support import Support

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Estimate(NamedTuple):
    """A mean over requests with its interval and standard error, in the metric's unit."""

    value: float
    low: float
    high: float
    se: float


@dataclass(frozen=True)
class Feedback:
    """Who gives feedback, as a second selection: the share of the log that has the outcome, and what it does.

    `support` counts weights with the probability of feedback in them. `before` is the doubly robust estimate as if
    who gives feedback were drawn by lot, `after` the one that weighs by the modelled probability.
    """

    observed: float
    least_probability: float
    support: Support
    before: Estimate
    after: Estimate


@dataclass(frozen=True)
class PolicyValue:
    """What a target policy is worth by a log, in `metric`'s unit a request; a difference to a baseline if `paired`.

    Where it is not `identifiable`, `why` says so in a sentence, `estimates` is empty, and `identifiable_share` is the
    share of the target's decisions of which the log can tell. `feedback` is None where every outcome is known.
    `overlap` has a row per model. `clusters` is how many independent groups of rows there are.
    """

    metric: str
    n: int
    clusters: int
    paired: bool
    confidence: float
    interval: str
    identifiable: bool
    why: str
    identifiable_share: float
    estimates: Mapping[str, Estimate]
    support: Support
    feedback: Feedback | None
    overlap: pl.DataFrame
    warnings: tuple[str, ...]
    switch_threshold: float | None = None

    @property
    def headline(self) -> Estimate | None:
        """The doubly robust estimate, or the first that was asked for; None where nothing is identified."""
        return self.estimates.get("dr") or next(iter(self.estimates.values()), None)

    def to_frame(self) -> pl.DataFrame:
        """A row an estimator: metric, estimator, value, low, high, se; without rows where nothing is identified."""
        schema = {"metric": pl.String, "estimator": pl.String, **dict.fromkeys(Estimate._fields, pl.Float64)}
        rows = [(self.metric, name, *estimate) for name, estimate in self.estimates.items()]
        return pl.DataFrame(rows, schema=schema, orient="row")

    def support_frame(self) -> pl.DataFrame:
        """The log's support as one row, and that with feedback as a second one where some is missing."""
        found = {"policy": self.support} | ({"feedback": self.feedback.support} if self.feedback else {})
        return pl.DataFrame([{"of": name, **asdict(support)} for name, support in found.items()])

    def plot(self) -> Figure:
        """Each estimator's value with its interval."""
        label = f"{self.metric} a request{', target - baseline' if self.paired else ''}"
        return interval_plot(dict(self.estimates), label, zero=self.paired)


@dataclass(frozen=True)
class SliceValues:
    """A policy's value slice by slice. Their intervals hold together: all at once with the given confidence.

    `values` maps (column, value) to the slice's `PolicyValue`, whose own confidence is higher by Bonferroni's
    correction for as many slices as could be estimated.
    """

    metric: str
    confidence: float
    values: Mapping[tuple[str, str], PolicyValue]

    def to_frame(self) -> pl.DataFrame:
        """A row a slice: by, slice, n, ess, identifiable, why, value, low, high, se (null where not identifiable)."""
        schema = {
            "by": pl.String, "slice": pl.String, "n": pl.Int64, "ess": pl.Float64, "identifiable": pl.Boolean,
            "why": pl.String, **dict.fromkeys(Estimate._fields, pl.Float64),
        }  # fmt: skip
        rows = [
            (by, name, v.n, v.support.ess, v.identifiable, v.why or None, *(v.headline or (None,) * 4))
            for (by, name), v in self.values.items()
        ]
        return pl.DataFrame(rows, schema=schema, orient="row")

    def plot(self) -> Figure:
        """The headline of every slice that has one, with its interval."""
        found = {f"{by}: {name}": v.headline for (by, name), v in self.values.items() if v.headline is not None}
        paired = any(v.paired for v in self.values.values())
        return interval_plot(found, f"{self.metric} a request{', target - baseline' if paired else ''}", zero=paired)


def finish_cost_quality(axes: Axes, quality: str) -> None:
    """Labels, scale and legend of quality against USD per 1,000 requests, or the word that nothing is identifiable."""
    if not axes.has_data():
        axes.text(0.5, 0.5, "not identifiable", ha="center", transform=axes.transAxes)
    else:
        axes.set_xscale("log")
        axes.legend(loc="lower right", fontsize=8)
    axes.set_xlabel("cost, USD per 1,000 requests")
    axes.set_ylabel(quality)
    axes.grid(alpha=0.3)


def interval_plot(estimates: Mapping[str, Estimate], label: str, *, zero: bool) -> Figure:
    """Values with their intervals, one below the other; `zero` draws the line of no difference."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.4 * max(len(estimates), 2) + 1), layout="constrained")
    axes = figure.add_subplot()
    for row, estimate in enumerate(estimates.values()):
        axes.plot([estimate.low, estimate.high], [row, row], color="C0")
        axes.plot(estimate.value, row, "o", color="C0")
    if not estimates:
        axes.text(0.5, 0.5, "not identifiable", ha="center", transform=axes.transAxes)
    if zero:
        axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(estimates)), list(estimates), parse_math=False)  # a name may hold a $
    axes.set_ylim(max(len(estimates), 1) - 0.5, -0.5)
    axes.set_xlabel(label)
    return figure
