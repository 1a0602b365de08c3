"""Advice on planted traffic: what is truly as good and cheaper is found, what may not move is left alone."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, read_log, write_log
from router_ml.policy import Rule
from router_ml.prices import Usage, price_call
from router_ml.selfhost import Deployment
from router_ml.traffic_shape import MONTH_HOURS
from router_ml.types import LongContext, ModelCard
from training import world
from training.advice import Advice, Advised
from training.advise import advise
from training.experiment import cost_column, priced
from training.segments import segments_of, texts_of
from training.simulate import SIMULATED_CATALOG, simulate, true_quality

_PRICES = {"big": (3.0, 15.0), "mid": (0.5, 2.0), "small": (0.2, 0.6), "own": (0.4, 1.5)}
_TIERS = dict(zip(_PRICES, ("frontier-closed", "mid-closed", "hosted-open", "self-hosted-open"), strict=True))
MODELS = Catalog(
    tuple(
        ModelCard(
            id=name, provider=name, tier=_TIERS[name], input_usd_per_mtok=into, output_usd_per_mtok=out,
            context_window=100_000, regions=frozenset({"eu"}),
            data_classes=frozenset({"public", "confidential"} if name in ("mid", "own") else {"public"}),
        )
        for name, (into, out) in _PRICES.items()
    )
)  # fmt: skip
HOSTING = Deployment(
    gpus_per_replica=1, usd_per_gpu_hour=2.0, input_tokens_per_second=20_000, output_tokens_per_second=2000,
    min_replicas=1,
)  # fmt: skip
DAYS, SCALE = 28, 100.0
LUCKY = 31  # a seed whose luckiest model looks good enough
START = datetime(2025, 1, 6, tzinfo=UTC)
_TOPICS = ["parcel", "invoice", "garden", "planet", "recipe", "violin", "tunnel", "forest", "camera", "bridge"]


@dataclass(frozen=True)
class Kind:
    """Planted traffic of one tenant and task: success of each model, tokens a request, and when it comes."""

    tenant: str
    task: str
    rows: int
    p: tuple[float, float, float, float]
    tokens: tuple[int, int] = (500, 100)
    template: bool = True
    weekly_burst: bool = False


TAGS = Kind("shop", "tag", 6000, (0.95, 0.95, 0.95, 0.70))
SECRET = Kind("bank", "contracts", 3000, (0.95, 0.60, 0.95, 0.60))
BURST = Kind("lab", "nightly", 4000, (0.97, 0.97, 0.50, 0.97), (5000, 1000), weekly_burst=True)
STEADY = Kind("desk", "answers", 4000, (0.97, 0.97, 0.50, 0.97), (5000, 1000))
NEARLY = Kind("news", "sort", 3000, (0.95, 0.60, 0.88, 0.60))
KINDS = (TAGS, SECRET, BURST, STEADY, NEARLY)


def planted(kinds: tuple[Kind, ...] = KINDS, seed: int = 5) -> pl.DataFrame:
    """A log whose models were drawn evenly, every outcome known."""
    rng = np.random.default_rng(seed)
    frames = []
    for kind in kinds:
        n = kind.rows
        action = rng.integers(0, len(MODELS), n)
        hours = rng.integers(0, DAYS // 7, n) * 168 + 3 if kind.weekly_burst else rng.integers(0, DAYS * 24, n)
        seconds = np.sort(hours * 3600 + rng.integers(0, 3600, n))
        into, out = (np.maximum(rng.poisson(mean, n), 1) for mean in kind.tokens)
        price = np.array(list(_PRICES.values()))[action] * 1e-6
        topics = rng.choice(_TOPICS, (n, 3))
        said = [
            f"Please {kind.task} this {kind.tenant} message about the {a} and its {b}, case {i}"
            if kind.template
            else f"{a} {b} {c}"
            for i, (a, b, c) in enumerate(topics)
        ]
        frames.append(
            pl.DataFrame(
                {
                    "request_id": [f"{kind.task}-{i}" for i in range(n)],
                    "time": [START + timedelta(seconds=int(s)) for s in seconds],
                    "tenant": kind.tenant, "task": kind.task, "prompt": said,
                    "model": [MODELS.ids[a] for a in action], "propensity": 1 / len(MODELS),
                    "input_tokens": into, "output_tokens": out,
                    "cost_usd": into * price[:, 0] + out * price[:, 1], "status": "ok",
                    "quality": (rng.random(n) < np.array(kind.p)[action]).astype(float),
                }
            )
        )  # fmt: skip
    frame = pl.concat(frames).sort("time")
    known = [pl.col(c).cast(t) if c in frame.columns else pl.lit(None, t).alias(c) for c, t in LOG_SCHEMA.items()]
    return frame.select(known)


def of(found: Advice, task: str) -> Advised:
    (one,) = (one for one in found.segments if one.segment.task == task)
    return one


@pytest.fixture(scope="module")
def found() -> Advice:
    return advise(
        planted(), MODELS, margin=0.05, deployment=HOSTING, hosted="own", data_classes={"tenant=bank": "confidential"},
        scale=SCALE,
    )  # fmt: skip


def test_planted_traffic_comes_apart_by_its_columns(found: Advice) -> None:
    assert sorted(one.segment.name for one in found.segments) == sorted(f"{k.task}/{k.tenant}" for k in KINDS)
    assert sum(len(one.segment) for one in found.segments) == sum(kind.rows for kind in KINDS)
    assert all(one.segment.narrow and one.segment.repetitive and one.segment.declared for one in found.segments)
    assert {one.segment.task for one in found.segments if not one.segment.steady} == {"nightly"}


def test_narrow_traffic_that_a_cheap_model_does_as_well_is_a_rule_and_the_saving_holds_the_truth(found: Advice) -> None:
    tags = of(found, "tag")
    assert tags.verdict == "rule" and tags.best is not None and tags.best.model == "small"
    assert tags.rule == Rule("small", "tag", "shop")
    each = [kind_usd(TAGS, model) for model in MODELS.ids]
    month = TAGS.rows * SCALE * MONTH_HOURS / (DAYS * 24)
    assert tags.segment.requests_per_month == pytest.approx(month, rel=0.01)
    truth = (float(np.mean(each)) - kind_usd(TAGS, "small")) * month
    saving = tags.best.saving_usd
    assert saving is not None and 0 < saving.low < truth < saving.high < 1.5 * truth
    assert tags.spend_usd is not None and tags.spend_usd.low < np.mean(each) * month < tags.spend_usd.high
    assert tags.quality is not None and tags.quality.low < np.mean(TAGS.p) < tags.quality.high


def kind_usd(kind: Kind, model: str) -> float:
    return sum(t * price * 1e-6 for t, price in zip(kind.tokens, _PRICES[model], strict=True))


def test_sensitive_traffic_is_not_sent_where_it_may_not_go(found: Advice) -> None:
    secret = of(found, "contracts")
    assert secret.data_class == "confidential"
    assert {o.model for o in secret.options if o.status == "barred"} == {"big", "small"}
    small = next(o for o in secret.options if o.model == "small")
    assert small.keeps == "residency" and "confidential" in small.why and small.saving_usd is None
    assert secret.best is None and secret.verdict == "keep"
    assert any(line.startswith("small: residency") for line in secret.keeps)
    free = advise(planted((SECRET,)), MODELS, margin=0.05)
    assert free.segments[0].best is not None and free.segments[0].best.model == "small"


def test_steady_and_large_traffic_is_for_self_hosting_and_bursts_are_not(found: Advice) -> None:
    steady, burst = of(found, "answers"), of(found, "nightly")
    assert steady.verdict == "self-host" and steady.hosted is not None and steady.hosted.pays
    saving, best = steady.hosted.saving_usd, steady.best
    assert saving is not None and best is not None and best.spend_usd is not None and steady.hosted.route == best.model
    assert saving.value == pytest.approx(best.spend_usd.value - 1460, rel=1e-6) and saving.low > 0, "one replica"
    assert burst.verdict in ("rule", "cheaper route") and burst.best is not None and burst.best.model == "mid"
    assert "self-host" not in burst.also and burst.hosted is not None and not burst.hosted.pays
    assert burst.hosted.hosting.usd_per_month > 10 * steady.hosted.hosting.usd_per_month
    for one, kind in ((steady, STEADY), (burst, BURST)):
        mtok = sum(kind.tokens) * 1e-6 * kind.rows * SCALE * MONTH_HOURS / (DAYS * 24)
        assert one.segment.traffic is not None and one.segment.traffic.mtok_per_month == pytest.approx(mtok, rel=0.02)
    even = steady.hosted.against.break_even_mtok
    assert even is not None and even < steady.hosted.hosting.traffic.mtok_per_month


def test_a_small_model_that_is_nearly_good_enough_on_narrow_traffic_is_for_fine_tuning() -> None:
    news = advise(planted((NEARLY,)), MODELS, scale=SCALE, min_quality=0.93).segments[0]
    assert news.verdict == "fine-tune" and news.tuned is not None and news.tuned.model == "small"
    small = next(o for o in news.options if o.model == "small")
    assert small.status == "below" and small.keeps == "quality"
    few = advise(planted((NEARLY,)), MODELS, min_quality=0.93).segments[0]
    assert few.segment.requests_per_month < 10_000 and "fine-tune" not in (few.verdict, *few.also)


def test_a_log_whose_models_were_not_drawn_gives_a_price_and_no_number() -> None:
    log = planted((TAGS,)).filter(pl.col("model") == "big")
    for propensity in (1.0, None):
        (one,) = advise(log.with_columns(propensity=pl.lit(propensity, pl.Float64)), MODELS).segments
        small = next(o for o in one.options if o.model == "small")
        assert one.verdict == "explore" and one.best is None and one.explored is not None
        assert small.status == "unknown" and small.keeps == "missing evidence"
        assert all(o.quality is None and o.saving_usd is None for o in one.options if o.model != "big")
        plan = small.experiment
        assert plan is not None and plan.requests > 1000 and plan.b.model == "big"
        assert plan.cost_usd == pytest.approx(
            plan.requests * (kind_usd(TAGS, "small") + kind_usd(TAGS, "big")) / 2, rel=0.02
        )
        assert f"{plan.requests:,} requests" in small.why and "USD" in small.why


def test_without_feedback_there_is_no_number_and_nothing_to_explore() -> None:
    log = planted((TAGS,)).with_columns(quality=pl.lit(None, pl.Float64))
    fails = pl.Series(np.random.default_rng(0).random(len(log)) < 0.2)
    found = advise(log.with_columns(status=pl.when(fails).then(pl.lit("error")).otherwise("status")), MODELS)
    assert all(o.quality is None for o in found.segments[0].options) and found.segments[0].verdict == "keep"
    assert any("no request has a quality" in note for note in found.notes)
    assert "without feedback" in " ".join(found.segments[0].keeps)


def test_the_luckiest_of_many_segments_is_not_taken_for_good() -> None:
    """No cheaper model is quite good enough anywhere; some seem so by an interval of their own, and none is advised."""
    kinds = tuple(Kind("t", f"task{i}", 450, (0.9, 0.795, 0.795, 0.795)) for i in range(12))
    found = advise(planted(kinds, seed=LUCKY), MODELS, min_quality=0.8)
    assert len(found.segments) == 12
    qualities = [o.quality for one in found.segments for o in one.options if o.model != "big" and o.quality]
    assert any(quality.value - 1.96 * quality.se > 0.8 for quality in qualities)
    assert all(one.best is None for one in found.segments)


def test_hosting_is_not_advised_for_bursts_that_it_would_pay_for_nor_for_a_model_that_is_not_good_enough() -> None:
    cheap = replace(HOSTING, usd_per_gpu_hour=0.02)
    (burst,) = advise(planted((BURST,)), MODELS, margin=0.05, deployment=cheap, hosted="own", scale=SCALE).segments
    assert burst.hosted is not None and burst.hosted.pays and "self-host" not in (burst.verdict, *burst.also)
    assert any("bursty" in line for line in burst.keeps)
    (poor,) = advise(planted((STEADY,)), MODELS, margin=0.05, deployment=cheap, hosted="small", scale=SCALE).segments
    assert poor.hosted is not None and not poor.hosted.pays and "self-host" not in (poor.verdict, *poor.also)


def half_drawn(p: tuple[float, ...], fixed: str, share: float = 0.48) -> pl.DataFrame:
    """A kind of which a share was always sent to one model, with propensity 1, and the rest drawn of big and mid."""
    log = planted((replace(TAGS, rows=8000),), seed=1)
    rng = np.random.default_rng(2)
    pinned = rng.random(len(log)) < share
    model = np.where(pinned, fixed, rng.choice(["big", "mid"], len(log)))
    good = np.array([p[MODELS.index[m]] for m in model])
    price = np.array([_PRICES[m] for m in model]) * 1e-6
    into, out = log["input_tokens"].to_numpy(), log["output_tokens"].to_numpy()
    return log.with_columns(
        prompt=pl.format("Please tag this message about the parcel and its invoice, case {}", pl.int_range(pl.len())),
        model=pl.Series(model), propensity=pl.Series(np.where(pinned, 1.0, 0.5)),
        quality=pl.Series((rng.random(len(log)) < good).astype(float)),
        cost_usd=pl.Series(into * price[:, 0] + out * price[:, 1]),
    )  # fmt: skip


def test_what_was_not_drawn_does_not_dilute_the_change_of_what_would_move() -> None:
    """Mid is 0.12 worse; the drawn half of the requests has it in half of the cases already: 0.06 a moved request."""
    worse = half_drawn((0.97, 0.85, 0.6, 0.6), "big").with_columns(prompt=pl.lit(None, pl.String))
    for quality in ({"margin": 0.04}, {"min_quality": 0.9}):
        (one,) = advise(worse, MODELS, **quality).segments  # type: ignore[arg-type]
        mid = next(o for o in one.options if o.model == "mid")
        assert mid.status == "below" and mid.keeps == "quality" and one.best is None and one.rule is None
        assert mid.change is not None and mid.change.low < -0.06 < mid.change.high < -0.04
        assert mid.quality is not None and mid.quality.low < 0.85 < mid.quality.high
        assert mid.moved == pytest.approx(0.52, abs=0.01) and mid.rest == pytest.approx(0.48, abs=0.01)


def test_advice_is_of_the_drawn_part_where_the_log_tells_of_no_more_and_no_rule_pins_the_rest() -> None:
    (one,) = advise(half_drawn((0.97, 0.97, 0.6, 0.6), "big"), MODELS, margin=0.05).segments
    assert one.verdict == "cheaper route" and one.rule is None and one.best is not None and one.best.model == "mid"
    assert "for the 52% whose model was drawn, and of the others nothing is known" in one.why
    saving = (kind_usd(TAGS, "big") - kind_usd(TAGS, "mid")) / 2 * 0.52 * one.segment.requests_per_month
    assert one.best.saving_usd is not None and one.best.saving_usd.value == pytest.approx(saving, rel=0.05)
    # What is pinned to the model already needs no evidence: there a rule is of all.
    (there,) = advise(half_drawn((0.97, 0.97, 0.6, 0.6), "mid"), MODELS, margin=0.05).segments
    assert there.verdict == "rule" and there.best is not None and there.best.rest == 0.0
    assert there.best.moved == pytest.approx(0.52, abs=0.01)


def test_hosting_is_sized_and_priced_by_the_very_requests_that_may_go() -> None:
    """Three in five requests may go, and they are the short ones: 2 % of the tokens."""
    log = planted((replace(STEADY, rows=6000, p=(0.97, 0.5, 0.5, 0.97)),), seed=3)
    rng, n = np.random.default_rng(0), len(log)
    short = rng.random(n) < 0.6
    others = [name for name in MODELS.ids if name != "own"]
    model = np.where(~short & (log["model"] == "own").to_numpy(), rng.choice(others, n), log["model"].to_numpy())
    price = np.array([_PRICES[m] for m in model]) * 1e-6
    into, out = np.where(short, 200, 8000), np.where(short, 20, 2000)
    cost = into * price[:, 0] + out * price[:, 1]
    good = np.array([dict(zip(MODELS.ids, (0.97, 0.5, 0.5, 0.97), strict=True))[m] for m in model])
    log = log.with_columns(
        model=pl.Series(model), input_tokens=pl.Series(into), output_tokens=pl.Series(out), cost_usd=pl.Series(cost),
        propensity=pl.Series(np.where(short, 1 / 4, 1 / 3)),
        quality=pl.Series((rng.random(n) < good).astype(float)),
        candidates=pl.Series([list(MODELS.ids) if one else others for one in short]),
    )  # fmt: skip
    (one,) = advise(log, MODELS, margin=0.05, deployment=HOSTING, hosted="own", scale=SCALE).segments
    hosted, month = one.hosted, one.segment.requests_per_month
    assert hosted is not None and hosted.saving_usd is not None and hosted.share == pytest.approx(short.mean())
    of_these = cost[short].sum() / n * month
    assert hosted.saving_usd.low < of_these - hosted.hosting.usd_per_month < hosted.saving_usd.high
    assert hosted.hosting.traffic.mtok_per_month == pytest.approx(220 * short.mean() * month / 1e6, rel=0.01)
    assert hosted.hosting.replicas.max() == 1 and not hosted.pays


def test_long_calls_are_priced_as_such_where_the_log_has_no_costs() -> None:
    dear = replace(MODELS["small"], long_context=(LongContext(above_tokens=500, input_usd_per_mtok=20.0,
                                                              output_usd_per_mtok=60.0),))  # fmt: skip
    cards = Catalog(tuple(dear if card.id == "small" else card for card in MODELS))
    log = planted((TAGS,)).head(2000).with_columns(cost_usd=pl.lit(None, pl.Float64))
    found = log.with_columns(cost_column(cards))
    for model, into, out, usd in found.select("model", "input_tokens", "output_tokens", "cost_usd").iter_rows():
        assert usd == pytest.approx(float(price_call(cards[model], Usage(input_tokens=into, output_tokens=out))))
    for catalog, dearer in ((MODELS, False), (cards, True)):
        (one,) = advise(log.with_columns(propensity=pl.lit(1.0)), catalog).segments
        small = next(o for o in one.options if o.model == "small")
        mean = log.select(priced(catalog, pl.lit("small")).mean()).item() * one.segment.requests_per_month
        assert one.spend_usd is not None and small.priced_saving_usd == pytest.approx(one.spend_usd.value - mean)
        assert (small.priced_saving_usd < 0) == dearer


def test_what_was_assumed_stands_in_the_notes() -> None:
    log = planted((TAGS,))
    rare = log.with_columns(quality=pl.when(pl.int_range(pl.len()) % 100 == 0).then("quality"))
    notes = advise(rare, MODELS).notes
    assert any("get a quality with a probability below 2%" in note and "by lot" in note for note in notes)
    silent = log.with_columns(propensity=pl.when(pl.int_range(pl.len()) % 4 > 0).then("propensity"))
    found = advise(silent, MODELS, margin=0.05)
    assert any("25.0% of the requests have no propensity" in note for note in found.notes)
    assert found.segments[0].best is not None and found.segments[0].best.rest == pytest.approx(0.25)
    whole = advise(log, MODELS)
    assert not whole.notes
    hits = log.with_columns(pl.col("request_id") + "-hit", status=pl.lit("cached"), cost_usd=pl.lit(0.0))
    again = advise(pl.concat([log, hits]), MODELS)
    assert again.notes == ("6,000 rows that a cache answered are left out: no model was called",)
    assert again.to_frame().equals(whole.to_frame())


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("advise") / "log"
    simulate(9000, folder, seed=11, logging="mostly-best")
    return folder


def truths(folder: Path, log: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Quality and cost of a call of each model, with failures, retries and fallbacks, [n, m] each."""
    truth = true_quality(folder, log["request_id"])
    p, usd = (truth.select(f"{name}/{m}" for m in SIMULATED_CATALOG.ids).to_numpy() for name in ("p", "cost_usd"))
    allowed = np.stack([log["candidates"].list.contains(m).to_numpy() for m in SIMULATED_CATALOG.ids], axis=1)
    falls = np.isin(log["tenant"].to_numpy(), np.array(world.TENANTS)[world.FALLS_BACK])
    outage, glitch = world.OUTAGE, world.GLITCH
    sent = log["input_tokens"].to_numpy()[:, None] * np.array([c.input_usd_per_mtok for c in SIMULATED_CATALOG]) * 1e-6
    again = (world.MAX_RETRIES * outage + (1 - outage) * (glitch + glitch**2)) * sent
    quality, cost = (1 - outage) * p, again + (1 - outage) * usd
    for j in range(p.shape[1]):
        for i in np.flatnonzero(falls):
            other = next((k for k in world.FALLBACK_ORDER if allowed[i, k] and k != j), None)
            if other is not None:
                quality[i, j] += outage[j] * p[i, other]
                cost[i, j] += outage[j] * usd[i, other]
    return quality, cost


def test_all_intervals_of_a_simulated_log_hold_the_truth_together(simulated: Path) -> None:
    log = read_log(simulated)
    found = advise(log, SIMULATED_CATALOG, feedback_ratio=1.5)
    quality, cost = truths(simulated, log)
    allowed = np.stack([log["candidates"].list.contains(m).to_numpy() for m in SIMULATED_CATALOG.ids], axis=1)
    uniform = allowed / allowed.sum(axis=1, keepdims=True)
    best = np.eye(len(SIMULATED_CATALOG))[SIMULATED_CATALOG.index[world.BEST]]
    today = np.where(allowed @ best[:, None] > 0, 0.7 * best + 0.3 * uniform, uniform)
    checked = 0
    for one in found.segments:
        rows, month = one.segment.rows, one.segment.requests_per_month
        for j, option in enumerate(one.options):
            if option.quality is None or option.change is None or option.saving_usd is None:
                continue
            target = np.where(allowed[rows, j : j + 1], np.eye(len(SIMULATED_CATALOG))[j], today[rows])
            changed, spent = (((target - today[rows]) * of[rows]).sum(axis=1).mean() for of in (quality, cost))
            changed /= allowed[rows, j].mean()  # a moved request
            assert option.moved == pytest.approx(allowed[rows, j].mean()) and option.whole
            assert option.change.low <= changed <= option.change.high, (one.segment.name, option.model)
            assert option.saving_usd.low <= -spent * month <= option.saving_usd.high, (one.segment.name, option.model)
            checked += 1
    assert checked >= 6
    unknown = [o for one in found.segments for o in one.options if o.status == "unknown"]
    assert unknown and all(o.quality is None for o in unknown), "a twentieth of few requests is too little"
    tutorly = [o for one in found.segments for o in one.options if one.segment.tenant == "tutorly"]
    quill = [o for o in tutorly if o.model == "quill-8x7b"]
    assert quill and all(o.status == "barred" and o.keeps == "residency" and "us" in o.why for o in quill)


def test_clusters_of_untagged_traffic_are_its_families_whatever_the_seed(simulated: Path) -> None:
    from sklearn.metrics import adjusted_rand_score

    log = read_log(simulated).filter(pl.col("tenant") == "lexfirm")
    family = true_quality(simulated, log["request_id"])["family"].to_numpy()
    first = log["messages"].is_null().to_numpy()  # a later turn may read "thanks, and shorter?"
    labels = []
    for seed in (0, 1):
        made = segments_of(log, texts_of(log, seed=seed), seed=seed)
        assert len(made) > 1 and all(one.terms and not one.declared for one in made)
        label = np.empty(len(log), dtype=int)
        for at, one in enumerate(made):
            label[one.rows] = at
        labels.append(label)
    assert adjusted_rand_score(*labels) > 0.9
    assert (
        adjusted_rand_score(labels[0][first] == labels[0][first][family[first] == "legal"][0], family[first] == "legal")
        > 0.8
    )


def test_a_segment_is_declared_where_a_rule_matches_it_and_nothing_else() -> None:
    tenants = [Kind(tenant, "tag", rows, TAGS.p) for tenant, rows in (("a", 400), ("b", 150), ("c", 150))]
    log = planted((*tenants, Kind("a", "sort", 400, TAGS.p)))
    log = log.with_columns(task=pl.when(pl.col("task") == "tag").then("task"))
    made = segments_of(log, None)
    assert [(one.task, one.tenant, one.declared, len(one)) for one in made] == [
        (None, "a", False, 400), ("tag", "a", True, 400), ("tag", None, False, 300),
    ]  # fmt: skip


def test_without_prompts_the_columns_make_the_segments() -> None:
    log = planted((TAGS, SECRET)).with_columns(prompt=pl.lit(None, pl.String))
    found = advise(log, MODELS, margin=0.05)
    assert sorted(one.segment.name for one in found.segments) == ["contracts/bank", "tag/shop"]
    assert of(found, "tag").best is not None and of(found, "tag").segment.similarity is None
    assert of(found, "tag").verdict == "cheaper route", "how narrow it is is not known"
    assert any("without prompts" in note for note in found.notes)


def test_results_are_frames_json_words_and_a_plot(found: Advice) -> None:
    frame, options = found.to_frame(), found.options_frame()
    assert len(frame) == len(KINDS) and len(options) == len(KINDS) * len(MODELS)
    assert frame["spend_usd"].is_sorted(descending=True)
    said = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert [one["verdict"] for one in said["segments"]] == frame["verdict"].to_list()
    assert len(said["segments"][0]["options"]) == len(MODELS)
    assert any("rule: small is good enough" in line for line in found.in_words)
    assert len(found.plot().axes[0].patches) >= len(KINDS)


def test_impossible_options_say_what_to_do() -> None:
    log = planted((TAGS,)).head(300)
    for options, said in (
        ({"margin": 2.0}, "0 to 1"),
        ({"deployment": HOSTING}, "the model that it serves"),
        ({"confidence": 1.0}, "confidence"),
        ({"data_classes": {"team=x": "secret"}}, "task=NAME"),
    ):
        with pytest.raises(InputError, match=said):
            advise(log, MODELS, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no rows"):
        advise(log.head(0), MODELS)


def test_the_command(tmp_path: Path) -> None:
    write_log([planted((TAGS, SECRET))], tmp_path / "log", catalog=MODELS)
    (tmp_path / "hosting.toml").write_text(
        "[deployment]\ngpus_per_replica = 1\nusd_per_gpu_hour = 2.0\ninput_tokens_per_second = 20000\n"
        "output_tokens_per_second = 2000\n"
    )
    outputs = {name: str(tmp_path / f"out.{name}") for name in ("json", "csv", "png")}
    done = CliRunner().invoke(
        main,
        [
            "advise", str(tmp_path / "log"), "--margin", "0.05", "--deployment", str(tmp_path / "hosting.toml"),
            "--host", "own", "--data-class", "tenant=bank:confidential", "--json", outputs["json"], "--csv",
            outputs["csv"], "--plot", outputs["png"],
        ],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "tag/shop" in done.output and "rule: small is good enough" in done.output
    assert "confidential" in done.output and "self-hosting own" in done.output
    assert json.loads(Path(outputs["json"]).read_text())["segments"]
    assert pl.read_csv(outputs["csv"])["verdict"].to_list()[0] == "rule"
    assert Path(outputs["png"]).stat().st_size > 1000
    assert "its middle may be high" in done.output
    wrong = CliRunner().invoke(main, ["advise", str(tmp_path / "log"), "--feedback-ratio", "0"])
    assert wrong.exit_code == 2 and "twice as often" in wrong.output
    wrong = CliRunner().invoke(main, ["advise", str(tmp_path / "log"), "--data-class", "bank"])
    assert wrong.exit_code == 2 and "task=NAME:VALUE" in wrong.output
