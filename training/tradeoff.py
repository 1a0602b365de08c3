"""The trade-off of a dial on one's own log: what each setting would cost and be worth, computed once, to be looked at.

What a product owner drags is precomputed here: for every setting of the least probability its quality, cost and latency
off-policy with intervals (`training.ope`), the models' shares, and against today's setting of each tier what would get
worse and what would change for whom.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from threadpoolctl import threadpool_limits

from router_ml.errors import InputError
from router_ml.logs import log_sha256
from router_ml.policy import Dial
from router_ml.router import Router
from router_ml.writing import write_aside
from training.candidates import first_named
from training.challenge import MOST_ROWS, catalog_of, usable_rows
from training.dials import Setting, seen_of_log
from training.experiment import cost_column
from training.gate import Limits
from training.held_out import held_out
from training.logged import Decided, Logged, decided, logged_of, one_row_a_request
from training.ope import Look
from training.reading import Report, ticked
from training.rivals import always_cheapest, always_one, ranked_models
from training.slices import ABSENT
from training.tradeoff_changes import Change, Changes, examples_of
from training.tradeoff_levels import LEAST_ROWS, METRICS, Judge, Level, models_of, oracle_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
FORMAT = 1
SETTINGS = (0.0, 0.2, 0.3, 0.4, *(round(0.45 + 0.02 * i, 2) for i in range(28)))
"""Least probabilities that are judged beside those of the policy's tiers: finer where routers differ."""
DAYS_A_MONTH = 30
_MOST_TASKS = 12


@dataclass(frozen=True)
class Scope:
    """Rows of the log: all, or one tier's or one task's, `n` of them and `outcomes` with a quality.

    `settings` has a level a setting of the trade-off, `singles` one a model that always serves (where it may, else the
    next best), `cheapest` always the cheapest. `oracle` takes the best answer of all, at the least cost; it is known
    only where every model's outcome is, and `oracle_why` says otherwise.
    """

    by: str
    name: str
    n: int
    outcomes: int
    settings: tuple[Level, ...]
    singles: Mapping[str, Level]
    cheapest: Level
    oracle: tuple[float, float] | None
    oracle_why: str | None


@dataclass(frozen=True)
class Tier:
    """A tier's dial: `today` is the position of its setting, and `changes` what each setting changes against it.

    `scope` is the position of the rows that it is judged on, `apart` how sure a difference of settings is there
    (`Changes.apart`). Where the tier cannot be moved as a least probability, `why` says so and there are no changes.
    """

    name: str
    today: int | None
    scope: int
    rows: str
    changes: tuple[Change, ...]
    why: str | None
    apart: Mapping[str, Any]


@dataclass(frozen=True)
class TradeOff:
    """The trade-off of one bundle under one policy by one log; `made` is when. Money is USD a request.

    `source` says what it rests on: rows, times, how it is known that they are new to the bundle, notes.
    """

    made: datetime
    model_version: str
    policy_version: str
    source: Mapping[str, Any]
    confidence: float
    requests_a_month: float
    models: tuple[str, ...]
    settings: tuple[float, ...]
    scopes: tuple[Scope, ...]
    tiers: tuple[Tier, ...]
    examples: tuple[Mapping[str, Any], ...]
    gate: Limits

    def to_frame(self) -> pl.DataFrame:
        """A row a scope and policy: by, name, policy, min_probability, model, n, each metric with _low and _high."""
        rows: list[dict[str, Any]] = []
        for scope in self.scopes:
            named: list[tuple[str, float | None, str | None, Level]] = [
                ("dial", value, None, level) for value, level in zip(self.settings, scope.settings, strict=True)
            ]
            named += [("always", None, model, level) for model, level in scope.singles.items()]
            for policy, value, model, level in [*named, ("always cheapest", None, None, scope.cheapest)]:
                row: dict[str, Any] = {"by": scope.by, "name": scope.name, "policy": policy}
                row |= {"min_probability": value, "model": model, "n": scope.n}
                for metric in METRICS:
                    found = level.values[metric] or (None, None, None)
                    row |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), found, strict=True))
                rows.append(row)
        texts = dict.fromkeys(("by", "name", "policy", "model"), pl.String)
        numbers = {f"{m}{end}": pl.Float64 for m in METRICS for end in ("", "_low", "_high")}
        order = {"by", "name", "policy"}
        schema = {**{n: t for n, t in texts.items() if n in order}, "min_probability": pl.Float64, "model": pl.String}
        return pl.DataFrame(rows, schema={**schema, "n": pl.Int64, **numbers}, orient="row")

    def tiers_frame(self) -> pl.DataFrame:
        """A row a tier: tier, rows (judged on), why, min_probability, quality and cost_usd each with _low and _high.

        Null, and `why`, where the tier is not a least probability alone, or is not identifiable.
        """
        rows: list[dict[str, Any]] = []
        for tier in self.tiers:
            row: dict[str, Any] = {"tier": tier.name, "rows": tier.rows, "why": tier.why}
            if tier.today is not None:
                level = self.scopes[tier.scope].settings[tier.today]
                row |= {"min_probability": self.settings[tier.today], "why": level.why.get("quality")}
                for metric in METRICS[:2]:
                    found = level.values[metric] or (None, None, None)
                    row |= dict(zip((metric, f"{metric}_low", f"{metric}_high"), found, strict=True))
            rows.append(row)
        numbers = ["min_probability", *(f"{m}{end}" for m in METRICS[:2] for end in ("", "_low", "_high"))]
        texts = dict.fromkeys(("tier", "rows", "why"), pl.String)
        return pl.DataFrame(rows, schema={**texts, **dict.fromkeys(numbers, pl.Float64)})

    def plot(self) -> Figure:
        """The frontier of all rows with its band, each tier's setting today, and the single models."""
        from training.challenge_plots import frontier_plot

        frame = self.to_frame().filter(pl.col("by") == "all")
        kind = pl.when(pl.col("policy") == "dial").then(pl.lit("champion")).otherwise("policy")
        today = []
        for tier in self.tiers:
            if tier.today is not None:
                values = self.scopes[0].settings[tier.today].values
                today += [("champion", m, *(values[m] or (None,) * 3), None) for m in METRICS[:2]]
        schema = {"policy": pl.String, "metric": pl.String, **dict.fromkeys(("value", "low", "high", "se"), pl.Float64)}
        first = pl.DataFrame(today[:2], schema=schema, orient="row")
        return frontier_plot(frame.with_columns(policy=kind), first, self.confidence)

    def to_json(self) -> dict[str, Any]:
        """Everything, as the console reads it."""
        return {
            "format": FORMAT,
            "made": self.made.isoformat(timespec="seconds"),
            "model_version": self.model_version,
            "policy_version": self.policy_version,
            "source": dict(self.source),
            "confidence": self.confidence,
            "requests_a_month": self.requests_a_month,
            "days_a_month": DAYS_A_MONTH,
            "models": list(self.models),
            "settings": list(self.settings),
            "scopes": [
                {
                    "by": s.by, "name": s.name, "n": s.n, "outcomes": s.outcomes,
                    "settings": [level.to_json() for level in s.settings],
                    "singles": {model: level.to_json() for model, level in s.singles.items()},
                    "cheapest": s.cheapest.to_json(),
                    "oracle": None if s.oracle is None else {"quality": s.oracle[0], "cost_usd": s.oracle[1]},
                    "oracle_why": s.oracle_why,
                }
                for s in self.scopes
            ],
            "tiers": [
                {
                    "name": t.name, "today": t.today, "scope": t.scope, "rows": t.rows, "why": t.why,
                    "changes": [change.to_json() for change in t.changes], "apart": dict(t.apart),
                }
                for t in self.tiers
            ],
            "examples": [dict(example) for example in self.examples],
            "gate": {name: getattr(self.gate, name) for name in ("quality", "slice", "slice_rows")},
        }  # fmt: skip

    def write(self, path: Path) -> None:
        """The JSON in a file, written aside and renamed: a service that looks sees one or the other whole."""
        write_aside(path, json.dumps(_rounded(self.to_json()), separators=(",", ":"), allow_nan=False))


@contextmanager
def _one_thread() -> Iterator[None]:
    with threadpool_limits(limits=1, user_api="blas"):  # threads that wait for a busy core only spin
        yield


@_one_thread()
def tradeoff(
    router: Router,
    log: pl.DataFrame,
    manifest: Mapping[str, Any],
    *,
    since: datetime | None = None,
    settings: Sequence[float] = SETTINGS,
    most_rows: int = MOST_ROWS,
    cluster: str = "session",
    confidence: float = 0.95,
    keep_prompts: bool = False,
    seed: int = 0,
    made: datetime | None = None,
    report: Report | None = None,
) -> TradeOff:
    """What each setting of the dial would do on the log's newest requests, which the router has not learnt from.

    `log` as `read_log` gives it, with a column `tier` where it is known; `manifest` the bundle's. Rows that may judge
    are those of `training.challenge`: with a text, and where any model was drawn only those. Intervals have
    `confidence` each, and those of one setting's slices together. Requests a month are the whole log's over its
    time. `keep_prompts` takes a few requests' texts along as examples; `report` is told of progress. Raises InputError
    where no row can judge.
    """
    say = report or (lambda stage, share: None)
    say("routing anew", 0.0)
    rows, others, how = held_out(log, manifest, since=since)
    considered = rows["request_id"].n_unique()
    every = rows
    rows, notes = usable_rows(one_row_a_request(rows), most_rows)
    catalog = catalog_of(router.catalog, router.catalog, rows)
    logged = logged_of(rows.with_columns(cost_column(catalog)), catalog, cluster=cluster, metrics=METRICS)
    first = first_named(log)
    values, notes = _settings(router, settings), (f"judged on {how}", *notes)
    today = decided(router, rows, catalog, first)
    ranking = ranked_models(others, router.catalog)
    dialled = _dialled(router, rows, catalog.ids, first, values, today)
    say("routing anew", 1.0)
    models = {metric: model for metric in METRICS if (model := models_of(logged, metric, seed, today)) is not None}
    judge = Judge(logged, models, Look(("dr",), confidence, "bootstrap", 1000, seed))
    singles = {model: always_one(today, [model, *ranking]) for model in router.catalog.ids}
    oracle = oracle_of(every, catalog.ids)
    scopes: list[Scope] = []
    at: dict[tuple[str, str], int] = {}
    for by, name, mask in ticked(_scopes(logged, router), "settings, by rows", say):
        best, why = oracle(rows["request_id"].filter(pl.Series(mask)))
        at[by, name] = len(scopes)
        scopes.append(
            Scope(
                by, name, int(mask.sum()), int((~np.isnan(logged.metrics["quality"][mask])).sum()),
                tuple(judge.level(one.target, mask) for one in dialled),
                {model: judge.level(target, mask) for model, target in singles.items()},
                judge.level(always_cheapest(today), mask), best, why,
            )
        )  # fmt: skip
    shown = examples_of(rows, dialled, seed) if keep_prompts else ()
    changes = Changes(logged, models, judge.look, tuple(example["row"] for example in shown))
    tiers = []
    for name, dial in ticked(router.policy.dials.items(), "changes, by tier", say):
        scope = at.get(("tier", name), 0)
        why = _fixed(dial, router)
        position = None if why else values.index(dial.min_probability)
        of = "of this tier" if scope else "of every tier: the log does not tell this one's apart"
        mask = (logged.slices["tier"] == name).to_numpy() if scope else np.ones(len(logged), dtype=bool)
        found = () if position is None else tuple(changes.of(dialled[position], one, mask) for one in dialled)
        apart = {} if position is None else changes.apart(dialled[position], dialled, mask)
        tiers.append(Tier(name, position, scope, f"{int(mask.sum()):,} requests {of}", found, why, apart))
    span = (log["time"].max() - log["time"].min()).total_seconds() / 86_400  # type: ignore[operator, union-attr]
    requests = log["request_id"].n_unique()
    return TradeOff(
        made=made or datetime.now(UTC), model_version=router.model_version, policy_version=router.policy.version,
        source={
            "log_sha256": log_sha256(log), "requests": requests, "days": span, "considered": considered,
            "judged": len(rows), "outcomes": int((~np.isnan(logged.metrics["quality"])).sum()),
            "oldest": rows["time"].min().isoformat(), "newest": rows["time"].max().isoformat(),  # type: ignore[union-attr]
            "notes": list(dict.fromkeys([*notes, *logged.notes])), "estimator": "doubly robust, cross-fitted",
        },
        confidence=confidence, requests_a_month=requests / max(span, 1.0) * DAYS_A_MONTH,
        models=catalog.ids, settings=values, scopes=tuple(scopes), tiers=tuple(tiers),
        examples=tuple({k: v for k, v in example.items() if k != "row"} for example in shown), gate=changes.limits,
    )  # fmt: skip


def _settings(router: Router, settings: Sequence[float]) -> tuple[float, ...]:
    """All settings, those of the policy's tiers among them, in order. Raises InputError for one outside [0, 1]."""
    tiers = {dial.min_probability for dial in router.policy.dials.values()}
    values = tuple(sorted({float(value) for value in (*settings, *tiers)}))
    if not values or values[0] < 0.0 or values[-1] > 1.0:
        raise InputError("settings of the dial have to lie in [0, 1]")
    return values


def _fixed(dial: Dial, router: Router) -> str | None:
    """Why a tier's setting is not one of the trade-off's, if it is not."""
    if dial.objective != "cost":
        return "it takes the most probable model within a budget, which no least probability sets"
    if dial.quality_threshold not in (None, router.quality_threshold):
        return f"its quality threshold {dial.quality_threshold:g} is another one than the bundle's"
    if dial.max_cost_usd is not None:
        return "it also has a greatest cost, which is not part of the trade-off"
    return None


def _dialled(
    router: Router, rows: pl.DataFrame, ids: Sequence[str], first: Mapping[str, datetime], values: Sequence[float],
    today: Decided,
) -> list[Decided]:  # fmt: skip
    """What the router would do at each setting, as `decided` says it of the policy in force."""
    seen, served = seen_of_log(router, rows, first)
    position = np.array([list(ids).index(model) for model in router.catalog.ids])
    at, total = np.flatnonzero(served), seen.total
    explored = seen.rate[:, None] * seen.drawn / np.maximum(seen.drawn.sum(axis=1, keepdims=True), 1)
    made = []
    for value in values:
        own, taken = explored.copy(), seen.choices(Setting("min_probability", value), total)
        own[np.arange(len(at)), taken] += 1.0 - seen.rate
        target, choice = np.zeros(today.target.shape), np.full(len(rows), -1)
        target[np.ix_(at, position)], choice[at] = own, position[taken]
        made.append(replace(today, target=target, choice=choice))
    return made


def _scopes(logged: Logged, router: Router) -> list[tuple[str, str, npt.NDArray[np.bool_]]]:
    """All rows, then those of each of the policy's tiers that the log tells apart, then of each task."""
    found = [("all", "", np.ones(len(logged), dtype=bool))]
    for by, names in (("tier", list(router.policy.dials)), ("task", None)):
        if by in logged.slices.columns:
            counts = dict(logged.slices[by].value_counts(sort=True).iter_rows())
            for name in [n for n in names or counts if counts.get(n, 0) >= LEAST_ROWS and n != ABSENT][:_MOST_TASKS]:
                found.append((by, name, (logged.slices[by] == name).to_numpy()))
    return found


def _rounded(value: Any) -> Any:
    """Floats to six significant digits: the file is a third as long, and no interval is as sure as that."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value
