"""What an imported log knows of its imports, and how it is kept so that a kill at any moment neither loses nor doubles.

Two files of the log directory say what its other files are. `log.json` is what readers see: it is swapped last, when an
import is whole. `import.json` is the importer's own: it runs ahead, part by part, with the cursor that belongs to them.
A file that neither names is what an interrupted step left behind; the next import removes it. Files are never changed:
what has to be different is written under another name. Parts that a published log named stay for a day after the log
that names them no more, since who reads it (a training of some hours) opens them one after the other.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import polars as pl

from router_ml.errors import InputError

STATE, LOG = "import.json", "log.json"
STATE_FORMAT = 1
GRACE_S = 24 * 3600.0
MIN_RETIRED_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of the log: `file` has them, `joins` in the same order their ids and their own quality; times are ISO."""

    file: str
    joins: str
    rows: int
    first: str
    last: str


@dataclass
class Tally:
    """Counts of one import: rows read, of them added, known before, set aside by reason, no requests by why."""

    read: int = 0
    added: int = 0
    known: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)

    def plus(self, other: Tally) -> Tally:
        """Both counts together."""
        return Tally(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass
class State:
    """All that `import.json` says. `run` counts the import under way.

    `cursors` has each source's by its name; `settings` what it was read with (`said`, and `again` while it is read anew
    because they are others); `tails` by source and file the rows, (request_id, model), of a last line without newline
    and its hash (`resume`). `retired` are parts that readers of an earlier log may hold, and since when (s since 1970).
    `signals`, `updates` and `rejects` are files that are not in the log yet,
    or, for signals, that are to be joined again whenever rows or rules change. `rules` are the feedback's.
    """

    parts: list[Part] = field(default_factory=list)
    cursors: dict[str, Any] = field(default_factory=dict)
    signals: list[str] = field(default_factory=list)
    updates: list[str] = field(default_factory=list)
    rejects: list[str] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    tails: dict[str, dict[str, Any]] = field(default_factory=dict)
    retired: dict[str, float] = field(default_factory=dict)
    run: Tally = field(default_factory=Tally)

    def files(self) -> set[str]:
        """The names of all files that belong to the log."""
        parts = {name for part in self.parts for name in (part.file, part.joins)}
        return parts | {*self.signals, *self.updates, *self.rejects}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        said = {f.name: getattr(self, f.name) for f in fields(self)}
        said["parts"] = [asdict(part) for part in self.parts]
        # Not asdict: it makes a Counter of a Counter's pairs.
        return {"format": STATE_FORMAT, **said, "run": dict(vars(self.run))}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> State:
        """The state that `to_json` gave."""
        if said.get("format") != STATE_FORMAT:
            raise ValueError("of another version")
        kept = {name: said[name] for name in ("cursors", "signals", "updates", "rejects", "rules")}
        # Older states have none of these.
        kept |= {name: said.get(name, {}) for name in ("settings", "tails", "retired")}
        run = Tally(**said["run"])
        run.reasons, run.skipped = Counter(run.reasons), Counter(run.skipped)
        return cls(parts=[Part(**part) for part in said["parts"]], run=run, **kept)


class LogFolder:
    """A log directory that imports add to. Use `open_folder`, which keeps others out while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = State()
        committed = read_json(path / LOG)
        if committed is not None and "import" not in committed:
            raise InputError(
                f"{path} is a log that was not made by importing, so nothing is added: choose another --out"
            )
        said = read_json(path / STATE)
        try:
            # The readers' file has a state, too: the importer's may be away, after a restore of the log alone.
            found = said if said is not None else committed and committed["import"]
            if found is not None:
                self.state = State.from_json(found)
            kept = State.from_json(committed["import"]) if committed is not None else State()
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path / STATE} is not readable ({error}): import into another --out") from None
        held = self._held([kept.retired, self.state.retired])
        self.state.retired = held
        named = self.state.files() | kept.files() | held.keys()
        for file in path.iterdir():
            if file.suffix in (".parquet", ".tmp") and file.name not in named | {"rejects.parquet"}:
                file.unlink()
        if lost := sorted(name for name in self.state.files() if not (path / name).is_file()):
            raise InputError(f"{path} is incomplete: {lost[0]} is missing; import again into another --out")

    def _held(self, retired: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """The retired parts that stay: for GRACE_S, the oldest less where all take more than twice the log's disk."""
        since = {name: at for one in retired for name, at in one.items() if (self.path / name).is_file()}
        now = [part.file for part in self.state.parts if (self.path / part.file).is_file()]
        room = max(MIN_RETIRED_BYTES, 2 * sum(self._size(name) for name in now))
        held = {}
        for name, at in sorted(since.items(), key=lambda pair: -pair[1]):
            room -= self._size(name)
            if time.time() - at < GRACE_S and room >= 0:
                held[name] = at
        return held

    def _size(self, name: str) -> int:
        return (self.path / name).stat().st_size

    def write(self, frame: pl.DataFrame, kind: str) -> str:
        """Writes a file that nothing names yet, and returns its name."""
        name = f"{kind}-{secrets.token_hex(8)}.parquet"
        self.write_as(frame, name)
        return name

    def write_as(self, frame: pl.DataFrame, name: str) -> None:
        """Writes a file aside and renames it."""
        aside = self.path / f".{name}.tmp"
        try:
            frame.write_parquet(aside, compression="zstd", compression_level=1)
            aside.replace(self.path / name)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise InputError(
                f"cannot write {self.path}: {error}; free some space and import again: it goes on"
            ) from None

    def add_part(self, rows: pl.DataFrame, joins: pl.DataFrame) -> Part:
        """Writes rows in order of time as a part and returns what to put into the state."""
        first, last = rows["time"].min(), rows["time"].max()
        return Part(self.write(rows, "part"), self.write(joins, "joins"), rows.height, _iso(first), _iso(last))

    def save(self) -> None:
        """Makes the state the one that a next import goes on from."""
        self._swap(STATE, self.state.to_json())

    def publish(self, info: dict[str, Any]) -> None:
        """Makes the log what readers see, and then forgets what was under way."""
        before = read_json(self.path / LOG)
        names = {part.file for part in self.state.parts}
        dropped = {part["file"] for part in (before or {}).get("parts", [])} - names
        self.state.retired = {name: at for name, at in self.state.retired.items() if name not in names}
        self.state.retired |= dict.fromkeys(sorted(dropped), time.time())
        self._swap(LOG, {**info, "import": self.state.to_json()})
        self.save()

    def revert(self) -> None:
        """Gives up the import under way: the state is that of what readers see."""
        committed = read_json(self.path / LOG)
        if committed is None:
            (self.path / STATE).unlink(missing_ok=True)
        else:
            self.state = State.from_json(committed["import"])
            self.save()

    def _swap(self, name: str, said: dict[str, Any]) -> None:
        aside = self.path / f".{name}.tmp"
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(said, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.path / name)


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's JSON object; None where there is no such file. Raises InputError for anything else."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not readable JSON: {error}; import into another --out") from None
    if not isinstance(said, dict):
        raise InputError(f"{path} is not a JSON object: import into another --out")
    return said


def _iso(moment: Any) -> str:
    return str(moment.isoformat())


@contextmanager
def open_folder(out: str | Path) -> Iterator[LogFolder]:
    """The log directory at `out`, made where there is none.

    Raises InputError where it cannot be made, is no log, is incomplete, or where another import is at it.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file: choose another --out")
    if path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in (STATE, LOG, ".lock")):
        raise InputError(f"{path} is not a log, and not empty: choose another --out")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / ".lock").open("w")
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}: choose another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"another import into {path} is under way: wait for it") from None
        yield LogFolder(path)
