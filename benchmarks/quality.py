"""Quality of decisions on real outcomes: our router beside its baselines, under the published protocols.

    python -m benchmarks.quality --data ../shared/data --seeds 5 --json benchmarks/results/quality.json

The protocols (splits, costs, measures) are those of the data's own README: MMLU-Pro with full and with one outcome a
request, RouteLLM's MMLU and GSM8K. `--matrix FILE --catalog FILE` runs the same table on your own outcomes.
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

from benchmarks.baselines import baselines
from benchmarks.problems import DATASETS, STRONG, WEAK, IntArray, Problem, load_own, load_problem, logged
from benchmarks.results import check_source, open_console, summarise, write_results
from features.encoder import Encoder
from features.text import request_text, words
from training.dataset import Dataset
from training.encoders import ENCODERS, make_encoder
from training.evaluate import Frontier, aiq_log, cost_at, frontier, scores, strong_weak
from training.fit import fit
from training.train import expected_costs

Array = npt.NDArray[np.floating]
THRESHOLD = 0.5
PUBLISHED = {
    "routellm_mmlu": {"apgr": 0.603, "cpt50": 0.3540, "cpt80": 0.7031},
    "routellm_gsm8k": {"apgr": 0.622, "cpt50": 0.3364, "cpt80": 0.6326},
}
"""Best rows of RouteLLM's tables 1 and 2 (arXiv 2406.18665). They were trained on arena data plus some 1,500 MMLU
validation labels or judge labels; ours on 1,500 or 600 labels of the same benchmark. The difference is in the data."""


def run(problem: Problem, seed: int, encoder: Encoder | str) -> dict[str, dict[str, Any]]:
    """All rows of the table for one seed."""
    train_rows, test_rows = problem.split(seed)
    full, test = problem.data.take(train_rows), problem.data.take(test_rows)
    train = logged(full, problem.logging, seed)
    judge = judge_of(problem, test_rows)
    out: dict[str, dict[str, Any]] = {}

    def router(data: Dataset) -> tuple[Array, Array]:
        made = fit(data, threshold=THRESHOLD, encoder=encoder, seed=seed)
        estimates = made.estimator.estimate_many(test.requests)
        return np.stack([e.p_ok for e in estimates]), expected_costs(estimates, test.catalog)

    p_ok, expected = router(train)
    out["router"] = judge.of(p_ok, expected)
    cost = judge.cost
    if cost is not None and not np.isnan(train.output_tokens).all():
        out["router"]["cost_error"] = cost_error(expected, cost)
        out["router"]["cost_error_of_means"] = cost_error(_mean_costs(train, test), cost)
    if cost is not None:
        out["router_min_probability"] = judge.of(p_ok, expected, by="probability")
    embedder = make_encoder(encoder, _words(train), seed=seed) if isinstance(encoder, str) else encoder
    embedder = embedder.adapted([embedder.token_ids(w) for w in _words(train)])
    x, x_test = embed(embedder, train), embed(embedder, test)
    for name, p in baselines(x, train.labels(THRESHOLD), x_test, seed=seed):
        out[name] = judge.of(p, expected)  # the router's own cost estimate: only the probabilities differ
    order = np.random.default_rng([seed, 1]).permutation(len(train))
    shuffled = replace(
        train,
        quality=train.quality[order],
        output_tokens=train.output_tokens[order],
        propensity=train.propensity[order],
    )
    out["shuffled"] = judge.of(*router(shuffled))
    out |= judge.references()
    return out


def cost_error(expected: Array, cost: Array) -> float:
    """Mean absolute error of expected costs [n, m] per model, as a share of the model's mean cost; mean over models."""
    return float((np.abs(expected - cost).mean(axis=0) / cost.mean(axis=0)).mean())


def _mean_costs(train: Dataset, test: Dataset) -> Array:
    """What requests cost if each model always answered at its mean length: the estimate to beat."""
    output = np.nanmean(train.output_tokens.astype(float), axis=0)
    return test.input_tokens[:, None] * test.catalog.input_price.astype(float) + output * test.catalog.output_price


def judge_of(problem: Problem, rows: IntArray) -> Judge:
    """A judge of what is decided on these requests of a problem."""
    return Judge(problem.data.take(rows), None if problem.cost_usd is None else problem.cost_usd[rows])


class Judge:
    """Measures rows of the table on the test requests."""

    def __init__(self, test: Dataset, cost: Array | None) -> None:
        self.quality, self.labels = test.quality, test.labels(THRESHOLD)
        self.cost = cost
        self.pair = [test.catalog.index[model] for model in (STRONG, WEAK)] if cost is None else []

    def of(self, p_ok: Array, expected: Array, *, by: str = "value") -> dict[str, Any]:
        """What probabilities and expected costs [n, m] come to, under one of the two dials."""
        found: dict[str, Any] = dict(scores(p_ok, self.labels))
        if self.cost is not None:
            return found | self._money(frontier(p_ok, expected, self.cost, self.quality, by=by))
        strong, weak = self.pair
        return found | strong_weak(p_ok[:, strong] - p_ok[:, weak], self.quality[:, strong], self.quality[:, weak])

    def references(self) -> dict[str, dict[str, Any]]:
        """Rows that learn nothing: always the cheapest, the best single model, a random mix of both, the oracle."""
        m = self.quality.shape[1]
        if self.cost is None:
            strong, weak = self.pair
            gain = self.quality[:, strong] - self.quality[:, weak]
            random = {"apgr": 0.5, "cpt50": 0.5, "cpt80": 0.8}
            return {"random_mix": random, "oracle": strong_weak(gain, self.quality[:, strong], self.quality[:, weak])}
        single_cost, single_quality = self.cost.mean(axis=0), self.quality.mean(axis=0)
        cheapest, best = int(single_cost.argmin()), int(single_quality.argmax())
        part = np.linspace(0.0, 1.0, 401)

        def line(share: Array) -> Frontier:
            return Frontier(share, share @ single_cost, share @ single_quality, share, single_cost, single_quality)

        mix = np.zeros((len(part), m))
        mix[:, cheapest] += 1 - part
        mix[:, best] += part
        return {
            "always_cheapest": self._money(line(np.eye(m)[[cheapest]])),
            "best_single": self._money(line(np.eye(m)[[best]])),
            "random_mix": self._money(line(mix)),
            "oracle": self._money(frontier(self.quality, self.cost, self.cost, self.quality)),
        }

    @staticmethod
    def _money(front: Frontier) -> dict[str, Any]:
        return {"cost_at": cost_at(front), "aiq_log": aiq_log(front)}


def _words(data: Dataset) -> list[list[str]]:
    return [words(request_text(r)) for r in data.requests]


def embed(encoder: Encoder, data: Dataset) -> Array:
    """The embedding of every request, float32 [n, d]."""
    return np.stack([encoder.embed(encoder.token_ids(w)) for w in _words(data)])


def show(console: Console, name: str, summary: dict[str, Any]) -> None:
    """One data set's table."""
    money = "cost_at" in summary["router"]
    columns = ["auc", "brier", "ece"]
    columns += (
        ["aiq_log", "cost_at.0.9", "cost_at.0.95", "cost_at.0.98", "cost_at.1.0"]
        if money
        else ["apgr", "cpt50", "cpt80"]
    )
    table = Table("row", *columns, title=name)
    rows = dict(summary)
    if name in PUBLISHED:
        rows["RouteLLM, published (other labels)"] = PUBLISHED[name]
    for row, values in rows.items():
        if not isinstance(values, dict):
            continue
        cells = []
        for column in columns:
            head, _, key = column.partition(".")
            node = values.get(head, {}) if key else values
            value, sd = node.get(key or head), node.get(f"{key or head}_sd")
            cells.append("" if value is None else f"{value:.3f}" + (f" ±{sd:.3f}" if sd is not None else ""))
        table.add_row(row, *cells)
    console.print(table)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--only", multiple=True, type=click.Choice(DATASETS), help="Run only this data set; may be repeated.")
@click.option("--encoder", default="static", type=click.Choice(ENCODERS), show_default=True)
@click.option("--matrix", type=click.Path(path_type=Path, exists=True), help="An outcome matrix of your own.")
@click.option("--catalog", type=click.Path(path_type=Path, exists=True), help="Its catalogue.")
@click.option("--train-split", help="Value of the matrix's column 'split' whose rows train.")
def main(
    data: Path, seeds: int, json_path: Path | None, only: tuple[str, ...], encoder: str,
    matrix: Path | None, catalog: Path | None, train_split: str | None,
) -> None:  # fmt: skip
    console = open_console()
    check_source(data, matrix, catalog)
    shared = encoder if encoder == "lexical" else make_encoder(encoder, [])
    results: dict[str, Any] = {}
    for name in ["custom"] if matrix else only or DATASETS:
        problem = load_own(matrix, catalog, train_split) if matrix and catalog else load_problem(name, data)
        runs, started = [], time.perf_counter()
        with console.status(f"{name}") as status:
            for seed in range(seeds):
                status.update(f"{name}: seed {seed + 1} of {seeds}, {time.perf_counter() - started:.0f} s")
                runs.append(run(problem, seed, shared))
        results[name] = summarise(runs)
        if name in PUBLISHED:
            results[name]["published_routellm"] = PUBLISHED[name]
        show(console, name, {k: v for k, v in results[name].items() if k != "published_routellm"})
        console.print(f"{name}: {seeds} seeds in {time.perf_counter() - started:.0f} s\n")
    if json_path:
        write_results(console, json_path, {"seeds": seeds, "encoder": encoder, **results})


if __name__ == "__main__":
    main()
