"""Champion against challenger on the newest requests of a log that neither has learnt from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from features.load import load_router
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.router import Router
from router_ml.types import ModelCard
from training.candidates import first_named
from training.challenge_plots import frontier_plot
from training.changes import changed_for, changed_models
from training.dials import seen_of_log, sequence
from training.experiment import cost_column
from training.held_out import held_out
from training.logged import Decided, Logged, decided, logged_of, one_row_a_request
from training.ope import PolicyValue, SliceValues, evaluate_policies, evaluate_slices
from training.promises import calibration_by_model, own_answers, promise_of
from training.reading import Report, ticked
from training.rivals import always_cheapest, always_one, ranked_models, shuffled
from training.slices import SLICES
from training.support import CERTAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
METRICS = ("quality", "cost_usd")
CHAMPION, CHALLENGER = "champion", "challenger"
CHEAPEST, BEST_SINGLE, SHUFFLED = "always cheapest", "best single", "challenger shuffled"
MOST_ROWS = 20_000
_DIALS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4, 0.2, 0.0)


class _Point(NamedTuple):
    """A policy of the frontier: a contender at a setting of its dial, or always a model."""

    policy: str
    min_probability: float | None = None
    model: str | None = None


@dataclass(frozen=True)
class Contender:
    """A router with what its bundle says of its training."""

    router: Router
    manifest: Mapping[str, Any]

    @classmethod
    def load(cls, bundle: str | Path, policy: Policy | None = None) -> Contender:
        """A bundle directory under `policy`. Raises BundleError, and InputError where the policy does not fit it."""
        return cls(load_router(bundle, policy), read_bundle(bundle).manifest)

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self.router.model_version

    @property
    def threshold(self) -> float:
        """From this quality on its answers count as successes."""
        return 0.5 if self.router.quality_threshold is None else self.router.quality_threshold


@dataclass(frozen=True)
class Challenge:
    """What the log says of a challenger. Frames and values are of the `n` judged requests of `considered`.

    `quality` and `cost_usd` are the challenger's value less the champion's a request, doubly robust; `slices` has the
    former slice by slice. `policies` maps a metric to the value of each policy by name: both, and what they must beat.
    `promise` is how each one's probabilities hold where it acts on them, `calibration` by model where the log asked it.
    `frontier` has a row per contender and setting of its dial, and one per single model; `changes` a row per pair of
    models between which requests would move, `who` one per task and tenant; `changed` is the share of requests that
    would. `best_single` is that model, None where no other row tells. `policies_in_force` are the versions of the
    policies that champion and challenger were judged under.
    """

    champion: str
    challenger: str
    policies_in_force: tuple[str, str]
    n: int
    outcomes: int
    considered: int
    oldest: datetime
    newest: datetime
    confidence: float
    quality: PolicyValue
    cost_usd: PolicyValue
    slices: SliceValues
    policies: Mapping[str, Mapping[str, PolicyValue]]
    promise: Mapping[str, PolicyValue]
    calibration: pl.DataFrame
    frontier: pl.DataFrame
    changes: pl.DataFrame
    who: pl.DataFrame
    changed: float
    best_single: str | None
    notes: tuple[str, ...]

    def to_frame(self) -> pl.DataFrame:
        """A row a policy and metric: policy, metric, value, low, high, se (null where it is not identifiable)."""
        rows = [
            (name, metric, *(value.headline or (None,) * 4))
            for metric, values in self.policies.items()
            for name, value in values.items()
        ]
        schema = {"policy": pl.String, "metric": pl.String, **dict.fromkeys(("value", "low", "high", "se"), pl.Float64)}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def plot(self) -> Figure:
        """Both frontiers with their bands, today's points and the single models."""
        return frontier_plot(self.frontier, self.to_frame(), self.confidence)


def challenge(
    champion: Contender,
    challenger: Contender,
    log: pl.DataFrame,
    *,
    since: datetime | None = None,
    most_rows: int = MOST_ROWS,
    by: Sequence[str] = SLICES,
    cluster: str = "session",
    confidence: float = 0.95,
    seed: int = 0,
    report: Report | None = None,
) -> Challenge:
    """Judges two bundles on the newest rows of a log that neither has learnt from, off-policy (`training.ope`).

    `since` takes later rows only, `most_rows` the newest of them. `cluster` is the column whose values are independent
    of each other. The best single model is the one that was best in the log's other rows. Rows without a text are left
    out, and so are those whose model was not drawn (later turns of sessions, pinned ones) where others' was: what is
    found then holds for requests whose model is drawn. `notes` counts them. `report` is told of progress. Raises
    InputError where no row is left, or where it cannot be known what a bundle has learnt from.
    """
    say = report or (lambda stage, share: None)
    say("routing anew", 0.0)
    rows, others, how = _judged(champion, challenger, log, since)
    considered = rows["request_id"].n_unique()
    rows, notes = usable_rows(one_row_a_request(rows), most_rows)
    catalog = catalog_of(challenger.router.catalog, champion.router.catalog, rows)
    notes = (f"judged on {how}", *notes)
    logged = logged_of(rows.with_columns(cost_column(catalog)), catalog, cluster=cluster)
    first = first_named(log)
    old, new = (decided(one.router, rows, catalog, first) for one in (champion, challenger))
    ranking = ranked_models(others, challenger.router.catalog)
    if not ranking:
        notes += ("no other row of the log tells which single model is the best",)
    targets = {CHAMPION: old.target, CHALLENGER: new.target, CHEAPEST: always_cheapest(new), SHUFFLED: shuffled(new)}
    if ranking:
        targets[BEST_SINGLE] = always_one(new, ranking)
    points = _dialled(CHAMPION, champion, rows, catalog, first)
    points |= _dialled(CHALLENGER, challenger, rows, catalog, first)
    for model in challenger.router.catalog.ids:
        points[_Point("always", model=model)] = always_one(new, [model, *ranking])
    say("routing anew", 1.0)
    options: dict[str, Any] = {"confidence": confidence, "seed": seed, "predictions": new.predictions}
    every: dict[Any, Array] = {**targets, **points}
    found: dict[str, dict[Any, PolicyValue]] = {
        metric: evaluate_policies(logged, every, metric=metric, **options)
        for metric in ticked(METRICS, "policies", say)
    }
    change = {
        metric: evaluate_policies(logged, {"": new.target}, baseline=old.target, metric=metric, **options)[""]
        for metric in ticked(METRICS, "change", say)
    }
    say("slices, promises, changes", 0.0)
    answered = own_answers(rows)
    present = [name for name in by if name in logged.slices.columns]
    slices = evaluate_slices(logged, new.target, by=present, baseline=old.target, **options)
    both = {CHAMPION: (champion, old), CHALLENGER: (challenger, new)}
    made = Challenge(
        champion=champion.version, challenger=challenger.version,
        policies_in_force=(champion.router.policy.version, challenger.router.policy.version),
        n=len(rows), outcomes=int((~np.isnan(logged.metrics["quality"])).sum()), considered=considered,
        oldest=rows["time"].min(), newest=rows["time"].max(), confidence=confidence,  # type: ignore[arg-type]
        quality=change["quality"], cost_usd=change["cost_usd"], slices=slices,
        policies={metric: {name: values[name] for name in targets} for metric, values in found.items()},
        promise={
            name: promise_of(logged, of, one.threshold, answered, confidence=confidence, seed=seed)
            for name, (one, of) in both.items()
        },
        calibration=_calibration(logged, both, answered, confidence, seed),
        frontier=_frontier(found, list(points)),
        changes=changed_models(logged, old, new, options),
        who=changed_for(logged, old, new),
        changed=float((old.choice != new.choice).mean()),
        best_single=ranking[0] if ranking else None,
        notes=notes,
    )  # fmt: skip
    say("slices, promises, changes", 1.0)
    return made


def catalog_of(first: Catalog, second: Catalog, rows: pl.DataFrame) -> Catalog:
    """Both catalogues, and what else the log's policy could choose: weights are right only where all of it is there."""
    cards = {card.id: replace(card, sibling=None) for card in (*second, *first)}
    listed = rows["candidates"].explode().drop_nulls()
    for model in pl.concat([rows.select(pl.coalesce("fallback_from", "model")).to_series(), listed]).unique().sort():
        if model not in cards:  # neither would choose it, so its prices are never asked for
            cards[model] = ModelCard(
                id=model, provider="unknown", tier="hosted-open", input_usd_per_mtok=0.0, output_usd_per_mtok=0.0,
                context_window=1,
            )  # fmt: skip
    return Catalog(tuple(cards.values()))


def _judged(
    champion: Contender, challenger: Contender, log: pl.DataFrame, since: datetime | None
) -> tuple[pl.DataFrame, pl.DataFrame, str]:
    """(rows that neither has learnt from, the other rows, how that is known)."""
    rows, _, how = held_out(log, challenger.manifest, since=since)
    new, _, of_champion = held_out(log, champion.manifest, since=since)
    both = rows.filter(pl.col("request_id").is_in(new["request_id"].implode()))
    if both.is_empty():
        raise InputError(
            "no row of the log is new to both bundles: give newer rows, or train the challenger with --holdout 0.2"
        )
    others = log.filter(~pl.col("request_id").is_in(both["request_id"].implode()))
    return both, others, how if how == of_champion else f"{how}; and, for the champion, {of_champion}"


def usable_rows(rows: pl.DataFrame, most: int) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The newest rows that have a text and, if any has, a model that was drawn; and what was left out."""
    notes = []
    kept = rows.filter(pl.col("prompt").is_not_null() | pl.col("messages").is_not_null())
    if len(kept) < len(rows):
        notes.append(f"{len(rows) - len(kept):,} requests have no text in the log and could not be routed again")
    if kept.is_empty():
        raise InputError("none of the log's newest rows can be judged on: they lack prompts; log them")
    drawn = kept.filter(pl.col("propensity").is_null() | (pl.col("propensity") < CERTAIN))
    if 0 < len(drawn) < len(kept):
        share = 1.0 - len(drawn) / len(kept)
        notes.append(f"{share:.0%} of the requests had no model drawn (later turns, pinned ones) and are not judged")
        kept = drawn
    if len(kept) > most:
        notes.append(f"of {len(kept):,} requests the newest {most:,} were taken")
        kept = kept.sort("time").tail(most)
    return kept, tuple(notes)


def _dialled(
    name: str, contender: Contender, rows: pl.DataFrame, catalog: Catalog, first: Mapping[str, datetime]
) -> dict[_Point, Array]:
    """Probabilities [n, m] for a dozen settings of the least probability."""
    seen, served = seen_of_log(contender.router, rows, first)
    position = np.array([catalog.index[model] for model in contender.router.catalog.ids])
    at, total = np.flatnonzero(served), seen.total
    explored = seen.rate[:, None] * seen.drawn / np.maximum(seen.drawn.sum(axis=1, keepdims=True), 1)
    made: dict[_Point, Array] = {}
    for setting in sequence("min_probability"):
        if setting.value in _DIALS:
            own = explored.copy()
            own[np.arange(len(at)), seen.choices(setting, total)] += 1.0 - seen.rate
            target = np.zeros((len(rows), len(catalog)))
            target[np.ix_(at, position)] = own
            made[_Point(name, setting.value)] = target
    return made


def _calibration(
    logged: Logged, both: Mapping[str, tuple[Contender, Decided]], answered: BoolArray, confidence: float, seed: int
) -> pl.DataFrame:
    frames = [
        calibration_by_model(logged, of, one.threshold, answered, confidence=confidence, seed=seed).select(
            pl.lit(name).alias("contender"), pl.all()
        )
        for name, (one, of) in both.items()
    ]
    return pl.concat(frames)


def _frontier(found: Mapping[str, Mapping[Any, PolicyValue]], points: Sequence[_Point]) -> pl.DataFrame:
    rows = []
    for key in points:
        values = [found[metric][key].headline for metric in METRICS]
        numbers = [number for value in values for number in ((None,) * 3 if value is None else value[:3])]
        rows.append((*key, *numbers))
    floats = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
    schema = {
        "policy": pl.String,
        "min_probability": pl.Float64,
        "model": pl.String,
        **dict.fromkeys(floats, pl.Float64),
    }
    return pl.DataFrame(rows, schema=schema, orient="row")
