"""The benchmarks run, say what they measured under stable keys, and their controls come out as controls do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result

from benchmarks.calibration import DIALS
from benchmarks.calibration import main as calibration_main
from benchmarks.cold_start import main as cold_start_main
from benchmarks.latency import main as latency_main
from benchmarks.learning_curve import main as learning_curve_main
from benchmarks.ope import SETTINGS
from benchmarks.ope import main as ope_main
from benchmarks.quality import main as quality_main
from benchmarks.sessions import main as sessions_main
from benchmarks.tune import main as tune_main
from router_ml.catalog import Catalog
from router_ml.logs import read_log

ROOT = Path(__file__).resolve().parents[1]
LEARNT = {"router", "router_min_probability", "knn_40", "knn_100", "ridge", "lightgbm_raw", "shuffled"}
FIXED = {"always_cheapest", "best_single", "random_mix", "oracle"}


def benchmark(module: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, options)],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def invoked(command: click.Command, *options: str | Path) -> Result:
    """The same in this process, which has loaded the libraries already."""
    return CliRunner(env={"COLUMNS": "200"}).invoke(command, [str(option) for option in options])


@pytest.fixture(scope="module")
def matrix(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Outcomes of 400 prompts on four models, as a user would keep them: which are hard can be read in their words."""
    folder = tmp_path_factory.mktemp("matrix")
    rng = np.random.default_rng(11)
    nouns = np.array(
        ["river", "stone", "cloud", "engine", "ledger", "market", "protein", "theorem", "tensor", "violin"]
    )
    rates = {"frontier": (0.97, 0.9), "mid": (0.95, 0.55), "hosted": (0.9, 0.4), "local": (0.9, 0.15)}
    hard = rng.random(400) < 0.5
    topics = [" ".join(rng.choice(nouns, 4)) for _ in hard]
    columns: dict[str, Any] = {
        "prompt": [
            f"Prove rigorously that the {t} operator is bounded." if h else f"What is the plural of {t}?"
            for h, t in zip(hard, topics, strict=True)
        ],
        "split": np.where(np.arange(400) < 240, "train", "test"),
    }
    for model in catalog.ids:
        columns[f"correct/{model}"] = (rng.random(400) < np.where(hard, rates[model][1], rates[model][0])).astype(int)
        columns[f"output_tokens/{model}"] = rng.integers(20, 60, 400) * np.where(hard, 8, 1)
    pl.DataFrame(columns).write_parquet(folder / "outcomes.parquet")
    (folder / "catalog.json").write_text(json.dumps(catalog.to_json()))
    return folder / "outcomes.parquet"


@pytest.fixture(scope="module")
def quality(matrix: Path) -> tuple[dict[str, Any], str]:
    """The table of two seeds on that matrix, as JSON and as printed."""
    out = matrix.with_name("results") / "quality.json"
    done = benchmark(
        "quality", "--matrix", matrix, "--catalog", matrix.with_name("catalog.json"), "--seeds", "2",
        "--encoder", "lexical", "--json", out,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert [p.name for p in out.parent.iterdir()] == ["quality.json"]
    return json.loads(out.read_text()), done.stdout


def test_every_row_has_its_measures_and_their_spread(quality: tuple[dict[str, Any], str]) -> None:
    found, said = quality
    assert (found["seeds"], found["encoder"]) == (2, "lexical")
    assert set(found["custom"]) == LEARNT | FIXED
    for row, values in found["custom"].items():
        assert {"aiq_log", "aiq_log_sd"} <= set(values)
        shares = [f"{share}{sd}" for share in ("0.9", "0.95", "0.98", "1.0") for sd in ("", "_sd")]
        assert set(values["cost_at"]) == set(shares)
        assert 0 < values["cost_at"]["0.9"] <= values["cost_at"]["0.95"] <= values["cost_at"]["1.0"] <= 1 + 1e-9
        if row in LEARNT:
            assert {f"{m}{sd}" for m in ("auc", "brier", "log_loss", "ece") for sd in ("", "_sd")} <= set(values)
        assert row in said
    assert found["custom"]["router"]["auc_sd"] > 0, "two seeds split differently"


def test_the_router_foretells_costs_better_than_means_do(quality: tuple[dict[str, Any], str]) -> None:
    router = quality[0]["custom"]["router"]
    assert (
        0 < router["cost_error"] < 0.7 * router["cost_error_of_means"]
    )  # the hard prompts' answers are eight times as long


def test_more_data_decides_better(matrix: Path) -> None:
    out, plot = matrix.with_name("curve.json"), matrix.with_name("curve.png")
    done = invoked(
        learning_curve_main, "--matrix", matrix, "--catalog", matrix.with_name("catalog.json"), "--seeds", "1",
        "--encoder", "static", "--json", out, "--plot", plot,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["full"]
    assert list(found) == ["60", "120", "240"]
    assert all(set(rows) == {"router", "knn_100"} for rows in found.values())
    assert found["240"]["router"]["brier"] < found["60"]["router"]["brier"]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_rows_are_ordered_as_they_have_to_be(quality: tuple[dict[str, Any], str]) -> None:
    rows = quality[0]["custom"]
    cost = {row: values["cost_at"]["0.98"] for row, values in rows.items()}
    assert rows["router"]["auc"] > 0.7, "the prompts say which of them are hard"
    assert abs(rows["shuffled"]["auc"] - 0.5) < 0.06
    assert cost["oracle"] <= cost["router"] < cost["shuffled"]
    assert cost["router"] < cost["random_mix"]
    assert rows["best_single"]["cost_at"]["1.0"] == rows["always_cheapest"]["cost_at"]["1.0"] == 1
    assert rows["oracle"]["aiq_log"] > rows["router"]["aiq_log"] > rows["always_cheapest"]["aiq_log"]


def test_a_named_split_trains(matrix: Path, tmp_path: Path) -> None:
    own = ["--matrix", matrix, "--catalog", matrix.with_name("catalog.json"), "--encoder", "lexical", "--seeds", "1"]
    done = invoked(quality_main, *own, "--train-split", "train", "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out.json").read_text())["custom"]["router"]["auc"] > 0.7


def test_what_does_not_fit_is_refused_in_words(matrix: Path, tmp_path: Path) -> None:
    catalog, out = matrix.with_name("catalog.json"), tmp_path / "out.json"
    pl.read_parquet(matrix).head(40).write_csv(tmp_path / "few.csv")
    pl.read_parquet(matrix).drop("output_tokens/mid").write_csv(tmp_path / "costless.csv")
    for options, text in {
        ("--matrix", matrix, "--catalog", catalog, "--train-split", "dev"): "'dev' leaves 0 rows to train, 400 to test",
        ("--matrix", tmp_path / "few.csv", "--catalog", catalog): "has 40 rows with every model's outcome; at least 50",
        (
            "--matrix",
            tmp_path / "costless.csv",
            "--catalog",
            catalog,
        ): "give cost_usd/<model>, output_tokens",
        ("--matrix", matrix): "--matrix and --catalog go together",
        ("--data", tmp_path): f"no published outcomes in {tmp_path}: give --data DIR",
    }.items():
        done = invoked(quality_main, *options, "--encoder", "lexical", "--json", out)
        assert done.exit_code == 1 and text in done.stderr, done.output
    done = invoked(latency_main, "--data", tmp_path)
    assert done.exit_code == 1 and f"no published outcomes in {tmp_path}: give --data DIR" in done.stderr
    assert not out.exists()


def test_cold_start_says_what_a_new_model_loses(matrix: Path, tmp_path: Path) -> None:
    out, cards = tmp_path / "out.json", tmp_path / "catalog.json"
    catalog = json.loads(matrix.with_name("catalog.json").read_text())
    next(card for card in catalog["models"] if card["id"] == "hosted")["sibling"] = "mid"
    cards.write_text(json.dumps(catalog))
    options = ["--matrix", matrix, "--catalog", cards, "--encoder", "lexical", "--seeds", "1", "--json", out]
    done = invoked(cold_start_main, *options)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["seeds"], found["encoder"]) == (1, "lexical")
    rows = found["cold_start"]
    assert set(rows) == {"full", "without", "0", "50", "200"}, "there are not 1,000 training rows"
    for k in ("0", "50", "200"):
        row = rows[k]
        names = ("regret", "aiq_log_lost", "auc", "ece", "bias", "inside", "width")
        assert {f"{name}{sd}" for name in names for sd in ("", "_sd")} <= set(row)
        assert set(row["models"]) == {"frontier", "mid", "hosted", "local"}
        assert row["regret"] == pytest.approx(np.mean([v["regret"] for v in row["models"].values()]))
        assert row["models"]["mid"]["auc"] > 0.6, "which requests are hard is known from the others"
        assert "regret_sd" in row["own_mean"] and k in done.stdout
    assert rows["without"]["regret"] > 0.01, "the best model is worth something"
    assert rows["200"]["regret"] < 0.5 * rows["without"]["regret"]
    assert rows["0"]["width"] > rows["50"]["width"] > rows["200"]["width"] > 0
    assert abs(rows["200"]["bias"]) < 0.1
    assert not rows["full"].get("regret"), "the full retrain is what the others are held against"


def test_calibration_says_what_comes_of_the_claims(matrix: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    own = ["--matrix", matrix, "--catalog", matrix.with_name("catalog.json"), "--encoder", "lexical"]
    done = invoked(calibration_main, *own, "--seeds", "2", "--json", out)
    assert done.exit_code == 0, done.output
    results = json.loads(out.read_text())
    assert (results.pop("seeds"), results.pop("encoder"), set(results)) == (
        2, "lexical", {"full", "uniform", "mostly-best"}
    )  # fmt: skip
    dials = [f"{dial:g}" for dial in DIALS]
    for setting, found in results.items():
        assert setting in done.stdout
        for rows in (found, found["by_p_ok"]):
            for name in ("claimed", "coverage", "se", "promised", "defaulted"):
                assert list(rows[name]) == dials and all(len(rows[name][dial]) == 2 for dial in dials)
            for seed in (0, 1):
                claimed = [rows["claimed"][dial][seed] for dial in dials]
                assert claimed == sorted(claimed, reverse=True) and 0 <= claimed[-1] <= claimed[0] <= 1
                for dial, share in zip(dials, claimed, strict=True):
                    assert rows["defaulted"][dial][seed] == pytest.approx(1 - share), "what is not claimed is defaulted"
                    assert (rows["coverage"][dial][seed] is None) == (share == 0)
                    if share:
                        assert rows["promised"][dial][seed] >= float(dial) - 1e-6
            low = [
                (float(dial), seed)
                for dial in dials
                for seed, rate in enumerate(rows["coverage"][dial])
                if rate is not None and rate < float(dial) - 0.02
            ]
            assert low == [(v["dial"], v["seed"]) for v in rows["violations"]]
        for dial in dials:
            ours, plain = found["claimed"][dial], found["by_p_ok"]["claimed"][dial]
            assert all(a <= b for a, b in zip(ours, plain, strict=True)), "a claim is at most the probability"
        assert len(found["violations"]) <= len(found["by_p_ok"]["violations"])
        assert found["ece_floor"][0] > 0 and 0 <= found["interval_holds"][0] <= 1
    assert results["full"]["coverage_mean"]["0.7"] > 0.7 and results["full"]["claimed"]["0.7"][0] > 0.5
    width = {setting: np.mean(found["interval_width"]) for setting, found in results.items()}
    assert width["full"] < width["uniform"], "a quarter of the outcomes, a wider interval"
    done = invoked(calibration_main, "--matrix", matrix)
    assert done.exit_code == 1 and "--matrix and --catalog go together" in done.stderr


def test_the_routellm_protocol_on_published_outcomes(data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ["--data", data_dir, "--only", "routellm_gsm8k", "--seeds", "1", "--encoder", "lexical"]
    done = invoked(quality_main, *options, "--json", out)
    assert done.exit_code == 0, done.output
    rows = json.loads(out.read_text())["routellm_gsm8k"]
    assert set(rows) == LEARNT - {"router_min_probability"} | {"random_mix", "oracle", "published_routellm"}
    assert 0.5 < rows["router"]["apgr"] < rows["oracle"]["apgr"], "the oracle may pass 1: it never pays for a worse one"
    assert abs(rows["shuffled"]["apgr"] - 0.5) < 0.12
    assert rows["router"]["cpt50"] < rows["router"]["cpt80"] <= 1
    assert rows["published_routellm"] == {"apgr": 0.622, "cpt50": 0.3364, "cpt80": 0.6326}
    assert "RouteLLM, published" in done.stdout


def test_latency_by_stage(data_dir: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    done = benchmark(
        "latency", "--data", data_dir, "--bundle", tiny_bundle, "--requests", "20", "--repeats", "2", "--json", out
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["candidates"] == 4 and found["prompts"]["count"] == 20
    whole = found["decide_us"]
    assert 0 < whole["p50"] <= whole["p99"]
    assert 10 < whole["p50"] < 20_000, "a decision takes microseconds: neither nothing nor a training"
    stages = found["stages_us"]
    assert len(stages) >= 5 and all(0 < stage["p50"] <= stage["p99"] for stage in stages.values())
    assert all(name in done.stdout for name in stages)
    assert 0.4 * whole["p50"] < sum(stage["p50"] for stage in stages.values()) < 2.5 * whole["p50"]


def test_a_session_that_is_routed_costs_less_than_its_turns_alone_and_is_better_than_one_that_never_moves(
    tmp_path: Path,
) -> None:
    ran = invoked(sessions_main, "--sessions", "60", "--seeds", "2", "--json", tmp_path / "sessions.json")
    assert ran.exit_code == 0, ran.output
    for kind, rules in json.loads((tmp_path / "sessions.json").read_text())["results"].items():
        ours, alone, sticky = (rules[name] for name in ("router-ml", "no session logic", "sticky for ever"))
        assert ours["with escalation"] < alone["with escalation"] and ours["acceptable"] > alone["acceptable"], kind
        assert ours["cost"] < 1.03 * alone["cost"] and ours["moves"] < 0.6 * alone["moves"], kind
        assert ours["short"] < 0.03 < 0.05 < sticky["short"] and sticky["moves"] == 0, kind


def test_the_service_over_http(data_dir: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "service.json"
    options = ("--data", data_dir, "--bundle", tiny_bundle, "--connections", "2", "--seconds", "0.5", "--json", out)
    done = benchmark("service", *options)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text())["runs"]
    assert found["connections"] == 2 and found["answers"] > 20 and found["degraded"] == 0.0
    assert 0.0 < found["route_ms"]["p50"] <= found["route_ms"]["p99"] <= found["route_ms"]["max"] < 5_000
    assert 0.0 < found["healthz_ms"]["p50"] < 1_000


def test_the_service_under_load_beside_a_bare_endpoint(
    tiny_log: pl.DataFrame, tiny_bundle: Path, tmp_path: Path
) -> None:
    out, prompts = tmp_path / "load.json", tmp_path / "prompts.json"
    prompts.write_text(json.dumps(tiny_log["prompt"].unique(maintain_order=True).to_list()))
    options = ("--prompts", prompts, "--bundle", tiny_bundle, "--requests", "9", "--rounds", "1", "--seconds", "1")
    done = benchmark("load", *options, "--json", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert 0.05 < found["rps_ratio"] < 1.0 < found["p50_ratio"] < 20.0, found  # tiny, and far from quiet
    assert found["cold_start_s"] < 20.0 and found["memory_mb"]["after_load"] < 300
    assert found["open_loop"]["p99_ms"] > found["open_loop"]["p50_ms"] > 0.0
    assert found["vs_paretobandit"]["p50_ratio"] > 10.0
    assert found["decisions_stored"] > 200


def test_tuned_dials_keep_their_promise(matrix: Path, tmp_path: Path) -> None:
    out, catalog = tmp_path / "tune.json", matrix.with_name("catalog.json")
    cases = [option for name in ("full", "full_halves", "uniform_2500") for option in ("--only", name)]
    done = invoked(
        tune_main, "--matrix", matrix, "--catalog", catalog, "--encoder", "lexical", "--resplits", "10", "--fits", "1",
        *cases, "--target", "0.85", "--target", "0.99", "--json", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    assert (found["resplits"], found["fits"], found["encoder"]) == (10, 1, "lexical")
    for case in ("full", "full_halves", "uniform_2500"):
        row = found[case]["0.85"]
        assert row["violated"] <= 0.1 and row["certified"] >= row["violated"] and row["attainable"] == 1.0
        assert found[case]["0.99"]["certified"] <= 0.1, "nobody reaches that"
        assert case in done.stdout
    drawn = found["full"]["0.85"]
    assert drawn["certified"] == 1.0 and drawn["quality"] >= 0.85
    assert 1.0 <= drawn["cost_over_oracle"] < 10
    refused = invoked(tune_main, "--data", tmp_path)
    assert refused.exit_code == 1 and "no published outcomes" in refused.stderr


def test_off_policy_estimates_are_held_against_the_truth(matrix: Path) -> None:
    out = matrix.with_name("ope.json")
    done = invoked(
        ope_main, "--matrix", matrix, "--catalog", matrix.with_name("catalog.json"), "--encoder", "lexical",
        "--repetitions", "12", "--rows", "1000", "--json", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    for setting in SETTINGS:
        for metric in ("quality", "cost_usd", "quality_gain"):
            values = found[setting][metric]
            assert {"dm", "ips", "snips", "dr", "switch-dr"} <= set(values)
            assert values["dr"]["coverage"] >= 0.6 and abs(values["dr"]["bias_z"]) < 5
            assert metric != "quality" or values["dr"]["rmse"] < values["ips"]["rmse"]
    assert found["deterministic"]["identifiable"] is False and found["deterministic"]["estimates"] == 0
    ignored = found["selected"]["quality"]["dr-ratio-unknown"]
    assert ignored["bias_z"] < -2, "the control: who does not know of the selection is misled"
    assert found["looks"]["sequence"] >= 0.8


def test_scale_measures_importing_and_training(tmp_path: Path) -> None:
    ran = benchmark("scale", "--rows", 1000, "--no-growth", "--folder", tmp_path, "--json", tmp_path / "scale.json")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads((tmp_path / "scale.json").read_text())
    assert found["rows"] == 1000
    for stage in ("import", "train"):
        assert found[f"{stage}_cpu_s"] > 0 and found[f"{stage}_s"] > 0 and 0.1 < found[f"{stage}_peak_gb"] < 8
    spent = read_log(tmp_path / "imported-1000")
    assert len(spent) == 1000 and spent["messages"].n_unique() > 990 and spent["model"].n_unique() > 3
    manifest = json.loads((tmp_path / "bundle-1000" / "manifest.json").read_text())
    assert len(manifest["catalog"]["models"]) == 8 and manifest["metrics"]["train_outcomes"] == 800
    log = pl.read_parquet(tmp_path / "log-1000" / "part-*.parquet")
    assert log["prompt"].n_unique() > 990
    assert log["prompt"].str.len_chars().is_between(200, 600).all()
