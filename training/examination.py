"""What an examination of a log found: sentences with their numbers, tables behind them, and what to log from now on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

State = Literal["good", "partly", "missing", "not known"]
LEAST_OUTCOMES = 80
"""Outcomes of a model from which scores order its requests: 1,000 requests over 13 models (docs/benchmarks.md, uniform;
with 300, 23 each, there was no evidence of it)."""
GOOD_OUTCOMES = 230
"""Outcomes of a model from which the curve is flat: 3,000 requests over the same models."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: whether it is there, in a sentence, and the numbers that the sentence has."""

    topic: str
    state: State
    sentence: str
    numbers: Mapping[str, Any]


@dataclass(frozen=True)
class Remedy:
    """What to log from now on: what it makes possible, and the command or setting that does it."""

    what: str
    why: str
    how: str


@dataclass(frozen=True)
class Examination:
    """What a log can and cannot support.

    `models` has a row per model (`model`, `card`, `rows`, `answers`, `outcomes`, `learnt`: "no", "thin", "yes" or
    "well", `identifiable`, `ess`, `unsupported`, `why`: of always choosing it, off-policy; null where that was not
    looked at); `feedback` one per value of `by` (`by`, `value`, `answers`, `outcomes`, `rate`); `overlap` one per task
    and pair of models (`task`, `model_a`, `model_b`, `pairs`, `drawn_a`, `drawn_b`, `comparable`: "pairs", "drawn" or
    "no"). `remedies` are in the order of their worth.
    """

    checks: tuple[Check, ...]
    models: pl.DataFrame
    feedback: pl.DataFrame
    overlap: pl.DataFrame
    remedies: tuple[Remedy, ...]

    @property
    def learnable(self) -> tuple[str, ...]:
        """Candidates of which the log has outcomes enough to learn their requests apart."""
        return tuple(self.models.filter(pl.col("learnt").is_in(["yes", "well"]))["model"])

    @property
    def routable(self) -> bool:
        """Whether a choice can be learnt at all: there are two candidates with enough outcomes."""
        return len(self.learnable) > 1

    def to_frame(self) -> pl.DataFrame:
        """A row a check: topic, state, sentence."""
        rows = [(check.topic, check.state, check.sentence) for check in self.checks]
        return pl.DataFrame(rows, schema=dict.fromkeys(("topic", "state", "sentence"), pl.String()), orient="row")

    def to_json(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        tables = {"models": self.models, "feedback": self.feedback, "overlap": self.overlap}
        return {
            "routable": self.routable,
            "learnable": list(self.learnable),
            "checks": [asdict(check) | {"numbers": dict(check.numbers)} for check in self.checks],
            **{name: table.to_dicts() for name, table in tables.items()},
            "remedies": [asdict(remedy) for remedy in self.remedies],
        }

    @property
    def in_words(self) -> tuple[str, ...]:
        """The sentences, then what to log, line by line."""
        width = max((len(check.topic) for check in self.checks), default=0)
        lines = [f"{check.topic:<{width}}  {check.state:<9}  {check.sentence}" for check in self.checks]
        if self.remedies:
            lines += ["", "From now on, the most valuable first:"]
        for number, remedy in enumerate(self.remedies, 1):
            lines += [f"{number}. {remedy.what}: {remedy.why}", f"   {remedy.how}"]
        return tuple(lines)

    def plot(self) -> Figure:
        """Outcomes by model, with the numbers from which they can be learnt from."""
        from matplotlib.figure import Figure

        models = self.models.sort("outcomes")
        figure = Figure(figsize=(8, 1.5 + 0.35 * max(len(models), 1)), layout="constrained")
        axes = figure.subplots()
        axes.barh(models["model"].to_list(), models["outcomes"].to_list(), color="tab:blue")
        for count, style in ((LEAST_OUTCOMES, ":"), (GOOD_OUTCOMES, "--")):
            axes.axvline(count, color="grey", linestyle=style, label=f"{count} outcomes")
        axes.set_xscale("symlog", linthresh=10)
        axes.set_xlabel("outcomes of requests with a prompt")
        axes.legend()
        return figure
