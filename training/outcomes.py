"""The way of an outcome matrix into the request log.

A matrix says what every model would have done. A logging policy with known propensities decides which of it the log
gets to see, so that real outcomes go through the same door as a gateway's log.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from router_ml.log_writer import LogSummary, LogWriter
from training.matrix import CHARS_PER_TOKEN, Array, OutcomeMatrix, read_matrix

__all__ = [
    "LOGGINGS",
    "Logging",
    "OutcomeMatrix",
    "draw_models",
    "import_outcomes",
    "logging_propensities",
    "read_matrix",
]

Logging = Literal["full", "uniform", "mostly-best"]
LOGGINGS: tuple[Logging, ...] = get_args(Logging)
BEST_SHARE = 0.7
START = datetime(2024, 1, 1, tzinfo=UTC)
_CHUNK_ROWS = 100_000


def logging_propensities(quality: npt.NDArray[np.floating], logging: Logging, *, best: int | None = None) -> Array:
    """Probability of each model being logged for each prompt, float64 [n, m]; quality [n, m], NaN is no candidate.

    `full`: every candidate, always (rows of ones, not a distribution). `uniform`: one candidate, all equally probable.
    `mostly-best`: the model of the highest mean quality (or the one at position `best`) with 0.7, else any candidate,
    itself included, equally probable; uniform where it is no candidate. Raises InputError for another policy.
    """
    known = ~np.isnan(quality)
    if logging == "full":
        return np.asarray(known, dtype=np.float64)
    uniform: Array = known / known.sum(axis=1, keepdims=True)
    if logging == "uniform":
        return uniform
    if logging != "mostly-best":
        raise InputError(f"unknown logging policy {logging!r}: choose one of {', '.join(LOGGINGS)}")
    if best is None:
        sums = np.where(known, quality, 0.0).sum(axis=0, dtype=np.float64)
        best = int(np.argmax(sums / np.maximum(known.sum(axis=0), 1)))
    mixed: Array = (1.0 - BEST_SHARE) * uniform
    mixed[:, best] += BEST_SHARE
    mixed[~known[:, best]] = uniform[~known[:, best]]
    return mixed


def draw_models(propensities: Array, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """One model a row, drawn with the row's propensities [n, m]; int64 [n]. A propensity of 0 is never drawn."""
    upto = np.cumsum(propensities, axis=1)
    drawn: npt.NDArray[np.int64] = np.argmax(rng.random((len(upto), 1)) * upto[:, -1:] < upto, axis=1)
    return drawn


def import_outcomes(
    file: str | Path,
    catalog: Catalog,
    *,
    out: str | Path,
    logging: Logging = "full",
    seed: int = 0,
    split: str | None = None,
    preamble_tokens: int = 0,
    max_reject_share: float = 0.05,
    quality_source: str = "benchmark",
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> LogSummary:
    """Turns an outcome matrix into a request log under a named logging policy; deterministic under `seed`.

    A model without a published outcome is no candidate for that prompt. Input tokens are a quarter of the prompt's
    characters, rounded up, plus `preamble_tokens`; the cost is the file's, else tokens times the catalogue's price,
    else absent. Times are synthetic: one prompt a second from `START`, in an order
    drawn under `seed`. The log's catalogue lists
    the matrix's models only. `progress` is called with the number of log rows written. Raises InputError as
    `read_matrix` and `LogWriter` do.
    """
    if logging not in LOGGINGS:
        raise InputError(f"unknown logging policy {logging!r}: choose one of {', '.join(LOGGINGS)}")
    meta = {
        "source": Path(file).name,
        "seed": seed,
        "split": split,
        "preamble_tokens": preamble_tokens,
        "times": "synthetic",
    }
    # Opened before the matrix is read, so that an existing log is refused at once.
    with LogWriter(
        out, catalog=catalog, logging=logging, max_reject_share=max_reject_share, meta=meta, overwrite=overwrite
    ) as writer:
        matrix = read_matrix(file, catalog, split, max_reject_share=max_reject_share, keep_beside=out)
        writer.catalog = catalog.subset(list(matrix.models))
        writer.set_aside(matrix.rejects)
        propensities = logging_propensities(matrix.quality, logging)
        rng = np.random.default_rng(seed)
        # A matrix is often sorted by subject: without a drawn order a split by time would be a split by subject.
        arrival = rng.permutation(len(matrix))
        if logging == "full":
            position, models = np.nonzero(propensities[arrival])
            rows = arrival[position]
        else:
            rows, models = arrival, draw_models(propensities[arrival], rng)
        columns = _prompt_columns(matrix, preamble_tokens, np.argsort(arrival))
        for at in range(0, len(rows), _CHUNK_ROWS):
            some, which = rows[at : at + _CHUNK_ROWS], models[at : at + _CHUNK_ROWS]
            log = _log_rows(matrix, writer.catalog, columns[some], some, which, propensities[some, which])
            writer.write(
                log.with_columns(
                    policy_version=pl.lit(f"outcomes-{logging}"),
                    quality_source=pl.lit(quality_source),
                    status=pl.lit("ok"),
                )
            )
            if progress is not None:
                progress(min(at + _CHUNK_ROWS, len(rows)))
    assert writer.summary is not None
    return writer.summary


def _prompt_columns(matrix: OutcomeMatrix, preamble_tokens: int, second: npt.NDArray[np.int64]) -> pl.DataFrame:
    known = ~np.isnan(matrix.quality)
    sets, which = np.unique(known, axis=0, return_inverse=True)
    names = np.array(matrix.models)
    candidates = pl.Series([names[mask].tolist() for mask in sets], dtype=pl.List(pl.String))
    optional = {"task": matrix.category, "session": matrix.session}
    return pl.DataFrame(
        {
            "request_id": matrix.ids,
            "prompt": matrix.prompts,
            "candidates": candidates.gather(which.ravel()),
            **{name: pl.Series(values, dtype=pl.String) for name, values in optional.items() if values is not None},
        }
    ).with_columns(
        time=pl.lit(START, LOG_SCHEMA["time"]) + pl.duration(seconds=pl.lit(pl.Series(second))),
        input_tokens=-(-pl.col("prompt").str.len_chars().cast(pl.Int64) // CHARS_PER_TOKEN) + preamble_tokens,
    )


def _log_rows(
    matrix: OutcomeMatrix,
    catalog: Catalog,
    prompts: pl.DataFrame,
    rows: npt.NDArray[np.int64],
    models: npt.NDArray[np.int64],
    propensity: Array,
) -> pl.DataFrame:
    cards = catalog.cards
    output_tokens = np.ceil(matrix.output_tokens[rows, models].astype(np.float64))
    price = np.array([(card.input_usd_per_mtok * 1e-6, card.output_usd_per_mtok * 1e-6) for card in cards])[models]
    cost = prompts["input_tokens"].to_numpy() * price[:, 0] + output_tokens * price[:, 1]
    if matrix.cost_usd is not None:
        given = matrix.cost_usd[rows, models]
        cost = np.where(np.isnan(given), cost, given)
    # float32 holds some seven digits: 0.7 has to come out as 0.7, or a threshold at 0.7 would split it off.
    quality = np.round(matrix.quality[rows, models].astype(np.float64), 6)
    return prompts.with_columns(
        model=pl.Series([card.id for card in cards]).gather(models),
        provider=pl.Series([card.provider for card in cards]).gather(models),
        propensity=pl.Series(propensity),
        output_tokens=pl.Series(output_tokens).fill_nan(None).cast(pl.Int64),
        cost_usd=pl.Series(cost).fill_nan(None),
        quality=pl.Series(quality),
        retries=pl.lit(0, pl.Int64),
    )
