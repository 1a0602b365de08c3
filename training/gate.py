"""May a challenger become the champion: conditions with their numbers, each of which has to hold.

Nothing is taken on trust: where the log cannot show that a condition holds, it does not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any

import polars as pl

from features import golden
from features.load import GOLDEN, load_estimator
from router_ml.bundle import read_bundle
from router_ml.errors import BundleError, InputError
from router_ml.router import Router
from router_ml.types import RouteRequest
from router_ml.writing import finite
from training.challenge import CHALLENGER, CHAMPION, Challenge
from training.latency import latency_ratio
from training.promises import LEAST_OUTCOMES
from training.slices import SLICES
from training.support import FEW_CLUSTERS

POWER_Z = 0.8416  # how many rows show it in four cases of five


@dataclass(frozen=True)
class Limits:
    """What a promotion asks for. Raises InputError for a number out of its range.

    `quality`: how far below 0 the lower bound of the quality change may lie. `slice`: the same for each slice, with
    `slices` for single ones by "task=code" or all of a column by "task". One of fewer than `slice_rows` requests can
    hardly show anything: unless it is named, it only may not be shown to be worse. `cost`: how far the upper bound of
    the cost change may lie above 0, as a share of the champion's cost (None: any). `calibration`: how much less than
    promised may come, by the lower bound of the router's own decisions; a model may not be shown to fall short by more
    than twice that. `latency`: the challenger's time for a decision as a multiple of the champion's. `fresh_days`: the
    age of the newest judged request. `rows`: how many judged requests have to have an outcome. `clusters`: how many
    independent groups of them there have to be.
    """

    quality: float = 0.02
    slice: float = 0.1
    slices: Mapping[str, float] = field(default_factory=dict)
    slice_rows: int = 500
    cost: float | None = None
    calibration: float = 0.05
    latency: float = 1.5
    fresh_days: float = 30.0
    rows: int = 500
    clusters: int = FEW_CLUSTERS

    def __post_init__(self) -> None:
        for name in ("quality", "slice", "calibration"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise InputError(f"the margin of {name} has to lie in [0, 1], not {getattr(self, name)}")
        for name in ("latency", "fresh_days", "rows", "clusters"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise InputError(f"the limit of {name} has to be above 0, not {getattr(self, name)}")
        if self.cost is not None and not -1.0 <= self.cost < math.inf:
            raise InputError(f"the limit of the cost change has to be a share of -1 or more, not {self.cost}")
        for name, margin in self.slices.items():
            if not 0.0 <= margin <= 1.0:
                raise InputError(f"the margin of slice {name} has to lie in [0, 1], not {margin}")

    def of_slice(self, by: str, name: str) -> float:
        """The margin of one slice."""
        return self.slices.get(f"{by}={name}", self.slices.get(by, self.slice))


@dataclass(frozen=True)
class Condition:
    """One condition: whether it holds, its number and limit, and both in a sentence."""

    name: str
    holds: bool
    value: float | None
    limit: float | None
    says: str


@dataclass(frozen=True)
class Verdict:
    """All conditions of a promotion."""

    conditions: tuple[Condition, ...]

    @property
    def passed(self) -> bool:
        """Whether every condition holds."""
        return all(condition.holds for condition in self.conditions)

    @property
    def failed(self) -> tuple[Condition, ...]:
        """Those that do not."""
        return tuple(condition for condition in self.conditions if not condition.holds)

    def to_frame(self) -> pl.DataFrame:
        """A row a condition: name, holds, value, limit, says."""
        schema = {
            "name": pl.String, "holds": pl.Boolean, "value": pl.Float64, "limit": pl.Float64, "says": pl.String,
        }  # fmt: skip
        return pl.DataFrame([asdict(condition) for condition in self.conditions], schema=schema)

    def to_json(self) -> dict[str, Any]:
        """What is kept with a version: whether it passed, and each condition's number."""
        return {
            "passed": self.passed,
            "conditions": {c.name: {"holds": c.holds, "value": finite(c.value)} for c in self.conditions},
        }


def judge(
    challenge: Challenge,
    champion: Router,
    challenger: Router,
    *,
    bundle: str | Path,
    limits: Limits | None = None,
    now: datetime | None = None,
    rolled_back: str | None = None,
    requests: Sequence[RouteRequest] | None = None,
) -> Verdict:
    """Every condition of a promotion of the challenger, whose `bundle` directory is read again for its golden rows.

    `rolled_back` says why this version was taken back before. `requests` are what latency is measured with; by default
    the golden ones.
    """
    limits = limits or Limits()
    conditions = [
        *_rows(challenge, limits), _fresh(challenge, limits, now or datetime.now(UTC)), _quality(challenge, limits),
        _slices(challenge, limits), _calibration(challenge, limits), _models(challenge, limits),
        _latency(champion, challenger, limits, requests), golden_rows(bundle),
    ]  # fmt: skip
    if limits.cost is not None:
        conditions.insert(5, _cost(challenge, limits.cost))
    if rolled_back is not None:
        conditions.append(taken_back(rolled_back))
    return Verdict(tuple(conditions))


def taken_back(reason: str) -> Condition:
    """The condition that a bundle which was rolled back for this reason fails."""
    return Condition("not rolled back", False, None, None, f"it was rolled back before: {reason}")


def golden_rows(bundle: str | Path) -> Condition:
    """Whether the bundle answers its golden rows as it did where it was made."""
    try:
        read = read_bundle(bundle)
        largest = golden.check(load_estimator(read), read.file(GOLDEN), GOLDEN)
    except (BundleError, KeyError) as error:
        return Condition("golden rows", False, None, golden.TOLERANCE, str(error))
    said = f"the largest difference is {largest:.2g}, {golden.TOLERANCE:g} is allowed"
    return Condition("golden rows", True, largest, golden.TOLERANCE, said)


def _rows(challenge: Challenge, limits: Limits) -> tuple[Condition, Condition]:
    n, clusters = challenge.outcomes, challenge.quality.clusters
    rows = f"{n:,} of the {challenge.n:,} judged requests have an outcome, {limits.rows:,} are asked for"
    groups = f"they are {clusters:,} independent groups (sessions), {limits.clusters:,} are asked for"
    return (
        Condition("outcomes", n >= limits.rows, n, limits.rows, rows),
        Condition("clusters", clusters >= limits.clusters, clusters, limits.clusters, groups),
    )


def _fresh(challenge: Challenge, limits: Limits, now: datetime) -> Condition:
    days = (now - challenge.newest).total_seconds() / 86_400
    said = f"the newest judged request is {days:.1f} days old, {limits.fresh_days:g} are allowed"
    if days < -1.0:
        said = f"the newest judged request is dated {challenge.newest:%Y-%m-%d %H:%M}, which is to come: mend its time"
    return Condition("fresh log", -1.0 <= days <= limits.fresh_days, days, limits.fresh_days, said)


def _quality(challenge: Challenge, limits: Limits) -> Condition:
    found, margin = challenge.quality, limits.quality
    if found.headline is None:
        return Condition("quality", False, None, -margin, found.why)
    value, low, high, _ = found.headline
    said = f"quality changes by {value:+.4f} ({low:+.4f} to {high:+.4f})"
    unknown = found.support.unsupported_mass
    if unknown > 0.0:  # what the log could not have done may be worth 1 less than is guessed
        low -= unknown
        said += f", less {unknown:.4f} for decisions out of the log's reach"
    holds = low >= -margin
    said += f", its lower bound has to be {-margin:+g} or more"
    if not holds:
        said += _needed(challenge.n, value, low, margin)
    return Condition("quality", holds, low, -margin, said)


def _needed(n: int, value: float, low: float, margin: float) -> str:
    """How many requests would show it, if the change is what it seems."""
    if value <= -margin:
        return "; it is estimated below that, so more such requests would hardly show otherwise"
    wide = value - low
    more = n * (wide * (1.0 + POWER_Z / 1.96) / (value + margin)) ** 2
    return (
        f"; if it is what it seems, some {float(f'{more:.2g}'):,.0f} such requests would show it" if more < 1e9 else ""
    )


def _slices(challenge: Challenge, limits: Limits) -> Condition:
    """The slice that is furthest below its margin, by its lower bound, or for a small one by its upper bound."""
    values = challenge.slices.values
    columns = sorted({by for by, _ in values})
    worst: tuple[float, str, float] | None = None
    failed = []
    for name in limits.slices:
        by, _, of = name.partition("=")
        if by not in SLICES:
            raise InputError(f"there is no slice {name!r}: name one of {', '.join(SLICES)}, or a value as in task=code")
        if of and (by, of) not in values:
            known = ", ".join(v for column, v in values if column == by) or "none"
            failed.append(f"{name}: it has too few judged requests to be held to a margin (enough have: {known})")
    for (by, name), value in values.items():
        margin = limits.of_slice(by, name)
        large = value.n >= limits.slice_rows or f"{by}={name}" in limits.slices
        if value.headline is None:
            if large:
                failed.append(f"{by}={name}: {value.why}")
            continue
        bound = value.headline.low if large else value.headline.high
        said = f"{by}={name}: {value.headline.value:+.3f} ({value.headline.low:+.3f} to {value.headline.high:+.3f})"
        if bound < -margin:
            failed.append(f"{said}, the {'lower' if large else 'upper'} bound has to be {-margin:+g} or more")
        if worst is None or bound + margin < worst[0]:
            worst = bound + margin, said, bound
    if failed:
        return Condition("slices", False, worst[2] if worst else None, -limits.slice, "; ".join(failed))
    if worst is None:
        return Condition("slices", True, None, None, "no slice has enough requests to be judged by itself")
    said = f"of {len(values)} (by {', '.join(columns)}) the nearest to its margin is {worst[1]}"
    return Condition("slices", True, worst[2], -limits.slice, said)


def _cost(challenge: Challenge, limit: float) -> Condition:
    """Whether new - (1 + limit) x old is at most 0 by its upper bound; the three errors known give the covariance."""
    found = challenge.cost_usd
    old, new = (challenge.policies["cost_usd"][name].headline for name in (CHAMPION, CHALLENGER))
    if found.headline is None or old is None or new is None:
        return Condition("cost", False, None, limit, found.why or "the cost is not identifiable")
    grown = 1.0 + limit
    covariance = (new.se**2 + old.se**2 - found.headline.se**2) / 2.0
    error = math.sqrt(max(new.se**2 + grown**2 * old.se**2 - 2.0 * grown * covariance, 0.0))
    z = NormalDist().inv_cdf(0.5 + challenge.confidence / 2.0)
    high = found.headline.value + old.value - grown * old.value
    # As far out as the bootstrap says, which knows the skewness.
    wide = (found.headline.high - found.headline.value) / max(z * found.headline.se, 1e-300)
    high += z * error * (max(wide, 1.0) if math.isfinite(wide) else math.inf)
    said = f"cost changes by {found.headline.value:+.3g} USD a request"
    if old.value > 0.0:
        said += f", {found.headline.value / old.value:+.1%},"
    said += f" and may by {limit:+.0%}: the bound is {abs(high):.2g} USD {'above' if high > 0 else 'below'} that"
    return Condition("cost", high <= 0.0, high, 0.0, said)


def _calibration(challenge: Challenge, limits: Limits) -> Condition:
    found, margin = challenge.promise["challenger"], limits.calibration
    if found.headline is None:
        return Condition("calibration", False, None, -margin, found.why)
    value, low, high, _ = found.headline
    said = (
        f"where it decides, success is {value:+.4f} from what it promises ({low:+.4f} to {high:+.4f}), the lower bound "
        f"has to be {-margin:+g} or more"
    )
    if low < -margin:
        said += _needed(challenge.n, value, low, margin)
    return Condition("calibration", low >= -margin, low, -margin, said)


def _models(challenge: Challenge, limits: Limits) -> Condition:
    """No model is shown to fall short of what the challenger promises of it by more than twice the margin."""
    margin = 2.0 * limits.calibration
    of = challenge.calibration.filter(pl.col("contender") == "challenger").drop_nulls("high").sort("high")
    if of.is_empty():
        said = f"no model has the {LEAST_OUTCOMES} outcomes that it takes"
        return Condition("models' calibration", False, None, -margin, said)
    worst = of.row(0, named=True)
    said = (
        f"{worst['model']} answers {worst['residual']:+.3f} from what is promised of it ({worst['low']:+.3f} to "
        f"{worst['high']:+.3f} on {worst['n']} outcomes), the upper bound has to be {-margin:+g} or more"
    )
    return Condition("models' calibration", worst["high"] >= -margin, worst["high"], -margin, said)


def _latency(
    champion: Router, challenger: Router, limits: Limits, requests: Sequence[RouteRequest] | None
) -> Condition:
    ratio = latency_ratio(champion, challenger, requests)
    if math.isnan(ratio):
        said = "there is no request to measure it with that both bundles may decide"
        return Condition("latency", False, None, limits.latency, said)
    said = f"a decision takes {ratio:.2f} times as long as the champion's here, {limits.latency:g} is allowed"
    return Condition("latency", ratio <= limits.latency, ratio, limits.latency, said)
