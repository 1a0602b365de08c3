"""The outcomes that benchmarks run on: the published sets under their protocols, or a matrix of one's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from training.dataset import Dataset
from training.matrix import CHARS_PER_TOKEN, read_matrix
from training.outcomes import draw_models, logging_propensities

Array = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.int64]
DATASETS = ("mmlu_pro", "mmlu_pro_uniform", "mmlu_pro_mostly_best", "routellm_mmlu", "routellm_gsm8k")
PREAMBLE_TOKENS = 1200
TRAIN_ROWS = {"mmlu_pro": 7000, "routellm_mmlu": 1500, "routellm_gsm8k": 600}
STRONG, WEAK = "gpt-4-1106-preview", "mixtral-8x7b-instruct-v0.1"


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


def logged(data: Dataset, logging: str, seed: int) -> Dataset:
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
