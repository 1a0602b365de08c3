"""A training gives the same whoever does its work: one process, several, or a Ray cluster of two workers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from training.boosting import Cells, boost, from_texts
from training.engines import Local
from training.scratch import Scratch
from training.simulate import SIMULATED_CATALOG, simulate
from training.train import Training, train


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engines") / "log"
    simulate(2000, out, seed=5)
    return out


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tasks of a small log."""
    for module in ("fit", "reading", "train"):
        monkeypatch.setattr(f"training.{module}.TASK", 512)


def trained(log: Path, out: Path, engine: Any) -> Training:
    return train(log, SIMULATED_CATALOG, out=out, encoder="lexical", engine=engine)


def test_one_process_and_several_give_the_same_bytes(log: Path, tmp_path: Path, small_tasks: None) -> None:
    versions = [trained(log, tmp_path / str(n), Local(n)).version for n in (1, 2)]
    assert versions[0] == versions[1]


def test_an_error_in_another_process_is_raised_here(tmp_path: Path, catalog: Catalog, small_tasks: None) -> None:
    rows = pl.DataFrame(
        {
            "request_id": [f"r{i}" for i in range(1500)],
            "messages": [f'[{{"role": "user", "content": "number {i}"}}]' for i in range(1499)] + ['[{"role": "no"}]'],
            "model": catalog.ids[0],
            "quality": 1.0,
        }
    ).with_columns(time=pl.datetime(2026, 1, 1, time_zone="UTC") + pl.duration(seconds=pl.int_range(1500)))
    rows.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(InputError, match="role has to be one of"):
        train(tmp_path / "log.parquet", catalog, out=tmp_path / "b", encoder="lexical", holdout=0.0, engine=Local(2))


def test_rows_on_disk_are_indexed_like_an_array() -> None:
    rng = np.random.default_rng(0)
    array = rng.random((100, 3, 2)).astype(np.float32)
    store = Scratch((3, 2), np.float32)
    assert len(store) == 0 and store[:5].shape == (0, 3, 2)
    for at in (slice(0, 40), slice(40, 41), slice(41, 100)):
        store.append(array[at])
    mask = rng.random(100) < 0.3
    for key in (7, slice(30, 60), np.array([99, 0, 41]), mask):
        assert np.array_equal(store[key], array[key])
    assert [array[at].sum() for at in store.chunks(33)] == [store[at].sum() for at in store.chunks(33)]
    with pytest.raises(ValueError, match="shape"):
        store.append(array[:, :2])


def test_models_fitted_elsewhere_come_to_the_same_rounds() -> None:
    rng = np.random.default_rng(1)
    x = rng.random((3000, 5)).astype(np.float32)
    y = (rng.random(3000) < x[:, 0]).astype(np.float32)
    cells = Cells(x, y, rng.integers(0, 3, 3000), 3, tuple("abcde"), 0)
    here = boost(cells)
    import lightgbm as lgb

    from training.boosting import ROUNDS

    texts = [
        lgb.train(cells.params, lgb.Dataset(x[at], y[at], feature_name=list("abcde")), ROUNDS).model_to_string()
        for at in [*(cells.fold != f for f in range(3)), np.ones(3000, dtype=bool)]
    ]
    there = from_texts(cells, texts)
    assert there.rounds == here.rounds
    one, other = (lgb.Booster(model_str=made.text).predict(x) for made in (here, there))
    assert np.allclose(one, other, atol=1e-9)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A Ray cluster of two cores on this machine."""
    import ray

    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=200_000_000,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1])])}},
    )  # fmt: skip
    yield
    ray.shutdown()


def test_a_cluster_of_two_workers_learns_as_much_as_one_process(
    log: Path, tmp_path: Path, small_tasks: None, cluster: None
) -> None:
    from training.ray_engine import Ray

    engine = Ray()
    assert engine.workers == 2
    here, there = trained(log, tmp_path / "here", Local(1)), trained(log, tmp_path / "there", engine)
    assert abs(here.metrics["rounds"] - there.metrics["rounds"]) <= 15
    for part in ("out_of_fold", "held_out"):
        for name, value in here.metrics[part].items():
            assert there.metrics[part][name] == pytest.approx(value, abs=0.01), (part, name)
    heads = [np.load(tmp_path / way / "outcomes.npz") for way in ("here", "there")]
    for name in ("kernel_w", "lexical_w", "network_w1", "landmarks"):
        assert np.array_equal(heads[0][name], heads[1][name]), name
