"""A router beside its rivals: better than its own shares dealt by chance, by the simulation's truth as well."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from conftest import Contest

from router_ml.errors import InputError
from training.challenge import Contender
from training.logged import target_of
from training.simulate import true_quality
from training.standing import ROUTER, SHUFFLED, standing


def test_values_are_those_of_the_world(contest: Contest) -> None:
    contender = Contender.load(contest.challenger)
    found = standing(contender, contest.log)
    frame = found.to_frame()
    assert frame["policy"].to_list() == [ROUTER, "always cheapest", "best single", SHUFFLED]
    assert found.version == contender.version and found.best_single in {"aurora-4", "summit-pro"}
    assert found.n == pytest.approx(0.6 * len(contest.log), rel=0.01) and found.outcomes < found.n
    rows = contest.log.tail(found.n)
    truth = true_quality(contest.folder / "logs", rows["request_id"])
    p = truth.select([f"p/{model}" for model in contender.router.catalog.ids]).to_numpy()
    cost = truth.select([f"cost_usd/{model}" for model in contender.router.catalog.ids]).to_numpy()
    target = target_of(contender.router, rows)
    true = {"quality": float((target * p).sum(axis=1).mean()), "cost_usd": float((target * cost).sum(axis=1).mean())}
    own = frame.row(0, named=True)
    for metric, value in true.items():
        assert own[f"{metric}_low"] < value < own[f"{metric}_high"], metric
    gains = dict(frame.select("policy", "gain_low").iter_rows())
    assert gains[ROUTER] is None and gains["always cheapest"] > 0.0 and gains[SHUFFLED] > 0.0
    share = target.mean(axis=0)
    assert frame.filter(pl.col("policy") == SHUFFLED)["quality"][0] < own["quality"]
    assert np.count_nonzero(share > 0.01) >= 3, "it is no single model in disguise"
    assert len(found.plot().axes[0].containers) == 4
    assert "held out" in found.notes[0]


def test_a_log_that_cannot_tell_says_so(contest: Contest) -> None:
    contender = Contender.load(contest.challenger)
    fixed = contest.log.with_columns(propensity=pl.lit(1.0))
    found = standing(contender, fixed)
    assert found.to_frame()["quality"].null_count() == 4
    assert "not identifiable" in found.policies["quality"][ROUTER].why
    assert found.plot().axes[0].texts[0].get_text() == "not identifiable"
    with pytest.raises(InputError, match="no row of the log is left"):
        standing(contender, contest.log.head(100))
