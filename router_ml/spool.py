"""A journal on the local disk between the service and its database, which routing never waits for.

A record is appended with one `write` before its decision is answered. From then on it outlives the process, because the
kernel has it; `fdatasync` every `interval` seconds makes that the most a power cut takes. `router_ml.drain` moves the
records on to the database and deletes what is there. However long the database is away, what waits is on disk and not
in memory, and it is bounded.

A spool is a folder with a folder per process that appends, each locked by its owner and holding segments: files named
by the number of their first record, of frames (length, CRC-32, record). Where the lock is free, the owner is gone, and
whoever comes next drains what it left.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import struct
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from router_ml.errors import InputError

log = logging.getLogger(__name__)
SEGMENT_BYTES = 8 << 20
HELD_BYTES = 16 << 20  # of records that wait in memory because the disk refuses them
RETRY_SECONDS = 0.2
LOCK = "lock"
_HEAD = struct.Struct("<II")
_SEGMENT = re.compile(r"\d{20}\.log")


@dataclass
class SpoolCounters:
    """What became of the records: `dropped` are lost, `failures` counts what the disk refused, retried or not."""

    appended: int = 0
    dropped: int = 0
    failures: int = 0


class Spool:
    """The appending side, of one process; every method may be called from any thread.

    `owner` says where the records are to go: what another owner left here is not taken over. `max_bytes` bounds what
    waits on disk: past it records are dropped and counted. Where the disk refuses a record, it waits in memory, up to
    `HELD_BYTES`, and is tried again. Raises InputError when the folder cannot be used.
    """

    def __init__(self, root: Path, *, owner: str = "any", interval: float = 0.05, max_bytes: int = 1 << 30) -> None:
        self.root, self.interval, self.max_bytes = root, interval, max_bytes
        self.counters = SpoolCounters()
        try:
            self.folder, self.lock = _own_folder(root, owner)
        except OSError as error:
            raise InputError(
                f"the spool {root} cannot be used ({error.strerror}): name a writable folder with --spool"
            ) from None
        self._mutex = threading.Lock()
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._retry_at = 0.0
        self._fd, self._size = -1, 0
        self._used = 0
        self._segment_bytes = min(SEGMENT_BYTES, max(max_bytes // 8, 4096))  # a segment goes only as a whole
        self._ended: list[int] = []  # descriptors of full segments, to be made durable and closed
        self._dirty = self._begun = False
        self._sync_failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._sync_regularly, name="spool-sync", daemon=True)
        self._thread.start()

    @property
    def used_bytes(self) -> int:
        """Bytes that wait on disk and in memory; what was drained in the last second may be among them."""
        return self._used + self._held_bytes

    @property
    def held(self) -> int:
        """Records that wait in memory because the disk refuses them."""
        return len(self._held)

    @property
    def full(self) -> bool:
        """Whether there is hardly room for another record, or none."""
        return self.used_bytes >= 0.95 * self.max_bytes or self._held_bytes >= 0.95 * HELD_BYTES

    @property
    def failing(self) -> bool:
        """Whether the disk refuses records, or to make them durable."""
        return bool(self._held) or self._sync_failed or not (self._thread.is_alive() or self._closing.is_set())

    def append(self, record: bytes, *, hold: bool = True) -> int | None:
        """Appends a record and returns its number; None when it was dropped because there is no room for it.

        Without `hold` it is not kept in memory where the disk refuses it: for what is acknowledged only when safe.
        """
        frame = _HEAD.pack(len(record), zlib.crc32(record)) + record
        with self._mutex:
            if self._closing.is_set() or self._used + self._held_bytes + len(frame) > self.max_bytes:
                self.counters.dropped += 1
                return None
            if (not self._held or self._write_held()) and self._write(frame):
                return self.counters.appended - 1
            if not hold:
                return None
            if self._held_bytes + len(frame) > HELD_BYTES:
                self.counters.dropped += 1
                return None
            self._held.append(frame)
            self._held_bytes += len(frame)
            return self.counters.appended + len(self._held) - 1

    def sync(self) -> None:
        """Makes what was appended durable; what the disk refused is tried again."""
        with self._mutex:
            if self._held:
                self._write_held()
            ended, self._ended = self._ended, []
            dirty, self._dirty = self._dirty, False
            begun, self._begun = self._begun, False
        try:
            with self._mutex:
                if dirty and self._fd >= 0:
                    ended.append(os.dup(self._fd))  # one of our own, so that the segment may be ended meanwhile
            if begun:
                _sync_folder(self.folder)
            for fd in ended:
                os.fdatasync(fd)
            self._sync_failed = False
        except OSError as error:
            self._sync_failed, self._dirty, self._begun = True, True, True
            self.counters.failures += 1
            log.error("the spool cannot be made durable: %s", error.strerror)
        finally:
            for fd in ended:
                os.close(fd)

    def close(self) -> None:
        """Makes everything durable and ends the segment; the lock is kept until `release`."""
        self._closing.set()
        self._thread.join()
        self.sync()
        with self._mutex:
            self.counters.dropped += len(self._held)
            self._held.clear()
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def release(self) -> None:
        """Lets go of the folder, and removes it where nothing is left in it."""
        if not segments(self.folder):
            shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self.lock)

    def _write(self, frame: bytes) -> bool:
        if self._size >= self._segment_bytes and self._fd >= 0:
            self._ended.append(self._fd)
            self._fd = -1
        try:
            if self._fd < 0:
                name = f"{self.counters.appended:020d}.log"
                self._fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                self._size = os.fstat(self._fd).st_size
                self._begun = True
            written = os.write(self._fd, frame)
            if written < len(frame):  # a full disk takes part of it; half a record would hide all that follow
                os.ftruncate(self._fd, self._size)
                raise OSError(28, "No space left on device")
        except OSError as error:
            self.counters.failures += 1
            self._retry_at = time.monotonic() + RETRY_SECONDS
            log.error("the spool's disk refuses a record: %s", error.strerror)
            return False
        self._size += len(frame)
        self._used += len(frame)
        self.counters.appended += 1
        self._dirty = True
        return True

    def _write_held(self) -> bool:
        """Writes what the disk refused before; False while it still does."""
        if time.monotonic() < self._retry_at:
            return False
        while self._held:
            if not self._write(self._held[0]):
                return False
            self._held_bytes -= len(self._held.popleft())
        return True

    def _sync_regularly(self) -> None:
        measured = 0.0
        while not self._closing.wait(self.interval):
            try:
                self.sync()
                if time.monotonic() - measured > 1.0:
                    measured = time.monotonic()
                    used = sum(size for _, _, size in segments(self.folder))
                    with self._mutex:
                        self._used = used
            except Exception as error:  # noqa: BLE001 (no descriptor left, say: nothing may end this thread)
                self._sync_failed = True
                log.error("the spool cannot be looked after just now: %s", type(error).__name__)


@dataclass
class Reader:
    """The draining side of one folder: the records in order, each read again until `done` says that it is safe."""

    folder: Path
    position: int = 0
    """The number of the next record."""
    torn: int = 0
    """Segments whose rest could not be read, which only a power cut or a bad disk brings about."""
    _segment: int = 0
    _offset: int = 0
    _taken: tuple[int, int, int] = field(default=(0, 0, 0))

    def take(self, limit: int, *, final: bool = False) -> list[bytes]:
        """The next records, at most `limit`. With `final` nobody appends any more, so half a record is a torn one."""
        while True:
            found = segments(self.folder)
            ahead = [first for first, _, _ in found if first >= self._segment]
            if not ahead:
                return []
            if ahead[0] != self._segment:
                self._segment, self._offset, self.position = ahead[0], 0, ahead[0]
            records, offset = _read(_name(self.folder, self._segment), self._offset, limit)
            if records:
                self._taken = (self._segment, offset, self.position + len(records))
                return records
            last = len(ahead) == 1
            if last and not final:
                return []
            # A later segment is begun only when this one has been written to its end.
            if _read(_name(self.folder, self._segment), self._offset, 1)[0]:
                continue
            size = next(size for first, _, size in found if first == self._segment)
            if self._offset < size:
                self.torn += 1
                log.error("the spool's segment %d is torn at byte %d: its rest is lost", self._segment, self._offset)
            _name(self.folder, self._segment).unlink(missing_ok=True)
            if last:
                return []
            self._segment, self._offset, self.position = ahead[1], 0, ahead[1]

    def done(self) -> None:
        """The records that were taken last are safe elsewhere."""
        self._segment, self._offset, self.position = self._taken


def segments(folder: Path) -> list[tuple[int, Path, int]]:
    """The folder's segments in order: number of the first record, path, bytes. Empty where there is no such folder."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if _SEGMENT.fullmatch(entry.name):
                    found.append((int(entry.name[:20]), Path(entry.path), entry.stat().st_size))
    return sorted(found)


def abandoned(root: Path, owner: str = "any") -> Iterator[Path]:
    """The folders of `owner` that no process holds any more, each locked while the caller has it.

    Those without segments are removed.
    """
    for folder in sorted(root.glob(f"{owner}-*")):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if segments(folder):
                    yield folder
                if not segments(folder):
                    shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def _own_folder(root: Path, owner: str) -> tuple[Path, int]:
    """A new folder of this process and the descriptor that locks it."""
    root.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=root, prefix=f".new-{owner}-"))  # nobody may find it before it is locked
    lock = os.open(aside / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = aside.rename(root / aside.name.removeprefix(".new-"))
    _sync_folder(root)
    return folder, lock


def _name(folder: Path, first: int) -> Path:
    return folder / f"{first:020d}.log"


def _read(path: Path, offset: int, limit: int) -> tuple[list[bytes], int]:
    """Whole records from `offset` on and where they end."""
    records: list[bytes] = []
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while len(records) < limit:
                head = file.read(_HEAD.size)
                if len(head) < _HEAD.size:
                    break
                length, crc = _HEAD.unpack(head)
                record = file.read(length) if length <= HELD_BYTES else b""
                if len(record) < length or zlib.crc32(record) != crc:
                    break
                records.append(record)
                offset += _HEAD.size + length
    except FileNotFoundError:
        pass
    return records, offset


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
