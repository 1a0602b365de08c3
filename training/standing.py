"""Where one router stands: beside what it has to beat, on requests that it has not learnt from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from training.candidates import first_named
from training.challenge import BEST_SINGLE, CHEAPEST, METRICS, MOST_ROWS, Contender, catalog_of, usable_rows
from training.experiment import cost_column
from training.held_out import held_out
from training.logged import decided, logged_of, one_row_a_request
from training.ope import PolicyValue, evaluate_policies
from training.policy_value import Estimate, finish_cost_quality
from training.rivals import always_cheapest, always_one, ranked_models, shuffled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROUTER, SHUFFLED = "router", "router shuffled"


@dataclass(frozen=True)
class Standing:
    """Quality and cost a request of a router and of its rivals, off-policy, on `n` requests, `outcomes` with a quality.

    `policies` maps a metric to each policy's value by name: "router", "always cheapest", "best single" (`best_single`,
    where another row of the log tells which that is), "router shuffled". `gains` maps each rival to the router's
    quality less that one's.
    """

    version: str
    n: int
    outcomes: int
    confidence: float
    policies: Mapping[str, Mapping[str, PolicyValue]]
    gains: Mapping[str, PolicyValue]
    best_single: str | None
    notes: tuple[str, ...]

    def to_frame(self) -> pl.DataFrame:
        """A row a policy: quality, cost_usd, and gain (of the router over it in quality), each with _low and _high.

        Null where it is not identifiable.
        """
        rows = []
        for name in self.policies["quality"]:
            gain = self.gains[name].headline if name in self.gains else None
            found = [*(self.policies[metric][name].headline for metric in METRICS), gain]
            rows.append((name, *(number for one in found for number in ((None,) * 3 if one is None else one[:3]))))
        numbers = [f"{name}{end}" for name in (*METRICS, "gain") for end in ("", "_low", "_high")]
        schema = {"policy": pl.String, **dict.fromkeys(numbers, pl.Float64)}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def plot(self) -> Figure:
        """Quality against cost, both with their intervals."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        for name, quality in self.policies["quality"].items():
            q, c = quality.headline, self.policies["cost_usd"][name].headline
            if q is not None and c is not None:
                axes.errorbar(c.value * 1000, q.value, yerr=_ends(q, 1), xerr=_ends(c, 1000), fmt="o", capsize=3,
                              label=f"{name} ({self.best_single})" if name == BEST_SINGLE else name)  # fmt: skip
        finish_cost_quality(axes, f"quality a request, {self.confidence:.0%} each")
        return figure


def standing(
    contender: Contender, log: pl.DataFrame, *, most_rows: int = MOST_ROWS, confidence: float = 0.95, seed: int = 0
) -> Standing:
    """Judges a router beside its rivals on the newest rows of the log that it has not learnt from, doubly robust.

    The rows are those of `challenge.challenge`. A rival is a policy that takes no learning, or none of the single
    request: the router is worth its trouble where it is better than the shuffled one, at the same mixture of models.
    Raises InputError where no row is left.
    """
    rows, others, how = held_out(log, contender.manifest)
    rows, left = usable_rows(one_row_a_request(rows), most_rows)
    catalog = catalog_of(contender.router.catalog, contender.router.catalog, rows)
    logged = logged_of(rows.with_columns(cost_column(catalog)), catalog)
    made = decided(contender.router, rows, catalog, first_named(log))
    ranking = ranked_models(others, contender.router.catalog)
    targets = {ROUTER: made.target, CHEAPEST: always_cheapest(made)}
    if ranking:
        targets[BEST_SINGLE] = always_one(made, ranking)
    targets[SHUFFLED] = shuffled(made)
    policies = {
        metric: evaluate_policies(
            logged, targets, metric=metric, confidence=confidence, seed=seed, predictions=made.predictions
        )
        for metric in METRICS
    }
    gains = {
        name: evaluate_policies(
            logged, {name: made.target}, baseline=target, confidence=confidence, seed=seed, predictions=made.predictions
        )[name]
        for name, target in targets.items()
        if name != ROUTER
    }
    return Standing(
        version=contender.version, n=len(rows), outcomes=int((logged.metrics["quality"] >= 0.0).sum()),
        confidence=confidence, policies=policies, gains=gains, best_single=ranking[0] if ranking else None,
        notes=(f"judged on {how}", *left, *policies["quality"][ROUTER].warnings),
    )  # fmt: skip


def _ends(found: Estimate, times: float) -> list[list[float]]:
    return [[(found.value - found.low) * times], [(found.high - found.value) * times]]
