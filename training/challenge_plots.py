"""Plots of a challenge: frontiers with bands, and calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

import polars as pl

from training.policy_value import finish_cost_quality

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = {"champion": "tab:blue", "challenger": "tab:orange"}


def frontier_plot(frontier: pl.DataFrame, policies: pl.DataFrame, confidence: float) -> Figure:
    """Quality against cost: each contender's dial with its band, the single models, and where both stand today.

    `frontier` and `policies` as in `challenge.Challenge`; what is not identifiable is left out.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    per = 1000.0
    for name, color in _COLORS.items():
        of = frontier.filter(pl.col("policy") == name).drop_nulls(["quality", "cost_usd"]).sort("cost_usd")
        if of.height:
            x = of["cost_usd"] * per
            axes.fill_between(x, of["quality_low"], of["quality_high"], color=color, alpha=0.15, linewidth=0)
            axes.plot(x, of["quality"], ".-", color=color, label=f"{name}, least probability 0 to 0.95")
        today = policies.filter(pl.col("policy") == name).drop_nulls("value")
        values = dict(zip(today["metric"], today.iter_rows(named=True), strict=True))
        if len(values) == 2:
            q, c = values["quality"], values["cost_usd"]
            axes.errorbar(
                c["value"] * per, q["value"], xerr=[[(c["value"] - c["low"]) * per], [(c["high"] - c["value"]) * per]],
                yerr=[[q["value"] - q["low"]], [q["high"] - q["value"]]], fmt="D", color=color, capsize=3,
                label=f"{name}, today",
            )  # fmt: skip
    singles = frontier.filter(pl.col("policy") == "always").drop_nulls(["quality", "cost_usd"])
    for row in singles.iter_rows(named=True):
        spread = [[row["quality"] - row["quality_low"]], [row["quality_high"] - row["quality"]]]
        axes.errorbar(row["cost_usd"] * per, row["quality"], yerr=spread, fmt="o", color="tab:gray", alpha=0.6)
        axes.annotate(
            row["model"], (row["cost_usd"] * per, row["quality"]), fontsize=7, xytext=(4, -8),
            textcoords="offset points", parse_math=False,
        )  # fmt: skip
    finish_cost_quality(axes, f"quality a request; {confidence:.0%} of each point by itself")
    return figure


def calibration_plot(calibration: pl.DataFrame) -> Figure:
    """Success less promise by model and contender, with intervals that hold together."""
    from matplotlib.figure import Figure

    models = calibration["model"].unique(maintain_order=True).to_list()
    figure = Figure(figsize=(8, 0.5 * max(len(models), 2) + 1), layout="constrained")
    axes = figure.subplots()
    for shift, (name, color) in zip((-0.15, 0.15), _COLORS.items(), strict=True):
        for row in calibration.filter(pl.col("contender") == name).iter_rows(named=True):
            y = models.index(row["model"]) + shift
            if row["low"] is not None:
                axes.plot([row["low"], row["high"]], [y, y], color=color)
            axes.plot(row["residual"], y, "o", color=color)
    axes.axvline(0, color="grey", linewidth=0.8)
    axes.set_yticks(range(len(models)), models, parse_math=False)  # a name may hold a $
    axes.set_ylim(max(len(models), 1) - 0.5, -0.5)
    axes.set_xlabel("observed less promised success (champion blue, challenger orange)")
    return figure
