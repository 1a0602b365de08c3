"""A new model by the number of its outcomes: what onboarding says of it, held against its later answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from router_ml.errors import InputError, NoEligibleModelError
from router_ml.policy import Policy
from router_ml.types import ModelCard
from training.challenge import Contender
from training.evaluate import scores
from training.held_out import held_out
from training.logged import requests_of
from training.onboard import onboard_bundle

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COUNTS = (0, 30, 100)
LEAST_LATER = 20


@dataclass(frozen=True)
class Arrival:
    """What bundles say of a model that joined them after so many outcomes; `frame` has a row each.

    Columns: `outcomes` that it was onboarded with; `promised`, the mean p_ok on its `n` later answers, with the mean
    ends of the interval `low` and `high` and the mean `claim` that a dial is held against; `observed`, the share of
    these that was acceptable; `auc` (null without both kinds of answers) and `brier`; `share` of these requests that
    the router would send to it; `like`, the existing model that its heads resemble most, with its `weight`. `bundle` is
    the directory of the last one, which knows all of the model's outcomes before those that it is judged by.
    """

    model: str
    n: int
    sibling: str | None
    bundle: Path
    frame: pl.DataFrame

    def to_frame(self) -> pl.DataFrame:
        """The frame."""
        return self.frame

    def plot(self) -> Figure:
        """Promise with its interval, and what came of it, by the number of outcomes."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        x, frame = np.arange(len(self.frame)), self.frame
        spread = [frame["promised"] - frame["low"], frame["high"] - frame["promised"]]
        axes.errorbar(x, frame["promised"], yerr=spread, fmt="o", capsize=4, label="promised P(ok), mean 90% interval")
        axes.plot(x, frame["claim"], "_", markersize=14, label="claim, which a dial is held against")
        axes.plot(x, frame["observed"], color="tab:gray", label=f"observed on {self.n} later answers")
        axes.set_xticks(x, [str(count) for count in frame["outcomes"]])
        axes.set_xlabel(f"outcomes of {self.model} that it was onboarded with")
        axes.set_ylim(0, 1)
        axes.legend(loc="lower right", fontsize=8)
        return figure


def arrival(
    bundle: str | Path,
    card: ModelCard,
    log: pl.DataFrame,
    out: str | Path,
    *,
    sibling: str | None = None,
    counts: Sequence[int] = COUNTS,
    policy: Policy | None = None,
) -> Arrival:
    """Onboards a model from its first outcomes in the log, and judges it on later ones.

    `counts` are numbers of outcomes; those that the log does not have are left out, and all that it has are added. A
    model that joins from no outcome needs nothing but its card and, better, a `sibling`. Judged are its answers among
    the rows that the bundle has not learnt from (`held_out.held_out`); it is onboarded from those before, at least the
    older half of its answers where it has fewer. Bundles go into `out`, one a count. Raises InputError where the log
    has too few answers of the model to judge anything.
    """
    manifest = Contender.load(bundle).manifest
    told = log.filter(pl.col("model") == card.id, pl.col("quality").is_not_null()).sort("time", maintain_order=True)
    fresh = held_out(log, manifest)[0]["request_id"]
    texts = pl.col("prompt").is_not_null() | pl.col("messages").is_not_null()
    later = told.filter(pl.col("request_id").is_in(fresh.implode()), texts)
    later = later.tail(max(len(told) // 2, 1))
    if len(later) < LEAST_LATER:
        raise InputError(
            f"the log has {len(later)} answers of {card.id!r} to judge it by, and {LEAST_LATER} are the least: log more"
        )
    before = told.filter(pl.col("time") < later["time"].min())
    rows = []
    for count in sorted({*(c for c in counts if c < len(before)), len(before)}):
        to = Path(out) / str(count)
        to.parent.mkdir(parents=True, exist_ok=True)
        made = onboard_bundle(bundle, card, out=to, logs=before.head(count) if count else None, sibling=sibling)
        like, weight = max(made.mix.items(), key=lambda item: item[1])
        rows.append({"outcomes": made.outcomes, **_judged(to, card.id, later, policy), "like": like, "weight": weight})
    return Arrival(card.id, len(later), sibling or card.sibling, to, pl.DataFrame(rows, infer_schema_length=None))


def _judged(bundle: Path, model: str, later: pl.DataFrame, policy: Policy | None) -> dict[str, float | None]:
    """How the promises of one bundle hold on the model's own later answers."""
    contender = Contender.load(bundle, policy)
    router = replace(contender.router, draw=lambda: 1.0)  # never below an exploration rate
    at = router.catalog.index[model]
    numbers, sent = [], 0
    for request in requests_of(later, None, None):
        try:
            decision, estimate = router.decide_with_estimate(request)
        except NoEligibleModelError:
            chosen, estimate = None, router.estimator.estimate(request)
        else:
            chosen = decision.model
        ends = [estimate.p_ok if of is None else of for of in (estimate.p_low, estimate.p_high, estimate.p_claim)]
        numbers.append([float(of[at]) for of in (estimate.p_ok, *ends)])
        sent += chosen == model
    p, low, high, claim = np.array(numbers).T
    ok = (later["quality"].to_numpy() >= contender.threshold).astype(np.float64)
    found = scores(p[:, None], ok[:, None])
    means = {"promised": p.mean(), "low": low.mean(), "high": high.mean(), "claim": claim.mean()}
    auc = None if np.isnan(found["auc"]) else found["auc"]
    return {**{name: float(v) for name, v in means.items()}, "observed": float(ok.mean()), "auc": auc,
            "brier": found["brier"], "share": sent / len(later)}  # fmt: skip
