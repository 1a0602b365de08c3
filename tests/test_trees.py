"""Trees: LightGBM itself is the oracle, on the thresholds too; what is not of this kind is refused."""

from __future__ import annotations

from typing import Any

import lightgbm as lgb
import numpy as np
import pytest

from router_ml.errors import BundleError
from router_ml.trees import Trees


def trained(rounds: int = 30, *, n: int = 3000, seed: int = 0, **params: Any) -> tuple[lgb.Booster, np.ndarray]:
    """A booster on features of which some are coarse, so that rows often lie on a threshold."""
    rng = np.random.default_rng(seed)
    x = np.concatenate([rng.normal(size=(n, 5)), rng.integers(0, 4, (n, 3)) / 3, np.zeros((n, 1))], axis=1)
    x = x.astype(np.float32)
    y = (x[:, 0] * x[:, 5] + x[:, 6] + rng.normal(size=n) > 0.3).astype(np.float32)
    options = {"objective": "binary", "num_leaves": 8, "verbosity": -1, "seed": 1, "num_threads": 1, **params}
    return lgb.train(options, lgb.Dataset(x, y), rounds), x


@pytest.mark.parametrize("leaves", [2, 3, 8])
@pytest.mark.parametrize("objective", ["binary", "cross_entropy"])
def test_probabilities_are_lightgbms(leaves: int, objective: str) -> None:
    booster, x = trained(num_leaves=leaves, objective=objective)
    trees = Trees(booster.model_to_string(num_iteration=-1))
    assert trees.size == booster.num_trees() == 30
    assert trees.names == tuple(booster.feature_name())
    assert np.abs(trees.raw(x) - booster.predict(x, raw_score=True)).max() < 1e-12
    assert np.array_equal(trees.predict(x), booster.predict(x).astype(np.float32))


def test_rows_on_a_threshold_or_a_bit_beside_it_go_where_lightgbm_sends_them() -> None:
    booster, x = trained()
    trees = Trees(booster.model_to_string())
    splits = booster.trees_to_dataframe().dropna(subset=["threshold"])
    rows = []
    for feature, threshold in zip(splits["split_feature"], splits["threshold"], strict=True):
        at = np.float32(threshold)
        for value in (at, np.nextafter(at, np.float32(np.inf)), np.nextafter(at, np.float32(-np.inf))):
            row = x[len(rows) % len(x)].copy()
            row[trees.names.index(feature)] = value
            rows.append(row)
    edge = np.array(rows)
    assert len(edge) > 300
    assert np.abs(trees.raw(edge) - booster.predict(edge, raw_score=True)).max() < 1e-12


def test_one_row_and_many_are_the_same_numbers() -> None:
    booster, x = trained(n=9000)
    trees = Trees(booster.model_to_string())
    many = trees.predict(x)
    assert np.array_equal(many[:13], trees.predict(x[:13]))
    assert np.array_equal(many[5000:5001], trees.predict(x[5000:5001]))
    assert trees.predict(x[:0]).shape == (0,)


def test_trees_without_a_split_say_the_mean() -> None:
    booster, x = trained(rounds=3, min_data_in_leaf=2000)
    trees = Trees(booster.model_to_string())
    assert np.allclose(trees.predict(x), booster.predict(x))


def test_infinite_values_go_where_lightgbm_sends_them() -> None:
    booster, x = trained()
    wild = x[:50].copy()
    wild[::2, 0], wild[1::2, 5] = np.inf, -np.inf
    assert np.allclose(Trees(booster.model_to_string()).predict(wild), booster.predict(wild))


@pytest.mark.parametrize(
    ("params", "message"),
    [({"num_leaves": 9}, "a tree of 9 leaves"), ({"objective": "regression"}, "objective 'regression'")],
)
def test_another_kind_of_model_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        Trees(trained(**params)[0].model_to_string())


def test_categorical_splits_and_missing_values_are_refused() -> None:
    _, x = trained()
    y = (x[:, 5] > 0.5).astype(np.float32)
    holes = x.copy()
    holes[::3, 5] = np.nan
    options = {"objective": "binary", "num_leaves": 8, "verbosity": -1}
    for made in (
        lgb.train(options, lgb.Dataset(np.round(x * 3), y, categorical_feature=[5]), 5),
        lgb.train(options, lgb.Dataset(holes, y), 5),
    ):
        with pytest.raises(BundleError, match="cannot be read"):
            Trees(made.model_to_string())


@pytest.mark.parametrize("spoil", ["left_child=0", "num_leaves=x", f"threshold={' '.join(['nan'] * 7)}"])
def test_a_text_that_was_spoilt_is_refused(spoil: str) -> None:
    text = trained(rounds=2)[0].model_to_string()
    name = spoil.split("=")[0]
    start = text.index(f"\n{name}=") + 1
    with pytest.raises(BundleError, match="cannot be read"):
        Trees(text[:start] + spoil + text[text.index("\n", start) :])
