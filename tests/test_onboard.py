"""A new model without retraining: the others stay as they were, and what is known of it shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from features.load import load_estimator, load_neighbours, load_router
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.conversation import request_of
from router_ml.errors import InputError
from router_ml.logs import write_log
from router_ml.quality import LearnedEstimator
from router_ml.types import Estimate, ModelCard
from training.dataset import Dataset, build_dataset
from training.fit import fit
from training.onboard import fit_mix, onboard, onboard_bundle, outcomes_of, prior_mix
from training.simulate import simulate, true_quality
from training.train import train
from training.world import SIMULATED_CATALOG

NEW = ModelCard(
    id="newcomer",
    provider="acme",
    tier="mid-closed",
    input_usd_per_mtok=0.4,
    output_usd_per_mtok=1.6,
    context_window=64_000,
)
TOPICS = ["river ledger", "violin comet tensor", "market", "protein theorem cloud", "engine", "stone stone river"]
REQUESTS = [
    request_of(prompt=text.format(topic))
    for topic in TOPICS
    for text in ("Prove rigorously that the {} operator is bounded.", "What is the plural of {}?", "Compare {}.")
]


@pytest.fixture(scope="module")
def estimator(tiny_bundle: Path) -> LearnedEstimator:
    return load_estimator(read_bundle(tiny_bundle))


@pytest.fixture(scope="module")
def log(tiny_log: pl.DataFrame) -> pl.DataFrame:
    """The tiny log's rows of the weakest model, as if a new model had answered them; other models' rows beside them."""
    own = tiny_log.filter(pl.col("model") == "local").with_columns(model=pl.lit("newcomer"))
    return pl.concat([own, tiny_log.filter(pl.col("model") == "mid")])


def probabilities(estimates: list[Estimate]) -> np.ndarray:
    return np.stack([e.p_ok for e in estimates])


def test_what_is_said_of_the_others_does_not_change(estimator: LearnedEstimator, log: pl.DataFrame) -> None:
    wider = onboard(estimator, NEW, outcomes_of(log, NEW))
    before, after = estimator.estimate_many(REQUESTS), wider.estimate_many(REQUESTS)
    assert probabilities(after).shape == (len(REQUESTS), 5)
    assert np.allclose(probabilities(after)[:, :4], probabilities(before), atol=1e-6, rtol=0)
    for old, new in zip(before, after, strict=True):
        assert np.allclose(new.output_tokens[:4], old.output_tokens, rtol=1e-5)
    for request, new in zip(REQUESTS, after, strict=True):
        assert np.allclose(wider.estimate(request).p_ok, new.p_ok, atol=1e-6)


def test_a_second_model_may_follow_the_first(estimator: LearnedEstimator, log: pl.DataFrame) -> None:
    first = onboard(estimator, NEW, outcomes_of(log, NEW))
    second = onboard(first, replace(NEW, id="another", sibling="newcomer"))
    p = probabilities(second.estimate_many(REQUESTS))
    assert np.allclose(p[:, :5], probabilities(first.estimate_many(REQUESTS)), atol=1e-6, rtol=0)
    assert np.corrcoef(p[:, 4], p[:, 5])[0, 1] > 0.95


@pytest.mark.parametrize("sibling", ["frontier", "hosted", "local"])
def test_without_outcomes_it_is_like_its_sibling(estimator: LearnedEstimator, sibling: str) -> None:
    p = probabilities(onboard(estimator, NEW, sibling=sibling).estimate_many(REQUESTS))
    at = ["frontier", "mid", "hosted", "local"].index(sibling)
    assert int(np.abs(p[:, 4:] - p[:, :4]).mean(axis=0).argmin()) == at
    if sibling != "frontier":  # which does all requests about equally well
        assert np.corrcoef(p[:, 4], p[:, at])[0, 1] > 0.98
        hard = set(range(0, len(REQUESTS), 3))
        assert set(np.argsort(p[:, 4])[:6]) == set(np.argsort(p[:, at])[:6]) == hard, "what is hard for the one"


def test_the_siblings_place_among_the_models_is_taken(estimator: LearnedEstimator) -> None:
    strong = probabilities(onboard(estimator, NEW, sibling="frontier").estimate_many(REQUESTS))
    weak = probabilities(onboard(estimator, NEW, sibling="local").estimate_many(REQUESTS))
    hard = slice(0, None, 3)
    assert (strong[hard, 4] > strong[hard, 2]).all() and (weak[hard, 4] < weak[hard, 1]).all()


def test_the_prior_is_a_mean(catalog: Catalog) -> None:
    for card in (NEW, replace(NEW, sibling="local"), replace(NEW, tier="hosted-open")):
        mix = prior_mix(catalog, card)
        assert mix.sum() == pytest.approx(1.0) and (mix > 0).all()
    assert prior_mix(catalog, NEW).argmax() == catalog.index["mid"], "the one of its tier"
    assert prior_mix(catalog, replace(NEW, sibling="local")).argmax() == catalog.index["local"]
    first_of_its_tier = catalog.subset(["frontier", "local"])
    assert np.allclose(prior_mix(first_of_its_tier, NEW), 0.5)


def test_many_outcomes_find_the_mixture_and_few_keep_to_the_prior() -> None:
    rng = np.random.default_rng(3)
    parts = rng.uniform(0.1, 0.9, size=(20_000, 4))
    truth, prior = np.array([0.0, 0.7, 0.3, 0.0]), np.full(4, 0.25)
    label = (rng.random(len(parts)) < parts @ truth - 0.05).astype(float)
    mix, shift = fit_mix(parts, label, prior)
    assert np.allclose(mix, truth, atol=0.06) and shift == pytest.approx(-0.05, abs=0.05)
    tens = [slice(i, i + 10) for i in range(0, 2000, 10)]
    few = np.array([fit_mix(parts[at], label[at], prior)[0] for at in tens])
    free = np.array([np.linalg.lstsq(parts[at], label[at])[0] for at in tens])
    assert np.abs(few - truth).mean() < 0.5 * np.abs(free - truth).mean(), "what ten outcomes say freely is noise"


def test_its_length_and_its_rate_follow_the_outcomes(estimator: LearnedEstimator, log: pl.DataFrame) -> None:
    longer = log.with_columns(pl.col("output_tokens") * 20)
    short = onboard(estimator, NEW, outcomes_of(log, NEW), "local").estimate_many(REQUESTS)
    long = onboard(estimator, NEW, outcomes_of(longer, NEW), "local").estimate_many(REQUESTS)
    ratio = np.mean([b.output_tokens[4] / a.output_tokens[4] for a, b in zip(short, long, strict=True)])
    assert 15 < ratio < 20.1
    failing = log.with_columns(quality=pl.lit(0.0, dtype=pl.Float64))
    p = probabilities(onboard(estimator, NEW, outcomes_of(failing, NEW), "frontier").estimate_many(REQUESTS))
    assert 0 < p[:, 4].max() < 0.3, "240 failures and no success"
    ten = outcomes_of(failing, NEW).take(np.arange(10))
    p = probabilities(onboard(estimator, NEW, ten, "frontier").estimate_many(REQUESTS))
    assert 0.1 < p[:, 4].mean() < 0.8, "ten are few"


def test_little_known_is_widely_uncertain(estimator: LearnedEstimator, log: pl.DataFrame) -> None:
    own = outcomes_of(log, NEW)
    widths = []
    for rows in (0, 10, 240):
        wider = onboard(estimator, NEW, own.take(np.arange(rows)) if rows else None, "local")
        found, width = wider.estimate_many(REQUESTS), []
        for e in found:
            assert e.p_low is not None and e.p_high is not None and e.p_claim is not None
            assert 0 < e.p_low[4] <= e.p_ok[4] <= e.p_high[4] < 1 and e.p_claim[4] <= e.p_ok[4]
            width.append(e.p_high[4] - e.p_low[4])
        widths.append(np.mean(width))
    assert widths[0] > 0.3 and widths[0] > widths[1] > 1.5 * widths[2], widths


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray, Path]:
    """Some 4,000 simulated requests with the outcomes of six models, and each model's true probability."""
    out = tmp_path_factory.mktemp("world") / "log"
    simulate(4000, out, seed=8, logging="full", feedback_rate=1.0)
    data = build_dataset(pl.read_parquet(out / "part-*.parquet"), SIMULATED_CATALOG)
    truth = true_quality(out, data.ids).select([f"p/{m}" for m in SIMULATED_CATALOG.ids]).to_numpy()
    return data, truth, out


def test_fifty_outcomes_are_better_than_none_and_more_than_fifty(world: tuple[Dataset, np.ndarray, Path]) -> None:
    data, truth, _ = world
    old, new = np.split(np.arange(len(data)), [len(data) - 1500])
    errors: dict[int, list[float]] = {0: [], 50: [], 500: []}
    for j, card in list(enumerate(SIMULATED_CATALOG))[::2]:
        rest = [i for i in range(len(SIMULATED_CATALOG)) if i != j]
        base = fit(_columns(data.take(old), rest), encoder="lexical").estimator
        own = _columns(data.take(new), [j])
        answered = np.flatnonzero(own.observed[:, 0])
        judged = data.take(new[1000:]).requests
        for k in errors:
            wider = onboard(base, card, own.take(answered[answered < 1000][:k]) if k else None)
            p = probabilities(wider.estimate_many(judged))[:, -1]
            errors[k].append(float(np.mean((p - truth[new[1000:], j]) ** 2)))
    mean = {k: float(np.mean(found)) for k, found in errors.items()}
    assert mean[500] < mean[50] < 0.8 * mean[0], mean


def test_the_bundle_loads_and_routes(
    tiny_log: pl.DataFrame, catalog: Catalog, log: pl.DataFrame, tmp_path: Path
) -> None:
    train(tiny_log, catalog, out=tmp_path / "old", encoder="lexical")
    made = onboard_bundle(tmp_path / "old", NEW, out=tmp_path / "new", logs=log)
    before, after = load_router(tmp_path / "old"), load_router(tmp_path / "new")
    assert after.catalog.ids == (*before.catalog.ids, "newcomer") and after.model_version == made.version
    assert made.outcomes == 240 and set(made.mix) == set(catalog.ids)
    assert max(made.mix, key=made.mix.__getitem__) == "local", "whose outcomes these are"
    one, two = before.decide(REQUESTS[0]), after.decide(REQUESTS[0])
    p = {c.model: c.p_ok for c in two.candidates}
    assert all(abs(p[c.model] - c.p_ok) < 1e-6 for c in one.candidates) and "newcomer" in p
    assert after.decide(replace(REQUESTS[0], candidates=("newcomer",))).model == "newcomer"
    assert after.reliability is not None and len(after.reliability.attempts) == 5
    past = load_neighbours(tmp_path / "new", made.version)
    assert past is not None and past.outcomes.shape[1] == 5 and np.isnan(past.outcomes[:, 4]).all()
    manifest = read_bundle(tmp_path / "new").manifest
    assert manifest["trained_models"] == 4
    assert [(e["model"], e["outcomes"], e["onto"]) for e in manifest["onboarded"]] == [
        ("newcomer", 240, before.model_version)
    ]
    again = onboard_bundle(tmp_path / "old", NEW, out=tmp_path / "again", logs=log)
    assert again.version == made.version, "the same bytes twice"


def test_what_cannot_be_is_refused_in_words(
    tiny_bundle: Path, tiny_log: pl.DataFrame, log: pl.DataFrame, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="'mid' is in the bundle already: train again"):
        onboard_bundle(tiny_bundle, replace(NEW, id="mid"), out=out)
    with pytest.raises(InputError, match="sibling 'nobody' is not in the bundle: choose one of frontier, mid"):
        onboard_bundle(tiny_bundle, NEW, out=out, sibling="nobody")
    with pytest.raises(InputError, match="sibling 'newcomer' is not in the bundle"):
        onboard_bundle(tiny_bundle, replace(NEW, sibling="newcomer"), out=out)
    with pytest.raises(InputError, match=r"0 rows of model 'newcomer', none with a quality .*frontier"):
        onboard_bundle(tiny_bundle, NEW, out=out, logs=tiny_log)
    mute = log.with_columns(quality=pl.lit(None, dtype=pl.Float64))
    with pytest.raises(InputError, match="240 rows of model 'newcomer', none with a quality"):
        onboard_bundle(tiny_bundle, NEW, out=out, logs=mute)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a bundle"):
        onboard_bundle(tiny_bundle, NEW, out=tmp_path / "taken")
    assert not out.exists()


def test_on_the_command_line(tiny_bundle: Path, catalog: Catalog, log: pl.DataFrame, tmp_path: Path) -> None:
    card = {
        "id": "newcomer",
        "provider": "acme",
        "tier": "mid-closed",
        "input_usd_per_mtok": 0.4,
        "output_usd_per_mtok": 1.6,
        "context_window": 64_000,
    }
    (tmp_path / "card.json").write_text(json.dumps(card))
    rows = log.filter(pl.col("model") == "newcomer").with_columns(candidates=pl.lit(["mid", "newcomer"]))
    write_log([rows], tmp_path / "log", catalog=catalog.with_card(NEW))
    options = ["onboard", "--bundle", str(tiny_bundle), "--card", str(tmp_path / "card.json")]

    def run(*more: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(main, [*options, *more])
        return done.exit_code, done.stdout, done.stderr

    code, said, warned = run("--out", str(tmp_path / "plain"))
    assert code == 0 and "newcomer from 0 outcomes, most like" in said
    assert "no outcomes and no sibling: 'newcomer' is taken to be like the bundle's models of its tier" in warned
    code, said, warned = run("--sibling", "local", "--out", str(tmp_path / "sibling"))
    assert code == 0 and not warned and " local," in said
    code, said, warned = run("--logs", str(tmp_path / "log"), "--out", str(tmp_path / "logged"))
    assert code == 0 and not warned and "newcomer from 240 outcomes" in said
    assert load_router(tmp_path / "logged").decide(REQUESTS[0]).model_version in said
    code, _, warned = run("--sibling", "nobody", "--out", str(tmp_path / "none"))
    assert code == 2 and "'nobody' is not in the bundle" in warned
    (tmp_path / "card.json").write_text(json.dumps(card | {"price": 1}))
    code, _, warned = run("--out", str(tmp_path / "none"))
    assert code == 2 and "unknown field 'price'" in warned and not (tmp_path / "none").exists()


def _columns(data: Dataset, models: list[int]) -> Dataset:
    return replace(
        data,
        catalog=data.catalog.subset([data.catalog.ids[i] for i in models]),
        quality=data.quality[:, models],
        output_tokens=data.output_tokens[:, models],
        propensity=data.propensity[:, models],
    )
