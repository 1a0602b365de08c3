"""A budget on a trade-off: how far the dial would move in a period, what would be spent, and what quality is left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.budget import Budget, moved
from router_ml.errors import InputError
from training.tradeoff import DAYS_A_MONTH, TradeOff

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
STEPS = 400


@dataclass(frozen=True)
class Paced:
    """A budget through one period: arrays [k] by the share of the period that has gone by, `elapsed`.

    `spent_usd` until then, the least probability `dial` in force, and the mean `quality` of the answers then (NaN where
    the log does not tell). `unpressed_usd` is what the period would cost without the budget, `mean_quality` what its
    answers are worth on average under it, `unpressed_quality` without it. `decided` is the share of the requests that
    are decided at all: less than 1 where a hard budget runs out.
    """

    budget: Budget
    elapsed: Array
    spent_usd: Array
    dial: Array
    quality: Array
    unpressed_usd: float
    unpressed_quality: float
    mean_quality: float
    decided: float

    def to_frame(self) -> pl.DataFrame:
        """A row a step: elapsed, spent_usd, dial, quality."""
        names = ("elapsed", "spent_usd", "dial", "quality")
        return pl.DataFrame({name: getattr(self, name) for name in names}).with_columns(
            pl.col("quality", "dial").fill_nan(None)
        )

    def plot(self) -> Figure:
        """What is spent of the budget, and the dial, as the period goes by."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(self.elapsed, self.spent_usd / self.budget.usd, label="share of the budget that is spent")
        axes.plot(self.elapsed, self.dial, label="least probability in force")
        axes.plot(self.elapsed, self.quality, label="quality of the answers")
        axes.axhline(1.0, color="tab:gray", linewidth=1)
        axes.set_xlabel(f"share of the {self.budget.per} gone by")
        axes.legend(loc="lower right", fontsize=8)
        return figure


def pace(found: TradeOff, budget: Budget, min_probability: float, *, share: float = 1.0) -> Paced:
    """Spends a period's traffic evenly under a budget, step by step, with the service's own rule for the dial.

    Cost and quality at each dial are the estimates of the trade-off's settings on all its rows, joined by lines.
    `share` is the part of the traffic that the budget is for. Raises InputError where the log identifies fewer than two
    settings, for a share or a dial that is not possible, and for a dial, moved or not, outside of the settings that the
    log identifies.
    """
    if not 0.0 < share <= 1.0 or not 0.0 <= min_probability <= 1.0:
        raise InputError("the share of the traffic has to lie in (0, 1], and the least probability in [0, 1]")
    known = [
        (setting, *(float(level.values[m][0]) for m in ("cost_usd", "quality")))  # type: ignore[index]
        for setting, level in zip(found.settings, found.scopes[0].settings, strict=True)
        if level.values["cost_usd"] is not None and level.values["quality"] is not None
    ]
    if len(known) < 2:
        raise InputError("the log does not identify what the settings of the dial cost: explore, and log propensities")
    if not known[0][0] <= min_probability <= known[-1][0]:
        raise InputError(
            f"the log identifies the settings from {known[0][0]:g} to {known[-1][0]:g}, and not {min_probability:g}: "
            "choose a dial among them, or explore"
        )
    settings, cost, quality = (np.array(column) for column in zip(*known, strict=True))
    requests = found.requests_a_month * share / (1.0 if budget.per == "month" else DAYS_A_MONTH)
    elapsed = np.arange(STEPS) / STEPS
    spent, dials, worth = np.zeros(STEPS), np.full(STEPS, np.nan), np.full(STEPS, np.nan)
    usd = 0.0
    for step, gone in enumerate(elapsed):
        spent[step] = usd
        if budget.hard and usd >= budget.usd:
            continue
        pressure = budget.pressure(usd, float(gone))
        dials[step] = min_probability if pressure is None else moved(min_probability, pressure)
        if dials[step] < settings[0]:
            raise InputError(
                f"the budget moves the dial to {dials[step]:.3g}, and of settings below {settings[0]:g} the log tells "
                f"nothing: give the budget a floor of {settings[0]:g}, or explore"
            )
        worth[step] = np.interp(dials[step], settings, quality)
        usd += float(np.interp(dials[step], settings, cost)) * requests / STEPS
    served = ~np.isnan(dials)
    return Paced(
        budget, elapsed, spent, dials, worth,
        unpressed_usd=float(np.interp(min_probability, settings, cost)) * requests,
        unpressed_quality=float(np.interp(min_probability, settings, quality)),
        mean_quality=float(worth[served].mean()), decided=float(served.mean()),
    )  # fmt: skip
