"""Histograms of durations that cost a fraction of a microsecond: counted on the event loop's thread, without a lock."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate


class Durations:
    """Counts of durations in buckets up to each of `bounds` (seconds, ascending), and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one duration."""
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def buckets(self) -> Sequence[tuple[str, float]]:
        """Cumulative counts by upper bound, as Prometheus has them; the last bound is infinity."""
        return list(zip([*map(str, self.bounds), "+Inf"], map(float, accumulate(self.counts)), strict=True))
