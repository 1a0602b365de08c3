"""A data set to a learner: encoder, heads, booster and calibration, every supervised stage out of fold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import lightgbm as lgb
import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from features.encoder import Encoder
from features.featurizer import CandidateFeaturizer, RequestFeatures
from features.outcomes import OutcomeHeads
from features.text import conversation_chars, request_text, words
from router_ml.errors import InputError
from router_ml.quality import Calibration, LearnedEstimator, blend
from router_ml.trees import LEAVES, Trees
from training.calibrate import calibrate
from training.dataset import Dataset, Matrix, folds_of
from training.design import fit_request_featurizer
from training.encoders import make_encoder
from training.heads import Moments, fit_head, model_means, moments, total
from training.network import Network, fit_networks, network_inputs

Report = Callable[[str, float], None]
"""Told of progress: the stage's name and its share done, in [0, 1]."""

FOLDS = 5
ROUNDS = 80
_ONE_THREAD_BELOW = 50_000
"""Rows below which LightGBM's threads cost more than they save: on a busy machine each round waits for the slowest."""
_ADAPTED_BY = 4096
"""Training requests by whose texts an encoder is adapted to the log."""
DEFAULT_OUTPUT_TOKENS = 256.0
"""Expected output of a model whose log has no token counts at all."""
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


@dataclass(frozen=True)
class Fit:
    """What `fit` made: the learner, and what it knows of its own training rows.

    `fold` [n] is each training request's fold, `fold_featurizers` the paths that made their rows `rows` float32
    [n, m, d], `out_of_fold` float32 [n, m] their probability from heads and boosters of the other folds. Calibration
    (two numbers a model) and the number of rounds are chosen on these same rows. `embeddings` is float32 [n, e].
    """

    estimator: LearnedEstimator
    fold: npt.NDArray[np.int64]
    fold_featurizers: tuple[CandidateFeaturizer, ...]
    rows: Matrix
    out_of_fold: Matrix
    rounds: int
    embeddings: Matrix


def fit(
    data: Dataset,
    *,
    threshold: float | Sequence[float] = 0.5,
    encoder: str | Encoder = "static",
    encoder_model: str | None = None,
    seed: int = 0,
    report: Report | None = None,
) -> Fit:
    """Fits a learner of P(quality >= threshold) per model, from full or partial outcomes; the same under a seed.

    With several thresholds there is still one learner: it learns the mean of their labels, a graded quality, and its
    scores are calibrated for each threshold. The lowest is the default of requests that name none.

    Linear algebra runs on one thread: its sums then come out the same on every number of cores, and on a busy machine
    it does not wait, spinning, for a core that another process has.

    Raises InputError when the data holds too little to learn from.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        thresholds = sorted({threshold} if isinstance(threshold, int | float) else set(threshold))
        return _fit(data, thresholds, encoder, encoder_model, seed, report or (lambda stage, share: None))


def _fit(
    data: Dataset,
    thresholds: list[float],
    encoder: str | Encoder,
    encoder_model: str | None,
    seed: int,
    say: Report,
) -> Fit:
    labels_at, known = [data.labels(t) for t in thresholds], data.observed
    labels: Matrix = np.mean(labels_at, axis=0, dtype=np.float32)
    if known.sum() < 4 * FOLDS or len(data) < 4 * FOLDS:
        raise InputError(
            f"only {int(known.sum())} outcomes with a quality, on {len(data)} distinct requests: {4 * FOLDS} of each "
            "are the least to learn from; log quality feedback, or import more"
        )
    texts = [request_text(r) for r in data.requests]
    text_words = [words(text) for text in _tick(texts, "read prompts", say)]
    say("encoder and vocabulary", 0.0)
    if isinstance(encoder, str):
        encoder = make_encoder(encoder, text_words, model=encoder_model, seed=seed)
    sample = np.random.default_rng(seed).permutation(len(data))[:_ADAPTED_BY]
    encoder = encoder.adapted([encoder.token_ids(text_words[i]) for i in sample])
    requests, kernel, lexical = fit_request_featurizer(data.requests, texts, text_words, encoder, seed)
    say("encoder and vocabulary", 1.0)
    features = [requests.transform(r) for r in _tick(data.requests, "features", say)]

    fold = folds_of(data, FOLDS, seed)
    kernel_design = kernel.matrix(features)
    lexical_design = lexical.matrix(features)
    targets = {
        "kernel": (kernel_design, labels),
        "lexical": (lexical_design, labels),
    }
    sums: dict[str, list[Moments]] = {name: [] for name in targets}
    for f in _tick(range(FOLDS), "outcome statistics", say):
        for name, (design, target) in targets.items():
            full = not np.isnan(target).any()
            sums[name].append(moments(design[fold == f], target[fold == f], full=full))
    whole = {name: total(parts) for name, parts in sums.items()}

    directions = lexical.directions().astype(np.float32)
    seen, scale = network_inputs(features, lexical_design[:, : directions.shape[1]])
    say("network", 0.0)
    inputs = seen * scale
    network, networks = fit_networks(
        inputs, labels, np.log1p(data.output_tokens), math.log1p(DEFAULT_OUTPUT_TOKENS), fold, FOLDS, seed
    )
    log_tokens = np.empty(labels.shape)
    for f in range(FOLDS):
        log_tokens[fold == f] = networks[f].predict(inputs[fold == f])[1]
    tokens_scale = _smearing(log_tokens, data.output_tokens)
    say("network", 1.0)

    def heads(stats: dict[str, Moments], net: Network) -> OutcomeHeads:
        kernel_w, kernel_b = fit_head(stats["kernel"])
        lexical_w, lexical_b = fit_head(stats["lexical"])
        return OutcomeHeads(
            kernel_w=kernel.fold(kernel_w).astype(np.float32),
            kernel_b=kernel_b.astype(np.float32),
            lexical_w=np.concatenate([lexical.fold(lexical_w).astype(np.float32), directions], axis=1),
            lexical_b=lexical_b.astype(np.float32),
            tokens_scale=tokens_scale.astype(np.float32),
            network_w1=net.w1 * scale[:, None],
            network_b1=net.b1,
            network_w2=net.w2,
            network_b2=net.b2,
        )

    final = CandidateFeaturizer(
        data.catalog, requests, heads(whole, network), _success(whole["kernel"]), _input_tokens_fit(data)
    )
    by_fold = []
    for f in _tick(range(FOLDS), "outcome heads", say):
        rest = {name: whole[name].minus(sums[name][f]) for name in ("kernel", "lexical")}
        by_fold.append(final.with_heads(heads(rest, networks[f]), _success(rest["kernel"])))
    rows, parts = _out_of_fold_rows(features, fold, by_fold, say)
    booster, rounds, raw = _boost(rows, labels, fold, final.names, seed, say)
    mixed = blend(raw, parts)
    weight = 1.0 / data.propensity.astype(np.float64)
    calibration = Calibration.stack(
        [calibrate(mixed, at, weight, t) for t, at in zip(thresholds, labels_at, strict=True)]
    )
    return Fit(
        LearnedEstimator(final, Trees(booster.model_to_string(num_iteration=-1)), calibration),
        fold,
        tuple(by_fold),
        rows,
        calibration.apply(mixed),
        rounds,
        seen[:, : encoder.dim],
    )


def _out_of_fold_rows(
    features: list[RequestFeatures], fold: npt.NDArray[np.int64], by_fold: list[CandidateFeaturizer], say: Report
) -> tuple[Matrix, Matrix]:
    """Rows [n, m, d] and parts [k, n, m], each request through the path of the fold that has not seen it."""
    one = [by_fold[f].rows(x) for f, x in _tick(list(zip(fold, features, strict=True)), "training rows", say)]
    return np.stack([x.rows for x in one]), np.stack([x.parts for x in one], axis=1)


def _boost(
    rows: Matrix, labels: Matrix, fold: npt.NDArray[np.int64], names: tuple[str, ...], seed: int, say: Report
) -> tuple[lgb.Booster, int, Matrix]:
    """The pooled classifier, its number of rounds (least log loss out of fold) and its scores out of fold [n, m]."""
    n, m, d = rows.shape
    known = ~np.isnan(labels)
    size = int(known.sum())
    params = {**BOOSTER_PARAMS, "seed": seed, "min_data_in_leaf": int(np.clip(size // 100, 5, 100))}
    if not np.isin(labels[known], (0.0, 1.0)).all():  # of several thresholds
        params["objective"] = "cross_entropy"
    if size < _ONE_THREAD_BELOW:
        params["num_threads"] = 1
    names_list = list(names)

    def dataset(at: npt.NDArray[np.bool_]) -> lgb.Dataset:
        return lgb.Dataset(rows[at], labels[at], feature_name=names_list, params=params, free_raw_data=False)

    boosters, losses = [], np.zeros(ROUNDS)
    for f in _tick(range(FOLDS), "booster", say):
        held = known & (fold == f)[:, None]
        curve: dict[str, dict[str, list[float]]] = {}
        train = dataset(known & ~held)
        boosters.append(
            lgb.train(
                params,
                train,
                ROUNDS,
                valid_sets=[lgb.Dataset(rows[held], labels[held], reference=train)] if held.any() else [],
                valid_names=["held"] if held.any() else [],
                callbacks=[lgb.record_evaluation(curve)],
            )
        )
        if held.any():
            (loss,) = curve["held"].values()
            losses += np.array(loss) * int(held.sum())
    rounds = int(losses.argmin()) + 1
    raw = np.empty((n, m), dtype=np.float32)
    for f, booster in enumerate(boosters):
        at = fold == f
        raw[at] = np.asarray(booster.predict(rows[at].reshape(-1, d), num_iteration=rounds)).reshape(-1, m)
    return lgb.train(params, dataset(known), rounds), rounds, raw


def _success(stats: Moments) -> npt.NDArray[np.float32]:
    return model_means(stats).astype(np.float32)


def _smearing(log_tokens: npt.NDArray[np.float64], tokens: Matrix) -> npt.NDArray[np.float64]:
    """Per model, what the mean of exp(ln tokens), out of fold, lacks to the mean of the tokens (Duan, JASA 1983)."""
    known = ~np.isnan(tokens)
    predicted = np.where(known, np.exp(np.minimum(log_tokens, 14.0)), 0.0).sum(axis=0)
    scale = np.divide(
        np.where(known, tokens, 0.0).sum(axis=0), predicted, out=np.ones(len(predicted)), where=predicted > 0
    )
    clipped: npt.NDArray[np.float64] = np.clip(scale, 0.1, 10.0)
    return clipped


def _input_tokens_fit(data: Dataset) -> tuple[float, float]:
    """(a, b) of input tokens = a + b * characters by least squares, neither below 0; 1 token for 4 by default."""
    chars = np.array([conversation_chars(r) for r in data.requests], dtype=np.float64)
    known = ~np.isnan(data.input_tokens)
    if known.sum() < 2 or np.ptp(chars[known]) == 0:
        return 0.0, 0.25
    b, a = np.polyfit(chars[known], data.input_tokens[known].astype(np.float64), 1)
    if a < 0 or b < 0:
        return 0.0, float(data.input_tokens[known].sum() / max(chars[known].sum(), 1.0))
    return float(a), float(b)


def _tick(items: list[Any] | range, stage: str, say: Report) -> Iterator[Any]:
    """Iterates with about a hundred reports of progress."""
    size = max(len(items), 1)
    step = max(size // 100, 1)
    for i, item in enumerate(items):
        if i % step == 0:
            say(stage, i / size)
        yield item
    say(stage, 1.0)
