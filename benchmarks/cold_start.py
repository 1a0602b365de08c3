"""A new model without retraining: what is lost against a full retrain, after 0, 50, 200 and 1,000 of its outcomes.

    python -m benchmarks.cold_start --data ../shared/data --seeds 1 --json benchmarks/results/cold_start.json

Each model of MMLU-Pro is held out in turn. The router is trained on the training rows without it, then takes it up
with its card, its sibling and k of its outcomes, drawn from the training rows; a router trained on all models and all
rows is the other side of the comparison. `--matrix FILE --catalog FILE` does the same on your own outcomes, with the
siblings that the catalogue's cards name.

Regret is mean utility lost a test request: utility is quality - cost / worth, averaged over `WORTHS` values of an
acceptable answer, evenly on a log scale from what the cheapest model's mean call costs (at which an answer is not worth
more than that) to 100 times what the dearest's does (at which a point of quality is worth one such call).
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

from benchmarks.problems import Problem, load_own, load_problem
from benchmarks.quality import THRESHOLD
from benchmarks.results import check_source, open_console, write_results
from features.encoder import Encoder
from router_ml.quality import LearnedEstimator
from router_ml.types import Estimate, RouteRequest
from training.dataset import Dataset
from training.encoders import ENCODERS, make_encoder
from training.evaluate import aiq_log, choose_by_value, frontier, scores
from training.fit import fit
from training.onboard import MEAN_ROWS, onboard, prior_mix
from training.train import expected_costs

Array = npt.NDArray[np.floating]
OUTCOMES = (0, 50, 200, 1000)
WORTHS = 60
DIALS = (0.5, 0.6, 0.7, 0.8, 0.9)
_LEAST_CLAIMS = 50
SPREAD = ("regret", "own_mean", "bias")
"""The columns of the printed table that show their standard deviation over models and seeds."""
SIBLINGS = {
    "gemini-1.5-pro-002": "gemini-1.5-flash-002",
    "gemini-1.5-flash-002": "gemini-1.5-pro-002",
    "llama-3.1-70b-instruct": "llama-3.1-8b-instruct",
    "llama-3.1-8b-instruct": "llama-3.1-70b-instruct",
    "mixtral-8x7b-instruct": "mistral-7b-instruct-v0.2",
    "mistral-7b-instruct-v0.2": "mixtral-8x7b-instruct",
    "mathstral-7b": "mistral-7b-instruct-v0.2",
    "gpt-4o": "gemini-1.5-pro-002",
    "jamba-1.5-large": "gemini-1.5-pro-002",
    "command-r": "jamba-1.5-large",
    "qwen1.5-72b-chat": "llama-3.1-70b-instruct",
    "deepseek-v2-chat": "llama-3.1-70b-instruct",
    "phi-3-mini-4k-instruct": "llama-3.1-8b-instruct",
}
"""Declared by hand from the models' names, before any figure was looked at: one of the same family where there is one
(the first seven, which differ in size), else one of a like size or price."""


class Judge:
    """Measures routers on the test requests, over all models of the catalogue or all but one."""

    def __init__(self, problem: Problem, train: npt.NDArray[np.int64], test: npt.NDArray[np.int64]) -> None:
        assert problem.cost_usd is not None
        self.test = problem.data.take(test)
        self.cost = problem.cost_usd[test]
        single = problem.cost_usd[train].mean(axis=0)
        self.worths = np.geomspace(single.min(), 100.0 * single.max(), WORTHS)

    def of(self, p_ok: Array, expected: Array, models: list[int]) -> dict[str, float]:
        """`utility` and `aiq_log` of a router that chooses among `models`; `p_ok` and `expected` are in their order."""
        quality, cost = self.test.quality[:, models], self.cost[:, models]
        rows = np.arange(len(quality))
        utility = []
        for worth in self.worths:
            chosen = choose_by_value(p_ok, expected, float(worth))
            utility.append(float((quality[rows, chosen] - cost[rows, chosen] / worth).mean()))
        front = frontier(p_ok, expected, cost, quality)
        # The axis is that of all models. One that the router lacks counts as good as the cheapest that it has.
        single_cost, single_quality = self.cost.mean(axis=0), self.test.quality.mean(axis=0)
        lacked = np.setdiff1d(np.arange(len(single_cost)), models)
        single_quality[lacked] = front.single_quality[front.single_cost.argmin()]
        whole = replace(front, single_cost=single_cost, single_quality=single_quality)
        return {"utility": float(np.mean(utility)), "aiq_log": aiq_log(whole)}

    def claims(self, estimates: list[Estimate], at: int, model: int) -> dict[str, Any]:
        """What the router says of one model, at position `at` of its estimates, beside what the model does.

        `auc` and `ece`; `bias`, its mean probability less its success rate; `inside`, 1 if that rate lies between the
        means of the intervals' bounds, which are `width` apart; `coverage` per dial, the success rate among requests on
        which the model is claimed to meet the dial, less the dial (left out where they are fewer than 50).
        """
        label = self.test.labels(THRESHOLD)[:, model]
        p, low, high, claim = (
            np.array([getattr(e, name)[at] for e in estimates]) for name in ("p_ok", "p_low", "p_high", "p_claim")
        )
        found = scores(p[:, None], label[:, None])
        rate = float(label.mean())
        auc = {"auc": found["auc"]} if not np.isnan(found["auc"]) else {}
        return auc | {
            "ece": found["ece"],
            "bias": float(p.mean()) - rate,
            "inside": float(low.mean() <= rate <= high.mean()),
            "width": float((high - low).mean()),
            "coverage": {
                f"{d:g}": float(label[claim >= d].mean() - d) for d in DIALS if (claim >= d).sum() >= _LEAST_CLAIMS
            },
        }


def run(problem: Problem, seed: int, encoder: Encoder | str, say: Any = lambda text: None) -> dict[str, Any]:
    """One seed: per held-out model and number of outcomes, what is lost against the full retrain, and the baselines."""
    train_rows, test_rows = problem.split(seed)
    train, judge = problem.data.take(train_rows), Judge(problem, train_rows, test_rows)
    catalog, requests = train.catalog, judge.test.requests
    every = list(range(len(catalog)))
    say("full retrain")
    whole, p, expected = _estimates(fit(train, threshold=THRESHOLD, encoder=encoder, seed=seed).estimator, requests)
    best = judge.of(p, expected, every)
    models: dict[str, Any] = {}
    for j, card in enumerate(catalog):
        say(f"without {card.id}")
        others = [i for i in every if i != j]
        base = fit(_columns(train, others), threshold=THRESHOLD, encoder=encoder, seed=seed).estimator
        found: dict[str, Any] = {"full": judge.claims(whole, j, j)}
        _, p, expected = _estimates(base, requests)
        found["without"] = _lost(best, judge.of(p, expected, others))
        drawn = np.random.default_rng([seed, j]).permutation(len(train))
        back = np.argsort([*others, j])  # the new model stands last: back to the catalogue's order
        own = _columns(train, [j])
        rest = _columns(train, others).catalog
        named = replace(card, sibling=SIBLINGS.get(card.id, card.sibling))
        named = named if named.sibling in rest else replace(named, sibling=None)
        for k in (k for k in OUTCOMES if k <= len(train)):
            outcomes = own.take(drawn[:k]) if k else None
            said, p, expected = _estimates(onboard(base, named, outcomes), requests)
            p, expected = p[:, back], expected[:, back]
            row: dict[str, Any] = _lost(best, judge.of(p, expected, every)) | judge.claims(said, -1, j)
            guess = float(base.featurizer.success @ prior_mix(rest, named))  # type: ignore[attr-defined]
            label = own.labels(THRESHOLD)[drawn[:k], 0]
            constant = p.copy()
            constant[:, j] = (float(label.sum()) + MEAN_ROWS * guess) / (k + MEAN_ROWS)
            row["own_mean"] = _lost(best, judge.of(constant, expected, every))
            found[str(k)] = row
        models[card.id] = found
    return models


def _columns(data: Dataset, models: list[int]) -> Dataset:
    """The data set as it would be if there were only these models."""
    ids = [data.catalog.ids[i] for i in models]
    return replace(
        data,
        catalog=data.catalog.subset(ids),
        quality=data.quality[:, models],
        output_tokens=data.output_tokens[:, models],
        propensity=data.propensity[:, models],
    )


def _estimates(estimator: LearnedEstimator, requests: list[RouteRequest]) -> tuple[list[Estimate], Array, Array]:
    """What a learner says of the requests; its probabilities and expected costs, both [n, m]."""
    found = estimator.estimate_many(requests)
    catalog = estimator.featurizer.catalog  # type: ignore[attr-defined]
    return found, np.stack([e.p_ok for e in found]), expected_costs(found, catalog)


def _lost(best: dict[str, float], got: dict[str, float]) -> dict[str, float]:
    return {"regret": best["utility"] - got["utility"], "aiq_log_lost": best["aiq_log"] - got["aiq_log"]}


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over models and seeds, `…_sd` beside each, and per model the means over seeds under `models`."""

    def pooled(nodes: list[Any], spread: bool) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key in dict.fromkeys(key for node in nodes for key in node):
            values = [node[key] for node in nodes if key in node]
            if isinstance(values[0], dict):
                out[key] = pooled(values, spread)
            else:
                out[key] = float(np.mean(values))
                if spread:
                    out[f"{key}_sd"] = float(np.std(values))
        return out

    found = pooled([model for run in runs for model in run.values()], True)
    for model in runs[0]:
        alone = pooled([run[model] for run in runs], False)
        for row, values in alone.items():
            found[row].setdefault("models", {})[model] = values
    return found


def show(console: Console, found: dict[str, Any]) -> None:
    """The table of means."""
    columns = ["regret", "own_mean.regret", "aiq_log_lost", "auc", "ece", "bias", "inside", "width"]
    table = Table("outcomes", *columns)
    for row, values in found.items():
        cells = []
        for column in columns:
            head, _, key = column.partition(".")
            node = values.get(head, {}) if key else values
            value, spread = node.get(key or head), node.get(f"{key or head}_sd")
            cells.append("" if value is None else f"{value:.4f}" + (f" ±{spread:.4f}" if head in SPREAD else ""))
        table.add_row(row, *cells)
    console.print(table)


@click.command(help=__doc__)
@click.option("--data", type=click.Path(path_type=Path), default=Path("../shared/data"), show_default=True)
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1))
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Where to write the results.")
@click.option("--encoder", default="static", type=click.Choice(ENCODERS), show_default=True)
@click.option("--matrix", type=click.Path(path_type=Path, exists=True), help="An outcome matrix of your own.")
@click.option("--catalog", type=click.Path(path_type=Path, exists=True), help="Its catalogue.")
def main(
    data: Path, seeds: int, json_path: Path | None, encoder: str, matrix: Path | None, catalog: Path | None
) -> None:
    console = open_console(120)
    check_source(data, matrix, catalog)
    problem = load_own(matrix, catalog, None) if matrix and catalog else load_problem("mmlu_pro", data)
    if problem.cost_usd is None:
        raise click.ClickException(
            "give cost_usd/<model>, output_tokens/<model> or output_chars/<model> for each model"
        )
    shared = encoder if encoder == "lexical" else make_encoder(encoder, [])
    runs, started = [], time.perf_counter()
    with console.status("cold start") as status:
        for seed in range(seeds):
            where = f"seed {seed + 1} of {seeds}"
            runs.append(run(problem, seed, shared, lambda text, where=where: status.update(f"{where}: {text}")))
    found = summarise(runs)
    show(console, found)
    console.print(f"{seeds} seeds in {time.perf_counter() - started:.0f} s")
    if json_path:
        write_results(console, json_path, {"seeds": seeds, "encoder": encoder, "cold_start": found})


if __name__ == "__main__":
    main()
