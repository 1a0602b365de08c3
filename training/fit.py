"""A data set to a learner: encoder, heads, booster and calibration, every supervised stage out of fold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from features.encoder import Encoder
from features.featurizer import PARTS, CandidateFeaturizer, RequestFeaturizer
from features.outcomes import OutcomeHeads
from features.text import request_text, words
from router_ml.errors import InputError
from router_ml.quality import Calibration, LearnedEstimator, blend
from router_ml.trees import Trees
from training.boosting import Boosted, Cells
from training.calibrate import calibrate
from training.dataset import Dataset, Matrix, folds_of
from training.design import KernelDesign, LexicalDesign, fit_request_featurizer
from training.encoders import make_encoder
from training.engines import Engine, Local
from training.heads import Moments, fit_head, model_means
from training.network import Network, NetworkData, fit_networks, input_scale
from training.passes import TASK, Reading, candidate_rows
from training.reading import Report, count_of, read_all, sampled, ticked
from training.requests import read
from training.scratch import Scratch

FOLDS = 5
_ONE_PROCESS_BELOW = 32_768
"""Requests below which other processes take longer to start than they save in fitting networks."""
VOCABULARY_ROWS = 32_768
NETWORK_ROWS = 65_536
BOOSTER_ROWS = 500_000
CALIBRATION_ROWS = 1_000_000
"""The most that each of these stages sees: more make it slower and no better (docs/benchmarks.md)."""
_ADAPTED_BY = 4096
"""Training requests by whose texts an encoder is adapted to the log."""
DEFAULT_OUTPUT_TOKENS = 256.0
"""Expected output of a model whose log has no token counts at all."""


@dataclass(frozen=True)
class Fit:
    """What `fit` made: the learner, and what it knows of its own training rows.

    `fold` [n] is each training request's fold, `fold_featurizers` the paths that made their rows `rows` float32
    [n, m, d], `out_of_fold` float32 [n, m] their probability from heads and boosters of the other folds. Calibration
    (two numbers a model) and the number of rounds are chosen on these same rows. `rows` and `inputs` float32 [n, k],
    which begin with the embedding of `embedding` numbers, are on disk.
    """

    estimator: LearnedEstimator
    fold: npt.NDArray[np.int64]
    fold_featurizers: tuple[CandidateFeaturizer, ...]
    rows: Scratch
    out_of_fold: Matrix
    rounds: int
    inputs: Scratch
    embedding: int

    def embeddings(self, rows: npt.NDArray[np.int64]) -> Matrix:
        """The embeddings of some training requests, float32 [k, e]."""
        return self.inputs[rows][:, : self.embedding]


def fit(
    data: Dataset,
    *,
    threshold: float | Sequence[float] = 0.5,
    encoder: str | Encoder = "static",
    encoder_model: str | None = None,
    seed: int = 0,
    report: Report | None = None,
    engine: Engine | None = None,
) -> Fit:
    """Fits a learner of P(quality >= threshold) per model, from full or partial outcomes; the same under a seed.

    With several thresholds there is still one learner: it learns the mean of their labels, a graded quality, and its
    scores are calibrated for each threshold. The lowest is the default of requests that name none.

    The heads learn from every outcome. What is as good by then sees a random part: the vocabulary and the encoder's
    adaptation `VOCABULARY_ROWS` requests, the network `NETWORK_ROWS`, the booster `BOOSTER_ROWS` outcomes and the
    calibration `CALIBRATION_ROWS` requests. `engine` does what grows with the log; the result is the same with any
    `Local` one.

    Linear algebra runs on one thread: its sums then come out the same on every number of cores, and on a busy machine
    it does not wait, spinning, for a core that another process has.

    Raises InputError when the data holds too little to learn from.
    """
    with threadpool_limits(limits=1, user_api="blas"):
        thresholds = sorted({threshold} if isinstance(threshold, int | float) else set(threshold))
        return _fit(
            data, thresholds, encoder, encoder_model, seed, report or (lambda stage, share: None), engine or Local()
        )


def _fit(
    data: Dataset,
    thresholds: list[float],
    encoder: str | Encoder,
    encoder_model: str | None,
    seed: int,
    say: Report,
    engine: Engine,
) -> Fit:
    labels_at, known = [data.labels(t) for t in thresholds], data.observed
    labels: Matrix = np.mean(labels_at, axis=0, dtype=np.float32) if len(labels_at) > 1 else labels_at[0]
    if known.sum() < 4 * FOLDS or len(data) < 4 * FOLDS:
        raise InputError(
            f"only {int(known.sum())} outcomes with a quality, on {len(data)} distinct requests: {4 * FOLDS} of each "
            "are the least to learn from; log quality feedback, or import more"
        )
    say("encoder and vocabulary", 0.0)
    encoder, requests, kernel, lexical = _vocabulary(data, encoder, encoder_model, seed)
    say("encoder and vocabulary", 1.0)

    fold = folds_of(data, FOLDS, seed)
    directions = lexical.directions().astype(np.float32)
    shared = Reading(requests, kernel, lexical, directions.shape[1], FOLDS, full=bool(known.all()))
    kept, whole, sums = read_all(shared, data.requests, labels, fold, engine, say)

    say("network", 0.0)
    sample = sampled(len(data), NETWORK_ROWS, seed)
    inputs = kept.inputs[sample]
    scale = input_scale(inputs, encoder.dim, shared.wording)
    inputs *= scale
    tokens = data.output_tokens[sample]
    network, networks = fit_networks(
        NetworkData(inputs, labels[sample], np.log1p(tokens), math.log1p(DEFAULT_OUTPUT_TOKENS), fold[sample], seed),
        FOLDS,
        engine if len(sample) > _ONE_PROCESS_BELOW else Local(1),
    )
    log_tokens = np.empty(tokens.shape)
    for f in range(FOLDS):
        log_tokens[fold[sample] == f] = networks[f].predict(inputs[fold[sample] == f])[1]
    tokens_scale = _smearing(log_tokens, tokens)
    say("network", 1.0)

    def heads(kernel_sums: Moments, lexical_sums: Moments, net: Network) -> OutcomeHeads:
        kernel_w, kernel_b = fit_head(kernel_sums)
        lexical_w, lexical_b = fit_head(lexical_sums)
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

    tokens_fit = _input_tokens_fit(kept.chars, data.input_tokens)
    whole_heads = heads(whole[0], whole[1], network)
    final = CandidateFeaturizer(data.catalog, requests, whole_heads, _success(whole[0]), tokens_fit)
    by_fold = []
    for f in ticked(range(FOLDS), "outcome heads", say):
        rest = [all_rows.minus(own) for all_rows, own in zip(whole, sums[f], strict=True)]
        by_fold.append(final.with_heads(heads(rest[0], rest[1], networks[f]), _success(rest[0])))
    rows = Scratch((len(data.catalog), len(final.names)), np.float32)
    tasks, count = (kept.part(at, fold[at]) for at in kept.inputs.chunks(TASK)), count_of(data.requests)
    for made in ticked(engine.map(candidate_rows, tuple(by_fold), tasks, count), "training rows", say, count):
        rows.append(made)
    say("booster", 0.0)
    boosted = engine.boost(_cells(rows, labels, fold, final.names, seed))
    say("booster", 1.0)
    mixed = _average(rows, fold, boosted, say)
    some = sampled(len(data), CALIBRATION_ROWS, seed)
    weight = 1.0 / data.propensity[some].astype(np.float64)
    calibration = Calibration.stack(
        [calibrate(mixed[some], at[some], weight, t) for t, at in zip(thresholds, labels_at, strict=True)]
    )
    return Fit(
        LearnedEstimator(final, Trees(boosted.text), calibration),
        fold,
        tuple(by_fold),
        rows,
        np.concatenate([calibration.apply(mixed[at]) for at in rows.chunks(TASK)]),
        boosted.rounds,
        kept.inputs,
        encoder.dim,
    )


def _vocabulary(
    data: Dataset, encoder: str | Encoder, encoder_model: str | None, seed: int
) -> tuple[Encoder, RequestFeaturizer, KernelDesign, LexicalDesign]:
    """Everything that no outcome enters, from `VOCABULARY_ROWS` requests."""
    requests = read(data.take(sampled(len(data), VOCABULARY_ROWS, seed)).requests)
    texts = [request_text(r) for r in requests]
    text_words = [words(text) for text in texts]
    if isinstance(encoder, str):
        encoder = make_encoder(encoder, text_words, model=encoder_model, seed=seed)
    some = np.random.default_rng(seed).permutation(len(requests))[:_ADAPTED_BY]
    encoder = encoder.adapted([encoder.token_ids(text_words[i]) for i in some])
    return encoder, *fit_request_featurizer(requests, texts, text_words, encoder, seed)


def _cells(rows: Scratch, labels: Matrix, fold: npt.NDArray[np.int64], names: tuple[str, ...], seed: int) -> Cells:
    """The rows of known outcomes that the booster is fitted on."""
    m, d = rows.shape
    cells = np.flatnonzero(~np.isnan(labels))
    cells = cells[sampled(len(cells), BOOSTER_ROWS, seed)]
    x = np.concatenate([rows[at].reshape(-1, d)[_within(cells, at, m)] for at in rows.chunks(TASK)])
    return Cells(x, labels.ravel()[cells], fold[cells // m], FOLDS, names, seed)


def _average(rows: Scratch, fold: npt.NDArray[np.int64], boosted: Boosted, say: Report) -> Matrix:
    """The average of booster and heads, each request by those that have not seen its fold; float32 [n, m]."""
    m, d = rows.shape
    mixed = np.empty((len(rows), m), dtype=np.float32)
    for at in ticked(list(rows.chunks(TASK)), "average", say):
        part, own, raw = rows[at], fold[at], np.empty((at.stop - at.start, m), dtype=np.float32)
        for f, booster in enumerate(boosted.by_fold):
            some = own == f
            if some.any():
                found = booster.predict(part[some].reshape(-1, d), num_iteration=boosted.rounds)
                raw[some] = np.asarray(found).reshape(-1, m)
        mixed[at] = blend(raw, np.moveaxis(part[..., : len(PARTS)], -1, 0))
    return mixed


def _within(cells: npt.NDArray[np.int64], at: slice, m: int) -> npt.NDArray[np.int64]:
    """Those of the ascending cells that lie in the requests `at`, counted from the first of them."""
    low, high = np.searchsorted(cells, (at.start * m, at.stop * m))
    within: npt.NDArray[np.int64] = cells[low:high] - at.start * m
    return within


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


def _input_tokens_fit(counted: npt.NDArray[np.int64], tokens: npt.NDArray[np.float32]) -> tuple[float, float]:
    """(a, b) of input tokens = a + b * characters by least squares, neither below 0; 1 token for 4 by default."""
    chars = counted.astype(np.float64)
    known = ~np.isnan(tokens)
    if known.sum() < 2 or np.ptp(chars[known]) == 0:
        return 0.0, 0.25
    b, a = np.polyfit(chars[known], tokens[known].astype(np.float64), 1)
    if a < 0 or b < 0:
        return 0.0, float(tokens[known].sum() / max(chars[known].sum(), 1.0))
    return float(a), float(b)
