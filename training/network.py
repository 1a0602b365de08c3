"""A small neural network over a request's features, with an output per model and the unknown outcomes masked.

It sees what the linear heads cannot, how features act together, and shares its hidden layer among all models, so that
one model's outcomes help another's. Alone it is about as good as a linear head; averaged with them it is better
(docs/log.md). torch fits it, `features.outcomes` applies it with two products of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.featurizer import RequestFeatures

Matrix = npt.NDArray[np.float32]
HIDDEN = 256
EPOCHS = (2, 4, 8)
"""Lengths of training, of which the one with the least log loss out of fold is taken."""
RATE, DECAY = 2e-3, 0.1
INPUT_DROPOUT, DROPOUT = 0.1, 0.3
_LEAST_BATCH, _BATCHES = 128, 55
_LENGTH, _STATISTICS = 4.0, 0.3


@dataclass(frozen=True)
class Network:
    """One hidden layer: p = sigmoid(max(0, x w1 + b1) w2 + b2); float32 [d, h], [h], [h, m], [m]."""

    w1: Matrix
    b1: Matrix
    w2: Matrix
    b2: Matrix

    def predict(self, x: Matrix) -> Matrix:
        """P(ok) float32 [n, m] of inputs [n, d]."""
        logits = np.maximum(x @ self.w1 + self.b1, np.float32(0.0)) @ self.w2 + self.b2
        p: Matrix = np.reciprocal(np.exp(-np.clip(logits, -30, 30)) + np.float32(1.0))
        return p


def network_inputs(features: Sequence[RequestFeatures], wording: Matrix) -> tuple[Matrix, npt.NDArray[np.float32]]:
    """What the network sees of requests, [n, e + c + s], and the scale [e + c + s] that it is fitted under.

    Embedding, main directions of the wording `wording` [n, c], and standardised statistics. Embedding and wording are
    scaled to a length of about 4 each, so that a weight means the same wherever it stands.
    """
    embeddings = np.stack([f.embedding for f in features])
    statistics = np.stack([f.kernel[-len(f.statistics) :] for f in features])
    scales = []
    for block in (embeddings, wording):
        length = float(np.sqrt((block.astype(np.float64) ** 2).sum(axis=1).mean()))
        scales.append(np.full(block.shape[1], _LENGTH / length if length > 0.0 else 0.0))
    scales.append(np.full(statistics.shape[1], _STATISTICS))
    return np.concatenate([embeddings, wording, statistics], axis=1), np.concatenate(scales).astype(np.float32)


def fit_networks(x: Matrix, labels: Matrix, fold: npt.NDArray[np.int64], seed: int) -> tuple[Network, list[Network]]:
    """The network of all requests, and one per fold fitted on the others.

    `x` is [n, d], `labels` [n, m] with NaN where unknown, `fold` [n] from 0. The same under a seed; torch runs on one
    thread, as the rest of the linear algebra does.
    """
    import torch

    folds = range(int(fold.max()) + 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        best: tuple[float, int, list[Network]] = (np.inf, EPOCHS[0], [])
        for epochs in EPOCHS:
            made = [_fit(x[fold != f], labels[fold != f], epochs, seed) for f in folds]
            loss = _log_loss([m.predict(x[fold == f]) for f, m in enumerate(made)], [labels[fold == f] for f in folds])
            if loss < best[0]:
                best = loss, epochs, made
        return _fit(x, labels, best[1], seed), best[2]
    finally:
        torch.set_num_threads(threads)


def _fit(x: Matrix, labels: Matrix, epochs: int, seed: int) -> Network:
    """AdamW under a one-cycle rate (Loshchilov & Hutter 2019; Smith & Topin 2019) on the masked log loss."""
    import torch
    from torch import nn

    known = ~np.isnan(labels)
    rows = np.flatnonzero(known.any(axis=1))
    inputs, mask = torch.from_numpy(x[rows]), torch.from_numpy(known[rows].astype(np.float32))
    targets = torch.from_numpy(np.nan_to_num(labels[rows]).astype(np.float32))
    seen = mask.sum(0)
    mean = (((targets * mask).sum(0) + 1.0) / (seen + 2.0)).clamp(0.02, 0.98)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Dropout(INPUT_DROPOUT),
            nn.Linear(x.shape[1], HIDDEN),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, labels.shape[1]),
        )
        first, last = net[1], net[4]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(0.1)
            last.bias.copy_(torch.log(mean / (1.0 - mean)))
        size = max(_LEAST_BATCH, len(rows) // _BATCHES)
        steps = epochs * -(-len(rows) // size)
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 20), pct_start=0.1)
        loss_of = nn.BCEWithLogitsLoss(reduction="none")
        for _ in range(epochs if len(rows) else 0):
            for at in torch.split(torch.randperm(len(rows), generator=generator), size):
                loss = (loss_of(net(inputs[at]), targets[at]) * mask[at]).sum() / mask[at].sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    arrays = [p.detach().numpy() for p in (first.weight.T, first.bias, last.weight.T, last.bias)]
    return Network(*(np.ascontiguousarray(a, dtype=np.float32) for a in arrays))


def _log_loss(predicted: Sequence[Matrix], labels: Sequence[Matrix]) -> float:
    p, y = np.concatenate(predicted), np.concatenate(labels)
    known = ~np.isnan(y)
    q = np.clip(p[known], 1e-6, 1 - 1e-6).astype(np.float64)
    t = y[known].astype(np.float64)
    return float(-np.mean(t * np.log(q) + (1.0 - t) * np.log1p(-q)))
