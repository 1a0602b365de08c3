"""Learning: what live requests get is what training saw, full and partial outcomes both work, a seed fixes it all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.load import save_router
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA
from training.dataset import Dataset, build_dataset
from training.evaluate import scores
from training.fit import Fit, fit
from training.simulate import SIMULATED_CATALOG, simulate, true_quality
from training.train import train


@pytest.fixture(scope="module")
def data(tiny_log: pl.DataFrame, catalog: Catalog) -> Dataset:
    return build_dataset(tiny_log, catalog)


@pytest.fixture(scope="module")
def fitted(data: Dataset) -> Fit:
    return fit(data, encoder="lexical")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("simulated") / "log"
    simulate(6000, out, seed=3, logging="uniform")
    return out


def test_a_live_request_gets_its_training_row_bit_for_bit(data: Dataset, fitted: Fit) -> None:
    for i, request in enumerate(data.requests):
        path = fitted.fold_featurizers[fitted.fold[i]]
        live = path.transform(request_of(prompt=request.messages[0].text)).rows
        assert live.dtype == np.float32
        assert live.tobytes() == fitted.rows[i].tobytes()


def test_the_same_holds_for_conversations_and_the_distilled_encoder(simulated: Path) -> None:
    log = pl.read_parquet(simulated / "part-00000.parquet").head(400)
    data = build_dataset(log, SIMULATED_CATALOG)
    assert any(len(r.messages) > 1 for r in data.requests)
    made = fit(data, encoder="static")
    for i, request in enumerate(data.requests):
        live = made.fold_featurizers[made.fold[i]].transform(request).rows
        assert live.tobytes() == made.rows[i].tobytes()


def test_folds_have_not_seen_their_own_outcomes(data: Dataset, fitted: Fit) -> None:
    """Turning round one fold's outcomes leaves that fold's own rows as they were."""
    turned = data.quality.copy()
    turned[fitted.fold == 0] = 1.0 - turned[fitted.fold == 0]
    other = fit(Dataset(**{**_fields(data), "quality": turned}), encoder="lexical")
    assert np.array_equal(other.fold, fitted.fold)
    k = 2  # the parts' own columns
    assert np.allclose(other.rows[fitted.fold == 0][..., :k], fitted.rows[fitted.fold == 0][..., :k], atol=1e-5)
    assert not np.allclose(other.rows[fitted.fold == 1][..., :k], fitted.rows[fitted.fold == 1][..., :k], atol=1e-2)


def test_single_and_batch_estimates_are_the_same_numbers(data: Dataset, fitted: Fit) -> None:
    for one, many in zip(
        map(fitted.estimator.estimate, data.requests), fitted.estimator.estimate_many(data.requests), strict=True
    ):
        assert np.array_equal(one.p_ok, many.p_ok)
        assert np.array_equal(one.output_tokens, many.output_tokens)


def test_learns_what_is_there(data: Dataset, fitted: Fit) -> None:
    found = scores(fitted.out_of_fold, data.labels(0.5))
    assert found["auc"] > 0.65
    hard, easy = (
        request_of(prompt="Prove rigorously that the tensor operator is bounded."),
        request_of(prompt="What is the plural of river?"),
    )
    drop = fitted.estimator.estimate(easy).p_ok - fitted.estimator.estimate(hard).p_ok
    assert (np.diff(drop) > 0).all()  # the log's models come in order of skill: what is hard costs the weak ones more
    assert (fitted.estimator.estimate(hard).output_tokens > 3 * fitted.estimator.estimate(easy).output_tokens).all()


def test_one_outcome_a_request_is_enough_to_learn_from(simulated: Path) -> None:
    data = build_dataset(pl.read_parquet(simulated / "part-*.parquet"), SIMULATED_CATALOG)
    assert data.observed.sum(axis=1).max() <= 2  # retries and fallbacks aside, one model a request
    made = fit(data, encoder="lexical", seed=1)
    truth = true_quality(simulated, data.ids).select([f"p/{m}" for m in SIMULATED_CATALOG.ids]).to_numpy()
    learnt, mean = made.out_of_fold, np.nanmean(data.labels(0.5), axis=0)
    error, base = np.mean((learnt - truth) ** 2), np.mean((mean - truth) ** 2)
    assert error < 0.75 * base


def test_nothing_to_learn_claims_nothing(data: Dataset) -> None:
    rng = np.random.default_rng(0)
    shuffled = fit(Dataset(**{**_fields(data), "quality": data.quality[rng.permutation(len(data))]}), encoder="lexical")
    p = np.stack([e.p_ok for e in shuffled.estimator.estimate_many(data.requests)])
    assert np.ptp(p, axis=0).max() < 1e-3


def test_models_never_seen_one_class_models_and_tiny_models(data: Dataset) -> None:
    quality = data.quality.copy()
    quality[:, 1] = np.nan
    quality[:, 2] = 1.0
    quality[10:, 3] = np.nan
    made = fit(Dataset(**{**_fields(data), "quality": quality}), encoder="lexical")
    p = np.stack([e.p_ok for e in made.estimator.estimate_many(data.requests)])
    assert np.isfinite(p).all()
    assert p.min() > 0.001 and p.max() < 0.9999


def test_few_long_sessions_are_enough_folds(data: Dataset) -> None:
    three = Dataset(**{**_fields(data), "group": np.arange(len(data)) % 3})
    made = fit(three, encoder="lexical")
    assert np.isfinite(made.out_of_fold).all()


def test_too_little_says_how_much_is_needed(data: Dataset) -> None:
    with pytest.raises(InputError, match="20 of each are the least"):
        fit(data.take(np.arange(5)), encoder="lexical")


def test_the_same_log_gives_the_same_bytes_twice(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path: Path) -> None:
    versions = {train(tiny_log, catalog, out=tmp_path / name, encoder="lexical", seed=7).version for name in ("a", "b")}
    assert len(versions) == 1
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name
    assert train(tiny_log, catalog, out=tmp_path / "c", encoder="lexical", seed=8).version not in versions


def test_held_out_requests_do_not_enter_the_bundle(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path: Path) -> None:
    made = train(tiny_log, catalog, out=tmp_path / "a", encoder="lexical", holdout=0.25)
    newest = tiny_log["time"].unique().sort()[-60]
    spoilt = tiny_log.with_columns(
        quality=pl.when(pl.col("time") >= newest).then(1 - pl.col("quality")).otherwise(pl.col("quality"))
    )
    other = train(spoilt, catalog, out=tmp_path / "b", encoder="lexical", holdout=0.25)
    assert made.metrics["held_out_requests"] == 60
    assert (tmp_path / "a" / "outcomes.npz").read_bytes() == (tmp_path / "b" / "outcomes.npz").read_bytes()
    assert made.metrics["held_out"]["auc"] > 0.6 > 0.4 > other.metrics["held_out"]["auc"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"holdout": 1.0}, "holdout"),
        ({"threshold": 0.0}, "quality-threshold"),
        ({"encoder": "bert"}, "static, lexical, transformer"),
    ],
)
def test_bad_options_are_refused(
    tiny_log: pl.DataFrame, catalog: Catalog, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(tiny_log, catalog, out=tmp_path / "x", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_a_log_without_lengths_still_has_costs(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path: Path) -> None:
    bare = tiny_log.with_columns(
        output_tokens=pl.lit(None, LOG_SCHEMA["output_tokens"]), input_tokens=pl.lit(None, LOG_SCHEMA["input_tokens"])
    )
    estimate = fit(build_dataset(bare, catalog), encoder="lexical").estimator.estimate(request_of(prompt="x" * 400))
    assert estimate.input_tokens == 100.0
    assert np.allclose(estimate.output_tokens, 257.0, rtol=0.01)


def test_saving_needs_the_featurizer_it_knows(fitted: Fit, tmp_path: Path) -> None:
    import dataclasses

    strange = dataclasses.replace(fitted.estimator, featurizer=object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        save_router(tmp_path / "x", strange, {})


def _fields(data: Dataset) -> dict[str, object]:
    return {name: getattr(data, name) for name in data.__dataclass_fields__}
