"""Traffic as tokens an hour, in a series that repeats itself: flat, within some hours of the week, or a log's own.

A log that is a sample shows peaks that are chance. `without_chance` takes off what a sample of its size would show of
flat traffic; `peak_within_hours` likewise finds what bursts within the hours are more than independent arrivals.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from router_ml.errors import InputError
from router_ml.types import CACHED, ModelCard

if TYPE_CHECKING:
    import polars as pl

Array = npt.NDArray[np.float64]
MONTH_HOURS = 730.0
WEEK_HOURS = 168
_BUSIEST = 0.1
"""The share of hours, the busiest, whose minutes say what a peak within an hour is."""
_PEAK = 0.99
_FEW = 5  # requests an hour
_ASSUMED = "no burst within an hour is assumed, say another {option}"
_FIELDS = ("requests_per_month", "input_tokens", "output_tokens", "busy_hours_per_week", "weights", "peak_to_mean")


@dataclass(frozen=True)
class Traffic:
    """Tokens in each of n hours, float64 [n]; the series repeats itself. `note` says where it comes from.

    `peak_to_mean` is how much the busiest minutes of an hour are above its mean, independent arrivals' own chance left
    out: capacity has to be there for them. `calls` has (input, output) tokens of the single requests, float64 [k, 2],
    where they are known. Raises InputError for traffic that is not possible.
    """

    input_tokens: Array
    output_tokens: Array
    peak_to_mean: float = 1.0
    note: str = ""
    calls: Array | None = None

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

    def prices_of(self, card: ModelCard) -> tuple[float, float]:
        """(input, output) USD a million tokens by the card for this traffic: its long calls at the prices of such.

        The card's ordinary prices where the single calls are not known.
        """
        ordinary = card.input_usd_per_mtok, card.output_usd_per_mtok
        if self.calls is None or not card.long_context:
            return ordinary
        steps = card.long_context
        prices = np.array([ordinary, *((step.input_usd_per_mtok, step.output_usd_per_mtok) for step in steps)])
        above = np.array([step.above_tokens for step in steps])
        paid = (self.calls * prices[np.searchsorted(above, self.calls[:, 0])]).sum(axis=0)
        tokens = self.calls.sum(axis=0)
        into, out = (float(paid[i] / tokens[i]) if tokens[i] > 0 else ordinary[i] for i in (0, 1))
        return into, out

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
        calls = np.array([[input_tokens, output_tokens]], dtype=np.float64)
        return cls(requests * input_tokens, requests * output_tokens, peak_to_mean, calls=calls)

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
        made = cls.of_week(requests, into, out, shape, float(table.get("peak_to_mean", 1.0)))
        return made if "peak_to_mean" in table else replace(made, note=_ASSUMED.format(option="peak_to_mean"))

    @classmethod
    def of_log(cls, log: pl.DataFrame, *, scale: float = 1.0, peak_to_mean: float | None = None) -> Traffic:
        """The hours of a log (`LOG_SCHEMA`) from its first to its last, as `of_requests`; one row a request counts.

        What a cache answered does not. A request whose tokens the log does not know counts with the mean of the
        others. Raises InputError for a log without any tokens, or of less than a day.
        """
        import polars as pl

        called = log.filter((pl.col("status") != CACHED).fill_null(True))
        rows = called.unique("request_id", keep="first", maintain_order=True)
        means = {name: rows[name].mean() for name in ("input_tokens", "output_tokens")}
        if any(mean is None for mean in means.values()):
            raise InputError("the log has no input_tokens and output_tokens: describe the traffic in a [traffic] table")
        tokens = rows.select(pl.col(name).cast(pl.Float64).fill_null(mean) for name, mean in means.items()).to_numpy()
        seconds = rows["time"].dt.epoch("us").to_numpy() * 1e-6
        first, last = (int(moment // 3600) for moment in (seconds.min(), seconds.max()))
        hours = last - first + 1
        if hours < 24:
            raise InputError(f"the log has {hours} hours: a day and its night is the least that shows a shape")
        made = cls.of_requests(seconds, tokens, first, hours, scale=scale, peak_to_mean=peak_to_mean)
        known = rows.select(pl.all_horizontal(pl.col(*means).is_not_null()).mean()).item()
        return replace(made, note=f"{made.note}; tokens known of {known:.0%}")

    @classmethod
    def of_requests(
        cls, seconds: Array, tokens: Array, first: int, hours: int, *, scale: float = 1.0,
        peak_to_mean: float | None = None,
    ) -> Traffic:  # fmt: skip
        """Traffic of which these requests are a part of 1 / `scale`, in `hours` hours from hour `first` (of 1970) on.

        `seconds` (since 1970) is float64 [n], `tokens` (input, output) float64 [n, 2]. With a scale above 1 hours that
        differ as those of such a sample do are taken to be alike (`without_chance`). The peak within the hours is
        measured where `scale` is 1 and times are finer than hours (`peak_within_hours`), and taken to be 1 elsewhere,
        unless `peak_to_mean` says it; the note says which, and how many requests stand behind an hour.
        """
        hour = (seconds // 3600).astype(np.int64) - first
        series = [np.bincount(hour, column, hours).astype(np.float64) for column in tokens.T]
        made = [without_chance(one, column, first, scale) * scale for one, column in zip(series, tokens.T, strict=True)]
        note = f"{len(seconds):,} requests in {hours} hours, {len(seconds) / hours:,.3g} behind an hour"
        if scale > 1.0:
            note += ", chance peaks of such a sample taken off"
            note += " (too few to show a single hour's own)" if len(seconds) < _FEW * hours else ""
        found = peak_within_hours(seconds, tokens, first, hours) if scale == 1.0 and peak_to_mean is None else None
        if found is not None:
            note += f"; the busiest minutes of busy hours have {found:.3g} times their mean"
        elif peak_to_mean is None:
            note += f"; {_ASSUMED.format(option='with --peak-to-mean')}"
        return cls(made[0], made[1], peak_to_mean or found or 1.0, note, tokens)


def without_chance(series: Array, sizes: Array, first: int, scale: float) -> Array:
    """The series [n] of hours from `first` on without the noise of a sample of 1 / `scale`; of the same sum.

    `sizes` [k] are the tokens of the single requests. Empirical Bayes in four steps, each with the one before as its
    expectation: by hour of the day, by day, by hour of the week, and hour by hour (`_credible`). Variation that is more
    than the sample's own stays, as far as it is more. A whole log (scale 1 or less) is no sample and stays as it is.
    """
    noise = 1.0 - 1.0 / scale
    if noise <= 0.0 or not series.sum() > 0.0:
        return series
    at = first + np.arange(len(series))
    made = np.full(len(series), series.mean())
    grain = [noise * np.power(sizes, power).sum() / sizes.sum() for power in (2, 4)]  # compound Poisson
    for group in (at % 24, at // 24, (at + 72) % WEEK_HOURS, at):  # 1 January 1970 was a Thursday
        _, code = np.unique(group, return_inverse=True)
        expected: Array = np.bincount(code, made).astype(np.float64)
        seen: Array = np.bincount(code, series).astype(np.float64)
        factor = _credible(seen, expected, *(g * expected for g in grain))
        factor /= np.maximum(expected, 1e-300)
        made = made * factor[code]
    whole: Array = made * (series.sum() / made.sum())
    return whole


def peak_within_hours(seconds: Array, tokens: Array, first: int, hours: int) -> float | None:
    """How far the busiest minutes are above their hour's mean: the 99th percentile of the busiest tenth of the hours.

    What the same requests would show by chance, each in any minute of its hour, is taken off (`_credible`). Of input
    and output (`tokens` [n, 2]) the greater peak. None where all times are whole hours, so that minutes are not known.
    """
    if not (seconds % 3600).any():
        return None
    minute = (seconds // 60).astype(np.int64) - first * 60
    found = [1.0]
    for sizes in tokens.T:
        by_minute = np.bincount(minute, sizes, hours * 60).astype(np.float64).reshape(hours, 60)
        whole, square, fourth = (np.bincount(minute // 60, np.power(sizes, power), hours) for power in (1, 2, 4))
        busy = np.argsort(-whole, kind="stable")[: math.ceil(_BUSIEST * hours)]
        busy = busy[whole[busy] > 0.0]
        if not busy.size:
            continue
        expected, chance, higher = (np.repeat(of[busy] / 60.0, 60) for of in (whole, square, fourth))
        ratio = _credible(by_minute[busy].ravel(), expected, chance, higher) / expected
        found.append(float(np.quantile(ratio, _PEAK)))
    return max(found)


def _credible(seen: Array, expected: Array, chance: Array, fourth: Array) -> Array:
    """Sums [n] of requests drawn towards what is expected of them [n], the more so the more of their spread is chance.

    Bühlmann's credibility. `chance` is the variance that each sum has by chance, `fourth` the fourth cumulant. What the
    sums vary more than that is their own, in proportion to what is expected; by less than two standard errors it counts
    as nothing.
    """
    more = float((np.square(seen - expected) - chance).sum())
    if more < 2.0 * math.sqrt(float((2.0 * np.square(chance) + fourth).sum())):
        return expected
    own = more / np.square(expected).sum() * np.square(expected)
    made: Array = expected + own / np.maximum(own + chance, 1e-300) * (seen - expected)
    return made


def busy_week(hours: int) -> Array:
    """Weights of a week whose traffic lies in so many hours, as many on each weekday, from nine o'clock on; [168]."""
    if not 1 <= hours <= 120:
        raise InputError("busy_hours_per_week has to be 1 to 120, the hours of the five weekdays; else give weights")
    weights = np.zeros(WEEK_HOURS)
    for i in range(hours):
        weights[24 * (i % 5) + (9 + i // 5) % 24] = 1.0
    return weights
