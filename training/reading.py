"""The one pass over a log's texts: requests to features on disk, and to the sums that the heads are fitted from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from router_ml.types import RouteRequest
from training.engines import Engine
from training.heads import Moments, total
from training.passes import TASK, Kept, Reading, Unread, read_requests
from training.requests import pieces
from training.scratch import Scratch

Matrix = npt.NDArray[np.float32]
Item = TypeVar("Item")
Report = Callable[[str, float], None]
"""Told of progress: the stage's name and its share done, in [0, 1]."""


def sampled(n: int, most: int, seed: int) -> npt.NDArray[np.int64]:
    """Row numbers below n, ascending: all, or `most` of them drawn under `seed`."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def count_of(requests: Sequence[RouteRequest]) -> int:
    """Tasks that the requests make."""
    return -(-len(requests) // TASK)


@dataclass(frozen=True)
class Seen:
    """What was read of all requests, on disk but for 16 bytes a request; see `Read`."""

    inputs: Scratch
    statistics: Scratch
    terms: Scratch
    counts: npt.NDArray[np.int64]
    chars: npt.NDArray[np.int64]

    def part(self, at: slice, fold: npt.NDArray[np.int64]) -> Kept:
        """What was kept of some of the requests."""
        first = int(self.counts[: at.start].sum())
        counts = self.counts[at]
        terms = self.terms[first : first + int(counts.sum())]
        return Kept(self.inputs[at], self.statistics[at], terms, counts, self.chars[at], fold)


def read_all(
    shared: Reading,
    requests: Sequence[RouteRequest],
    labels: Matrix,
    fold: npt.NDArray[np.int64],
    engine: Engine,
    say: Report,
) -> tuple[Seen, list[Moments], list[list[Moments]]]:
    """What is kept of every request, and the moments of both designs: of all requests, and per fold."""
    parts = zip(pieces(requests, TASK), range(0, len(requests), TASK), strict=True)
    tasks = (Unread(part, labels[i : i + TASK], fold[i : i + TASK]) for part, i in parts)
    stores: list[Scratch] = []
    counts, chars = [], []
    sums: list[list[Moments]] = []
    count = count_of(requests)
    for made in ticked(engine.map(read_requests, shared, tasks, count), "features", say, count):
        arrays = made.inputs, made.statistics, made.terms
        stores = stores or [Scratch(a.shape[1:], a.dtype) for a in arrays]
        for store, array in zip(stores, arrays, strict=True):
            store.append(array)
        counts.append(made.counts)
        chars.append(made.chars)
        own = [list(pair) for pair in made.sums]
        sums = [[a.plus(b) for a, b in zip(*f, strict=True)] for f in zip(sums, own, strict=True)] if sums else own
    whole = [total([of_fold[k] for of_fold in sums]) for k in range(2)]
    return Seen(stores[0], stores[1], stores[2], np.concatenate(counts), np.concatenate(chars)), whole, sums


def ticked(items: Iterable[Item], stage: str, say: Report, count: int | None = None) -> Iterator[Item]:
    """Iterates with about a hundred reports of progress; `count` is the number of items that have no length."""
    size = max(len(items) if isinstance(items, Sized) else count or 1, 1)
    step = max(size // 100, 1)
    for i, item in enumerate(items):
        if i % step == 0:
            say(stage, i / size)
        yield item
    say(stage, 1.0)
