"""A model that joins a bundle from more and more outcomes, judged by its later answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from conftest import Contest

from router_ml.bundle import read_bundle
from router_ml.errors import InputError
from training.arrival import arrival
from training.simulate import true_quality
from training.train import train
from training.world import SIMULATED_CATALOG

MODEL = "aurora-4-mini"


@pytest.fixture(scope="module")
def without(contest: Contest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of half of the log that has never seen the model."""
    to = tmp_path_factory.mktemp("without") / "bundle"
    rest = [model for model in SIMULATED_CATALOG.ids if model != MODEL]
    log = contest.log.filter(pl.col("model") != MODEL).head(1500)
    train(log, SIMULATED_CATALOG.subset(rest), out=to, encoder="lexical", holdout=0.0)
    return to


def test_the_promise_nears_what_comes_and_gets_narrower(contest: Contest, without: Path, tmp_path: Path) -> None:
    card = SIMULATED_CATALOG[MODEL]
    found = arrival(without, card, contest.log, tmp_path / "out", counts=(0, 30, 100, 10_000))
    frame = found.to_frame()
    counts = frame["outcomes"].to_list()
    assert counts[:3] == [0, 30, 100] and len(counts) == 4 and counts[3] > 100, "what the log does not have is left out"
    width = (frame["high"] - frame["low"]).to_list()
    assert width == sorted(width, reverse=True) and width[3] < 0.5 * width[0]
    assert (frame["claim"] < frame["promised"]).all() and (frame["auc"] > 0.55).all()
    off = (frame["promised"] - frame["observed"]).abs().to_list()
    assert off[3] < 0.08
    # The later answers are like what is true of the model on the requests that the log sent to it.
    told = contest.log.filter(pl.col("model") == MODEL, pl.col("quality").is_not_null()).tail(found.n)
    true = true_quality(contest.folder / "logs", told["request_id"])[f"p/{MODEL}"].mean()
    assert isinstance(true, float) and frame["observed"][0] == pytest.approx(true, abs=0.08)
    assert frame["observed"].n_unique() == 1 and ((frame["share"] >= 0.0) & (frame["share"] <= 1.0)).all()
    last = read_bundle(found.bundle)
    assert last.manifest["onboarded"][0]["outcomes"] == counts[3] and MODEL in last.catalog
    assert last.manifest["trained_until"] < told["time"].min().isoformat(), "nothing that judges was learnt from"
    assert [tick.get_text() for tick in found.plot().axes[0].get_xticklabels()] == [str(count) for count in counts]


def test_too_few_answers_judge_nothing(contest: Contest, without: Path, tmp_path: Path) -> None:
    card = replace(SIMULATED_CATALOG[MODEL], id="just out")
    with pytest.raises(InputError, match="the log has 0 answers of 'just out'"):
        arrival(without, card, contest.log, tmp_path / "out")
    with pytest.raises(InputError, match="log more"):
        arrival(without, SIMULATED_CATALOG[MODEL], contest.log.head(2000).tail(60), tmp_path / "out")
