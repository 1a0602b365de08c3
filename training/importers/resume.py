"""Where reading of an export stopped, and whether the file is still the one that was read.

A cursor says of a file: its first `end` bytes have this SHA-256, and of them `row` rows are read. Where that no longer
holds the file is another one (a rotated log, or an export that was made again and in which some row has changed) and
is read from its first row: what is known is told by ids. Where it holds, only what is behind `offset` is read.

A last line without its newline may be whole, or its writer may be at it. JSON lines tell: an object that closes is
whole. In CSV a number may be cut. So such a row is taken, as finished files often end like that, but the cursor stays
before it with the line's own hash (`tail`). When the line is another one next time, it is read again and `void` says
which row has to go. A last line that cannot be a row is left for the next time (`half`), and counted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from router_ml.errors import InputError

_BLOCK = 1 << 20
# A row that is being written is not longer: behind a quote that is open for longer all rows would wait for ever.
_LONGEST = 1 << 23
_AHEAD = tuple(b',\n\r"\xbf')  # what may be in front of a quote that opens; the last ends a byte order mark
_BEHIND = "\0\0behind"


@dataclass(frozen=True, slots=True)
class Place:
    """Where to go on in a file: after `row` rows, from the byte `offset`, before which are `base` of them, to `end`.

    `end` is behind the last line that is whole, `size` the file's as it was found; `digest` is of all before `end`.
    `void` is the digest of a last line that was taken as it stood and is another one now. `same` says that there is
    nothing to read.
    """

    row: int
    offset: int
    base: int
    end: int
    size: int
    digest: str
    void: str | None = None
    same: bool = False

    def mark(self, row: int, offset: int | None = None, **more: Any) -> dict[str, Any]:
        """The cursor after `row` rows: parsed from `offset` on, before which all of them are, or from where it was."""
        at = {"offset": self.offset, "base": self.base} if offset is None else {"offset": offset, "base": row}
        void = {"void": self.void} if self.void is not None else {}
        return {"row": row, **at, "end": self.end, "sha256": self.digest, **void, **more}


def place(path: Path, cursor: Mapping[str, Any] | None) -> Place:
    """Where to go on in a file. Raises InputError for a CSV file with a quote that is never closed."""
    kind, size = path.suffix.lower(), path.stat().st_size
    at, digest = dict(cursor or {}), hashlib.sha256()
    with path.open("rb") as file:
        # Cursors of older versions have no end: their files are read again, and their rows are known.
        known = "end" in at and size >= at["end"]
        if known:
            _take(digest, file, at["end"])
            known = digest.hexdigest() == at["sha256"]
        if not known:
            at, digest = {}, hashlib.sha256()
        seen, offset, tail = int(at.get("end", 0)), int(at.get("offset", 0)), at.get("tail")
        same = tail is not None and tail["sha256"] == sha256(_slice(file, seen, size))
        if seen and offset == seen and _slice(file, seen - 1, seen) != b"\n":
            # The last line was whole without its newline, which is there now.
            head = _slice(file, seen, seen + 2)
            offset += len(head) - len(head.lstrip(b"\r\n"))
        end = size
        if kind == ".csv":
            end = _end_of_rows(path, file, max(seen, offset), size)
        elif kind in (".jsonl", ".ndjson"):
            end = _end_of_lines(file, max(seen, offset), size)
        file.seek(seen)
        _take(digest, file, end - seen)
    return Place(
        row=int(at.get("row", 0)),
        offset=offset,
        base=int(at.get("base", 0)),
        end=end,
        size=size,
        digest=digest.hexdigest(),
        void=tail["sha256"] if tail is not None and not same else None,
        same=same,
    )


def tail_of(path: Path, at: Place) -> bytes:
    """The bytes behind the last line that is whole."""
    with path.open("rb") as file:
        return _slice(file, at.end, at.size)


def sha256(data: bytes) -> str:
    """The SHA-256 of some bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def _slice(file: BinaryIO, start: int, end: int) -> bytes:
    file.seek(start)
    return file.read(end - start)


def _take(digest: Any, file: BinaryIO, size: int) -> None:
    while size > 0 and (block := file.read(min(_BLOCK, size))):
        digest.update(block)
        size -= len(block)


def _end_of_lines(file: BinaryIO, start: int, size: int) -> int:
    """Behind the last line of JSON that is whole: with its newline, or an object that closes."""
    at = size
    while at > start:
        low = max(start, at - _BLOCK)
        if (found := _slice(file, low, at).rfind(b"\n")) >= 0:
            at = low + found + 1
            break
        at = low
    try:
        whole = isinstance(json.loads(_slice(file, at, size).decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        whole = False
    return size if whole else at


def _end_of_rows(path: Path, file: BinaryIO, start: int, size: int) -> int:
    """Behind the last row of CSV that has its newline: one that no quote is open at."""
    parities, parity, before = [], 0, ord("\n")
    file.seek(start)
    for low in range(start, size, _BLOCK):
        data = np.frombuffer(file.read(min(_BLOCK, size - low)), np.uint8)
        parities.append((low, parity))
        quotes = np.flatnonzero(data == ord('"'))
        opening = quotes[parity::2]
        ahead = np.where(opening > 0, data[opening - 1], before)
        if not np.isin(ahead, _AHEAD).all():
            # A quote stands within a field that has none around it, and opens nothing: counting them tells no more.
            return _end_by_rows(path, start, size)
        parity, before = (parity + len(quotes)) % 2, int(data[-1])
    last, end = None, None
    for low, parity in reversed(parities):
        data = np.frombuffer(_slice(file, low, min(low + _BLOCK, size)), np.uint8)
        lines = np.flatnonzero(data == ord("\n"))
        if not len(lines):
            continue
        last = low + int(lines[-1]) + 1 if last is None else last
        closed = lines[((np.cumsum(data == ord('"')) + parity) % 2 == 0)[lines]]
        if len(closed):
            end = low + int(closed[-1]) + 1
            break
    if last is None:
        # Rows may end in \r alone, as an old Mac's do.
        return size if start == 0 and b"\r" in _slice(file, 0, min(size, _BLOCK)) else start
    end = start if end is None else end
    return end if end == last else _end_by_rows(path, end, size)


def _end_by_rows(path: Path, start: int, size: int) -> int:
    """The same by reading row by row, as the reader of CSV does."""
    csv.field_size_limit(max(csv.field_size_limit(), size - start + 1))
    at = end = start
    closed = True

    def lines() -> Iterator[str]:
        nonlocal at, closed
        with io.BufferedReader(Span(path, b"", start, size), _BLOCK) as file:
            for line in file:
                at, closed = at + len(line), line.endswith(b"\n")
                yield line.decode("utf-8", "surrogateescape")
        yield _BEHIND

    for row in csv.reader(lines()):
        if row and row[-1].endswith(_BEHIND):
            # What is behind all lines is a row of its own, unless a quote is open.
            if len(row) == 1 and row[0] == _BEHIND:
                break
            if size - end > _LONGEST:
                raise InputError(
                    f"{path}: a quote that opens behind byte {end} is never closed: close it, or leave that row out"
                )
        elif closed:
            end = at
    return end


class Span(io.RawIOBase):
    """The bytes of a file from `start` to `end` behind those of `head`, to be read once."""

    def __init__(self, path: Path, head: bytes, start: int, end: int) -> None:
        self._file = path.open("rb")
        self._file.seek(start)
        self._head, self._left = head, end - start

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """The next bytes, as `io.RawIOBase` has it."""
        data, self._head = self._head[: len(buffer)], self._head[len(buffer) :]
        if not data:
            data = self._file.read(min(len(buffer), self._left))
            self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()
        super().close()


def text_of(span: Span, encoding: str = "utf-8") -> io.TextIOWrapper:
    """A span's text, as the reader of CSV wants it."""
    return io.TextIOWrapper(io.BufferedReader(span, _BLOCK), encoding, errors="surrogateescape", newline="")


def header_of(path: Path) -> bytes:
    """The first row of a CSV file, as it stands, with its newline; a row may go over lines."""
    found = b""
    with path.open("rb") as file:
        for line in file:
            found += line
            if found.count(b'"') % 2 == 0 or len(found) > _LONGEST:
                break
    return found
