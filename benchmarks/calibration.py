"""Does the dial mean what it says: the success rate among requests that the router claims to answer well enough.

    python -m benchmarks.calibration --data ../shared/data --seeds 5 --json benchmarks/results/calibration.json

On MMLU-Pro under the protocol of the data's own README, with full outcomes and with one a request (drawn uniformly, or
mostly from the best model): every held-out request is routed by the policy's own choice at each dial. `--matrix FILE
--catalog FILE` does the same on your own outcomes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.problems import Problem, load_own, load_problem, logged
from benchmarks.quality import THRESHOLD
from benchmarks.results import check_source, open_console, write_results
from features.encoder import Encoder
from router_ml.choice import choose
from router_ml.policy import Policy
from router_ml.types import Estimate
from training.encoders import ENCODERS, make_encoder
from training.evaluate import calibration_error, scores
from training.fit import fit
from training.train import expected_costs

Array = npt.NDArray[np.floating]
DIALS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
TOLERANCE = 0.02
SETTINGS = {"full": "mmlu_pro", "uniform": "mmlu_pro_uniform", "mostly-best": "mmlu_pro_mostly_best"}
FLOOR_DRAWS = 5


def run(problem: Problem, seed: int, encoder: Encoder | str) -> dict[str, Any]:
    """One seed: what is claimed at each dial, what comes of it, and how well probabilities and intervals hold."""
    train_rows, test_rows = problem.split(seed)
    full, test = problem.data.take(train_rows), problem.data.take(test_rows)
    train = logged(full, problem.logging, seed)
    made = fit(train, threshold=THRESHOLD, encoder=encoder, seed=seed)
    estimates = made.estimator.estimate_many(test.requests)
    expected = expected_costs(estimates, test.catalog).astype(np.float32)
    labels = test.labels(THRESHOLD)
    default = int(np.nanmean(train.labels(THRESHOLD), axis=0).argmax())
    out: dict[str, Any] = {
        "by_claim": routed(estimates, expected, labels, default),
        "by_p_ok": routed([replace(e, p_claim=None) for e in estimates], expected, labels, default),
    }
    p_ok, low, high = (np.stack([getattr(e, name) for e in estimates]) for name in ("p_ok", "p_low", "p_high"))
    rng = np.random.default_rng([seed, 4])
    out["ece"] = scores(p_ok, labels)["ece"]
    out["ece_floor"] = float(np.mean([_ece(p_ok, rng.random(p_ok.shape) < p_ok) for _ in range(FLOOR_DRAWS)]))
    rate, bottom, top = labels.mean(axis=0), low.mean(axis=0), high.mean(axis=0)
    out["interval_holds"] = float(np.mean((bottom <= rate) & (rate <= top)))
    out["interval_width"] = float(np.mean(top - bottom))
    return out


def routed(estimates: list[Estimate], expected_cost: Array, labels: Array, default: int) -> list[dict[str, Any]]:
    """Per dial: `claimed`, the share of requests whose answer says that the dial is met, and of those the `coverage`
    (share of acceptable answers; None where nothing is claimed), its binomial standard error `se`, and `promised`, the
    mean probability. `defaulted` is the share that took the model `default` because no candidate met the dial.
    """
    policy, eligible = Policy(), np.ones(labels.shape[1], dtype=bool)
    out = []
    for dial in DIALS:
        good, promised, defaulted = [], [], 0
        for estimate, cost, label in zip(estimates, expected_cost, labels, strict=True):
            choice = choose(
                estimate.p_ok,
                cost,
                eligible,
                dial,
                p_claim=estimate.p_claim,
                escalation_rate=policy.escalation_rate,
                default=default,
                unmet="default",
            )
            first = choice.order[0]
            if choice.meets_threshold:
                good.append(float(label[first]))
                promised.append(float(estimate.p_ok[first]))
            elif first == default:
                defaulted += 1
        n, rate = len(good), float(np.mean(good)) if good else None
        out.append(
            {
                "claimed": n / len(labels),
                "coverage": rate,
                "se": None if rate is None else float(np.sqrt(max(rate * (1.0 - rate), 1e-4) / n)),
                "promised": float(np.mean(promised)) if promised else None,
                "defaulted": defaulted / len(labels),
            }
        )
    return out


def _ece(p_ok: Array, label: Array) -> float:
    return float(np.mean([calibration_error(p_ok[:, j], label[:, j]) for j in range(p_ok.shape[1])]))


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per measure and dial a list over seeds, `coverage_mean` over the seeds that claim, and the violations.

    A violation is a coverage that lies more than 0.02 below its dial; `beyond_noise` says whether by more than that
    and 1.64 standard errors besides. `by_p_ok` is the same had the dial been held against the probability itself.
    """
    out = _dials([one["by_claim"] for one in runs])
    out["by_p_ok"] = _dials([one["by_p_ok"] for one in runs])
    for name in ("ece", "ece_floor", "interval_holds", "interval_width"):
        out[name] = [one[name] for one in runs]
    return out


def _dials(runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    out: dict[str, Any] = {
        name: {f"{dial:g}": [run[i][name] for run in runs] for i, dial in enumerate(DIALS)} for name in runs[0][0]
    }
    out["coverage_mean"], out["violations"] = {}, []
    for key, found in out["coverage"].items():
        claimed = [value for value in found if value is not None]
        out["coverage_mean"][key] = float(np.mean(claimed)) if claimed else None
        for seed, (value, se) in enumerate(zip(found, out["se"][key], strict=True)):
            if value is not None and value < float(key) - TOLERANCE:
                beyond = value + 1.64 * se < float(key) - TOLERANCE
                out["violations"].append({"dial": float(key), "seed": seed, "coverage": value, "beyond_noise": beyond})
    return out


def show(console: Console, name: str, found: dict[str, Any]) -> None:
    """One setting's table."""
    table = Table("dial", "claimed", "promised", "coverage", "least", "se of one", "by p_ok", title=name)

    def mean(values: list[float | None]) -> str:
        known = [v for v in values if v is not None]
        return f"{np.mean(known):.3f}" if known else ""

    for key, values in found["coverage"].items():
        known = [v for v in values if v is not None]
        table.add_row(
            key, mean(found["claimed"][key]), mean(found["promised"][key]), mean(values),
            f"{min(known):.3f}" if known else "", mean(found["se"][key]), mean(found["by_p_ok"]["coverage"][key]),
        )  # fmt: skip
    console.print(table)
    console.print(
        f"{name}: {len(found['violations'])} below the dial by more than {TOLERANCE:g} "
        f"({len(found['by_p_ok']['violations'])} had p_ok been asked); calibration error {np.mean(found['ece']):.4f}, "
        f"perfectly calibrated {np.mean(found['ece_floor']):.4f}; models' success rates within their 90 % interval: "
        f"{np.mean(found['interval_holds']):.0%}, {np.mean(found['interval_width']):.3f} wide"
    )


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--only", multiple=True, type=click.Choice(list(SETTINGS)), help="This logging only; may be repeated.")
@click.option("--encoder", default="static", type=click.Choice(ENCODERS), show_default=True)
@click.option("--matrix", type=click.Path(path_type=Path, exists=True), help="An outcome matrix of your own.")
@click.option("--catalog", type=click.Path(path_type=Path, exists=True), help="Its catalogue.")
def main(
    data: Path, seeds: int, json_path: Path | None, only: tuple[str, ...], encoder: str,
    matrix: Path | None, catalog: Path | None,
) -> None:  # fmt: skip
    console = open_console()
    check_source(data, matrix, catalog)
    shared = encoder if encoder == "lexical" else make_encoder(encoder, [])
    results: dict[str, Any] = {}
    for name in only or SETTINGS:
        if matrix and catalog:
            problem = replace(load_own(matrix, catalog, None), logging=name)
        else:
            problem = load_problem(SETTINGS[name], data)
        runs, started = [], time.perf_counter()
        with console.status(name) as status:
            for seed in range(seeds):
                status.update(f"{name}: seed {seed + 1} of {seeds}, {time.perf_counter() - started:.0f} s")
                runs.append(run(problem, seed, shared))
        results[name] = summarise(runs)
        show(console, name, results[name])
        console.print(f"{name}: {seeds} seeds in {time.perf_counter() - started:.0f} s\n")
    if json_path:
        write_results(console, json_path, {"seeds": seeds, "encoder": encoder, **results})


if __name__ == "__main__":
    main()
