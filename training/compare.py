"""Two models on the same traffic: how much better and dearer one is, where a log can tell, and else what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl

from router_ml.catalog import Catalog
from router_ml.intervals import bootstrap_interval
from training.experiment import Experiment, both_may_serve, cost_column, plan_experiment
from training.ope import Estimate, PolicyValue, evaluate_policy, logged_of
from training.policy_value import interval_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST_PAIRS = 30
How = Literal["paired", "randomised", "not identified"]


@dataclass(frozen=True)
class Comparison:
    """Model A minus model B, a request: `quality`, and `cost_usd`, where the log identifies them (else None).

    `how`: "paired", on requests that were sent to both; "randomised", on those whose model was drawn, doubly robust;
    or "not identified", and then `why`. `n` requests of `considered` were used. `experiment` is what it takes to see a
    difference of its `effect`; None where the question is settled: the interval leaves out 0, or is within the effect.
    """

    model_a: str
    model_b: str
    task: str | None
    how: How
    n: int
    considered: int
    confidence: float
    quality: Estimate | None
    cost_usd: Estimate | None
    why: str
    warnings: tuple[str, ...]
    experiment: Experiment | None

    def to_frame(self) -> pl.DataFrame:
        """A row for quality and one for cost, as far as they are identified: metric, how, n, value, low, high, se."""
        found = {"quality": self.quality, "cost_usd": self.cost_usd}
        rows = [(name, self.how, self.n, *e) for name, e in found.items() if e is not None]
        schema = {"metric": pl.String, "how": pl.String, "n": pl.Int64, **dict.fromkeys(Estimate._fields, pl.Float64)}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def plot(self) -> Figure:
        """The difference in quality with its interval."""
        found = {} if self.quality is None else {"quality": self.quality}
        return interval_plot(found, f"{self.model_a} - {self.model_b}, a request", zero=True)


def compare(
    log: pl.DataFrame,
    catalog: Catalog,
    model_a: str,
    model_b: str,
    *,
    task: str | None = None,
    effect: float = 0.05,
    power: float = 0.8,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """Compares two models on the log's requests of `task` (None: all) that both may serve.

    Requests that were sent to both are compared pairwise, if at least 30 of them have both qualities. Otherwise the
    requests whose model was drawn (propensity below 1) tell what always taking A would give over always taking B,
    estimated doubly robust (`ope.evaluate_policy`). Rows of propensity 1, or of none, tell nothing of the other model.
    Intervals are bootstraps over sessions. Raises InputError for models or a task that there are not.
    """
    rows = both_may_serve(log, catalog, model_a, model_b, task).with_columns(cost_column(catalog))
    considered = rows["request_id"].n_unique()
    pairs = _pairs(rows, model_a, model_b)
    quality: Estimate | None = None
    cost: Estimate | None = None
    how: How = "paired"
    warnings: tuple[str, ...] = ()
    why, n = "", len(pairs)
    if n >= LEAST_PAIRS:
        quality = _paired(pairs, "quality", confidence, seed)
        priced = pairs.drop_nulls(["cost_usd_a", "cost_usd_b"])
        cost = _paired(priced, "cost_usd", confidence, seed) if len(priced) >= LEAST_PAIRS else None
    else:
        how = "randomised"
        drawn = rows.filter(pl.col("propensity") < 1.0, pl.coalesce("fallback_from", "model").is_in(catalog.ids))
        drawn = drawn.unique("request_id", keep="first", maintain_order=True)
        n = len(drawn)
        told = [
            _drawn(drawn, catalog, model_a, model_b, metric, confidence, seed) for metric in ("quality", "cost_usd")
        ]
        if told[0] is None or not told[0].identifiable:
            how = "not identified"
            why = f"{n} of {considered} requests had their model drawn"
            why += f", and {told[0].why}" if told[0] is not None else ", and none was sent to both"
        else:
            quality, warnings = told[0].headline, told[0].warnings
            cost = told[1].headline if told[1] is not None else None
    experiment = None
    if not _settled(quality, effect):
        experiment = plan_experiment(
            log, catalog, model_a, model_b, task=task, effect=effect, power=power, confidence=confidence
        )
    return Comparison(model_a, model_b, task, how, n, considered, confidence, quality, cost, why, warnings, experiment)


def _settled(quality: Estimate | None, effect: float) -> bool:
    """Whether the interval leaves out 0, or every difference that matters."""
    if quality is None:
        return False
    return quality.low > 0.0 or quality.high < 0.0 or (quality.low > -effect and quality.high < effect)


def _pairs(rows: pl.DataFrame, a: str, b: str) -> pl.DataFrame:
    """Requests that were sent to both models and have both qualities: request_id, session, and each metric twice."""
    asked = rows.filter(pl.col("propensity") == 1.0, pl.col("fallback_from").is_null(), pl.col("quality").is_not_null())
    sides = [
        asked.filter(pl.col("model") == model).select("request_id", "session", "quality", "cost_usd")
        for model in (a, b)
    ]
    both = sides[0].join(sides[1].drop("session"), on="request_id", suffix="_b", maintain_order="left")
    return both.rename({"quality": "quality_a", "cost_usd": "cost_usd_a"})


def _paired(pairs: pl.DataFrame, metric: str, confidence: float, seed: int) -> Estimate:
    gain = (pairs[f"{metric}_a"] - pairs[f"{metric}_b"]).to_numpy().astype(np.float64)
    unit = pairs.select(pl.coalesce("session", "request_id").rank("dense").cast(pl.Int64)).to_series().to_numpy()
    found = bootstrap_interval(gain[:, None], unit, confidence=confidence, seed=seed)
    return Estimate(*(float(value[0]) for value in found))


def _drawn(
    drawn: pl.DataFrame, catalog: Catalog, a: str, b: str, metric: str, confidence: float, seed: int
) -> PolicyValue | None:
    """Always A against always B on rows whose model was drawn; None where there are none."""
    if drawn.is_empty() or drawn[metric].null_count() == len(drawn):
        return None
    logged = logged_of(drawn, catalog)
    target, baseline = np.zeros((2, len(drawn), len(catalog)))
    target[:, catalog.index[a]] = 1.0
    baseline[:, catalog.index[b]] = 1.0
    return evaluate_policy(
        logged, target, baseline=baseline, metric=metric, estimators=("dr",), confidence=confidence, seed=seed
    )
