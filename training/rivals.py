"""The policies that a router has to beat: always the cheapest, the best single model, and its own shuffled."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.catalog import Catalog
from training.dataset import FAILURES
from training.logged import Decided

Array = npt.NDArray[np.float64]
_LEAST_OUTCOMES = 30


def always_cheapest(decided: Decided) -> Array:
    """The eligible model of the least expected cost of each request; probabilities [n, m]."""
    return _one_hot(np.where(np.isnan(decided.cost_usd), np.inf, decided.cost_usd), decided.eligible)


def always_one(decided: Decided, ranking: list[str]) -> Array:
    """The same model wherever it may serve, else the next of the `ranking`; probabilities [n, m].

    Zeros where none of the ranking may.
    """
    rank = np.full(len(decided.catalog), np.inf)
    for place, model in reversed(list(enumerate(ranking))):  # a model that is named twice has its first place
        rank[decided.catalog.index[model]] = place
    return _one_hot(np.broadcast_to(rank, decided.eligible.shape), decided.eligible & np.isfinite(rank))


def shuffled(decided: Decided) -> Array:
    """The router with its decisions dealt to the requests by chance: the same shares, blind; probabilities [n, m].

    The mean over all permutations. What a router gains over this one is what it knows of the single request; what is
    left is a mixture of models, which needs no learning.
    """
    share = decided.target.mean(axis=0)
    mixed = np.where(decided.eligible, share, 0.0)
    total = mixed.sum(axis=1, keepdims=True)
    even = decided.eligible / np.maximum(decided.eligible.sum(axis=1, keepdims=True), 1)
    found: Array = np.where(total > 0.0, mixed / np.maximum(total, 1e-300), even)
    return found


def ranked_models(log: pl.DataFrame, catalog: Catalog) -> list[str]:
    """The catalogue's models from the best mean quality to the worst; those with fewer than 30 outcomes are left out.

    A model's mean is that of its answers with a quality, times the share of its calls that did not fail: a failed call
    is always known of, an answer only with feedback. A row weighs by 1 / its propensity (1 where that is not known), so
    that a model which got the hard requests is not taken for a bad one. Give rows on which nothing is judged: the best
    of them is chosen with luck.
    """
    weight = 1.0 / pl.col("propensity").fill_null(1.0)
    failed = (pl.col("quality").is_null() & pl.col("status").is_in(FAILURES)).fill_null(False)
    told = pl.col("quality").is_not_null()
    means = log.group_by(pl.coalesce("fallback_from", "model").alias("model")).agg(
        mean=(pl.col("quality") * weight).sum() / weight.filter(told).sum(),
        answers=1.0 - weight.filter(failed).sum() / weight.sum(),
        n=told.sum(),
    )
    known = {model: mean * answers for model, mean, answers, n in means.iter_rows() if n >= _LEAST_OUTCOMES}
    return sorted((model for model in catalog.ids if model in known), key=lambda model: -known[model])


def _one_hot(loss: Array, eligible: npt.NDArray[np.bool_]) -> Array:
    """The eligible position of the least loss a row; a row of zeros where none is."""
    at = np.where(eligible, loss, np.inf).argmin(axis=1)
    chosen = np.zeros(eligible.shape)
    chosen[np.arange(len(at)), at] = eligible.any(axis=1)
    return chosen
