"""A small neural network over a request's features, with two outputs per model and what is unknown masked.

It sees what the linear heads cannot, how features act together, and shares its hidden layer among all models, so that
one model's outcomes help another's. It learns P(ok) and ln(output tokens) together (multitask learning; Caruana,
Machine Learning 28, 1997): how long answers get tells of what is asked, also where nobody said how good they were.
Alone it is about as good as a linear head; averaged with them it is better (docs/log.md). torch fits it,
`features.outcomes` applies it with two products of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.featurizer import RequestFeatures
from features.transformer import one_torch_thread
from training.engines import Engine

Matrix = npt.NDArray[np.float32]
HIDDEN = 128
EPOCHS = (2, 4, 8, 16)
"""Lengths of training, of which the one with the least log loss out of fold is taken."""
RATE, DECAY = 2e-3, 0.1
LENGTHS_SHARE = 0.3
"""Weight of the squared error of the standardised ln(output tokens) beside the log loss of the outcomes."""
INPUT_DROPOUT, DROPOUT = 0.1, 0.3
_LEAST_BATCH, _BATCHES = 32, 55
_LENGTH, _STATISTICS = 4.0, 0.3
_PRIOR_ROWS = 10.0


@dataclass(frozen=True)
class Network:
    """One hidden layer, max(0, x w1 + b1), with log odds and ln(tokens) behind it; float32.

    `w1` [d, h], `b1` [h], `w2` [h, 2m], `b2` [2m].
    """

    w1: Matrix
    b1: Matrix
    w2: Matrix
    b2: Matrix

    def predict(self, x: Matrix) -> tuple[Matrix, Matrix]:
        """P(ok) and ln(output tokens), float32 [n, m] each, of inputs [n, d]."""
        out = np.maximum(x @ self.w1 + self.b1, np.float32(0.0)) @ self.w2 + self.b2
        odds, log_tokens = np.split(out, 2, axis=1)
        return np.reciprocal(np.exp(-np.clip(odds, -30, 30)) + np.float32(1.0)), log_tokens


def network_inputs(features: Sequence[RequestFeatures], wording: Matrix) -> Matrix:
    """What the network sees of requests: embedding, main directions of the wording [n, c], standardised statistics."""
    embeddings = np.stack([f.embedding for f in features])
    statistics = np.stack([f.kernel[-len(f.statistics) :] for f in features])
    return np.concatenate([embeddings, wording, statistics], axis=1)


def input_scale(inputs: Matrix, embedding: int, wording: int) -> npt.NDArray[np.float32]:
    """The scale [e + c + s] that inputs with `embedding` e and `wording` c columns are fitted under.

    Embedding and wording are scaled to a length of about 4 each, so that a weight means the same wherever it stands.
    """
    scales = []
    for block in (inputs[:, :embedding], inputs[:, embedding : embedding + wording]):
        length = float(np.sqrt((block.astype(np.float64) ** 2).sum(axis=1).mean()))
        scales.append(np.full(block.shape[1], _LENGTH / length if length > 0.0 else 0.0))
    scales.append(np.full(inputs.shape[1] - embedding - wording, _STATISTICS))
    return np.concatenate(scales).astype(np.float32)


class NetworkData(NamedTuple):
    """What networks are fitted on: inputs [n, d], labels and ln(output tokens) [n, m], NaN where unknown, folds [n].

    `default` is the ln(tokens) of a model without any, `seed` that of the weights and of the batches.
    """

    x: Matrix
    labels: Matrix
    log_tokens: Matrix
    default: float
    fold: npt.NDArray[np.int64]
    seed: int


def fit_one(data: NetworkData, task: tuple[int | None, int]) -> Network:
    """The network of `task` = (the fold that is left out, or None; epochs); a task of `training.engines`."""
    fold, epochs = task
    with one_torch_thread():
        at = slice(None) if fold is None else data.fold != fold
        return _fit(data.x[at], data.labels[at], data.log_tokens[at], data.default, epochs, data.seed)


def fit_networks(data: NetworkData, count: int, engine: Engine) -> tuple[Network, list[Network]]:
    """The network of all requests, and one for each of `count` folds fitted on the others.

    The same under a seed; torch runs on one thread, as the rest of the linear algebra does.
    """
    folds = range(count)
    best: tuple[float, int, list[Network]] = (np.inf, EPOCHS[0], [])
    for epochs in EPOCHS:
        made = list(engine.map(fit_one, data, [(f, epochs) for f in folds], count))
        held = [net.predict(data.x[data.fold == f])[0] for f, net in enumerate(made)]
        loss = _log_loss(held, [data.labels[data.fold == f] for f in folds])
        if loss >= best[0]:
            break
        best = loss, epochs, made
    return fit_one(data, (None, best[1])), best[2]


def _fit(x: Matrix, labels: Matrix, log_tokens: Matrix, default: float, epochs: int, seed: int) -> Network:
    """AdamW under a one-cycle rate (Loshchilov & Hutter 2019; Smith & Topin 2019) on the masked losses."""
    import torch
    from torch import nn

    m = labels.shape[1]
    level, spread = _standard(log_tokens, default)
    wanted = np.concatenate([labels, (log_tokens - level) / spread], axis=1).astype(np.float32)
    known = ~np.isnan(wanted)
    rows = np.flatnonzero(known.any(axis=1))
    inputs, mask = torch.from_numpy(x[rows]), torch.from_numpy(known[rows].astype(np.float32))
    targets = torch.from_numpy(np.nan_to_num(wanted[rows]))
    seen = mask[:, :m].sum(0)
    mean = (((targets * mask)[:, :m].sum(0) + 1.0) / (seen + 2.0)).clamp(0.02, 0.98)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Dropout(INPUT_DROPOUT),
            nn.Linear(x.shape[1], HIDDEN),
            nn.ReLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(HIDDEN, 2 * m),
        )
        first, last = net[1], net[4]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        with torch.no_grad():
            last.weight.mul_(0.1)
            # A model without lengths keeps its level, whatever is asked.
            last.weight.mul_(torch.from_numpy(np.append(np.ones(m), known[:, m:].any(axis=0)))[:, None])
            last.bias.copy_(torch.cat([torch.log(mean / (1.0 - mean)), torch.zeros(m)]))
        size = max(_LEAST_BATCH, len(rows) // _BATCHES)
        steps = epochs * -(-len(rows) // size)
        optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 20), pct_start=0.1)
        log_loss, square = nn.BCEWithLogitsLoss(reduction="none"), nn.MSELoss(reduction="none")
        for _ in range(epochs if len(rows) else 0):
            for at in torch.split(torch.randperm(len(rows), generator=generator), size):
                out, want, use = net(inputs[at]), targets[at], mask[at]
                outcomes = (log_loss(out[:, :m], want[:, :m]) * use[:, :m]).sum() / use[:, :m].sum().clamp(min=1.0)
                lengths = (square(out[:, m:], want[:, m:]) * use[:, m:]).sum() / use[:, m:].sum().clamp(min=1.0)
                loss = outcomes + LENGTHS_SHARE * lengths
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    w1, b1, w2, b2 = (p.detach().numpy() for p in (first.weight.T, first.bias, last.weight.T, last.bias))
    scale = np.concatenate([np.ones(m), spread])
    b2 = b2 * scale + np.concatenate([np.zeros(m), level])
    return Network(*(np.ascontiguousarray(a, dtype=np.float32) for a in (w1, b1, w2 * scale, b2)))


def _standard(log_tokens: Matrix, default: float) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and spread of ln(tokens) per model, shrunk to those of all models: ten answers' worth of them."""
    known = ~np.isnan(log_tokens)
    n = known.sum(axis=0)
    if not n.any():
        return np.full(len(n), default), np.ones(len(n))
    values = np.where(known, log_tokens, 0.0).astype(np.float64)
    level = (values.sum(axis=0) + _PRIOR_ROWS * values.sum() / n.sum()) / (n + _PRIOR_ROWS)
    squares = np.where(known, (values - level) ** 2, 0.0)
    variance = (squares.sum(axis=0) + _PRIOR_ROWS * squares.sum() / n.sum()) / (n + _PRIOR_ROWS)
    return level, np.sqrt(np.maximum(variance, 1e-4))


def _log_loss(predicted: Sequence[Matrix], labels: Sequence[Matrix]) -> float:
    p, y = np.concatenate(predicted), np.concatenate(labels)
    known = ~np.isnan(y)
    q = np.clip(p[known], 1e-6, 1 - 1e-6).astype(np.float64)
    t = y[known].astype(np.float64)
    return float(-np.mean(t * np.log(q) + (1.0 - t) * np.log1p(-q)))
