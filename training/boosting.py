"""The pooled classifier: a booster per fold for scores out of fold, the number of rounds, and one of all outcomes."""

from __future__ import annotations

from typing import Any, NamedTuple

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from router_ml.trees import LEAVES

ROUNDS = 80
_ONE_THREAD_BELOW = 50_000
"""Rows below which LightGBM's threads cost more than they save: on a busy machine each round waits for the slowest."""
BOOSTER_PARAMS: dict[str, Any] = {
    "objective": "binary",
    "num_leaves": LEAVES,
    "learning_rate": 0.15,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "lambda_l2": 10.0,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


class Cells(NamedTuple):
    """What boosters are fitted on: rows float32 [n, d] with their column `names`, labels [n] and folds [n]."""

    x: npt.NDArray[np.float32]
    y: npt.NDArray[np.float32]
    fold: npt.NDArray[np.int64]
    folds: int
    names: tuple[str, ...]
    seed: int

    @property
    def params(self) -> dict[str, Any]:
        """LightGBM's parameters for them."""
        params = {**BOOSTER_PARAMS, "seed": self.seed, "min_data_in_leaf": int(np.clip(len(self.y) // 100, 5, 100))}
        if not np.isin(self.y, (0.0, 1.0)).all():  # of several thresholds
            params["objective"] = "cross_entropy"
        if len(self.y) < _ONE_THREAD_BELOW:
            params["num_threads"] = 1
        return params


class Boosted(NamedTuple):
    """A booster per fold that has not seen it, the rounds at which they do best, and the text of one of all cells."""

    by_fold: list[lgb.Booster]
    rounds: int
    text: str


def boost(cells: Cells) -> Boosted:
    """Fits all of them in this process; the number of rounds is that of the least log loss out of fold."""
    x, y, params, names = cells.x, cells.y, cells.params, list(cells.names)

    def dataset(at: npt.NDArray[np.bool_] | slice) -> lgb.Dataset:
        return lgb.Dataset(x[at], y[at], feature_name=names, params=params, free_raw_data=False)

    boosters, losses = [], np.zeros(ROUNDS)
    for f in range(cells.folds):
        held = cells.fold == f
        curve: dict[str, dict[str, list[float]]] = {}
        train = dataset(~held)
        boosters.append(
            lgb.train(
                params,
                train,
                ROUNDS,
                valid_sets=[lgb.Dataset(x[held], y[held], reference=train)] if held.any() else [],
                valid_names=["held"] if held.any() else [],
                callbacks=[lgb.record_evaluation(curve)],
            )
        )
        if held.any():
            (loss,) = curve["held"].values()
            losses += np.array(loss) * int(held.sum())
    rounds = int(losses.argmin()) + 1
    whole = lgb.train(params, dataset(slice(None)), rounds)
    return Boosted(boosters, rounds, whole.model_to_string(num_iteration=-1))


def from_texts(cells: Cells, texts: list[str]) -> Boosted:
    """What `boost` gives, of models of `ROUNDS` rounds that were fitted elsewhere: a text per fold, then one of all.

    A model's first k rounds are the model that k rounds would have given.
    """
    boosters = [lgb.Booster(model_str=text) for text in texts]
    losses = np.zeros(ROUNDS)
    for f, booster in enumerate(boosters[:-1]):
        held = cells.fold == f
        if not held.any():
            continue
        odds, y = np.zeros(int(held.sum())), cells.y[held].astype(np.float64)
        for i in range(ROUNDS):
            odds += np.asarray(booster.predict(cells.x[held], start_iteration=i, num_iteration=1, raw_score=True))
            losses[i] += float(np.sum(np.logaddexp(0.0, odds) - y * odds))
    rounds = int(losses.argmin()) + 1
    return Boosted(boosters[:-1], rounds, boosters[-1].model_to_string(num_iteration=rounds))
