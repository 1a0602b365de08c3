"""What `advise` answers with: segments, their options and their verdicts, as frames, JSON, sentences and a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from router_ml.policy import Rule
from router_ml.selfhost import Against, Hosting
from training.experiment import Experiment
from training.policy_value import Estimate
from training.segments import Segment
from training.support import MOST_UNSUPPORTED

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["adequate", "below", "undecided", "unknown", "barred"]
Keeps = Literal["", "quality", "residency", "capability", "allow-list", "cost", "missing evidence"]
Verdict = Literal["self-host", "rule", "cheaper route", "fine-tune", "explore", "keep"]


@dataclass(frozen=True)
class Option:
    """What becomes of a segment where the requests that may and whose model was drawn go to `model`; the rest stays.

    `status`: "adequate", its quality is shown to be enough; "below", shown not to be; "undecided"; "unknown", the log
    does not identify it; "barred", fewer than half of the requests may go to it. `may` is that share, `moved` the share
    of those that would move, `rest` the share of what may go of which the log cannot tell, and which would not.
    `quality` is that of a moved request, `change` what it is more than today; `spend_usd` the segment's a month with
    these moved, `saving_usd` what that is less than today; None where the log does not identify them.
    `priced_saving_usd` is no estimate: it is what the card's prices come to for today's tokens of those that may go, or
    of all where it is barred.
    `keeps` is what keeps the segment from going there, and `why` says it; `experiment` is what settling it takes.
    """

    model: str
    status: Status
    may: float
    moved: float
    rest: float
    quality: Estimate | None
    change: Estimate | None
    spend_usd: Estimate | None
    saving_usd: Estimate | None
    priced_saving_usd: float
    keeps: Keeps
    why: str
    experiment: Experiment | None = None

    @property
    def hoped_usd(self) -> float:
        """What it may save a month: the estimate, or else what prices come to."""
        return self.priced_saving_usd if self.saving_usd is None else self.saving_usd.value

    @property
    def sure_usd(self) -> float:
        """What it is shown to save a month at least."""
        return -math.inf if self.saving_usd is None else self.saving_usd.low

    @property
    def whole(self) -> bool:
        """Whether the log tells of all requests that may go, but for 1 %."""
        return self.rest <= MOST_UNSUPPORTED


@dataclass(frozen=True)
class SelfHosted:
    """The segment's requests that could go to `model` on a deployment of its own, sized for their tokens and hours.

    These are the ones of which it is known how good it is, or all that may go where it is of none; `share` of the
    segment, and `steady` or not. It would replace what `route`, the best other option, or today's mix (None), makes of
    the same requests: `saving_usd` is the difference a month, and it `pays` where its lower bound is above 0 and the
    model is good enough. `against` has the break-even with that option's card, or that of the model which most is
    spent on today.
    """

    model: str
    hosting: Hosting
    against: Against
    route: str | None
    share: float
    steady: bool
    saving_usd: Estimate | None
    pays: bool


@dataclass(frozen=True)
class Advised:
    """A segment with what is advised. `mix` is each model's share of its requests today; `spend_usd` a month.

    `needed` is the quality that it needs (None where today's is not known); `data_class` is "mixed" where several are
    declared. `best` is the option that saves most of those shown to be adequate and cheaper. `also` are further cases.
    """

    segment: Segment
    data_class: str | None
    mix: Mapping[str, float]
    spend_usd: Estimate | None
    quality: Estimate | None
    needed: float | None
    options: tuple[Option, ...]
    best: Option | None
    tuned: Option | None
    explored: Option | None
    hosted: SelfHosted | None
    verdict: Verdict
    also: tuple[Verdict, ...]

    @property
    def why(self) -> str:
        """The verdict in a sentence."""
        if self.verdict == "self-host" and self.hosted is not None:
            usd, saving = self.hosted.hosting.usd_per_month, self.hosted.saving_usd
            less = "" if saving is None else f", {_money(saving)} less than {self.hosted.route or 'today'}"
            part = "" if self.hosted.share > 0.99 else f" for {self.hosted.share:.0%} of the requests"
            return f"host {self.hosted.model}{part}: {usd:,.2f} USD a month{less}"
        if self.best is not None and self.best.saving_usd is not None:
            how = "pin it with a rule" if self.verdict == "rule" else "let the router send these there"
            part = ""
            if not self.best.whole:
                part = f" for the {self.best.moved:.0%} whose model was drawn, and of the others nothing is known"
            return f"{self.best.model} is good enough{part} ({how}): saves {_money(self.best.saving_usd)} USD a month"
        if self.verdict == "fine-tune" and self.tuned is not None:
            return (
                f"{self.tuned.model} is nearly good enough on narrow, repetitive traffic: tuned, it could save up to "
                f"{self.tuned.hoped_usd:,.2f} USD a month"
            )
        if self.verdict == "explore" and self.explored is not None:
            return f"{self.explored.model}: {self.explored.why}"
        return "no cheaper model is shown, or seems, to be good enough"

    @property
    def rule(self) -> Rule | None:
        """The policy's rule that pins it, where the case is one."""
        if self.verdict != "rule" or self.best is None:
            return None
        return Rule(self.best.model, self.segment.task, self.segment.tenant)

    @property
    def keeps(self) -> tuple[str, ...]:
        """What keeps the segment from each model that may save more than what is advised, dearest hope first."""
        least = 0.0 if self.best is None else self.best.hoped_usd
        others = [o for o in self.options if o is not self.best and o.hoped_usd > least and o.keeps]
        said = [f"{o.model}: {o.keeps}: {o.why}" for o in sorted(others, key=lambda o: -o.hoped_usd)]
        if self.hosted is not None and self.verdict != "self-host":
            of, at = self.hosted, self.hosted.against
            even = "at no volume" if at.break_even_mtok is None else f"from {at.break_even_mtok:,.4g} Mtok a month on"
            shape = "" if of.steady else f", and it is bursty (peak {self.segment.peak_to_mean:.1f} x mean)"
            said.append(
                f"self-hosting {of.model}: {of.hosting.usd_per_month:,.2f} USD a month; pays {even} against "
                f"{at.model}, and what could go has {of.hosting.traffic.mtok_per_month:,.4g}{shape}"
            )
        return tuple(said)


@dataclass(frozen=True)
class Advice:
    """Advice on all segments, the dearest first. All intervals hold together with `confidence` (see `advise`)."""

    segments: tuple[Advised, ...]
    confidence: float
    intervals: int
    notes: tuple[str, ...]

    def to_frame(self) -> pl.DataFrame:
        """A row a segment; money is USD a month, null where not identified."""
        schema: dict[str, Any] = dict.fromkeys(_TEXTS, pl.String) | dict.fromkeys(_NUMBERS, pl.Float64)
        return pl.DataFrame([_row(one) for one in self.segments], schema=schema)

    def options_frame(self) -> pl.DataFrame:
        """A row a segment and model: what each option is worth, and what keeps the segment from it."""
        schema: dict[str, Any] = dict.fromkeys(("segment", "model", "status", "keeps", "why"), pl.String)
        schema |= dict.fromkeys(("may", "moved", "rest", "priced_saving_usd"), pl.Float64)
        for name in ("quality", "change", "saving_usd"):
            schema |= dict.fromkeys((name, f"{name}_low", f"{name}_high"), pl.Float64)
        schema |= {"experiment_requests": pl.Int64, "experiment_usd": pl.Float64, "experiment_anyway_usd": pl.Float64}
        rows = []
        for one in self.segments:
            for option in one.options:
                row: dict[str, Any] = {name: getattr(option, name) for name in ("model", "status", "keeps", "why")}
                row |= {name: getattr(option, name) for name in ("may", "moved", "rest", "priced_saving_usd")}
                for name in ("quality", "change", "saving_usd"):
                    row |= _spread(name, getattr(option, name))
                if (plan := option.experiment) is not None:
                    row |= {"experiment_requests": plan.requests, "experiment_usd": plan.cost_usd}
                    row |= {"experiment_anyway_usd": plan.anyway_usd}
                rows.append({"segment": one.segment.name} | row)
        return pl.DataFrame(rows, schema=schema).with_columns(pl.col(pl.Float64).fill_nan(None))

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values; None for what is not known."""
        options = self.options_frame().partition_by("segment", as_dict=True)
        return {
            "confidence": self.confidence,
            "intervals": self.intervals,
            "notes": list(self.notes),
            "segments": [
                _row(one)
                | {"also": list(one.also), "keeps": list(one.keeps), "mix": dict(one.mix)}
                | {"rule": None if one.rule is None else asdict(one.rule)}
                | {"options": options[one.segment.name,].drop("segment").to_dicts()}
                for one in self.segments
            ],
        }

    @property
    def in_words(self) -> tuple[str, ...]:
        """A few lines a segment: what it is, what is advised, what keeps it from moving further."""
        said = []
        for one in self.segments:
            of = one.segment
            spend = "unknown" if one.spend_usd is None else f"{_money(one.spend_usd)} USD"
            quality = "unknown" if one.quality is None else f"{one.quality.value:.3f}"
            kind = ["narrow" if of.narrow else "", "repetitive" if of.repetitive else ""]
            kind += ["steady" if of.steady else "bursty", f"data class {one.data_class}" if one.data_class else ""]
            said.append(
                f"{of.name} ({', '.join(filter(None, kind))}): {of.requests_per_month:,.0f} requests a month, spend "
                f"{spend}, quality {quality}"
            )
            also = f" (also: {', '.join(one.also)})" if one.also else ""
            said.append(f"  {one.verdict}: {one.why}{also}")
            aside = f"{one.explored.model}: missing" if one.verdict == "explore" and one.explored else None
            kept = [line for line in one.keeps if aside is None or not line.startswith(aside)]
            said += [f"  not {line}" for line in kept[:_SAID]]
        return (*said, *(f"note: {note}" for note in self.notes))

    def plot(self) -> Figure:
        """Spend a month of each segment, and beside it what is advised to be saved, with its interval."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 0.5 * max(len(self.segments), 2) + 1.5), layout="constrained")
        axes = figure.subplots()
        for row, one in enumerate(self.segments):
            spend = 0.0 if one.spend_usd is None else one.spend_usd.value
            axes.barh(row - 0.2, spend, 0.35, color="C7", label="spend today" if row == 0 else None)
            found = _row(one)
            if found["saving_usd"] is not None:
                axes.barh(row + 0.2, found["saving_usd"], 0.35, color="C2")
                axes.plot([found["saving_usd_low"], found["saving_usd_high"]], [row + 0.2, row + 0.2], color="black")
        names = [f"{one.segment.name} ({one.verdict})" for one in self.segments]
        axes.set_yticks(range(len(names)), names, parse_math=False)
        axes.invert_yaxis()
        axes.set_xlabel("USD a month: spend, and below it the saving with its interval")
        return figure


_SAID = 4
_TEXTS = ("segment", "verdict", "model", "why", "task", "tenant", "data_class", "keeps")
_NUMBERS = (
    "requests_per_month", "input_tokens", "output_tokens", "spend_usd", "spend_usd_low", "spend_usd_high", "quality",
    "quality_low", "quality_high", "needed", "saving_usd", "saving_usd_low", "saving_usd_high", "break_even_mtok",
    "mtok_per_month", "hosting_usd", "similarity", "near_duplicates", "template_share", "multi_turn", "peak_to_mean",
    "idle",
)  # fmt: skip


def _row(one: Advised) -> dict[str, Any]:
    """The columns of `to_frame` of one segment."""
    of, hosted = one.segment, one.hosted
    chosen = {"self-host": None, "fine-tune": one.tuned, "explore": one.explored, "keep": None}.get(
        one.verdict, one.best
    )
    row: dict[str, Any] = {name: getattr(of, name) for name in ("task", "tenant", "requests_per_month")}
    row |= {name: getattr(of, name) for name in ("input_tokens", "output_tokens", "similarity", "near_duplicates")}
    row |= {name: getattr(of, name) for name in ("template_share", "multi_turn", "peak_to_mean", "idle")}
    row |= _spread("spend_usd", one.spend_usd) | _spread("quality", one.quality)
    of_best = None if one.best is None else one.best.saving_usd
    row |= _spread("saving_usd", hosted.saving_usd if one.verdict == "self-host" and hosted else of_best)
    row |= {
        "segment": of.name,
        "verdict": one.verdict,
        "model": hosted.model if one.verdict == "self-host" and hosted else chosen.model if chosen else None,
        "why": one.why,
        "data_class": one.data_class,
        "keeps": "; ".join(one.keeps),
        "needed": one.needed,
        "mtok_per_month": None if of.traffic is None else of.traffic.mtok_per_month,
        "break_even_mtok": None if hosted is None else hosted.against.break_even_mtok,
        "hosting_usd": None if hosted is None else hosted.hosting.usd_per_month,
    }
    return {name: None if row[name] != row[name] else row[name] for name in (*_TEXTS, *_NUMBERS)}


def _spread(name: str, found: Estimate | None) -> dict[str, float | None]:
    low, high = f"{name}_low", f"{name}_high"
    return dict.fromkeys((name, low, high)) if found is None else {name: found.value, low: found.low, high: found.high}


def _money(found: Estimate) -> str:
    return f"{found.value:,.2f} ({found.low:,.2f} to {found.high:,.2f})"
