"""Quality of decisions by amount of data: our router and nearest neighbours, trained on 100 to 7,000 requests.

    python -m benchmarks.learning_curve --data ../shared/data --seeds 5 --json benchmarks/results/learning_curve.json

The MMLU-Pro protocol of the data's README: the first n of a seed's 7,000 training requests train, with all outcomes
("full") or with one a request ("uniform"), and its test rows judge. `--plot FILE` draws it. The same settings
throughout; `--matrix FILE --catalog FILE` does it on your own outcomes, by shares of their training rows.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from benchmarks.baselines import knn
from benchmarks.problems import Problem, load_own, load_problem, logged
from benchmarks.quality import THRESHOLD, embed, judge_of
from benchmarks.results import check_source, open_console, summarise, write_results
from features.encoder import Encoder
from training.encoders import ENCODERS, make_encoder
from training.fit import fit
from training.train import expected_costs

SIZES = (100, 300, 1000, 3000, 7000)
SETTINGS = {"full": "mmlu_pro", "uniform": "mmlu_pro_uniform"}
MEASURES = ("auc", "aiq_log", "cost_at.0.95", "cost_at.1.0")


def run(problem: Problem, seed: int, encoder: Encoder | str, sizes: tuple[int, ...]) -> dict[str, dict[str, Any]]:
    """One seed: what router and nearest neighbours reach from each number of training requests."""
    train_rows, test_rows = problem.split(seed)
    test = problem.data.take(test_rows)
    judge = judge_of(problem, test_rows)
    out = {}
    for size in sizes:
        train = logged(problem.data.take(train_rows[:size]), problem.logging, seed)
        estimates = fit(train, threshold=THRESHOLD, encoder=encoder, seed=seed).estimator.estimate_many(test.requests)
        expected = expected_costs(estimates, test.catalog)
        embedder = make_encoder(encoder, [], seed=seed) if encoder == "static" else encoder
        rows = {"router": judge.of(np.stack([e.p_ok for e in estimates]), expected)}
        if not isinstance(embedder, str):
            near = knn(embed(embedder, train), train.labels(THRESHOLD), embed(embedder, test), 100)
            rows["knn_100"] = judge.of(near, expected)
        out[str(size)] = rows
    return out


def draw(found: dict[str, Any], path: Path) -> None:
    """The curves of each setting: AUC, AIQ and the cost of 95 % of the best model's quality."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    panels = {"auc": "AUC", "aiq_log": "AIQ over log cost", "cost_at.0.95": "cost of 95 % of the best quality, share"}
    figure, axes = plt.subplots(1, len(panels), figsize=(12, 3.6), layout="constrained")
    for axis, (measure, title) in zip(axes, panels.items(), strict=True):
        for setting, colour in zip(found, ("C0", "C1"), strict=False):
            sizes = [int(size) for size in found[setting]]
            for row, line in (("router", "o-"), ("knn_100", "s:")):
                if row not in found[setting][str(sizes[0])]:
                    continue
                values = [_at(found[setting][str(size)][row], measure) for size in sizes]
                spread = [_at(found[setting][str(size)][row], f"{measure}_sd") for size in sizes]
                axis.errorbar(sizes, values, spread, fmt=line, color=colour, label=f"{row}, {setting}", capsize=2)
        axis.set(xscale="log", xlabel="training requests", title=title)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _at(values: dict[str, Any], measure: str) -> float:
    head, _, key = measure.partition(".")
    return float(values[head][key] if key else values[head])


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Where to draw the curves, PNG or SVG.")
@click.option("--encoder", default="static", type=click.Choice(ENCODERS), show_default=True)
@click.option("--matrix", type=click.Path(path_type=Path, exists=True), help="An outcome matrix of your own.")
@click.option("--catalog", type=click.Path(path_type=Path, exists=True), help="Its catalogue.")
def main(
    data: Path, seeds: int, json_path: Path | None, plot_path: Path | None, encoder: str,
    matrix: Path | None, catalog: Path | None,
) -> None:  # fmt: skip
    console = open_console()
    check_source(data, matrix, catalog)
    shared = encoder if encoder == "lexical" else make_encoder(encoder, [])
    found: dict[str, Any] = {}
    for setting, name in SETTINGS.items() if matrix is None else {"full": "custom"}.items():
        problem = load_own(matrix, catalog, None) if matrix and catalog else load_problem(name, data)
        most = len(problem.split(0)[0])
        sizes = SIZES if matrix is None else tuple(sorted({max(most // 4, 20), max(most // 2, 20), most}))
        runs, started = [], time.perf_counter()
        with console.status(setting) as status:
            for seed in range(seeds):
                status.update(f"{setting}: seed {seed + 1} of {seeds}")
                runs.append(run(problem, seed, shared, sizes))
        found[setting] = summarise(runs)
        table = Table("requests", "row", *MEASURES, title=f"{setting}, {time.perf_counter() - started:.0f} s")
        for size, rows in found[setting].items():
            for row, values in rows.items():
                cells = [f"{_at(values, m):.3f} ±{_at(values, f'{m}_sd'):.3f}" for m in MEASURES]
                table.add_row(size, row, *cells)
        console.print(table)
    if json_path:
        write_results(console, json_path, {"seeds": seeds, "encoder": encoder, **found})
    if plot_path:
        draw(found, plot_path)
        console.print(f"drawn to {plot_path}")


if __name__ == "__main__":
    main()
