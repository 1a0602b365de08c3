"""Traffic as tokens an hour, in a series that repeats itself: flat, within some hours of the week, or a log's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from router_ml.errors import InputError
from router_ml.types import CACHED

if TYPE_CHECKING:
    import polars as pl

Array = npt.NDArray[np.float64]
MONTH_HOURS = 730.0
WEEK_HOURS = 168
_FIELDS = ("requests_per_month", "input_tokens", "output_tokens", "busy_hours_per_week", "weights", "peak_to_mean")


@dataclass(frozen=True)
class Traffic:
    """Tokens in each of n hours, float64 [n]; the series repeats itself. `note` says where it comes from.

    `peak_to_mean` is how much the busiest moments of an hour are above its mean: capacity has to be there for them.
    Raises InputError for traffic that is not possible.
    """

    input_tokens: Array
    output_tokens: Array
    peak_to_mean: float = 1.0
    note: str = ""

    def __post_init__(self) -> None:
        both = np.concatenate([self.input_tokens, self.output_tokens])
        if self.input_tokens.shape != self.output_tokens.shape or not np.isfinite(both).all() or (both < 0).any():
            raise InputError("traffic needs tokens of 0 or more for the same hours, of input and of output")
        if not both.sum() > 0:
            raise InputError("traffic without any tokens costs nothing: there is nothing to compare")
        if not 1.0 <= self.peak_to_mean < math.inf:
            raise InputError("peak_to_mean has to be 1 or more: a peak is no lower than the mean")

    @property
    def mtok_per_month(self) -> float:
        """Million tokens a month, input and output together."""
        return float(self.input_tokens.sum() + self.output_tokens.sum()) * MONTH_HOURS / len(self.input_tokens) / 1e6

    def usd_per_month(self, input_usd_per_mtok: float, output_usd_per_mtok: float) -> float:
        """What the traffic costs a month at prices by the token."""
        series = self.input_tokens.sum() * input_usd_per_mtok + self.output_tokens.sum() * output_usd_per_mtok
        return float(series) * 1e-6 * MONTH_HOURS / len(self.input_tokens)

    @classmethod
    def of_week(
        cls, requests_per_month: float, input_tokens: float, output_tokens: float, weights: Array | None = None,
        peak_to_mean: float = 1.0,
    ) -> Traffic:  # fmt: skip
        """So many requests of so many tokens each, spread over the 168 hours of a week by `weights` (None: evenly)."""
        shape = np.ones(WEEK_HOURS) if weights is None else np.asarray(weights, dtype=np.float64)
        if shape.shape != (WEEK_HOURS,) or not np.isfinite(shape).all() or (shape < 0).any() or not shape.sum() > 0:
            raise InputError("a week's weights have to be 168 numbers of 0 or more, from Monday's first hour on")
        requests = requests_per_month * WEEK_HOURS / MONTH_HOURS * shape / shape.sum()
        return cls(requests * input_tokens, requests * output_tokens, peak_to_mean)

    @classmethod
    def from_table(cls, table: Any) -> Traffic:
        """Traffic from parsed TOML: requests_per_month, input_tokens and output_tokens a request, and its shape.

        The shape is 168 `weights`, or `busy_hours_per_week`, spread over the five weekdays from nine o'clock on, or
        flat. Raises InputError.
        """
        if not isinstance(table, Mapping) or not set(_FIELDS[:3]) <= set(table) <= set(_FIELDS):
            needs = ", ".join(_FIELDS[:3])
            raise InputError(f"'traffic' has to be a table with {needs} and, of {', '.join(_FIELDS)}, nothing else")
        numbers = {name: table[name] for name in _FIELDS if name in table and name != "weights"}
        if any(isinstance(v, bool) or not isinstance(v, int | float) or v < 0 for v in numbers.values()):
            raise InputError(f"traffic: {', '.join(numbers)} have to be numbers of 0 or more")
        weights = table.get("weights")
        if weights is not None and (
            "busy_hours_per_week" in table
            or not isinstance(weights, list)
            or not all(isinstance(w, int | float) and not isinstance(w, bool) for w in weights)
        ):
            raise InputError("traffic: give 'weights', 168 numbers, or 'busy_hours_per_week', not both")
        shape = None if weights is None else np.array(weights, dtype=np.float64)
        if "busy_hours_per_week" in table:
            shape = busy_week(int(table["busy_hours_per_week"]))
        requests, into, out = (float(table[name]) for name in _FIELDS[:3])
        return cls.of_week(requests, into, out, shape, float(table.get("peak_to_mean", 1.0)))

    @classmethod
    def of_log(cls, log: pl.DataFrame, *, scale: float = 1.0, peak_to_mean: float = 1.0) -> Traffic:
        """The hours of a log (`LOG_SCHEMA`) from its first to its last, times `scale`; one row a request counts.

        What a cache answered does not. A request whose tokens the log does not know counts with the mean of the
        others. Raises InputError for a log without any tokens, or of less than a day.
        """
        import polars as pl

        called = log.filter((pl.col("status") != CACHED).fill_null(True))
        rows = called.unique("request_id", keep="first", maintain_order=True)
        means = {name: rows[name].mean() for name in ("input_tokens", "output_tokens")}
        if any(mean is None for mean in means.values()):
            raise InputError("the log has no input_tokens and output_tokens: describe the traffic in a [traffic] table")
        tokens = [pl.col(name).cast(pl.Float64).fill_null(mean) for name, mean in means.items()]
        hours = (
            rows.select(pl.col("time").dt.truncate("1h"), *tokens)
            .group_by("time")
            .sum()
            .sort("time")
            .upsample("time", every="1h")
            .fill_null(0.0)
        )
        if hours.height < 24:
            raise InputError(f"the log has {hours.height} hours: a day and its night is the least that shows a shape")
        known = rows.select(pl.all_horizontal(pl.col(*means).is_not_null()).mean()).item()
        note = f"{rows.height:,} requests in {hours.height} hours, tokens known of {known:.0%}"
        columns = [hours[name].to_numpy() * scale for name in means]
        return cls(columns[0], columns[1], peak_to_mean, note)


def busy_week(hours: int) -> Array:
    """Weights of a week whose traffic lies in so many hours, as many on each weekday, from nine o'clock on; [168]."""
    if not 1 <= hours <= 120:
        raise InputError("busy_hours_per_week has to be 1 to 120, the hours of the five weekdays; else give weights")
    weights = np.zeros(WEEK_HOURS)
    for i in range(hours):
        weights[24 * (i % 5) + (9 + i // 5) % 24] = 1.0
    return weights
