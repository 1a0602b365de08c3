"""The work that grows with the log, as tasks of some ten thousand requests: reading them, their rows, their estimates.

Each function takes what all tasks share and one task, and depends on nothing else: `training.engines` does them in any
process. A task reads its requests' texts from the log itself and works on a few thousand at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.featurizer import CandidateFeaturizer, RequestFeatures, RequestFeaturizer
from features.outcomes import KernelMap
from router_ml.quality import LearnedEstimator
from router_ml.types import RouteRequest
from training.design import KernelDesign, LexicalDesign
from training.heads import Moments, moments
from training.network import network_inputs
from training.requests import read

Matrix = npt.NDArray[np.float32]
TASK = 32_768
"""Requests of a task. Where the tasks are cut decides the order of sums, so it depends on nothing."""
_BATCH = 4096


@dataclass(frozen=True)
class Reading:
    """What reading needs: the featurizer, the heads' designs, the number of folds, whether all outcomes are known."""

    featurizer: RequestFeaturizer
    kernel: KernelDesign
    lexical: LexicalDesign
    wording: int
    folds: int
    full: bool


class Unread(NamedTuple):
    """Requests [n] with their labels float32 [n, m] and folds [n]."""

    requests: Sequence[RouteRequest]
    labels: Matrix
    fold: npt.NDArray[np.int64]


class Read(NamedTuple):
    """What is kept of n requests, and their part of the heads' sums.

    `inputs` float32 [n, e + c + s] is what the network sees (it begins with the embedding), `statistics` float32 [n, s]
    those of the text, `chars` int64 [n]; `terms` int32 holds the `counts` int64 [n] terms of each, one after another.
    `sums` has the moments of the kernel and of the lexical design per fold.
    """

    inputs: Matrix
    statistics: Matrix
    terms: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    chars: npt.NDArray[np.int64]
    sums: list[tuple[Moments, Moments]]


def read_requests(shared: Reading, task: Unread) -> Read:
    """Requests to features, once: all that later passes need of them is in what comes back."""
    inputs, statistics, terms, chars, counts = [], [], [], [], []
    designs: tuple[list[Matrix], list[Matrix]] = [], []
    for start in range(0, len(task.requests), _BATCH):
        features = [shared.featurizer.transform(r) for r in read(task.requests[start : start + _BATCH])]
        kernel, lexical = shared.kernel.matrix(features), shared.lexical.matrix(features)
        designs[0].append(kernel)
        designs[1].append(lexical)
        inputs.append(network_inputs(features, lexical[:, : shared.wording]))
        statistics.append(np.stack([f.statistics for f in features]))
        terms.append(np.concatenate([f.term_ids for f in features]).astype(np.int32))
        counts += [len(f.term_ids) for f in features]
        chars += [f.chars for f in features]
    whole = [np.concatenate(design) for design in designs]
    sums = []
    for f in range(shared.folds):
        at = task.fold == f
        kernel_sums, lexical_sums = (moments(x[at], task.labels[at], full=shared.full) for x in whole)
        sums.append((kernel_sums, lexical_sums))
    return Read(
        np.concatenate(inputs),
        np.concatenate(statistics),
        np.concatenate(terms),
        np.array(counts, dtype=np.int64),
        np.array(chars, dtype=np.int64),
        sums,
    )


class Kept(NamedTuple):
    """What `Read` kept of n requests, with their folds [n]."""

    inputs: Matrix
    statistics: Matrix
    terms: npt.NDArray[np.int32]
    counts: npt.NDArray[np.int64]
    chars: npt.NDArray[np.int64]
    fold: npt.NDArray[np.int64]


def candidate_rows(by_fold: Sequence[CandidateFeaturizer], task: Kept) -> Matrix:
    """The booster's rows float32 [n, m, d], each request through the path of the fold that has not seen it."""
    first = by_fold[0]
    size = first.requests.encoder.dim
    ends = np.cumsum(task.counts)
    out = np.empty((len(task.fold), len(first.catalog), len(first.names)), dtype=np.float32)
    kernel_map: KernelMap = first.requests.kernel_map
    for i, f in enumerate(task.fold):
        embedding, statistics = task.inputs[i, :size].copy(), task.statistics[i]
        terms = task.terms[ends[i] - task.counts[i] : ends[i]].astype(np.int64)
        features = RequestFeatures(
            kernel_map.apply(embedding, statistics), statistics, terms, int(task.chars[i]), embedding
        )
        out[i] = by_fold[f].rows(features).rows
    return out


class Estimates(NamedTuple):
    """What a learner says of n requests: float32 [n, m] each, and the expected input tokens float32 [n]."""

    p_ok: Matrix
    output_tokens: Matrix
    input_tokens: npt.NDArray[np.float32]


def estimates(estimator: LearnedEstimator, task: Sequence[RouteRequest]) -> Estimates:
    """`estimate_many`, in bounded memory."""
    parts = []
    for start in range(0, len(task), _BATCH):
        made = estimator.estimate_many(read(task[start : start + _BATCH]))
        parts.append(
            Estimates(
                np.stack([e.p_ok for e in made]),
                np.stack([e.output_tokens for e in made]),
                np.array([e.input_tokens for e in made], dtype=np.float32),
            )
        )
    return joined(parts)


def joined(parts: Sequence[Estimates]) -> Estimates:
    """Estimates of several parts as one."""
    p_ok, output_tokens, input_tokens = zip(*parts, strict=True)
    return Estimates(np.concatenate(p_ok), np.concatenate(output_tokens), np.concatenate(input_tokens))
