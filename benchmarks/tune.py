"""Does a tuned dial keep its promise, and what does the caution cost: `router-ml tune` over and over on MMLU-Pro.

    python -m benchmarks.tune --data ../shared/data --resplits 200 --json benchmarks/results/tune.json

A router is fitted on 7,000 questions, once per `--fits`; for each of its resplits the other questions are drawn again.
`drawn`: a calibration log of the given number of rows is drawn from them with replacement, so that their own mean is
the true quality of every setting, without noise. `halves`: half of them calibrate, the other half judges; its mean is
noisy itself, so a setting that keeps its promise is now and then found not to. `full` logs have every model's outcome,
`uniform` ones that of one model a row. A resplit where nothing is certified violates nothing; `certified` says how many
are. `cost` is the chosen setting's true mean cost beside `oracle`'s, the cheapest setting of the same dials that is
truly good enough, over the resplits that certify one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from benchmarks.problems import Problem, load_own, load_problem
from benchmarks.results import check_source, open_console, write_results
from features.encoder import Encoder
from router_ml.policy import Policy
from router_ml.router import Router
from training.dials import KINDS, Kind, Setting, seen_of_requests, sequence
from training.encoders import ENCODERS, make_encoder
from training.fit import fit
from training.judged import Judged
from training.tune import Method, tune_judged

Array = npt.NDArray[np.float64]
TARGETS = (0.65, 0.68, 0.7, 0.8)
DIALS: dict[str, tuple[Kind, ...]] = {"both": KINDS, **{kind: (kind,) for kind in KINDS}}


@dataclass(frozen=True)
class Case:
    """How a calibration log is drawn, how large, and what is tuned on it, with which test."""

    name: str
    split: str
    logging: str
    rows: int
    dials: str = "both"
    method: Method = "auto"


CASES = (
    Case("full", "drawn", "full", 2500),
    Case("full_halves", "halves", "full", 0),
    Case("full_min_probability", "drawn", "full", 2500, "min_probability"),
    Case("full_willingness_to_pay", "drawn", "full", 2500, "willingness_to_pay_usd"),
    Case("full_hoeffding_bentkus", "drawn", "full", 2500, method="hoeffding-bentkus"),
    Case("full_betting", "drawn", "full", 2500, method="betting"),
    Case("uniform", "drawn", "uniform", 25_000),
    Case("uniform_halves", "halves", "uniform", 0),
    Case("uniform_2500", "drawn", "uniform", 2500),
    Case("uniform_betting", "drawn", "uniform", 25_000, method="betting"),
)


@dataclass(frozen=True)
class Pool:
    """The questions that a fitted router has not seen: what it sees of them, and each setting's outcome and cost."""

    judged: Judged
    chosen: dict[Setting, npt.NDArray[np.int64]]
    quality: dict[Setting, Array]
    cost: dict[Setting, Array]


def pool_of(problem: Problem, seed: int, encoder: Encoder | str) -> Pool:
    """Fits a router on one split's training rows, and routes the others at every setting."""
    train_rows, rows = problem.split(seed)
    data, rest = problem.data.take(train_rows), problem.data.take(rows)
    router = Router(rest.catalog, fit(data, encoder=encoder, seed=seed).estimator, Policy(), "benchmark")
    seen, served = seen_of_requests(router, rest.requests)
    assert served.all() and problem.cost_usd is not None
    n, at = len(rest), np.arange(len(rest))
    quality, cost = rest.quality.astype(np.float64), problem.cost_usd[rows]
    total = seen.total
    chosen = {setting: seen.choices(setting, total) for kind in KINDS for setting in sequence(kind)}
    judged = Judged(seen, quality, np.full(n, -1), np.ones(n), np.ones(n, dtype=bool), at)
    return Pool(
        judged, chosen, {s: quality[at, c] for s, c in chosen.items()}, {s: cost[at, c] for s, c in chosen.items()}
    )  # fmt: skip


def logged(judged: Judged, logging: str, rng: np.random.Generator) -> Judged:
    """The requests as a log of this kind knows them."""
    if logging == "full":
        return judged
    n, m = judged.quality.shape
    action = rng.integers(0, m, n)
    quality = np.full((n, m), np.nan)
    quality[np.arange(n), action] = judged.quality[np.arange(n), action]
    return Judged(judged.seen, quality, action, np.full(n, 1.0 / m), np.zeros(n, dtype=bool), judged.unit)


def run(pool: Pool, case: Case, target: float, seed: int) -> dict[str, Any]:
    """One resplit: whether a setting was certified, what it truly reaches and costs, and the oracle's cost."""
    rng = np.random.default_rng([seed, 5])
    n = len(pool.judged)
    if case.split == "halves":
        order = rng.permutation(n)
        rows, judge = order[: n // 2], order[n // 2 :]
    else:
        rows, judge = rng.integers(0, n, case.rows), np.arange(n)
    sample = pool.judged.take(rows)
    sample = Judged(sample.seen, sample.quality, sample.action, sample.propensity, sample.full, np.arange(len(rows)))
    found = tune_judged(
        logged(sample, case.logging, rng), min_quality=target, dials=DIALS[case.dials], method=case.method, seed=seed,
        choices={setting: chosen[rows] for setting, chosen in pool.chosen.items()},
    )  # fmt: skip
    of = [setting for kind in DIALS[case.dials] for setting in sequence(kind)]
    valid = [float(pool.cost[s].mean()) for s in of if pool.quality[s].mean() >= target]
    out: dict[str, Any] = {"certified": found.chosen is not None, "oracle": min(valid, default=None)}
    if found.chosen is not None:
        out["quality"] = float(pool.quality[found.chosen][judge].mean())
        out["cost"] = float(pool.cost[found.chosen].mean())
    return out


def summarise(runs: list[dict[str, Any]], target: float) -> dict[str, Any]:
    """Rates over all resplits; costs (USD a request) and their ratio over those that certify a setting."""
    certified = [one for one in runs if one["certified"]]
    out: dict[str, Any] = {
        "resplits": len(runs),
        "certified": len(certified) / len(runs),
        "violated": sum(one["quality"] < target for one in certified) / len(runs),
        "attainable": sum(one["oracle"] is not None for one in runs) / len(runs),
    }
    both = [one for one in certified if one["oracle"] is not None]
    if both:
        out["quality"] = float(np.mean([one["quality"] for one in both]))
        out["cost"] = float(np.mean([one["cost"] for one in both]))
        out["oracle_cost"] = float(np.mean([one["oracle"] for one in both]))
        out["cost_over_oracle"] = out["cost"] / out["oracle_cost"]
    return out


def show(console: Console, results: dict[str, Any]) -> None:
    """The table, a row a case and target."""
    names = ("certified", "violated", "quality", "cost", "oracle_cost", "cost_over_oracle")
    table = Table("case", "least quality", *names, title="tuned dials")
    for case, targets in results.items():
        for target, found in targets.items():
            cells = []
            for name in names:
                value = found.get(name)
                scaled = value if value is None or "cost" not in name or "over" in name else value * 1000
                cells.append("" if scaled is None else f"{scaled:.3f}")
            table.add_row(case, target, *cells)
    console.print(table)
    console.print("costs in USD per 1,000 requests")


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--resplits", default=200, show_default=True, type=click.IntRange(1))
@click.option("--fits", default=4, show_default=True, type=click.IntRange(1), help="Routers that share the resplits.")
@click.option("--target", "targets", multiple=True, type=float, help="Least quality; may be repeated.")
@click.option("--only", multiple=True, type=click.Choice([case.name for case in CASES]), help="May be repeated.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--encoder", default="static", type=click.Choice(ENCODERS), show_default=True)
@click.option("--matrix", type=click.Path(path_type=Path, exists=True), help="An outcome matrix of your own.")
@click.option("--catalog", type=click.Path(path_type=Path, exists=True), help="Its catalogue.")
def main(
    data: Path, resplits: int, fits: int, targets: tuple[float, ...], only: tuple[str, ...], json_path: Path | None,
    encoder: str, matrix: Path | None, catalog: Path | None,
) -> None:  # fmt: skip
    console = open_console()
    check_source(data, matrix, catalog)
    problem = load_own(matrix, catalog, None) if matrix and catalog else load_problem("mmlu_pro", data)
    if problem.cost_usd is None:
        raise click.ClickException("tuning needs what answers cost: give cost_usd or output_tokens for every model")
    shared = encoder if encoder == "lexical" else make_encoder(encoder, [])
    cases = [case for case in CASES if not only or case.name in only]
    runs: dict[tuple[str, float], list[dict[str, Any]]] = {}
    started = time.perf_counter()
    with console.status("fits") as status:
        for part in range(fits):
            pool = pool_of(problem, part, shared)
            for seed in range(part, resplits, fits):
                status.update(f"fit {part + 1} of {fits}, resplit {seed}, {time.perf_counter() - started:.0f} s")
                for case in cases:
                    for target in targets or TARGETS:
                        runs.setdefault((case.name, target), []).append(run(pool, case, target, seed))
    results: dict[str, Any] = {}
    for (name, target), found in runs.items():
        results.setdefault(name, {})[f"{target:g}"] = summarise(found, target)
    show(console, results)
    console.print(f"{resplits} resplits of {fits} fits in {time.perf_counter() - started:.0f} s")
    if json_path:
        write_results(console, json_path, {"resplits": resplits, "fits": fits, "encoder": encoder, **results})


if __name__ == "__main__":
    main()
