"""Advice from a log: which kinds of traffic could go elsewhere, what that saves for certain, and what keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import polars as pl
from threadpoolctl import threadpool_limits

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.selfhost import Deployment, against, host
from router_ml.types import CACHED
from training.advice import Advice, Advised, Keeps, Option, SelfHosted, Status, Verdict
from training.barred import Declared, bars_of
from training.experiment import cost_column, plan_experiment, priced
from training.logged import logged_of, one_row_a_request
from training.moves import Moves, told
from training.nuisance import LEAST_OBSERVED
from training.ope import FittedModels, fit_models
from training.policy_value import Estimate
from training.segments import Hours, Segment, hours_of, is_steady, profile_of, segments_of, texts_of, traffic_of

HIGH_VOLUME = 10_000.0
"""Requests a month from which tuning a model of one's own is worth the trouble."""
NEARLY = 0.1
"""How far below the needed quality a model may be that tuning is thought to bring there."""
_OPEN = ("hosted-open", "self-hosted-open")
_METRICS = ("quality", "cost_usd")


def advise(
    log: pl.DataFrame,
    catalog: Catalog,
    *,
    min_quality: float | None = None,
    margin: float = 0.02,
    deployment: Deployment | None = None,
    hosted: str | None = None,
    data_classes: Declared | None = None,
    regions: Declared | None = None,
    confidence: float = 0.95,
    scale: float = 1.0,
    peak_to_mean: float | None = None,
    cluster: str = "session",
    feedback_ratio: float = 1.0,
    seed: int = 0,
) -> Advice:
    """Finds the segments of a log's traffic and says of each whether it is a case for something cheaper, and for what.

    Needed of the requests that would move is a mean quality of `min_quality`, by default what they have today less
    `margin`. The estimates are cross-fitted doubly robust (`ope`, with the prompts' embeddings), of all of a segment's
    requests that may go to a model and whose model was drawn; change and saving are paired with what the log's own
    policy had of the same requests. What was not drawn (propensity 1, or none) tells of its own model alone: where that
    is more than half of what may go there is no number, and where it is less the advice is of the drawn part and says
    so. Nor is there a number where fewer than 100 effective rows with an outcome agree with the model
    (`support.FEW_ESS`), since intervals hold from there on.

    Looking for the best of many segments and models finds the luckiest as well (the winner's curse). So all intervals
    hold together with `confidence`: each has 1 - (1 - confidence) / k with k the number of all of them (Bonferroni),
    whichever is then picked. The segments themselves are found without looking at any outcome. A move is advised where
    the lower bounds of quality (or of its change) and of the saving both are high enough; of several the one with the
    highest lower bound of the saving. The middle of what is picked is still likely to be high: its lower end holds.

    Cases: "self-host" (`deployment` serving `hosted`, of steady traffic, costs less than the lower bound of what the
    best route has for the same requests); "rule" (one model is shown to do for all that may go, and task and tenant say
    which narrow traffic is meant) and "cheaper route" (the same, where no rule can say it, where the log tells of a
    part only, or where the traffic is mixed, so that a router may do better still);
    "fine-tune" (narrow, repetitive, at least 10,000 requests a month, and an open model within 0.1 of the needed
    quality; the tuning's own price is not known here); "explore" (a model that may save more is not known well enough:
    its experiment has requests and price, sized for a test of its own as `plan_experiment` does); else "keep".

    `data_classes` and `regions` as in `barred.bars_of`, `scale` and `peak_to_mean` as in `segments_of`, `cluster` as in
    `logged_of`, `feedback_ratio` as in `ope.evaluate_policy`. Raises InputError as these do, for impossible options,
    and for a `hosted` model that the catalogue has not.
    """
    if not 0.0 <= margin < 1.0 or not (min_quality is None or 0.0 <= min_quality <= 1.0):
        raise InputError("margin and min_quality are qualities: give numbers of 0 to 1")
    if not (0.5 <= confidence < 1.0 and 0.0 < scale < math.inf):
        raise InputError("confidence has to lie in [0.5, 1), and scale above 0")
    if (deployment is None) != (hosted is None) or (hosted is not None and hosted not in catalog):
        raise InputError(f"a deployment needs the model that it serves, one of the catalogue: {', '.join(catalog.ids)}")
    notes = []
    cached = (log["status"] == CACHED).fill_null(False)
    if cached.any():
        log = log.filter(~cached)
        notes.append(f"{cached.sum():,} rows that a cache answered are left out: no model was called")
    rows = one_row_a_request(log).with_columns(cost_column(catalog))
    known = pl.coalesce("fallback_from", "model").is_in(catalog.ids)
    if strange := rows.select((~known).sum()).item():
        rows = rows.filter(known)
        notes.append(f"{strange:,} requests to models that the catalogue does not list are left out")
    texts = texts_of(rows, seed=seed)
    segments = segments_of(rows, texts, scale=scale, peak_to_mean=peak_to_mean, seed=seed)
    if texts is None:
        notes.append("without prompts segments are those of the columns task and tenant alone")
    logged = logged_of(rows, catalog, cluster=cluster)
    if (silent := np.isnan(logged.propensity)).any():
        logged = replace(logged, propensity=np.where(silent, 1.0, logged.propensity))
        notes.append(f"{silent.mean():.1%} of the requests have no propensity: they count as not drawn")
    bars = bars_of(rows, catalog, data_classes=data_classes, regions=regions)
    models = {}
    with threadpool_limits(limits=1, user_api="blas"):
        for metric in _METRICS:
            if not told(logged, metric).any():
                notes.append(f"no request has a {metric}: nothing can be said of it")
                continue
            features = None if texts is None else texts.embedding
            ratio = feedback_ratio if metric == "quality" else 1.0
            models[metric] = fit_models(logged, metric, 5, seed, features, None, ratio)
            notes += [line for line in (*models[metric].warnings, *_cut(models[metric])) if line not in notes]
    own = None if hosted is None else catalog.index[hosted]
    found = [Moves(rows, logged, bars, models, segment, own) for segment in segments]
    intervals = sum(len(look.columns) for look in found)
    each = (1.0 - confidence) / max(intervals, 1)
    needs = _Needs(min_quality, margin, deployment, hosted, confidence, scale, peak_to_mean, rows, hours_of(rows))
    made = [_advised(look, look.estimates(each, seed), needs) for look in found]
    made.sort(key=lambda one: (-(one.spend_usd.value if one.spend_usd else 0.0), one.segment.name))
    return Advice(tuple(made), confidence, intervals, tuple(notes))


@dataclass(frozen=True)
class _Needs:
    min_quality: float | None
    margin: float
    deployment: Deployment | None
    hosted: str | None
    confidence: float
    scale: float
    peak_to_mean: float | None
    log: pl.DataFrame
    hours: Hours


def _cut(fitted: FittedModels) -> list[str]:
    """That who has an outcome is taken for drawn by lot, where it is so rare that weights are cut."""
    rare = 0.0 if fitted.told is None else float((fitted.told < LEAST_OBSERVED).mean())
    if not rare:
        return []
    return [
        f"{rare:.0%} of the requests get a {fitted.metric} with a probability below {LEAST_OBSERVED:.0%}, where "
        "weights are cut: among these it counts as if it came by lot, whoever gives it"
    ]


def _advised(look: Moves, found: dict[tuple[str, int], Estimate], needs: _Needs) -> Advised:
    segment = look.segment
    a_month = segment.requests_per_month
    today, cost = found.get(("quality", -1)), found.get(("cost_usd", -1))
    spend = None if cost is None else _times(cost, a_month)
    needed = needs.min_quality
    if needed is None and today is not None:
        needed = today.value - needs.margin
    counts = np.bincount(look.logged.action, minlength=len(look.catalog))
    order = np.argsort(-counts, kind="stable")
    mix = {look.catalog.ids[j]: float(counts[j] / len(segment)) for j in order if counts[j]}
    paid = np.bincount(look.logged.action, np.nan_to_num(look.logged.metrics["cost_usd"]), len(look.catalog))
    dearest = [look.catalog.ids[j] for j in np.lexsort((-counts, -paid)) if counts[j]]
    options = tuple(_option(look, found, j, spend, needed, needs) for j in range(len(look.catalog)))
    mine = [o for o in options if o.model != needs.hosted]
    shown = [o for o in mine if o.status == "adequate" and o.saving_usd is not None and o.saving_usd.low > 0.0]
    best = max(shown, key=lambda o: o.sure_usd, default=None)
    more = [o for o in options if o.hoped_usd > (0.0 if best is None else best.hoped_usd)]
    tuned = _tuned(look, more, needs)
    options = tuple(_priced(look, o, dearest, needs) if o in more else o for o in options)
    asked = [o for o in options if o.experiment is not None and o.experiment.requests > 0]
    explored = max(asked, key=lambda o: o.hoped_usd, default=None)
    hosted = _hosted(look, found, options, best, needs)
    cases = _cases(segment, best, tuned, explored, hosted)
    classes = look.bars.data_class.gather(segment.rows).unique().to_list()
    sensitivity = None if classes == [None] else cast("str", classes[0]) if len(classes) == 1 else "mixed"
    return Advised(
        segment, sensitivity, mix, spend, today, needed, options, best, tuned, explored, hosted, cases[0], cases[1:]
    )


def _cases(
    segment: Segment, best: Option | None, tuned: Option | None, explored: Option | None, hosted: SelfHosted | None
) -> tuple[Verdict, ...]:
    """All that the segment is a case for, the first the one to begin with."""
    cases: list[Verdict] = []
    if hosted is not None and hosted.pays and hosted.steady:
        cases.append("self-host")
    if best is not None:
        cases.append("rule" if segment.declared and segment.narrow and best.whole else "cheaper route")
    if tuned is not None:
        cases.append("fine-tune")
    if explored is not None:
        cases.append("explore")
    return tuple(cases) or ("keep",)


def _option(
    look: Moves, found: dict[tuple[str, int], Estimate], j: int, spend: Estimate | None, needed: float | None,
    needs: _Needs,
) -> Option:  # fmt: skip
    card, a_month = look.catalog.cards[j], look.segment.requests_per_month
    may, moved = float(look.may[:, j].mean()), float(look.moved[:, j].mean())
    those = look.rows if may < 0.5 else look.rows.filter(pl.Series(look.may[:, j]))
    now, own = those["cost_usd"].mean(), those.select(priced(look.catalog, pl.lit(card.id)).mean()).item()
    part = len(those) / len(look.rows)
    hoped = (float(now) - own) * part * a_month if isinstance(now, float) and own is not None else 0.0
    quality, change = found.get(("quality", j)), found.get(("quality change", j))
    costs, gain = found.get(("cost_usd", j)), found.get(("cost_usd change", j))
    saving = None if gain is None else _times(Estimate(-gain.value, -gain.high, -gain.low, gain.se), a_month)
    status, keeps, why = _judged(look, j, may, quality, change, needed, needs)
    if status == "adequate" and (saving is None or saving.low <= 0.0):
        keeps, why = "cost", "it is not shown to be cheaper"
    return Option(
        card.id, status, may, moved, float(look.rest[j]), quality, change,
        None if costs is None else _times(costs, a_month), saving, hoped, keeps, why,
    )  # fmt: skip


def _judged(
    look: Moves, j: int, may: float, quality: Estimate | None, change: Estimate | None, needed: float | None,
    needs: _Needs,
) -> tuple[Status, Keeps, str]:  # fmt: skip
    if may < 0.5:
        kind, why = look.bars.why(look.segment.rows, j)
        return "barred", cast("Keeps", kind), why
    if quality is None or change is None or needed is None:
        return "unknown", "missing evidence", look.why[j] or "no request has a quality"
    tested, least = (change, -needs.margin) if needs.min_quality is None else (quality, needs.min_quality)
    of_these = quality.value - change.value - needs.margin
    said = f"quality {quality.value:.3f}, needed {of_these:.3f}, change {change.value:+.3f} ({change.low:+.3f} to "
    said += f"{change.high:+.3f})"
    if needs.min_quality is not None:
        said = f"quality {quality.value:.3f} ({quality.low:.3f} to {quality.high:.3f}), needed {needed:.3f}"
    if tested.low >= least:
        return "adequate", "", ""
    if tested.high < least:
        return "below", "quality", said
    return "undecided", "missing evidence" if tested.value >= least else "quality", said


def _times(found: Estimate, factor: float) -> Estimate:
    return Estimate(*(value * factor for value in found))


def _over(option: Option, needs: _Needs) -> float:
    """How far the option's estimated quality is above what its requests need; NaN where it is not known."""
    if option.quality is None or option.change is None:
        return math.nan
    return option.change.value + needs.margin if needs.min_quality is None else option.quality.value - needs.min_quality


def _tuned(look: Moves, more: list[Option], needs: _Needs) -> Option | None:
    """The open model that is nearly good enough on traffic that a model could be tuned for."""
    of = look.segment
    if not (of.narrow and of.repetitive and of.requests_per_month >= HIGH_VOLUME):
        return None
    near = [
        o for o in more
        if o.status in ("below", "undecided") and _over(o, needs) >= -NEARLY
        and look.catalog[o.model].tier in _OPEN and o.saving_usd is not None and o.saving_usd.low > 0.0
    ]  # fmt: skip
    return max(near, key=lambda o: o.hoped_usd, default=None)


def _priced(look: Moves, option: Option, today: list[str], needs: _Needs) -> Option:
    """The option with what it takes to know whether it is good enough, where that is what it lacks.

    It is drawn against the model that most of the segment's spend goes to today.
    """
    rival = next((model for model in today if model != option.model), None)
    if option.keeps != "missing evidence" or rival is None:
        return option
    apart = needs.margin if needs.margin > 0.0 else 0.02
    if needs.min_quality is not None and option.quality is not None:
        apart = max(apart, abs(option.quality.value - needs.min_quality))
    rows = look.rows.filter(pl.Series(look.may[:, look.catalog.index[option.model]]))
    try:
        plan = plan_experiment(rows, look.catalog, option.model, rival, effect=apart, confidence=needs.confidence)
    except InputError as error:
        return replace(option, why=f"{option.why}; {error}")
    if not plan.requests:
        return replace(option, why=f"{option.why}; it is too near to the needed quality for more requests to tell")
    days = plan.requests / (plan.per_day * needs.scale)
    price = (
        f"{plan.requests:,} requests ({days:,.0f} days of them) drawn evenly from it and {rival} tell {apart:.2g} apart"
    )
    if not math.isnan(plan.cost_usd):
        price += f"; they cost {plan.cost_usd:,.2f} USD, and {plan.anyway_usd:,.2f} as they are routed now"
    return replace(option, why=f"{option.why}; {price}", experiment=plan)


def _hosted(
    look: Moves, found: dict[tuple[str, int], Estimate], options: tuple[Option, ...], best: Option | None,
    needs: _Needs,
) -> SelfHosted | None:  # fmt: skip
    """The deployment sized for what could go to it, beside the best route there is for just that; None for nothing."""
    own = next((o for o in options if o.model == needs.hosted), None)
    if needs.deployment is None or own is None or look.hosts is None or own.may < 0.5:
        return None
    rows = look.segment.rows[look.hosts]
    traffic, _ = traffic_of(needs.log, needs.hours, rows, needs.scale, needs.peak_to_mean)
    if traffic is None:
        return None
    hosting = host(needs.deployment, traffic)
    paid = look.rows.filter(pl.Series(look.hosts)).group_by("model").agg(pl.col("cost_usd").sum(), n=pl.len())
    main = paid.filter(pl.col("model") != own.model).sort("cost_usd", "n", "model", descending=[True, True, False])
    name = best.model if best is not None else main["model"][0] if len(main) else own.model
    route = found.get(("hosted cost", -1 if best is None else look.catalog.index[best.model]))
    saving = None
    if route is not None:  # what the deployment costs is certain, given the traffic; what overflows it goes the route
        kept, usd = _times(route, look.segment.requests_per_month * (1.0 - hosting.overflow)), hosting.usd_per_month
        saving = Estimate(kept.value - usd, kept.low - usd, kept.high - usd, kept.se)
    return SelfHosted(
        own.model, hosting, against(hosting, look.catalog[name]), None if best is None else best.model,
        len(rows) / len(look.segment), is_steady(*profile_of(needs.hours, rows)), saving,
        pays=own.status == "adequate" and saving is not None and saving.low > 0.0,
    )  # fmt: skip
