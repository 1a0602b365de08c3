"""Two models compared on logs of the same real outcomes: paired, drawn, and where nothing can be told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.logs import read_log, read_log_info
from training.compare import compare
from training.outcomes import import_outcomes

A, B = "gpt-4o", "llama-3.1-70b-instruct"
TASK = "math"
Logs = Callable[[str, int], tuple[pl.DataFrame, Catalog]]


@pytest.fixture(scope="module")
def logs(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Logs:
    """Logs of MMLU-Pro under a logging policy and a seed."""
    folder = tmp_path_factory.mktemp("compare")

    def made(logging: str, seed: int) -> tuple[pl.DataFrame, Catalog]:
        out = folder / f"{logging}{seed}"
        if not out.exists():
            cards = Catalog.load(data_dir / "catalog.json")
            import_outcomes(data_dir / "mmlu_pro.parquet", cards, logging=logging, out=out, seed=seed)  # type: ignore[arg-type]
        return read_log(out), Catalog.from_json(read_log_info(out)["catalog"])

    return made


def test_pairs_are_compared_as_pairs(logs: Logs) -> None:
    log, catalog = logs("full", 0)
    found = compare(log, catalog, A, B, task=TASK)
    of = log.filter(pl.col("task") == TASK)
    gain = of.pivot("model", index="request_id", values="quality").drop_nulls([A, B])
    difference = (gain[A] - gain[B]).to_numpy()
    assert found.how == "paired" and found.n == len(difference) and found.experiment is None
    assert found.quality is not None and found.cost_usd is not None
    assert found.quality.value == pytest.approx(difference.mean())
    assert found.quality.se == pytest.approx(difference.std(ddof=1) / np.sqrt(len(difference)), rel=1e-3)
    assert found.quality.low > 0, "the stronger one is better at maths"
    other = compare(log, catalog, B, A, task=TASK)
    assert other.quality is not None and other.quality.value == pytest.approx(-found.quality.value)
    assert found.to_frame()["metric"].to_list() == ["quality", "cost_usd"] and found.plot().axes


def test_drawn_models_tell_the_same(logs: Logs) -> None:
    log, catalog = logs("full", 0)
    truth = compare(log, catalog, A, B)
    assert truth.quality is not None and truth.cost_usd is not None
    held = []
    for logging, seed in (("uniform", 0), ("uniform", 1), ("mostly-best", 0), ("mostly-best", 1)):
        drawn, _ = logs(logging, seed)
        found = compare(drawn, catalog, A, B)
        assert found.how == "randomised" and found.quality is not None and found.cost_usd is not None
        held += [found.quality.low < truth.quality.value < found.quality.high]
        assert found.cost_usd.value == pytest.approx(truth.cost_usd.value, rel=0.1)
    assert sum(held) >= 3
    # The same rows, had they not been drawn, tell nothing; what it takes is said instead.
    blind = compare(drawn.with_columns(propensity=pl.lit(1.0)), catalog, A, B)
    assert blind.how == "not identified" and blind.experiment is not None and blind.experiment.requests > 1000
    unsettled = compare(drawn.filter(pl.col("task") == TASK).head(600), catalog, A, B, effect=0.01)
    assert unsettled.experiment is not None
    alike = compare(log, catalog, "gemini-1.5-pro-002", A, effect=0.9)
    assert alike.experiment is None


def test_the_command_says_what_it_compared(logs: Logs, tmp_path: Path) -> None:
    log, catalog = logs("uniform", 0)
    log.write_parquet(tmp_path / "log.parquet")
    base = ["compare", A, B, "--logs", str(tmp_path / "log.parquet")]
    refused = CliRunner().invoke(main, base)
    assert refused.exit_code == 2 and "--catalog" in refused.stderr
    (tmp_path / "catalog.json").write_text(json.dumps(catalog.to_json()))
    done = CliRunner().invoke(
        main, [*base, "--catalog", str(tmp_path / "catalog.json"), "--plot", str(tmp_path / "p.png")]
    )
    assert done.exit_code == 0, done.output
    assert "whose model was drawn, doubly robust; 95% intervals" in done.stdout and (tmp_path / "p.png").is_file()
