"""One learner for several quality thresholds: from a log of graded qualities to decisions that ask for one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.load import load_router
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from router_ml.errors import InputError
from training.dataset import build_dataset
from training.fit import fit
from training.train import train


@pytest.fixture(scope="module")
def graded_log(tiny_log: pl.DataFrame) -> pl.DataFrame:
    """The tiny log with good answers between .6 and 1 and bad ones between 0 and .4, evenly."""
    draw = np.random.default_rng(5).random(len(tiny_log))
    good = tiny_log["quality"].to_numpy() >= 0.5
    return tiny_log.with_columns(quality=pl.Series(np.where(good, 0.6 + 0.4 * draw, 0.4 * draw)))


def test_each_threshold_is_calibrated_and_a_higher_one_is_never_more_probable(
    graded_log: pl.DataFrame, catalog: Catalog
) -> None:
    data = build_dataset(graded_log, catalog)
    made = fit(data, threshold=(0.8, 0.5), encoder="lexical")
    assert made.estimator.thresholds == (0.5, 0.8)
    means = []
    for threshold in (0.5, 0.8):
        requests = [replace(r, quality_threshold=threshold) for r in data.requests]
        p = np.stack([e.p_ok for e in made.estimator.estimate_many(requests)])
        means.append(p)
        assert p.mean() == pytest.approx(float(np.nanmean(data.labels(threshold))), abs=0.04)
    assert (means[1] <= means[0]).all()
    assert means[1].mean() < means[0].mean() - 0.1  # half of the good answers are above .8
    first = made.estimator.estimate(data.requests[0]).p_ok
    assert (first == made.estimator.estimate(replace(data.requests[0], quality_threshold=0.5)).p_ok).all()


def test_one_threshold_of_two_classes_is_what_it_was(tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    data = build_dataset(tiny_log, catalog)
    one, listed = (fit(data, threshold=t, encoder="lexical").out_of_fold for t in (0.5, [0.5]))
    assert (one == listed).all()


def test_a_request_asks_for_a_threshold_that_the_bundle_has(
    graded_log: pl.DataFrame, catalog: Catalog, tmp_path: Path
) -> None:
    train(graded_log, catalog, out=tmp_path / "bundle", threshold=(0.5, 0.8), encoder="lexical")
    assert read_bundle(tmp_path / "bundle").manifest["quality_thresholds"] == [0.5, 0.8]
    router = load_router(tmp_path / "bundle")
    lenient, strict = (
        router.decide(request_of(prompt="Explain why the sky is blue.", quality_threshold=t)) for t in (0.5, 0.8)
    )
    assert (lenient.quality_threshold, strict.quality_threshold) == (0.5, 0.8)
    p = {c.model: c.p_ok for c in lenient.candidates}
    assert all(c.p_ok <= p[c.model] for c in strict.candidates)
    with pytest.raises(InputError, match=r"0\.5.*0\.8"):
        router.decide(request_of(prompt="x", quality_threshold=0.6))


@pytest.mark.parametrize("bad", [(), (0.0, 0.5), (0.5, 1.2)])
def test_thresholds_outside_of_0_to_1_are_refused(
    graded_log: pl.DataFrame, catalog: Catalog, tmp_path: Path, bad: tuple[float, ...]
) -> None:
    with pytest.raises(InputError, match="has to lie in"):
        train(graded_log, catalog, out=tmp_path / "bundle", threshold=bad, encoder="lexical")
