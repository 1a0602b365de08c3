"""Arrays that are too large to hold: rows on disk, written once in order and read back by slices."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt


class Scratch:
    """Rows of one shape and type in a nameless temporary file (in `$TMPDIR`), which is gone with the object.

    Indexed like an array [n, ...] by its first axis: a number, a slice, row numbers or a mask; what comes back is a
    copy, so that nothing of the file stays mapped.
    """

    def __init__(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the object
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def append(self, rows: npt.NDArray[Any]) -> None:
        """Writes rows [k, ...] behind those that are there. Raises ValueError for another shape."""
        if rows.shape[1:] != self.shape:
            raise ValueError(f"rows of shape {rows.shape[1:]}, not {self.shape}")
        self._file.seek(0, 2)
        self._file.write(np.ascontiguousarray(rows, dtype=self.dtype).data)
        self._file.flush()
        self._rows += len(rows)

    def __getitem__(self, key: int | slice | npt.NDArray[Any]) -> npt.NDArray[Any]:
        if not self._rows:
            return np.empty((0, *self.shape), dtype=self.dtype)[key]
        mapped = np.memmap(self._file, self.dtype, "r", shape=(self._rows, *self.shape))
        return np.array(mapped[key])

    def chunks(self, size: int) -> Iterator[slice]:
        """Slices that cover all rows in order, of `size` rows each but for the last."""
        return (slice(start, min(start + size, self._rows)) for start in range(0, self._rows, size))
