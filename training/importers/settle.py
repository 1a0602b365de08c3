"""What an import does to the parts of a log at its end: order, later outcomes, and the quality that feedback gives.

Each step writes other files and changes the state; nothing is seen by readers before the state is published.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from training.feedback import Rule, apply_rules, by_source, qualities, rule_of
from training.importers.batch import JOINS, SIGNALS
from training.importers.state import LOG, LogFolder, Part, State, read_json

# What stands beside each row of the log: what feedback finds it by, and the quality that the row itself came with.
JOINS_SCHEMA = pl.Schema(
    {
        "request_id": pl.String(),
        **JOINS,
        "time": LOG_SCHEMA["time"],
        "own_quality": pl.Float64(),
        "own_source": pl.String(),
    }
)
OWN_SOURCE = "row"
WHOLE = "whole"
"""A column of updates: the row holds as it is, what it lacks too. Otherwise what an older or a later one has stays."""


_MUCH = 2


def in_order(folder: LogFolder, part_rows: int) -> None:
    """Puts the rows of parts whose times overlap into the order of time, so that the log as a whole is in it.

    Training and its hold-out take a log's order for that of arrival. Memory is that of two parts or so, and of the
    times of what overlaps.
    """
    ordered: list[Part] = []
    for group in _overlapping(sorted(folder.state.parts, key=lambda part: (_moment(part.first), part.file)), part_rows):
        ordered += group if len(group) == 1 else _merged(folder, group, part_rows)
    folder.state.parts = ordered


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _overlapping(parts: Sequence[Part], part_rows: int) -> Iterator[list[Part]]:
    group: list[Part] = []
    last: datetime | None = None
    for part in parts:
        # Small neighbours become one part, so that an import an hour does not make a file an hour; one that is much
        # larger than its neighbour stays, or every import would write it again.
        before = sum(p.rows for p in group)
        full = before + part.rows > part_rows or before > _MUCH * part.rows
        if last is not None and _moment(part.first) >= last and full:
            yield group
            group, last = [], None
        group.append(part)
        last = _moment(part.last) if last is None else max(last, _moment(part.last))
    if group:
        yield group


def _merged(folder: LogFolder, group: Sequence[Part], part_rows: int) -> list[Part]:
    times = pl.concat([pl.read_parquet(folder.path / p.joins, columns=["time"]) for p in group])["time"].sort()
    # What is before all that overlaps is cut off where it is most of it: next time it stays as it is.
    head = int((times < _moment(group[1].first)).sum())
    start = head if head > _MUCH * (len(times) - head) else 0
    cuts = [times[0], *(times[at] for at in range(start or part_rows, len(times), part_rows)), None]
    made = []
    for low, high in pairwise(cuts):
        if low == high:
            continue
        frames = []
        for part in group:
            if _moment(part.last) < low or (high is not None and _moment(part.first) >= high):
                continue
            both = read_part(folder, part)
            frames.append(
                both.filter((pl.col("time") >= low) & (pl.lit(True) if high is None else pl.col("time") < high))
            )
        both = pl.concat(frames).sort("time", maintain_order=True)
        if both.height:
            made.append(write_part(folder, both))
    return made


def read_part(folder: LogFolder, part: Part) -> pl.DataFrame:
    """A part's rows with the columns of their joins, those of the same name left out."""
    rows = pl.read_parquet(folder.path / part.file)
    return rows.hstack(pl.read_parquet(folder.path / part.joins).drop("request_id", "time"))


def write_part(folder: LogFolder, both: pl.DataFrame) -> Part:
    """Writes what `read_part` gave as a part."""
    return folder.add_part(both.select(LOG_SCHEMA.names()), both.select(JOINS_SCHEMA.names()))


def withdraw(folder: LogFolder, rows: Sequence[Sequence[str]]) -> int:
    """Takes rows, named by request_id and model, out of the parts; how many there were."""
    gone = pl.DataFrame([list(row) for row in rows], schema={"request_id": pl.String, "model": pl.String}, orient="row")
    kept, count = [], 0
    for part in folder.state.parts:
        ids = pl.read_parquet(folder.path / part.file, columns=["request_id", "model"])
        if not (found := ids.join(gone, on=ids.columns, how="semi").height):
            kept.append(part)
            continue
        count += found
        if found < part.rows:
            kept.append(write_part(folder, read_part(folder, part).join(gone, on=ids.columns, how="anti",
                                                                        maintain_order="left")))  # fmt: skip
    folder.state.parts = kept
    return count


def take_updates(folder: LogFolder) -> int:
    """Puts rows that were read again in the place of those in the log, where they say something else; how many.

    Of two readings that one holds whose call ended later, value by value: what only the other has stays, as an export
    that was made while a call ran, or before its price was known, may be read after a newer one. A `WHOLE` row holds as
    it is.
    """
    state = folder.state
    if not state.updates:
        return 0
    new = pl.concat([pl.read_parquet(folder.path / name) for name in state.updates], how="diagonal")
    if WHOLE not in new.columns:
        new = new.with_columns(pl.lit(False).alias(WHOLE))
    new = new.with_columns(pl.col(WHOLE).fill_null(True))
    changed = 0
    for at, part in enumerate(state.parts):
        ids = pl.read_parquet(folder.path / part.joins, columns=["request_id"])["request_id"]
        about = ids.filter(ids.is_in(new["request_id"].implode()) & ids.is_unique())
        if about.is_empty():
            continue
        old = read_part(folder, part).with_row_index("_at")
        mine = _newest(old.filter(pl.col("request_id").is_in(about.implode())), new)
        # The quality is the feedback's business, which comes after this.
        same = [n for n in old.columns if n not in ("quality", "quality_source")]
        differs = mine.select(same).join(old.select(same), on=same, how="anti", nulls_equal=True)["_at"]
        if differs.len():
            changed += differs.len()
            mine = mine.filter(pl.col("_at").is_in(differs.implode()))
            rest = old.filter(~pl.col("_at").is_in(differs.implode()))
            state.parts[at] = write_part(folder, pl.concat([rest, mine]).sort("time", "_at").drop("_at"))
    state.updates = []
    return changed


def _newest(old: pl.DataFrame, new: pl.DataFrame) -> pl.DataFrame:
    """The old rows, one a request, with what the new ones say of them."""
    at = old.select("request_id", "_at")
    mine = new.join(at, on="request_id", how="inner", maintain_order="left").select(*old.columns, WHOLE)
    end = pl.col("time").dt.timestamp("us") + pl.col("latency_ms") * 1000
    every = pl.concat([old.with_columns(pl.lit(False).alias(WHOLE)), mine])
    every = every.with_columns(_last_whole=pl.col(WHOLE).any().over("_at")).filter(
        ~pl.col("_last_whole") | pl.col(WHOLE) & pl.col(WHOLE).is_last_distinct().over("_at")
    )
    ordered = every.sort(end, nulls_last=False, maintain_order=True)
    values = [name for name in old.columns if name != "_at"]
    found = ordered.group_by("_at", maintain_order=True).agg(pl.col(values).drop_nulls().last())
    return found.select(old.columns)


def signals_of(path: Path, state: State) -> pl.DataFrame:
    """All signals of a log, each once: of those with one id the newest by its time, of several times the last read."""
    if not state.signals:
        return pl.DataFrame(schema=SIGNALS)
    files = [pl.read_parquet(path / name) for name in state.signals]
    signals = pl.concat([pl.DataFrame(schema=SIGNALS), *files], how="diagonal")  # older ones name no model
    content = [name for name in SIGNALS if name != "signal"]
    by_id = (
        signals.filter(pl.col("signal").is_not_null())
        .sort("time", nulls_last=False, maintain_order=True)
        .unique(["source", "signal", "model"], keep="last", maintain_order=True)
    )
    by_content = signals.filter(pl.col("signal").is_null()).unique(content, keep="last", maintain_order=True)
    return pl.concat([by_id, by_content])


def take_feedback(folder: LogFolder, rules: Sequence[Rule]) -> tuple[pl.DataFrame, int]:
    """Gives every row the quality that its own and all signals give it under the rules, late ones included.

    Returns the signals with `q`, `w` (`feedback.apply_rules`), `joined`, whether an answer of the log has it, and
    `ambiguous`, whether it could be of several models' answers; and how many rows' quality changed. Memory is that of
    the signals and of the rows that they are about, and of a part.
    """
    state = folder.state
    if not state.signals:
        more = {"q": pl.Float64(), "w": pl.Float64(), "joined": pl.Boolean(), "ambiguous": pl.Boolean()}
        return pl.DataFrame(schema={**SIGNALS, **more}), 0
    signals = signals_of(folder.path, state)
    if len(state.signals) > 1:
        state.signals = [folder.write(signals, "signals")]
    signals = apply_rules(signals, rules).with_row_index("_signal")
    rows, heard, own = _about(folder.path, state, signals, rules)
    found, joined, ambiguous = qualities(rows, heard, own)
    found = found.join(rows.select("row", "part", "at"), on="row")
    changed = sum(_requality(folder, at, found.filter(pl.col("part") == at)) for at in range(len(state.parts)))
    has = {name: pl.col("_signal").is_in(ids.implode()) for name, ids in (("joined", joined), ("ambiguous", ambiguous))}
    return signals.with_columns(**has).drop("_signal"), changed


def judgements_of(path: Path) -> pl.DataFrame | None:
    """What each source says of each row that signals are about: (`row`, a number, `request_id`, `source`, `q`).

    `q` is its quality under the log's rules, that which the row came with among them. None where the log was not made
    by importing or has no signals. Changes nothing. Raises InputError where files are missing.
    """
    committed = read_json(path / LOG)
    if committed is None or "import" not in committed:
        return None
    try:
        state = State.from_json(committed["import"])
        if not state.signals:
            return None
        rules = [rule_of(rule, str(path)) for rule in state.rules]
        signals = apply_rules(signals_of(path, state), rules).with_row_index("_signal")
        rows, heard, own = _about(path, state, signals, rules)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"the feedback of {path} is not readable ({error}): is an import under way? Try again"
        ) from None
    return by_source(rows, heard, own)[0].join(rows.select("row", "request_id"), on="row").drop("w")


def _about(
    path: Path, state: State, signals: pl.DataFrame, rules: Sequence[Rule]
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """(rows that signals are about, signals that say something, what these rows said of themselves)."""
    heard = signals.filter(pl.col("q").is_not_null() & (pl.col("w") > 0))
    keys = {name: heard[name].drop_nulls().unique().implode() for name in ("request_id", *JOINS)}
    about = [
        pl.read_parquet(path / part.joins)
        .hstack(pl.read_parquet(path / part.file, columns=["model", "status"]))
        .with_columns(part=pl.lit(at, pl.Int64), at=pl.int_range(pl.len(), dtype=pl.Int64))
        .filter(pl.any_horizontal(pl.col(name).is_in(ids).fill_null(False) for name, ids in keys.items()))
        for at, part in enumerate(state.parts)
    ]
    rows = pl.concat(about).with_row_index("row")
    own = apply_rules(
        rows.select("row", source=pl.col("own_source").fill_null(OWN_SOURCE), value="own_quality").with_columns(
            label=pl.lit(None, pl.String), weight=pl.lit(None, pl.Float64)
        ),
        rules,
    ).select("row", "source", q="value", w=pl.col("w").fill_null(1.0))
    return rows, heard, own.filter(pl.col("q").is_not_null())


def _requality(folder: LogFolder, at: int, found: pl.DataFrame) -> int:
    """Writes one part again where its rows' quality is another; `found` has that of the rows that signals are about."""
    part = folder.state.parts[at]
    now = pl.read_parquet(folder.path / part.file, columns=["quality", "quality_source"])
    joins = pl.read_parquet(folder.path / part.joins)
    place = pl.DataFrame({"at": pl.int_range(joins.height, dtype=pl.Int64, eager=True)})
    said = place.join(found.select("at", "quality", "quality_source"), on="at", how="left", maintain_order="left")
    has = said["quality"].is_not_null()
    quality = said["quality"].zip_with(has, joins["own_quality"])
    source = said["quality_source"].zip_with(has, joins["own_source"])
    changed = int((quality.ne_missing(now["quality"]) | source.ne_missing(now["quality_source"])).sum())
    if changed:
        rows = pl.read_parquet(folder.path / part.file)
        rows = rows.with_columns(quality.alias("quality"), source.alias("quality_source"))
        folder.state.parts[at] = folder.add_part(rows, joins)
    return changed
