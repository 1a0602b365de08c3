"""The cheapest dial whose quality is at least so much, with confidence: risk control on rows nobody has learnt from.

Learn then Test (Angelopoulos, Bates, Candès, Jordan, Lei 2021, arXiv 2110.01052) by fixed sequence: the settings of a
dial are tested from the safest to the cheapest, each at the full level, up to the first that does not pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import polars as pl

from router_ml.errors import InputError
from router_ml.router import Router
from training.candidates import first_named
from training.dials import KINDS, Array, BoolArray, IntArray, Kind, Setting, sequence
from training.held_out import held_out
from training.judged import Judged, judged_of
from training.risk import betting_p, binomial_bound, binomial_p, hoeffding_bentkus_p, lower_bound

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["auto", "betting", "binomial", "hoeffding-bentkus"]
METHODS: tuple[Method, ...] = ("auto", "betting", "binomial", "hoeffding-bentkus")
LONGEST = 20
"""A longer session counts as one of so many requests: what one session can say has to be bounded beforehand."""
POWER_Z = 0.8416
"""Standard normal quantile of 0.8: with how many rows it will be shown in four cases of five."""


@dataclass(frozen=True)
class Tuned:
    """What was found. `chosen` is None where no setting is shown to be good enough; `why` then says what is missing.

    Arrays [k] are aligned with `settings`: `quality` (estimate), `lower` (its bound at `confidence`, each for itself),
    `p_value`, `cost_usd` (mean expected cost of a request's call) and `certified`. The certified settings hold all at
    once. `rows` were judged of `considered`, `informative` of them tell of the chosen (else the safest) setting;
    `max_weight` bounds a row's weight. `more_rows` would show the safest setting, in four cases of five.
    """

    min_quality: float
    confidence: float
    method: Method
    settings: tuple[Setting, ...]
    quality: Array
    lower: Array
    p_value: Array
    cost_usd: Array
    certified: BoolArray
    chosen: Setting | None
    why: str
    more_rows: int | None
    rows: int
    considered: int
    informative: int
    max_weight: float
    assumptions: tuple[str, ...]

    @property
    def at(self) -> int | None:
        """Position of the chosen setting."""
        return None if self.chosen is None else self.settings.index(self.chosen)

    def to_frame(self) -> pl.DataFrame:
        """A row a setting, from the safest to the cheapest of each dial."""
        return pl.DataFrame(
            {
                "dial": [setting.kind for setting in self.settings],
                "value": [setting.value for setting in self.settings],
                "quality": self.quality,
                "lower": self.lower,
                "p_value": self.p_value,
                "cost_usd": self.cost_usd,
                "certified": self.certified,
                "chosen": [setting == self.chosen for setting in self.settings],
            }
        ).with_columns(pl.col("quality").fill_nan(None))

    def plot(self) -> Figure:
        """Quality with its lower bound against cost, the certified settings marked."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 5), layout="constrained")
        axes = figure.subplots()
        for kind, color in zip(KINDS, ("tab:blue", "tab:orange"), strict=True):
            of = np.array([setting.kind == kind for setting in self.settings])
            if of.any():
                x = self.cost_usd[of] * 1000
                axes.vlines(x, self.lower[of], self.quality[of], color=color, alpha=0.3)
                axes.plot(x, self.quality[of], ".", color=color, label=kind)
                held = self.certified[of]
                axes.plot(x[held], self.quality[of][held], "o", color=color, fillstyle="none")
        axes.axhline(self.min_quality, color="tab:gray", linewidth=1)
        if self.at is not None:
            axes.axvline(self.cost_usd[self.at] * 1000, color="tab:green", linewidth=1, label="chosen")
        axes.set_xscale("log")
        axes.set_xlabel("mean expected cost, USD per 1,000 requests")
        axes.set_ylabel(f"quality, and its lower bound at {self.confidence:.0%}")
        axes.legend(loc="lower right")
        return figure


def tune(
    router: Router,
    log: pl.DataFrame,
    manifest: Mapping[str, Any],
    *,
    min_quality: float,
    confidence: float = 0.95,
    dials: Sequence[Kind] = KINDS,
    method: Method = "auto",
    since: datetime | None = None,
    seed: int = 0,
) -> Tuned:
    """The cheapest setting of the router's dial whose mean quality is at least `min_quality` with this confidence.

    `log` is a frame of the log schema, `manifest` the bundle's, by which the rows that it has learnt from are left out
    (`held_out.held_out`). Raises InputError where no row is left, none has propensities, or none is randomised.
    """
    rows, older, how = held_out(log, manifest, since=since)
    if method == "auto" and not _binary(older):
        method = "betting"
    found = tune_judged(
        judged_of(router, rows, first_named(log)),
        min_quality=min_quality,
        confidence=confidence,
        dials=dials,
        method=method,
        seed=seed,
    )
    return replace(found, assumptions=(f"rows: {how}", *found.assumptions))


def tune_judged(
    judged: Judged,
    *,
    min_quality: float,
    confidence: float = 0.95,
    dials: Sequence[Kind] = KINDS,
    method: Method = "auto",
    seed: int = 0,
    choices: Mapping[Setting, IntArray] | None = None,
) -> Tuned:
    """`tune` on requests that are known to be held out.

    With "auto" the test is the exact binomial one where every row weighs the same, else betting. Say "betting" where
    quality is graded: both are valid there, betting is the stronger one. `choices` spares the work where each setting's
    models [n] are known already; then nothing is reported of settings after the first that does not pass, and no
    bounds: what repeats this a thousand times needs the chosen one only.
    """
    if not 0.0 < min_quality < 1.0:
        raise InputError(f"--min-quality {min_quality:g} has to lie between 0 and 1")
    if not 0.5 <= confidence < 1.0:
        raise InputError(f"--confidence {confidence:g} has to lie in [0.5, 1)")
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    kinds = [kind for kind in KINDS if kind in dials]
    if not kinds:
        raise InputError(f"no dial to tune: choose of {', '.join(KINDS)}")
    has = judged.take(~np.isnan(judged.propensity))
    if not len(has):
        raise InputError(
            "the log has no propensities, so it cannot tell what another dial would have done: log them, or send some "
            "requests to every model"
        )
    usable = has.take(has.randomised)
    if not len(usable):
        raise InputError(
            "no request of the log was randomised (every propensity is 1), so no dial but the one in force can be "
            "judged: set exploration_rate in the policy, and come back with its log"
        )
    game = _Game(usable, min_quality, method, np.random.default_rng([seed, 9]))
    alpha = (1.0 - confidence) / len(kinds)
    settings = tuple(setting for kind in kinds for setting in sequence(kind))
    total, everyone = usable.seen.total, np.arange(len(usable))
    scores: list[_Score] = []
    costs = []
    for i, setting in enumerate(settings):
        if choices is None:
            chosen = usable.seen.choices(setting, total)
            scores.append(game.score(chosen, alpha))
        else:
            chosen = choices[setting]
            over = i > 0 and settings[i - 1].kind == setting.kind and not scores[-1].p_value <= alpha
            scores.append(_Score(1.0, np.nan, 0.0, 0) if over else game.score(chosen, alpha, bound=False))
        costs.append(float(np.nanmean(usable.seen.cost[everyone, chosen])))
    p_value = np.array([score.p_value for score in scores])
    certified = np.zeros(len(settings), dtype=bool)
    for kind in kinds:
        of = np.flatnonzero([setting.kind == kind for setting in settings])
        certified[of] = np.logical_and.accumulate(p_value[of] <= alpha)
    cost = np.array(costs)
    at = int(np.where(certified, cost, np.inf).argmin()) if certified.any() else None
    quality, lower = np.array([s.quality for s in scores]), np.array([s.lower for s in scores])
    chosen_setting = None if at is None else settings[at]
    why, more = "", None
    if at is None:
        why, more = _missing(settings, quality, lower, p_value, min_quality, game.units)
    feedback = float(np.mean(usable.told))
    doubt = game.doubt(usable.seen.choices(settings[0], total) if choices is None else choices[settings[0]])
    return Tuned(
        min_quality, confidence, game.method, settings, quality, lower, p_value, cost, certified, chosen_setting, why,
        more, len(usable), len(judged), scores[at or 0].told, game.max_weight,
        (*doubt, *_assumptions(usable, len(judged), feedback, game, len(kinds), confidence)),
    )  # fmt: skip


class _Score(NamedTuple):
    """What the rows say of one choice: p-value, estimate, lower bound, and how many rows tell."""

    p_value: float
    quality: float
    lower: float
    told: int


class _Game:
    """The test of one choice of models after another on the same rows, for "the mean quality is below `least`"."""

    def __init__(self, judged: Judged, least: float, method: Method, rng: np.random.Generator) -> None:
        self.judged, self.least = judged, least
        self.had = np.zeros(judged.quality.shape[1], dtype=bool)
        self.had[judged.action[judged.action >= 0]] = True
        weight = 1.0 / judged.propensity
        self.weight = np.where(judged.full, 1.0, weight)
        every, self.unit, size = np.unique(judged.unit, return_inverse=True, return_counts=True)
        self.units, self.longest = len(every), int(size.max())
        self.part = np.minimum(1.0, LONGEST / size)[self.unit]  # of each row
        alike = not judged.seen.rate.any() and self.units == len(judged) and np.ptp(self.weight) < 1e-9
        if method in ("binomial", "hoeffding-bentkus") and not alike:
            raise InputError(
                f"the method {method!r} needs rows that all weigh the same, without sessions and exploration: "
                "use 'betting'"
            )
        self.method: Method = ("binomial" if alike else "betting") if method == "auto" else method
        self.max_weight = float(self.weight.max())
        self.uniform = rng.random(len(judged))

    def score(self, chosen: IntArray, alpha: float, *, bound: bool = True) -> _Score:
        """What the rows say of taking the models `chosen` [n]; the bound is at level `alpha`."""
        weight, quality = self._weighted(chosen)
        told = ~np.isnan(quality) & (weight > 0.0)
        if not told.any():
            return _Score(1.0, float("nan"), 0.0, 0)
        x, w = quality[told], (weight * self.part)[told]

        def p_value(least: float) -> float:
            if self.method == "binomial":
                return binomial_p(x, least, self.uniform[told])
            if self.method == "hoeffding-bentkus":
                return hoeffding_bentkus_p(x, least)
            z = np.zeros(len(quality))
            z[told] = w * (x - least)
            if self.units < len(z):
                z = np.bincount(self.unit, z, self.units) / min(self.longest, LONGEST)
            return betting_p(z, self.max_weight * least, alpha)

        low = 0.0
        if bound and self.method == "binomial":
            low = binomial_bound(x, alpha, self.uniform[told])
        elif bound:
            low = lower_bound(p_value, alpha)
        return _Score(p_value(self.least), float(x @ w / w.sum()), low, int(told.sum()))

    def doubt(self, chosen: IntArray) -> tuple[str, ...]:
        """A sentence where the log's propensities cannot be those of its choices: weights have to average 1."""
        weight = self._weighted(chosen)[0]
        error = float(weight.std()) / np.sqrt(len(weight))
        if abs(weight.mean() - 1.0) <= max(4.0 * error, 0.01):
            return ()
        return (
            f"IN DOUBT: weights average {weight.mean():.2f} and not 1, so its models were not drawn with the "
            "propensities that the log states; what follows from them does not hold",
        )

    def _weighted(self, chosen: IntArray) -> tuple[Array, Array]:
        """Weight and quality of each row: what it says of the policy that takes `chosen` and explores at its rate."""
        of, rows = self.judged, np.arange(len(chosen))
        rate, share = of.seen.rate, of.seen.drawn / of.seen.drawn.sum(axis=1, keepdims=True)
        action = np.maximum(of.action, 0)
        explored = np.where(of.action >= 0, share[rows, action], 0.0)
        weight = self.weight * ((1.0 - rate) * (of.action == chosen) + rate * explored)
        quality = of.quality[rows, action]
        if of.full.any():
            mixed = of.quality[rows, chosen]
            mean = np.where(of.seen.drawn, of.quality * share, 0.0).sum(axis=1)
            mixed = np.where(rate > 0.0, (1.0 - rate) * mixed + rate * mean, mixed)
            weight, quality = np.where(of.full, 1.0, weight), np.where(of.full, mixed, quality)
        # Of a model that no row had nothing is known: it is held to be good for nothing, not for what is asked.
        blind = ~of.full & ~self.had[chosen]
        weight, quality = np.where(blind, 1.0, weight), np.where(blind, 0.0, quality)
        return weight, quality


def _binary(rows: pl.DataFrame) -> bool:
    """Whether the log records quality as 0 or 1; asked of the rows that are not tuned with."""
    known = rows["quality"].drop_nulls()
    return bool(known.is_in([0.0, 1.0]).all())


def _missing(
    settings: Sequence[Setting], quality: Array, lower: Array, p_value: Array, least: float, units: int
) -> tuple[str, int | None]:
    """Why no setting passed, and how many rows more would do for the one nearest to it among the first of each dial."""
    first = [i for i, s in enumerate(settings) if i == 0 or settings[i - 1].kind != s.kind]
    at = min(first, key=lambda i: p_value[i])
    said = f"the safest setting ({settings[at].kind} {settings[at].value:g}) is shown to reach {lower[at]:.3f}"
    if np.isnan(quality[at]):
        return "no row of the log has the quality of a model that the dial would choose", None
    if quality[at] <= least:
        return f"{said}, and is estimated at {quality[at]:.3f}: if that is what it is, no number of rows will do", None
    margin = quality[at] - lower[at]
    spread = margin / 2.0  # the bound lies some two standard errors below the estimate
    needed = units * ((margin + POWER_Z * spread) / (quality[at] - least)) ** 2
    more = max(round(needed - units, -1 if needed < 1000 else -2), 10)
    return f"{said}, and is estimated at {quality[at]:.3f}: some {more:,.0f} rows more like these would do", int(more)


def _assumptions(
    judged: Judged, considered: int, feedback: float, game: _Game, kinds: int, confidence: float
) -> tuple[str, ...]:
    full = float(judged.full.mean())
    how = f"{full:.0%} of them were sent to every model" if full else "each was given a model by chance"
    if 0.0 < full < 1.0:
        how += ", the others were given a model by chance"
    out = [
        f"the slice: {len(judged):,} of {considered:,} requests, {how}, with the probabilities that the log states; no "
        f"row weighs more than {game.max_weight:g}",
        "what is promised: the mean quality of first answers under this bundle and policy, on requests like these; "
        "not of each request, and not of each task or tenant",
        "later traffic is like this slice, and its rows are independent of each other"
        + (" but within a session" if game.units < len(judged) else "")
        + (f", a longer one of which counts as {LONGEST} requests" if game.longest > LONGEST else ""),
        f"the {'dials, their ' if kinds > 1 else ''}settings and their order were fixed before the slice was seen"
        + (f"; each dial is tested at {1 - (1 - confidence) / kinds:g}" if kinds > 1 else ""),
    ]
    if feedback < 1.0:
        out.append(
            f"feedback: {feedback:.0%} of the slice has it; answers without it are taken to be as good as those with it"
        )
    if len(judged) < considered:
        out.append("requests whose model was not drawn (sessions that go on, pinned models) are not covered")
    return tuple(out)
