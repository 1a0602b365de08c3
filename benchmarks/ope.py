"""Do off-policy estimates and their intervals hold: logs are drawn again and again where the truth is known.

    python -m benchmarks.ope --data ../shared/data --json benchmarks/results/ope.json

Settings `uniform`, `mostly-best`, `learned`: a router is trained on the MMLU-Pro protocol's training rows; its test
rows are the population, of which every model's outcome is known, so that the value of any policy is, too. Each
repetition draws requests from it with replacement and one model a request under the logging policy, and estimates
what the router would have earned and cost. `simulator`: whole sessions of simulated traffic, where feedback is missing
the more often the less a tenant cares and the cheaper the model. `selected`: besides that, bad answers bring feedback
1.5 times as often, and the estimators are told so. They get what the router itself predicts. `deterministic`: always
the best model, nothing to learn from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.populations import Population, outcome_populations, simulated_populations
from benchmarks.problems import load_own, load_problem
from benchmarks.results import check_source, open_console, write_results
from training.encoders import ENCODERS
from training.ope import ESTIMATORS, evaluate_policy, evaluate_slices

Array = npt.NDArray[np.float64]
OUTCOMES = ("uniform", "mostly-best", "learned")
SETTINGS = (*OUTCOMES, "simulator", "selected")
METRICS = {"quality": ("quality", False), "cost_usd": ("cost_usd", False), "quality_gain": ("quality", True)}
"""What is estimated: a metric, and whether as the paired difference to always asking the best single model."""
LOOKS = 5


def repetition(population: Population, n: int, seed: int) -> dict[str, Any]:
    """One log: each metric's estimates as [value, low, high], by estimator; and what a report says beside them."""
    log, rows = population.draw(n, np.random.default_rng([seed, 17]))
    predictions = {name: values[rows] for name, values in population.predictions.items()}
    found: dict[str, Any] = {}
    for name, (metric, paired) in METRICS.items():
        value = evaluate_policy(
            log, population.target[rows], metric=metric, estimators=ESTIMATORS, seed=seed,
            baseline=population.baseline[rows] if paired else None, predictions=predictions,
            feedback_ratio=population.ratio if metric == "quality" else 1.0,
        )  # fmt: skip
        found[name] = {estimator: list(e[:3]) for estimator, e in value.estimates.items()}
        found[f"{name}/support"] = [value.support.ess, value.support.max_weight]
        if value.feedback is not None:
            found[name]["dr-feedback-ignored"] = list(value.feedback.before[:3])
    if population.ratio != 1.0:
        value = evaluate_policy(log, population.target[rows], estimators=["dr"], seed=seed, predictions=predictions)
        found["quality"]["dr-ratio-unknown"] = list(value.estimates["dr"][:3])
    return found


def looks(population: Population, n: int, seed: int) -> dict[str, bool]:
    """Whether each kind of interval holds at every one of some looks at a growing log."""
    log, rows = population.draw(n, np.random.default_rng([seed, 18]))
    truth, held = population.truth("quality"), {}
    for interval in ("sequence", "bootstrap"):
        good = []
        for size in np.linspace(0, len(log), LOOKS + 1).astype(int)[1:]:
            part = np.arange(size)
            value = evaluate_policy(
                log.take(part), population.target[rows[part]], estimators=["dr"], interval=interval, seed=seed,  # type: ignore[arg-type]
                predictions={name: values[rows[part]] for name, values in population.predictions.items()},
            )  # fmt: skip
            good.append(value.headline is None or value.headline.low <= truth <= value.headline.high)
        held[interval] = all(good)
    return held


def slices(population: Population, n: int, seed: int) -> dict[str, bool]:
    """Whether the intervals of all slices hold at once, and whether those of each slice by itself would."""
    log, rows = population.draw(n, np.random.default_rng([seed, 19]))
    by = [name for name in ("task", "tenant", "length") if name in population.slices.columns]
    found = evaluate_slices(
        log, population.target[rows], by=by, seed=seed, feedback_ratio=population.ratio,
        predictions={name: values[rows] for name, values in population.predictions.items()},
    )  # fmt: skip
    misses, alone = 0, 0
    for (column, name), value in found.values.items():
        if value.headline is not None:
            truth = population.truth("quality", rows=(population.slices[column] == name).to_numpy())
            misses += not value.headline.low <= truth <= value.headline.high
            alone += abs(value.headline.value - truth) > 1.96 * value.headline.se
    return {"corrected": not misses, "uncorrected": not alone}


def deterministic(population: Population, n: int) -> dict[str, Any]:
    """What is said of a log that always asked the best model."""
    only = replace(population, propensity=population.baseline)
    log, rows = only.draw(n, np.random.default_rng(20))
    value = evaluate_policy(log, population.target[rows])
    return {
        "identifiable": value.identifiable,
        "estimates": len(value.estimates),
        "identifiable_share": value.identifiable_share,
        "why": value.why,
    }


def summarise(runs: list[dict[str, Any]], population: Population) -> dict[str, Any]:
    """Per metric and estimator what the intervals and values of all repetitions were worth.

    `coverage`; `bias`, `sd`, `rmse` in the metric's unit; `bias_z`, the bias by its own standard error; `width`, the
    mean of the intervals' finite widths; `estimated`, the share of repetitions with an estimate.
    """
    out: dict[str, Any] = {}
    for metric, (column, paired) in METRICS.items():
        truth = population.truth(column, paired=paired)
        of_metric: dict[str, Any] = {"truth": truth}
        for name in dict.fromkeys(name for run in runs for name in run[metric]):
            rows = np.array([run[metric][name] for run in runs if name in run[metric]])
            value, low, high = rows.T
            off = value - truth
            sd = float(value.std(ddof=1)) if len(rows) > 1 else float("nan")
            of_metric[name] = {
                "coverage": float(np.mean((low <= truth) & (truth <= high))),
                "bias": float(off.mean()),
                "bias_z": float(off.mean() / (sd / np.sqrt(len(rows)))),
                "sd": sd,
                "rmse": float(np.sqrt(np.mean(off**2))),
                "width": float(np.mean(high - low)),
                "estimated": len(rows) / len(runs),
            }
        ess, most = np.array([run[f"{metric}/support"] for run in runs]).T
        of_metric["support"] = {"ess": float(ess.mean()), "max_weight": float(most.max())}
        if of_metric.get("ips", {}).get("rmse"):
            of_metric["rmse_dr_by_ips"] = of_metric["dr"]["rmse"] / of_metric["ips"]["rmse"]
        out[metric] = of_metric
    return out


_POPULATION: Population | None = None  # of this process


def _begin(population: Population) -> None:
    global _POPULATION
    _POPULATION = population


def _one(task: tuple[Callable[[Population, int, int], Any], int, int]) -> Any:
    assert _POPULATION is not None
    return task[0](_POPULATION, *task[1:])


def repeat(
    what: Callable[[Population, int, int], Any], population: Population, n: int, repetitions: int, jobs: int
) -> list[Any]:
    """`what` under seeds 0, 1, …: the same results for any number of jobs."""
    tasks = [(what, n, seed) for seed in range(repetitions)]
    if jobs == 1:
        _begin(population)
        return [_one(task) for task in tasks]
    # Spawned: a fork of a process that has trained hangs in OpenMP.
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_begin, initargs=(population,)) as pool:
        return list(pool.map(_one, tasks, chunksize=5))


def show(console: Console, name: str, found: dict[str, Any]) -> None:
    """One setting's table."""
    table = Table("metric", "estimator", "coverage", "width", "rmse", "bias", "bias_z", title=name)
    for metric in METRICS:
        for estimator, of in found[metric].items():
            if isinstance(of, dict) and "coverage" in of:
                table.add_row(
                    metric, estimator, f"{of['coverage']:.3f}", f"{of['width']:.3g}", f"{of['rmse']:.3g}",
                    f"{of['bias']:+.2g}", f"{of['bias_z']:+.2f}",
                )  # fmt: skip
        support = found[metric]["support"]
        console.print(
            f"{name} {metric}: truth {found[metric]['truth']:.4g}, effective rows {support['ess']:.0f}, "
            f"greatest weight {support['max_weight']:.0f}, rmse dr / ips {found[metric].get('rmse_dr_by_ips', 1):.2f}"
        )
    console.print(table)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--repetitions", default=500, show_default=True, type=click.IntRange(2))
@click.option("--rows", default=15_000, show_default=True, type=click.IntRange(100), help="Requests of a log.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--only", multiple=True, type=click.Choice(SETTINGS), help="This setting only; may be repeated.")
@click.option("--encoder", default="static", type=click.Choice(ENCODERS), show_default=True)
@click.option("--jobs", default=1, show_default=True, type=click.IntRange(1), help="Processes.")
@click.option("--matrix", type=click.Path(path_type=Path, exists=True), help="An outcome matrix of your own.")
@click.option("--catalog", type=click.Path(path_type=Path, exists=True), help="Its catalogue.")
def main(
    data: Path, repetitions: int, rows: int, json_path: Path | None, only: tuple[str, ...], encoder: str, jobs: int,
    matrix: Path | None, catalog: Path | None,
) -> None:  # fmt: skip
    console = open_console()
    wanted = only or SETTINGS
    results: dict[str, Any] = {"repetitions": repetitions, "rows": rows, "encoder": encoder}
    populations: dict[str, Population] = {}
    if set(wanted) & set(OUTCOMES):
        check_source(data, matrix, catalog)
        problem = load_own(matrix, catalog, None) if matrix and catalog else load_problem("mmlu_pro", data)
        populations |= outcome_populations(problem, encoder)
    if set(wanted) - set(OUTCOMES):
        populations |= simulated_populations(max(2 * rows, 4000))
    for name in wanted:
        population, started = populations[name], time.perf_counter()
        with console.status(f"{name}: {repetitions} repetitions"):
            results[name] = summarise(repeat(repetition, population, rows, repetitions, jobs), population)
        show(console, name, results[name])
        console.print(f"{name}: {time.perf_counter() - started:.0f} s\n")
    first = populations[wanted[0]]
    results["deterministic"] = deterministic(first, rows)
    console.print(f"deterministic log: {results['deterministic']['why']}")
    for what, part in ((looks, max(repetitions // 2, 2)), (slices, max(repetitions // 2, 2))):
        held = repeat(what, populations[wanted[-1 if what is slices else 0]], rows, part, jobs)
        results[what.__name__] = {"repetitions": part} | {
            kind: float(np.mean([one[kind] for one in held])) for kind in held[0]
        }
        console.print(f"{what.__name__}, all at once: {results[what.__name__]}")
    if json_path:
        write_results(console, json_path, results)


if __name__ == "__main__":
    main()
