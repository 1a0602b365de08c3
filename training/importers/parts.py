"""From a reader's batches to the parts of a log: what is known is left out, what is bad set aside, and nothing lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl

from router_ml.log_schema import LOG_SCHEMA, ValidationState, already_in, convert, take_up, validate
from router_ml.rawfiles import REASON, ROW, rejected
from training.importers.batch import JOINS, SIGNALS, Batch
from training.importers.settle import WHOLE, withdraw, write_part
from training.importers.state import LogFolder, Tally
from training.importers.values import TIME_UNITS

# A part is written when its rows are this many, or their text this long: long prompts must not fill the memory.
PART_BYTES = 1 << 27
_YEAR_2000, _DAY = 946_684_800.0, 86_400.0  # s since 1970
_ANY_ORDER = timedelta(days=365_000).total_seconds()
Raw = pl.DataFrame | Callable[[], pl.DataFrame] | None  # rows as the source had them, with `ROW`
_IDS = ("request_id", "model", "propensity")
HALF = "a last line that is not whole yet: left for the next import"


class PartWriter:
    """Takes the batches of one source into a log's parts, and the state along with them.

    With `updates` the rows that the log has already are kept beside it, for `settle.take_updates`; `again` says that
    they are read with other settings, so that they replace those of the log whole (but for those of a request that was
    sent to several models, which cannot be told apart by their ids). Those of a `live` source do as well.
    """

    def __init__(
        self, folder: LogFolder, name: str, *, updates: bool, part_rows: int, now: datetime | None,
        again: bool = False, live: bool = False,
    ) -> None:  # fmt: skip
        self.folder, self.name, self.updates, self.part_rows, self.now = folder, name, updates, part_rows, now
        self.again, self.whole = again, again or live
        self._places = _places(folder.state.cursors.get(name))
        self._cursor: Mapping[str, Any] | None = None
        self._rows: list[pl.DataFrame] = []
        self._again: list[pl.DataFrame] = []
        self._signals: list[pl.DataFrame] = []
        self._rejects: list[pl.DataFrame] = []
        self._done = Tally()
        self._is_tail = False
        # Micros of a time out of the range of times, for a word on its unit.
        self.odd_us: int | None = None
        # What the log held when this run began, which may come again, and all of it, of which nothing may.
        self._known: tuple[ValidationState, ValidationState] | None = None

    def _know(self) -> tuple[ValidationState, ValidationState]:
        """Reads the log's ids where that was not done: most looks at a source find nothing new."""
        if self._known is None:
            before = ValidationState()
            for part in self.folder.state.parts:
                take_up(pl.read_parquet(self.folder.path / part.file, columns=list(_IDS)), before)
            every = copy.deepcopy(before)
            for frame in self._rows:
                take_up(frame.select(_IDS), every)
            self._known = before, every
        return self._known

    @property
    def read(self) -> int:
        """Rows read in this import, those before it was interrupted included."""
        return self.folder.state.run.read + self._done.read

    def write(self, batch: Batch) -> None:
        """Takes a batch; what it brings is safe after the next `flush`."""
        frame, done = batch.rows, self._done
        done.read += frame.height + batch.rejects.height + sum(batch.skipped.values())
        done.skipped.update(batch.skipped)
        self._set_aside(batch.rejects)
        at = _places(batch.cursor)
        moved = [(file, place) for file, place in at.items() if place != self._places.get(file)]
        self._places = at
        for file, place in moved:
            self._withdraw(file, place.get("void"))
        if batch.signals.height:
            self._signals.append(convert(batch.signals, SIGNALS)[0])
        if frame.height:
            raw = batch.raw
            tails = [(file, place["tail"]) for file, place in moved if "tail" in place]
            self._is_tail = bool(tails)
            new = self._take(frame, raw.with_columns(frame[ROW]) if isinstance(raw, pl.DataFrame) else raw)
            self._is_tail = False
            for file, tail in tails:
                rows = [list(row) for row in new.select("request_id", "model").iter_rows()]
                self.folder.state.tails.setdefault(self.name, {})[file] = {"sha256": tail["sha256"], "rows": rows}
        self._cursor = batch.cursor
        pending = [*self._rows, *self._again, *self._signals]
        if sum(f.height for f in pending) >= self.part_rows or sum(f.estimated_size() for f in pending) >= PART_BYTES:
            self.flush()

    def take_signals(self, frames: Iterable[pl.DataFrame]) -> None:
        """Takes signals (`SIGNALS`) that come from elsewhere."""
        for frame in frames:
            self._signals.append(convert(frame, SIGNALS)[0])
            if sum(f.height for f in self._signals) >= self.part_rows:
                self.flush()
        self.flush()

    def _withdraw(self, file: str, tail: str | None) -> None:
        """Takes the rows of a last line out of the log that were read while its writer was at it."""
        tails = self.folder.state.tails.get(self.name, {})
        if tail is None or tails.get(file, {}).get("sha256") != tail:
            return
        if rows := tails.pop(file)["rows"]:
            self._done.added -= withdraw(self.folder, rows)
            self._known = None

    def finish(self) -> None:
        """To be called when all is read: counts the last lines that were left, and makes all safe."""
        if left := sum("half" in place for place in self._places.values()):
            self._done.read += left
            self._done.skipped[HALF] += left
        self.folder.state.settings.get(self.name, {})["again"] = False
        self.flush()

    def _take(self, frame: pl.DataFrame, raw: Raw) -> pl.DataFrame:
        ids = convert(frame, {name: LOG_SCHEMA[name] for name in _IDS})[0]
        if self.updates:
            # What is said again later holds: a call that ended meanwhile, in another file of the same export.
            last = ids["request_id"].is_null() | ids["request_id"].is_last_distinct()
            self._done.known += int((~last).sum())
            frame, ids = frame.filter(last), ids.filter(last)
        before, every = self._know()
        known = already_in(ids, every if self.updates else before, one_a_request=self.updates or self.again)
        self._done.known += int(known.sum())
        new = self._valid(frame.filter(~known), raw, every)
        self._done.added += new.height
        if new.height:
            self._rows.append(new)
        if self.again and not self.updates:
            known &= ids["propensity"].ne_missing(1.0)
        if (self.updates or self.again) and known.any():
            again = self._valid(frame.filter(known), raw, ValidationState())
            self._again.append(again.with_columns(pl.lit(self.whole).alias(WHOLE)))
        return new

    def _valid(self, frame: pl.DataFrame, raw: Raw, state: ValidationState) -> pl.DataFrame:
        """The good rows with their joins, as `settle.read_part` gives them."""
        # The order of time is made at the end, so here none runs backwards.
        good, rejects = validate(frame, state=state, max_disorder_s=_ANY_ORDER, now=self.now)
        if self.odd_us is None and rejects.height and isinstance(frame.schema["time"], pl.Datetime):
            odd = frame.filter(pl.col(ROW).is_in(_in_future(rejects).implode()))["time"].dt.timestamp("us")
            self.odd_us = None if odd.is_empty() else int(odd.sort()[len(odd) // 2])
        if self._is_tail:
            # Half a row, as it seems, which is read again when there is more of it.
            self._done.skipped.update({HALF: rejects.height} if rejects.height else {})
        else:
            self._set_aside(_as_they_were(rejects, raw))
        kept = frame.filter(~pl.col(ROW).is_in(rejects["row"].implode()))
        joins = convert(kept, JOINS)[0].with_columns(pl.when(pl.col(n) != "").then(pl.col(n)).alias(n) for n in JOINS)
        return good.hstack(joins).with_columns(own_quality="quality", own_source="quality_source")

    def _set_aside(self, rejects: pl.DataFrame) -> None:
        if rejects.height:
            self._done.rejected += rejects.height
            self._done.reasons.update(dict(rejects["reason"].str.split("; ").explode().value_counts().iter_rows()))
            self._rejects.append(rejects)

    def flush(self) -> None:
        """Writes what was taken and makes it, with its cursor, what a next import goes on from."""
        folder, state, done = self.folder, self.folder.state, self._done
        if self._rows:
            state.parts.append(write_part(folder, pl.concat(self._rows).sort("time", maintain_order=True)))
        for frames, names, kind in (
            (self._again, state.updates, "updates"),
            (self._signals, state.signals, "signals"),
            (self._rejects, state.rejects, "rejects"),
        ):
            if frames:
                names.append(folder.write(pl.concat(frames), kind))
        if self._cursor is not None:
            state.cursors[self.name] = dict(self._cursor)
        state.run = state.run.plus(done)
        self._rows, self._again, self._signals, self._rejects, self._done = [], [], [], [], Tally()
        folder.save()


def better_unit(micros: int | None, unit: str | None) -> str | None:
    """The unit, in words, by which a time in the future would be one of these years, where `unit` put it there."""
    if micros is None or unit not in TIME_UNITS:
        return None
    smaller = list(TIME_UNITS)[list(TIME_UNITS).index(unit) + 1 :]
    now = datetime.now(UTC).timestamp()
    fits = [name for at, name in enumerate(smaller, 1) if _YEAR_2000 < micros / 1e6 / 1000**at < now + _DAY]
    return fits[0] if fits else " or ".join(smaller[1:]) or None


def _in_future(rejects: pl.DataFrame) -> pl.Series:
    return rejects.filter(pl.col("reason").str.contains("time in the future", literal=True))["row"]


def _places(cursor: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """A source's place in each of its files; that of a lone file has no name."""
    said = dict(cursor or {})
    return dict(said["files"]) if "files" in said else {"": said}


def _as_they_were(rejects: pl.DataFrame, raw: Raw) -> pl.DataFrame:
    """Rejects with their rows as the source had them."""
    if not rejects.height or raw is None:
        return rejects
    found = raw if isinstance(raw, pl.DataFrame) else raw()
    why = rejects.select(pl.col("row").alias(ROW), pl.col("reason").alias(REASON))
    return rejected(found.join(why, on=ROW, how="inner", maintain_order="right"), {})
