"""What a challenger's shadow has shown: both bundles on the same live requests, from what the service has stored.

Two kinds of numbers, and they are not the same thing. Agreement and expectations are of what each bundle prefers, by
its own estimates. What the challenger would have earned is off-policy, from the outcomes of what was served, as far as
the policy's exploration has tried what the challenger would have chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import polars as pl
from threadpoolctl import threadpool_limits

from router_ml.audit import catalogs, changes
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.intervals import bootstrap_interval
from router_ml.log_schema import LOG_SCHEMA
from router_ml.stored import log_rows, pages
from router_ml.tables import DECISIONS, SHADOWS, existing, open_database
from router_ml.types import ModelCard
from training.estimators import Parts, row_values
from training.experiment import cost_column
from training.logged import Logged, logged_of
from training.ope import fit_models
from training.policy_value import Estimate, interval_plot
from training.support import CERTAIN, doubts, support_of, supported, unsupported_of, why_not_identifiable

if TYPE_CHECKING:
    import sqlalchemy as sa
    from matplotlib.figure import Figure

Array = npt.NDArray[np.float64]
EXPECTED = ("p_ok", "expected_cost_usd", "expected_total_cost_usd")
METRICS = ("quality", "cost_usd")
_BEFORE_US = 60_000_000  # a decision is stored before its shadow, and by less than this


@dataclass(frozen=True)
class Contrast:
    """One number of champion and challenger on the same requests, and the difference with its interval."""

    champion: float
    challenger: float
    change: Estimate


@dataclass(frozen=True)
class Shadowed:
    """What the shadow of the bundle `challenger` shows beside the bundle `champion`.

    Of `n` requests that both scored, `compared` were not drawn by exploration: on these both say what they prefer.
    `agreement` is the share of them on which that is the same model, `expected` compares each one's estimates for what
    it prefers, and `moves` has a row per pair of models (`from`, `to`, `n`, `share`, and the means of p_ok and
    expected_cost_usd `_before` and `_after`). `observed` compares quality and cost a request off-policy, on `judged`
    requests whose model was drawn, `outcomes` of them with a quality; a metric that the log does not identify is left
    out, and `why` has it with the reason.
    """

    champion: str
    challenger: str
    n: int
    compared: int
    agreement: float
    expected: Mapping[str, Contrast]
    moves: pl.DataFrame
    judged: int
    outcomes: int
    observed: Mapping[str, Contrast]
    why: Mapping[str, str]
    confidence: float
    notes: tuple[str, ...]

    def to_frame(self) -> pl.DataFrame:
        """A row a number: by ("own estimates" or "off-policy"), metric, n, champion, challenger, change, low, high.

        Null where it is not identifiable.
        """
        rows: list[tuple[Any, ...]] = []
        for name, found in self.expected.items():
            rows.append(("own estimates", name, self.compared, *_numbers(found)))
        for name in METRICS:
            rows.append(("off-policy", name, self.judged, *_numbers(self.observed.get(name))))
        floats = ("champion", "challenger", "change", "low", "high")
        schema = {"by": pl.String, "metric": pl.String, "n": pl.Int64, **dict.fromkeys(floats, pl.Float64)}
        return pl.DataFrame(rows, schema=schema, orient="row")

    def plot(self) -> Figure:
        """The change of quality: what the two expect of themselves, and what the outcomes say."""
        found = {}
        if "p_ok" in self.expected:
            found["P(ok), own estimates"] = self.expected["p_ok"].change
        if "quality" in self.observed:
            found["quality, off-policy"] = self.observed["quality"].change
        return interval_plot(found, "challenger less champion, a request", zero=True)


def shadowed(
    store: str,
    *,
    champion: str | None = None,
    challenger: str | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> Shadowed:
    """Compares the challenger with the champion from the table `shadows` of a service's store (file or URL).

    `champion` and `challenger` are versions of bundles; without them the pair that the newest shadow is of. Requests
    that a canary gave to the challenger are left out, and those of its champion's arm count with the propensity that
    they had within the arm; requests that a bundle's twin decided are left out, too. Off-policy values are doubly
    robust (`training.ope`), with the champion's own estimates inside; intervals draw sessions anew. Raises InputError
    where there is no store, or no shadow of this pair.
    """
    engine = open_database(existing(store))
    try:
        rows, versions, notes = _paired(engine, champion, challenger)
        noted = catalogs(changes(engine))
    finally:
        engine.dispose()
    cards = {card.id: replace(card, sibling=None) for of in noted.values() for each in of for card in each}
    catalog = _catalog(rows, cards)
    own = rows.filter(~pl.col("explored"))
    if own.is_empty():
        raise InputError("exploration drew every request that the shadow scored: wait for some that it did not draw")
    if cards:  # a call that reports no cost is priced, but not by a card that is not known
        rows = rows.with_columns(cost_column(Catalog(tuple(cards.values()))))
    logged = logged_of(rows, catalog)
    drawn = np.flatnonzero(logged.propensity < CERTAIN)
    if 0 < len(drawn) < len(rows):
        share = 1.0 - len(drawn) / len(rows)
        notes.append(
            f"{share:.0%} of the requests had no model drawn (later turns, pinned ones): no outcome judges there"
        )
    observed, why, doubt = _off_policy(logged, rows, drawn, confidence, seed)
    return Shadowed(
        champion=versions[0], challenger=versions[1], n=len(rows), compared=len(own),
        agreement=float((own["model_chosen"] == own["shadow_model"]).mean()),  # type: ignore[arg-type]
        expected=_expected(own, confidence, seed), moves=_moves(own), judged=len(drawn),
        outcomes=int((~np.isnan(logged.metrics["quality"][drawn])).sum()), observed=observed, why=why,
        confidence=confidence, notes=(*notes, *doubt),
    )  # fmt: skip


def _paired(
    engine: sa.Engine, champion: str | None, challenger: str | None
) -> tuple[pl.DataFrame, tuple[str, str], list[str]]:
    """The log's rows of decisions with a shadow, both bundles' numbers beside them; the versions; what is left out."""
    shadows = {row["decision_id"]: row for page in pages(engine, SHADOWS, 0) for row in page}
    if not shadows:
        raise InputError("the store has no shadows: serve with --challenger or --challenger-alias, and route requests")
    since = min(row["time_us"] for row in shadows.values()) - _BEFORE_US
    beside: dict[str, dict[str, Any]] = {}
    for page in pages(engine, DECISIONS, since, without="features"):
        for row in page:
            if (shadow := shadows.get(row["decision_id"])) is not None:
                beside[row["decision_id"]] = _beside(row, shadow)
    kept = [row for row in log_rows(engine, since) if row["request_id"] in beside]
    extra = pl.DataFrame([{"request_id": i, **row} for i, row in beside.items()], schema=_BESIDE, orient="row")
    rows = pl.DataFrame(kept, schema=LOG_SCHEMA).join(extra, on="request_id", how="left", maintain_order="left")
    notes = []
    usable = (pl.col("bundle") == "challenger") & ~pl.col("degraded")
    if left := rows.select((~usable).sum()).item():
        notes.append(f"{left:,} requests that the challenger served in a canary, or that a twin decided, are left out")
    rows = rows.filter(usable)
    newest = rows.tail(1)
    if newest.is_empty():
        raise InputError("no shadow of the challenger belongs to a decision of the champion: route requests first")
    versions = (champion or newest["champion_version"][0], challenger or newest["challenger_version"][0])
    mine = (pl.col("champion_version") == versions[0]) & (pl.col("challenger_version") == versions[1])
    if other := rows.select((~mine).sum()).item():
        notes.append(f"{other:,} shadows of other pairs of bundles are left out")
    rows = rows.filter(mine).with_columns(propensity=pl.coalesce("arm_propensity", "propensity"))
    if rows.is_empty():
        raise InputError(f"the store has no shadow of challenger {versions[1]} beside champion {versions[0]}")
    return rows, versions, notes


_BESIDE: dict[str, Any] = {
    "request_id": pl.String, "champion_version": pl.String, "challenger_version": pl.String, "bundle": pl.String,
    "degraded": pl.Boolean, "explored": pl.Boolean, "arm_propensity": pl.Float64, "model_chosen": pl.String,
    "shadow_model": pl.String, "shadow_propensity": pl.Float64, "served_probability": pl.Float64,
    **{f"{side}_{name}": pl.Float64 for side in ("champion", "challenger") for name in EXPECTED},
    "known": pl.List(pl.Struct({"model": pl.String, "p_ok": pl.Float64, "expected_cost_usd": pl.Float64})),
}  # fmt: skip


def _beside(decision: Mapping[str, Any], shadow: Mapping[str, Any]) -> dict[str, Any]:
    chosen = next(c for c in decision["candidates"] if c["model"] == decision["model"])
    return {
        "champion_version": decision["model_version"], "challenger_version": shadow["model_version"],
        "bundle": shadow["bundle"], "degraded": bool(decision["degraded"]) or bool(shadow["degraded"]),
        "explored": decision["explored"], "arm_propensity": decision["arm_propensity"],
        "model_chosen": decision["model"], "shadow_model": shadow["model"], "shadow_propensity": shadow["propensity"],
        "served_probability": shadow["served_probability"],
        **{f"champion_{name}": chosen.get(name) for name in EXPECTED},
        **{f"challenger_{name}": shadow[name] for name in EXPECTED},
        "known": [{n: c.get(n) for n in ("model", "p_ok", "expected_cost_usd")} for c in decision["candidates"]],
    }  # fmt: skip


def _catalog(rows: pl.DataFrame, cards: Mapping[str, ModelCard]) -> Catalog:
    """Every model that either bundle could choose; nothing asks for the prices of one that has no card."""
    listed = rows["candidates"].explode().drop_nulls()
    named = pl.concat([listed, rows["model_chosen"], rows["shadow_model"], rows["model"]]).unique().sort()
    unknown = ModelCard(
        id="unknown", provider="unknown", tier="hosted-open", input_usd_per_mtok=0.0, output_usd_per_mtok=0.0,
        context_window=1,
    )  # fmt: skip
    return Catalog(tuple(replace(cards.get(model, unknown), id=model, sibling=None) for model in named))


def _expected(own: pl.DataFrame, confidence: float, seed: int) -> dict[str, Contrast]:
    """Both bundles' estimates of what they prefer, where both have one."""
    found = {}
    for name in EXPECTED:
        known = own.drop_nulls([f"champion_{name}", f"challenger_{name}"])
        if known.is_empty():  # nothing has a price, say
            continue
        old, new = (known[f"{side}_{name}"].to_numpy() for side in ("champion", "challenger"))
        unit = known.select(pl.coalesce("session", "request_id").rank("dense").cast(pl.Int64)).to_series().to_numpy()
        change = bootstrap_interval((new - old)[:, None], unit, confidence=confidence, seed=seed)
        found[name] = Contrast(float(old.mean()), float(new.mean()), Estimate(*(float(v[0]) for v in change)))
    return found


def _moves(own: pl.DataFrame) -> pl.DataFrame:
    sides = (("champion", "before"), ("challenger", "after"))
    means = [pl.col(f"{side}_{name}").mean().alias(f"{name}_{when}") for name in EXPECTED[:2] for side, when in sides]
    return (
        own.filter(pl.col("model_chosen") != pl.col("shadow_model"))
        .group_by(pl.col("model_chosen").alias("from"), pl.col("shadow_model").alias("to"))
        .agg(pl.len().alias("n"), (pl.len() / len(own)).alias("share"), *means)
        .sort("n", "from", "to", descending=[True, False, False])
    )


def _off_policy(
    logged: Logged, rows: pl.DataFrame, drawn: npt.NDArray[np.int64], confidence: float, seed: int
) -> tuple[dict[str, Contrast], dict[str, str], tuple[str, ...]]:
    """Value of the log's own policy, of the challenger's, and the difference, on the rows whose model was drawn."""
    if not len(drawn):
        said = "no request's model was drawn: set exploration_rate in the policy, and what it draws will tell"
        return {}, dict.fromkeys(METRICS, said), ()
    logged, rows = logged.take(drawn), rows[drawn]
    target = _target(logged, rows)
    at = np.arange(len(logged))
    own = np.eye(len(logged.catalog))[logged.action]
    ratio = target[at, logged.action] / logged.propensity
    known = _known(logged.catalog, rows)
    lost = unsupported_of(target, target, supported(logged, None))
    lost[lost < 1e-9] = 0.0  # rounding is out of no log's reach
    support = support_of(ratio, target, np.zeros(len(logged)), lost)
    observed, why = {}, {}
    for metric in METRICS:
        seen = ~np.isnan(logged.metrics[metric])
        share = 1.0 - support.unsupported_mass
        if reason := why_not_identifiable(support, share, ratio, target, ratio, seen, logged.cluster):
            why[metric] = reason
            continue
        with threadpool_limits(limits=1, user_api="blas"):
            models = fit_models(logged, metric, 5, seed, None, {metric: known[metric]}, 1.0)
        outcome = np.nan_to_num(logged.metrics[metric])
        # Paired with what was served, of weight 1 on every row: the champion's own probabilities need not be known.
        served = Parts(own, logged.action, np.ones(len(logged)), outcome, models.known, models.q)
        change = Parts(target - own, logged.action, ratio - 1.0, outcome, models.known, models.q)
        values = [row_values("dr", parts, np.inf) for parts in (served, change)]
        found = bootstrap_interval(
            np.stack([values[0], values[0] + values[1], values[1]], axis=1), logged.cluster,
            confidence=confidence, seed=seed,
        )  # fmt: skip
        old, new, gain = (Estimate(*map(float, one)) for one in zip(*found, strict=True))
        observed[metric] = Contrast(old.value, new.value, gain)
    doubt = doubts(support, logged.cluster, "bootstrap", ratio, target) if observed else []
    return observed, why, tuple(doubt)


def _target(logged: Logged, rows: pl.DataFrame) -> Array:
    """The challenger's probability of each model, float64 [n, m].

    Of the model that it prefers and of the one that was served they are stored; what is left is its exploration, which
    draws evenly from the others.
    """
    at, index = np.arange(len(logged)), logged.catalog.index
    prefers = np.array([index[model] for model in rows["shadow_model"]])
    target = np.zeros(logged.eligible.shape)
    target[at, logged.action] = rows["served_probability"].to_numpy()
    target[at, prefers] = rows["shadow_propensity"].to_numpy()
    others = logged.eligible.copy()
    others[at, logged.action] = others[at, prefers] = False
    left = np.maximum(1.0 - target.sum(axis=1, keepdims=True), 0.0)
    target += np.where(others, left / np.maximum(others.sum(axis=1, keepdims=True), 1), 0.0)
    return target


def _known(catalog: Catalog, rows: pl.DataFrame) -> dict[str, Array]:
    """What the champion expected of every candidate, by metric; NaN of the others."""
    found = {metric: np.full((len(rows), len(catalog)), np.nan) for metric in METRICS}
    for i, candidates in enumerate(rows["known"]):
        for one in candidates:
            for metric, name in zip(METRICS, EXPECTED[:2], strict=True):
                if one[name] is not None:
                    found[metric][i, catalog.index[one["model"]]] = one[name]
    return found


def _numbers(found: Contrast | None) -> tuple[float | None, ...]:
    return (None,) * 5 if found is None else (found.champion, found.challenger, *found.change[:3])
