"""Quality of decisions on real outcomes: our router beside its baselines, under the published protocols.

    python -m benchmarks.quality --data ../shared/data --seeds 5 --json benchmarks/results/quality.json

The protocols (splits, costs, measures) are those of the data's own README: MMLU-Pro with full and with one outcome a
request, RouteLLM's MMLU and GSM8K. `--matrix FILE --catalog FILE` runs the same table on your own outcomes.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import polars as pl
from rich.console import Console
from rich.table import Table

from benchmarks.baselines import baselines
from features.encoder import Encoder
from features.text import request_text, words
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from training.dataset import Dataset
from training.encoders import ENCODERS, make_encoder
from training.evaluate import Frontier, aiq_log, cost_at, frontier, scores, strong_weak
from training.fit import fit
from training.matrix import CHARS_PER_TOKEN, read_matrix
from training.outcomes import draw_models, logging_propensities
from training.train import expected_costs

Array = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
DATASETS = ("mmlu_pro", "mmlu_pro_uniform", "mmlu_pro_mostly_best", "routellm_mmlu", "routellm_gsm8k")
PREAMBLE_TOKENS = 1200
TRAIN_ROWS = {"mmlu_pro": 7000, "routellm_mmlu": 1500, "routellm_gsm8k": 600}
STRONG, WEAK = "gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"
THRESHOLD = 0.5
PUBLISHED = {
    "routellm_mmlu": {"apgr": 0.603, "cpt50": 0.3540, "cpt80": 0.7031},
    "routellm_gsm8k": {"apgr": 0.622, "cpt50": 0.3364, "cpt80": 0.6326},
}
"""Best rows of RouteLLM's tables 1 and 2 (arXiv 2406.18665). They were trained on arena data plus some 1,500 MMLU
validation labels or judge labels; ours on 1,500 or 600 labels of the same benchmark. The difference is in the data."""


@dataclass(frozen=True)
class Problem:
    """A benchmark: all its requests with full outcomes, what answers really cost, and how to split."""

    data: Dataset
    cost_usd: Array | None
    split: Callable[[int], tuple[IntArray, IntArray]]
    logging: str = "full"


def load_problem(name: str, folder: Path) -> Problem:
    """One of the published data sets under its protocol."""
    base = "mmlu_pro" if name.startswith("mmlu_pro") else name
    catalog = Catalog.load(folder / "catalog.json")
    file = folder / f"{base}.parquet"
    matrix = read_matrix(file, catalog)
    catalog = catalog.subset(list(matrix.models))
    frame = pl.read_parquet(file)[matrix.rows - 1]
    keep = ~np.isnan(matrix.quality).any(axis=1)
    if "contaminated" in frame.columns:
        keep &= ~frame["contaminated"].to_numpy()
    rows = np.flatnonzero(keep)
    if "question_id" in frame.columns:
        rows = rows[np.argsort(frame["question_id"].to_numpy()[rows], kind="stable")]
    preamble = PREAMBLE_TOKENS if base == "mmlu_pro" else 0
    return _problem(
        catalog, matrix.prompts, matrix.quality, matrix.output_tokens, matrix.cost_usd, rows, preamble,
        lambda n, seed: _permuted(n, seed, TRAIN_ROWS[base]),
        {"mmlu_pro_uniform": "uniform", "mmlu_pro_mostly_best": "mostly-best"}.get(name, "full"),
    )  # fmt: skip


def load_own(file: Path, catalog_file: Path, train_split: str | None) -> Problem:
    """An outcome matrix of the user's own; without a named split, a random 60 % of its rows train."""
    catalog = Catalog.load(catalog_file)
    matrix = read_matrix(file, catalog)
    catalog = catalog.subset(list(matrix.models))
    rows = np.flatnonzero(~np.isnan(matrix.quality).any(axis=1))
    if len(rows) < 50:
        raise click.ClickException(f"{file} has {len(rows)} rows with every model's outcome; at least 50 are needed")

    def split(n: int, seed: int) -> tuple[IntArray, IntArray]:
        if train_split is None:
            return _permuted(n, seed, int(0.6 * n))
        if matrix.split is None:
            raise click.ClickException(f"{file} has no column 'split': leave --train-split out, or add the column")
        of_row = matrix.split[rows] == train_split
        train, test = np.flatnonzero(of_row), np.flatnonzero(~of_row)
        if not len(train) or not len(test):
            raise click.ClickException(
                f"--train-split {train_split!r} leaves {len(train)} rows to train, {len(test)} to test"
            )
        return np.random.default_rng(seed).permutation(train), test

    return _problem(
        catalog, matrix.prompts, matrix.quality, matrix.output_tokens, matrix.cost_usd, rows, 0, split, "full"
    )


def run(problem: Problem, seed: int, encoder: Encoder | str) -> dict[str, dict[str, Any]]:
    """All rows of the table for one seed."""
    train_rows, test_rows = problem.split(seed)
    full, test = problem.data.take(train_rows), problem.data.take(test_rows)
    train = _logged(full, problem.logging, seed)
    cost = None if problem.cost_usd is None else problem.cost_usd[test_rows]
    judge = _Judge(test, cost)
    out: dict[str, dict[str, Any]] = {}

    def router(data: Dataset) -> tuple[Array, Array]:
        made = fit(data, threshold=THRESHOLD, encoder=encoder, seed=seed)
        estimates = made.estimator.estimate_many(test.requests)
        return np.stack([e.p_ok for e in estimates]), expected_costs(estimates, test.catalog)

    p_ok, expected = router(train)
    out["router"] = judge.of(p_ok, expected)
    if cost is not None:
        out["router_min_probability"] = judge.of(p_ok, expected, by="probability")
    embedder = make_encoder(encoder, _words(train), seed=seed) if isinstance(encoder, str) else encoder
    x, x_test = _embed(embedder, _words(train)), _embed(embedder, _words(test))
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


class _Judge:
    """Measures rows of the table on the test requests."""

    def __init__(self, test: Dataset, cost: Array | None) -> None:
        self.quality, self.labels = test.quality, test.labels(THRESHOLD)
        self.cost = cost
        self.pair = [test.catalog.index[model] for model in (STRONG, WEAK)] if cost is None else []

    def of(self, p_ok: Array, expected: Array, *, by: str = "value") -> dict[str, Any]:
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


def _problem(
    catalog: Catalog, prompts: list[str], quality: Array, output_tokens: Array, cost_usd: Array | None,
    rows: IntArray, preamble: int, split: Callable[[int, int], tuple[IntArray, IntArray]], logging: str,
) -> Problem:  # fmt: skip
    texts = [prompts[i] for i in rows]
    input_tokens = np.array([len(t) / CHARS_PER_TOKEN + preamble for t in texts])
    tokens = output_tokens[rows]
    if cost_usd is not None:
        cost: Array | None = cost_usd[rows]
    elif np.isnan(tokens).any():
        cost = None
    else:
        cost = input_tokens[:, None] * catalog.input_price.astype(float) + tokens * catalog.output_price.astype(float)
    if cost is None and set(catalog.ids) != {STRONG, WEAK}:
        raise click.ClickException(
            "give cost_usd/<model>, output_tokens/<model> or output_chars/<model> for every model"
        )
    n = len(rows)
    data = Dataset(
        catalog, [str(i) for i in rows], [request_of(prompt=t) for t in texts], quality[rows], tokens,
        input_tokens.astype(np.float32), np.ones_like(quality[rows]), np.arange(n),
    )  # fmt: skip
    return Problem(data, cost, lambda seed: split(n, seed), logging)


def _permuted(n: int, seed: int, train: int) -> tuple[IntArray, IntArray]:
    order = np.random.default_rng(seed).permutation(n)
    return order[:train], order[train:]


def _logged(data: Dataset, logging: str, seed: int) -> Dataset:
    """What a log under this policy would know of the training requests."""
    if logging == "full":
        return data
    propensity = logging_propensities(data.quality, logging)  # type: ignore[arg-type]
    drawn = draw_models(propensity, np.random.default_rng([seed, 2]))
    seen = np.zeros(data.quality.shape, dtype=bool)
    seen[np.arange(len(data)), drawn] = True
    hide = np.where(seen, np.float32(1.0), np.float32("nan"))
    return replace(
        data,
        quality=data.quality * hide,
        output_tokens=data.output_tokens * hide,
        propensity=propensity.astype(np.float32) * hide,
    )


def _words(data: Dataset) -> list[list[str]]:
    return [words(request_text(r)) for r in data.requests]


def _embed(encoder: Encoder, text_words: list[list[str]]) -> Array:
    return np.stack([encoder.embed(encoder.token_ids(w)) for w in text_words])


def summarise(runs: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Means over seeds with `…_sd` beside each, nested as one run is."""

    def merge(values: list[Any]) -> Any:
        if not isinstance(values[0], dict):
            return values
        return {key: merge([v[key] for v in values]) for key in values[0]}

    def reduce(node: Any) -> Any:
        out: dict[str, Any] = {}
        for key, value in node.items():
            if isinstance(value, dict):
                out[key] = reduce(value)
            else:
                out[key], out[f"{key}_sd"] = float(np.mean(value)), float(np.std(value))
        return out

    return reduce(merge(runs))


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


def open_console(width: int = 170) -> Console:
    """The terminal; where there is none, a file of `width` columns, which has room for the table."""
    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=width)


def check_source(data: Path, matrix: Path | None, catalog: Path | None) -> None:
    """Raises ClickException unless there is either published data or a matrix with its catalogue."""
    if (matrix is None) != (catalog is None):
        raise click.ClickException("--matrix and --catalog go together")
    if matrix is None and not (data / "catalog.json").is_file():
        raise click.ClickException(f"no published outcomes in {data}: give --data DIR, or --matrix FILE --catalog FILE")


def write_results(console: Console, path: Path, results: dict[str, Any]) -> None:
    """Writes results as JSON, aside and renamed, and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    aside.replace(path)
    console.print(f"written to {path}")


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
