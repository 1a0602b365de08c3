"""How many requests it takes to tell two models apart, what they cost, and how to spread them over the days."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.policy import Exploration, Policy
from router_ml.types import CACHED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FEW = 20
"""With fewer outcomes of a model its spread is not estimated: it is taken to be the largest that is possible."""
WIDEST = 0.5
LEAST_DAYS = 1.0 / 24.0
MOST_DAYS = 3650


@dataclass(frozen=True)
class Arm:
    """What is known of one of the two models: spread of its quality, share of answers that get feedback, mean cost of
    a request in USD, and the outcomes that the log's randomised rows already hold."""

    model: str
    sd: float
    feedback: float
    cost_usd: float
    outcomes: int


@dataclass(frozen=True)
class Experiment:
    """A comparison of two models that are drawn evenly, planned to see a difference in mean quality of `effect`.

    `requests` (both models together) give that power on top of what the log holds already; they cost `cost_usd`, and
    would cost `anyway_usd` without the experiment. `power_now` is what the log's own outcomes give. `per_day` requests
    of this kind come, sessions counted once. Costs are NaN where the log has neither costs nor token counts.
    """

    a: Arm
    b: Arm
    task: str | None
    effect: float
    power: float
    confidence: float
    requests: int
    power_now: float
    anyway_each_usd: float
    per_day: float

    @property
    def cost_usd(self) -> float:
        """What the drawn requests cost at the two models' expected prices."""
        return self.requests * (self.a.cost_usd + self.b.cost_usd) / 2.0

    @property
    def anyway_usd(self) -> float:
        """What these requests cost as they are routed now."""
        return self.requests * self.anyway_each_usd

    @property
    def extra_each_usd(self) -> float:
        """What a drawn request costs more than one that is routed as now."""
        return (self.a.cost_usd + self.b.cost_usd) / 2.0 - self.anyway_each_usd

    def power_after(self, requests: float) -> float:
        """Probability of a difference of `effect` being seen after so many more requests, drawn evenly."""
        return _power(self.a, self.b, requests, self.effect, self.confidence)

    @property
    def in_words(self) -> tuple[str, ...]:
        """What the log can show as it is, and what is missing."""
        arms = ", ".join(f"{arm.outcomes:,} of {arm.model}" for arm in (self.a, self.b))
        now = f"a difference of {self.effect:g} is seen with probability {self.power_now:.2f} by the outcomes of drawn "
        now += f"models that the log has ({arms})"
        if not self.requests:
            return now, f"that is the power of {self.power:g} asked for: no further request is needed"
        return now, (
            f"{self.requests:,} more requests, drawn evenly from the two, make it {self.power:g}; they cost "
            f"{self.cost_usd:.4g} USD, and {self.anyway_usd:.4g} USD as they are routed now"
        )

    def to_frame(self) -> pl.DataFrame:
        """One row: the plan's numbers."""
        return pl.DataFrame(
            {
                "model_a": self.a.model, "model_b": self.b.model, "task": [self.task], "effect": self.effect,
                "power": self.power, "confidence": self.confidence, "requests": self.requests,
                "power_now": self.power_now, "cost_usd": self.cost_usd, "anyway_usd": self.anyway_usd,
                "outcomes_a": self.a.outcomes, "outcomes_b": self.b.outcomes,
            },
            schema_overrides={"task": pl.String},
        )  # fmt: skip

    def plot(self) -> Figure:
        """Power by the number of requests drawn."""
        steps = [self.requests * i / 40 for i in range(61)] if self.requests else [0.0]
        return _power_plot(steps, [self.power_after(n) for n in steps], self.power, "requests drawn")


@dataclass(frozen=True)
class Schedule:
    """An experiment spread over days at one exploration `rate`; `days` holds a row a day (`to_frame`)."""

    experiment: Experiment
    rate: float
    days: pl.DataFrame

    @property
    def rule(self) -> Exploration:
        """The policy's entry that draws these requests."""
        of = self.experiment
        return Exploration((of.a.model, of.b.model), self.rate, of.task)

    def to_frame(self) -> pl.DataFrame:
        """A row a day: day (from 1), requests that come, drawn of them, extra_usd of the day, power by its end."""
        return self.days

    def plot(self) -> Figure:
        """Power by day."""
        return _power_plot(self.days["day"].to_list(), self.days["power"].to_list(), self.experiment.power, "day")


def plan_experiment(
    log: pl.DataFrame,
    catalog: Catalog,
    model_a: str,
    model_b: str,
    *,
    task: str | None = None,
    effect: float = 0.05,
    power: float = 0.8,
    confidence: float = 0.95,
    requests_per_day: float | None = None,
) -> Experiment:
    """How many more requests, drawn evenly between two models, show a difference in mean quality of `effect`.

    The two-sided test of two means with unequal variances (Welch); spreads, feedback and costs are the log's, on the
    requests of `task` (None: all) that both models may serve. Only outcomes of rows whose propensity is below 1 count
    as already there. Raises InputError for a model, an effect or a task that there is not, and for a log without any
    feedback.
    """
    for name, value, top in (("--effect", effect, 1.0), ("--power", power, 1.0), ("--confidence", confidence, 1.0)):
        if not 0.0 < value < top:
            raise InputError(f"{name} {value:g} has to lie between 0 and {top:g}")
    rows = both_may_serve(log, catalog, model_a, model_b, task)
    told = rows.select(pl.col("quality").is_not_null().mean()).item()
    if not told:
        raise InputError("no answer in these rows has a quality: without feedback no number of requests will tell")
    a, b = (_arm(rows, catalog, model, told) for model in (model_a, model_b))
    served = _mean(rows.select(cost_column(catalog)).to_series())
    days = float(np.ptp(rows["time"].to_physical().to_numpy())) / 86400e6
    firsts = rows.select(pl.coalesce("session", "request_id")).to_series().n_unique()
    per_day = requests_per_day or firsts / max(days, LEAST_DAYS)
    if _power(a, b, 0.0, effect, confidence) >= power:
        needed = 0
    else:
        low, high = 0.0, 2.0
        while _power(a, b, high, effect, confidence) < power:
            low, high = high, 2.0 * high
        while high - low > 1.0:
            middle = (low + high) / 2.0
            low, high = (low, middle) if _power(a, b, middle, effect, confidence) >= power else (middle, high)
        needed = math.ceil(high)
    return Experiment(
        a, b, task, effect, power, confidence, needed, _power(a, b, 0.0, effect, confidence),
        served, per_day,
    )  # fmt: skip


def schedule(experiment: Experiment, *, budget_usd_per_day: float | None = None, max_rate: float = 0.2) -> Schedule:
    """Spreads the experiment's requests over days: as fast as `max_rate` and the budget allow.

    The budget bounds what the drawn requests of a day cost more than without the experiment; where they cost less, it
    binds nothing. Raises InputError where there is nothing to draw, or where it would take more than ten years.
    """
    if not 0.0 < max_rate <= 1.0:
        raise InputError(f"--max-rate {max_rate:g} has to lie between 0 and 1")
    if budget_usd_per_day is not None and not budget_usd_per_day > 0.0:
        raise InputError("--budget-usd-per-day has to be above 0")
    if not experiment.requests:
        raise InputError("the log has enough drawn outcomes already: compare the models, there is nothing to explore")
    extra, traffic = experiment.extra_each_usd, experiment.per_day
    most = max_rate * traffic
    if budget_usd_per_day is not None:
        if math.isnan(extra):
            raise InputError("the log has neither costs nor token counts, so no budget can be kept: leave it out")
        if extra > 0.0:
            most = min(most, budget_usd_per_day / extra)
    a_day = min(most, float(experiment.requests))
    if experiment.requests > a_day * MOST_DAYS:
        raise InputError(
            f"at {a_day:.3g} requests a day the {experiment.requests:,} requests would take more than ten years: raise "
            "the budget or --max-rate, or ask for a larger --effect"
        )
    rate = math.floor(a_day / traffic * 1e6) / 1e6 or a_day / traffic
    a_day = rate * traffic
    count = math.ceil(experiment.requests / a_day - 1e-6)
    drawn = [min(a_day, experiment.requests - a_day * i) for i in range(count)]
    days = pl.DataFrame(
        {
            "day": list(range(1, count + 1)),
            "requests": [traffic] * count,
            "drawn": drawn,
            "extra_usd": [n * extra for n in drawn],
            "power": [experiment.power_after(min(a_day * (i + 1), experiment.requests)) for i in range(count)],
        }
    )
    return Schedule(experiment, rate, days)


def write_policy(rule: Exploration, out: Path, *, base: Path | None, catalog: Catalog) -> Policy:
    """Writes the policy file `base` (None: the default policy) with this experiment at its end; returns what it says.

    Raises InputError where another experiment of the policy would come first, and where the file is not valid.
    """
    text = base.read_text(encoding="utf-8") if base else ""
    if text and not text.endswith("\n"):
        text += "\n"
    text += f"[[explore]]\nmodels = {json.dumps(rule.models)}\nrate = {rule.rate!r}\n"
    text += f"task = {json.dumps(rule.task)}\n" if rule.task else ""
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        made = Policy.load(aside).check_models(catalog)
        if made.exploration(rule.task, None) != rule:
            raise InputError(f"{base} has an [[explore]] that comes before this one: take it out first")
        aside.replace(out)
    finally:
        aside.unlink(missing_ok=True)
    return made


def both_may_serve(log: pl.DataFrame, catalog: Catalog, a: str, b: str, task: str | None) -> pl.DataFrame:
    """The log's rows of a task (None: all) that both models may serve. Raises InputError where there is none."""
    for model in (a, b):
        if model not in catalog:
            raise InputError(f"the catalogue has no model {model!r}: it has {', '.join(catalog.ids)}")
    if a == b:
        raise InputError(f"{a!r} is the same model twice: name two")
    rows = log if task is None else log.filter(pl.col("task") == task)
    if rows.is_empty():
        known = log["task"].drop_nulls().unique().sort().head(10).to_list()
        raise InputError(f"the log has no row of task {task!r}; it has {', '.join(known) or 'none'}")
    may = [pl.col("candidates").is_null() | pl.col("candidates").list.contains(model) for model in (a, b)]
    rows = rows.filter(may[0] & may[1])
    if rows.is_empty():
        raise InputError(f"no request of the log may be served by both {a!r} and {b!r}, by its candidates")
    return rows


def cost_column(catalog: Catalog) -> pl.Expr:
    """A row's cost in USD: the log's, 0 where a cache answered, or its tokens at the catalogue's prices (`priced`)."""
    free = pl.when(pl.col("status") == CACHED).then(0.0)
    return pl.coalesce("cost_usd", free, priced(catalog, pl.col("model"))).alias("cost_usd")


def priced(catalog: Catalog, model: pl.Expr, output_tokens: pl.Expr | None = None) -> pl.Expr:
    """USD of a row's tokens (or of so many output tokens) at the prices of `model`; null where one is not known.

    The step of `long_context` that the whole input is above prices the whole call, as in `prices.price_call`.
    """
    into = pl.col("input_tokens")
    out = pl.col("output_tokens") if output_tokens is None else output_tokens
    found = _at_prices(catalog, model, into, out)
    for above in catalog.price_steps:
        found = pl.when(into > above).then(_at_prices(catalog.priced_at(above + 1), model, into, out)).otherwise(found)
    return found


def _at_prices(catalog: Catalog, model: pl.Expr, into: pl.Expr, out: pl.Expr) -> pl.Expr:
    prices = {card.id: (card.input_usd_per_mtok * 1e-6, card.output_usd_per_mtok * 1e-6) for card in catalog}
    of_input, of_output = (
        model.replace_strict({m: p[i] for m, p in prices.items()}, default=None, return_dtype=pl.Float64)
        for i in (0, 1)
    )
    return into * of_input + out * of_output


def _arm(rows: pl.DataFrame, catalog: Catalog, model: str, told: float) -> Arm:
    own = rows.filter(pl.col("model") == model)
    known = own["quality"].drop_nulls()
    spread = float(known.to_numpy().std(ddof=1)) if len(known) >= FEW else None
    feedback = float(len(known) / len(own)) if len(own) >= FEW else told
    drawn = own.filter(pl.col("propensity") < 1.0, pl.col("fallback_from").is_null())["quality"].drop_nulls()
    of = own if len(own) >= FEW and own["output_tokens"].count() else rows
    answer = pl.lit(_mean(of["output_tokens"]))
    cost = _mean(rows.select(priced(catalog, pl.lit(model), answer).fill_nan(None)).to_series())
    if math.isnan(cost):  # the first is as if it had served all of these requests
        cost = _mean(own["cost_usd"])
    return Arm(
        model,
        WIDEST if spread is None else max(spread, 1e-3),
        max(feedback, 1e-3),
        cost,
        len(drawn),
    )


def _mean(values: pl.Series) -> float:
    """NaN where nothing is known."""
    known = values.drop_nulls().to_numpy()
    return float(known.mean()) if len(known) else math.nan


def _power(a: Arm, b: Arm, requests: float, effect: float, confidence: float) -> float:
    """Of the two-sided test, by the normal approximation; the chance of seeing it on the wrong side is left out."""
    from scipy.stats import norm

    counts = [arm.outcomes + arm.feedback * requests / 2.0 for arm in (a, b)]
    if min(counts) < 1.0:
        return 0.0
    error = math.sqrt(a.sd**2 / counts[0] + b.sd**2 / counts[1])
    return float(norm.cdf(effect / error - norm.ppf(0.5 + confidence / 2.0)))


def _power_plot(x: list[float], power: list[float], wanted: float, label: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, power, ".-")
    axes.axhline(wanted, color="tab:gray", linewidth=1)
    axes.set(xlabel=label, ylabel="power", ylim=(0, 1))
    return figure
