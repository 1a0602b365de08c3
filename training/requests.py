"""The requests of a log, read where they lie: a data set holds their row numbers, and their texts stay on disk."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError
from router_ml.logs import LogFiles, scan_log
from router_ml.types import RouteRequest

TEXT = ("prompt", "messages", "tools")
_SPAN = 65_536
"""Rows of a log that are read at once, whatever share of them is asked for."""
_BATCH = 4096


@dataclass(frozen=True, eq=False)
class LoggedRequests(Sequence[RouteRequest]):
    """Requests by their row numbers `at` int64 [n] in a log: a frame, or its files.

    Each is parsed when it is asked for. Rows in ascending order are read from files in one pass.
    """

    log: pl.DataFrame | LogFiles
    at: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.at)

    @overload
    def __getitem__(self, key: int) -> RouteRequest: ...
    @overload
    def __getitem__(self, key: slice) -> LoggedRequests: ...
    def __getitem__(self, key: int | slice) -> RouteRequest | LoggedRequests:
        if isinstance(key, slice):
            return LoggedRequests(self.log, self.at[key])
        return LoggedRequests(self.log, self.at[key : key + 1 or None]).read()[0]

    def __iter__(self) -> Iterator[RouteRequest]:
        for start in range(0, len(self), _BATCH):
            yield from self[start : start + _BATCH].read()

    def take(self, rows: npt.NDArray[np.int64]) -> LoggedRequests:
        """Those at some positions, in the order given."""
        return LoggedRequests(self.log, self.at[rows])

    def read(self) -> list[RouteRequest]:
        """All of them, parsed. Raises InputError for a conversation that is not one."""
        made = []
        for at, row in zip(self.at, self.texts().iter_rows(), strict=True):
            try:
                made.append(request_of_log_row(*row))
            except InputError as error:
                raise InputError(
                    f"row {at + 1} of the log: {error}; 'router-ml doctor' counts such rows, and importing the source "
                    "into a new log maps them or sets them aside"
                ) from None
        return made

    def texts(self) -> pl.DataFrame:
        """Their `TEXT` columns, a row each."""
        if isinstance(self.log, pl.DataFrame):
            return self.log.select(TEXT)[self.at]
        order = np.argsort(self.at, kind="stable")
        at = self.at[order]
        scan = scan_log(self.log).select(TEXT)
        pieces, start = [scan.head(0).collect()], 0
        while start < len(at):
            first = int(at[start])
            stop = int(np.searchsorted(at, first + _SPAN))
            piece = scan.slice(first, int(at[stop - 1]) - first + 1).collect()
            pieces.append(piece[at[start:stop] - first])
            start = stop
        back = np.empty(len(order), dtype=np.int64)
        back[order] = np.arange(len(order))
        return pl.concat(pieces)[back]

    def own(self) -> LoggedRequests:
        """The same without the rows of a frame that are not asked for: what is sent to another process."""
        if isinstance(self.log, LogFiles):
            return self
        return LoggedRequests(self.texts(), np.arange(len(self)))


def read(requests: Sequence[RouteRequest]) -> Sequence[RouteRequest]:
    """The requests in memory."""
    return requests.read() if isinstance(requests, LoggedRequests) else requests


def pieces(requests: Sequence[RouteRequest], size: int) -> Iterator[Sequence[RouteRequest]]:
    """Consecutive requests, `size` at a time, for another process."""
    for start in range(0, len(requests), size):
        piece = requests[start : start + size]
        yield piece.own() if isinstance(piece, LoggedRequests) else piece
