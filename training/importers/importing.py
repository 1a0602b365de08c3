"""The door: a gateway's log, read by its kind's reader, into a request log that further imports add to.

An import is whole or not seen: rows go into parts as they are read, with the cursor that belongs to them, and
`log.json` names them when all are there. One that was ended goes on where it was. What is in the log already is known
by its request_id and is not added again. Rows of models without a card stay, for volume, latency and reliability:
training takes those of the catalogue anyway.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import polars as pl

from router_ml.addresses import shown
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.log_writer import LOG_FORMAT, LogSummary, keep_rejects, too_many_rejects
from router_ml.rawfiles import CHUNK_ROWS, REJECT_SCHEMA
from training.feedback import Rule, rule_of
from training.importers.batch import Reader, ReadOptions
from training.importers.kinds import kind_of
from training.importers.parts import PartWriter, better_unit
from training.importers.settle import in_order, take_feedback, take_updates
from training.importers.state import LogFolder, State, Tally, open_folder, read_json

# Settings that say which rows are read, not how; parameters of a URL that say which tables.
_BOUNDS = ("since", "until", "overlap_s")
_WHICH = ("schema", "options", "dbname", "host", "port", "service")


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What an import did, and what the log then holds.

    `log` is of the whole log, its rejects of this import. `added`, `known` (in the log already), `updated`, `skipped`
    (no requests, by why) are rows of this import; `requality` counts rows whose quality changed, `signals` all signals
    of the log, `unjoined` those of them that found no answer, `ambiguous` those that could be of several models'
    answers, `unread` those whose value their rule cannot read or that say nothing, `without_rule` those of sources
    without a rule, by source; `without_card` counts the log's rows of models that the catalogue does not list, by model
    (None without a catalogue).
    """

    log: LogSummary
    added: int
    known: int
    updated: int
    skipped: Mapping[str, int]
    requality: int
    signals: int
    unjoined: int
    ambiguous: int
    unread: int
    without_rule: Mapping[str, int]
    without_card: Mapping[str, int] | None


def import_log(
    kind: str,
    source: str,
    *,
    out: str | Path,
    catalog: Catalog | None = None,
    feedback: Sequence[Rule] | None = None,
    signals: Iterable[pl.DataFrame] = (),
    settings: Mapping[str, Any] | None = None,
    max_reject_share: float = 0.05,
    part_rows: int = CHUNK_ROWS,
    now: datetime | None = None,
    progress: Callable[[int], None] | None = None,
) -> ImportSummary:
    """Reads a source of a kind (`kinds.KINDS`) into the log at `out`, which is made or added to.

    `catalog` goes into the log, as does `feedback`, the rules; without them those that the log has stay. `signals` are
    frames of `batch.SIGNALS` beside what the source itself has. `settings` are the kind's. `progress` is called with
    the number of rows read. Raises InputError as the reader does, and, with the log as it was before, when more than
    `max_reject_share` of the rows that were read are bad: those are kept as `OUT.rejects.parquet`.
    """
    chosen = kind_of(kind)
    with open_folder(out) as folder:
        _tell_rules(folder.state, feedback)
        name = f"{kind}:{_place(source)}"
        again = _other_settings(folder.state, name, settings or {})
        writer = PartWriter(
            folder, name, updates=chosen.updates, part_rows=part_rows, now=now, again=again, live=chosen.live
        )
        _read(writer, chosen.reader, source, settings or {}, part_rows, progress)
        writer.take_signals(signals)
        unit = (settings or {}).get("units", {}).get("time")
        return _finish(folder, catalog, max_reject_share, part_rows, better_unit(writer.odd_us, unit))


def import_feedback(
    signals: Iterable[pl.DataFrame], *, out: str | Path, feedback: Sequence[Rule] | None = None
) -> ImportSummary:
    """Brings late feedback (frames of `batch.SIGNALS`), or other rules, to the rows of an imported log.

    Raises InputError where there is no such log.
    """
    if not (Path(out) / "log.json").is_file():
        raise InputError(f"there is no log at {out}: import a gateway's log first")
    with open_folder(out) as folder:
        _tell_rules(folder.state, feedback)
        PartWriter(folder, "feedback", updates=False, part_rows=CHUNK_ROWS, now=None).take_signals(signals)
        return _finish(folder, None, 1.0, CHUNK_ROWS, None)


def _place(source: str) -> str:
    """A source by a name that is the same next time, and that tells no password."""
    if "://" not in source:
        return str(Path(source).resolve())
    parts = urlsplit(shown(source))
    # Of the parameters those that say which tables are read.
    which = [(k, v) for k, v in sorted(parse_qsl(parts.query)) if k in _WHICH and (k, v) != ("schema", "public")]
    query = f"?{urlencode(which)}" if which else ""
    return f"{parts.scheme.partition('+')[0]}://{parts.netloc.rpartition('@')[2]}{parts.path}{query}"


def _other_settings(state: State, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a source is read anew, since its rows in the log were read with other settings; it tells the state."""
    said = {k: v for k, v in json.loads(json.dumps(settings, default=str)).items() if v and k not in _BOUNDS}
    known = state.settings.get(name)
    if known is None or known["said"] == said:
        state.settings[name] = known or {"said": said, "again": False}
        return bool(known and known["again"])
    state.settings[name] = {"said": said, "again": True}
    state.cursors.pop(name, None)
    return True


def _tell_rules(state: State, feedback: Sequence[Rule] | None) -> None:
    if feedback is not None:
        state.rules = [rule.to_json() for rule in feedback]


def _read(
    writer: PartWriter,
    reader: Reader,
    source: str,
    settings: Mapping[str, Any],
    chunk_rows: int,
    progress: Callable[[int], None] | None,
) -> None:
    cursor = writer.folder.state.cursors.get(writer.name)
    for batch in reader(source, ReadOptions(cursor=cursor, chunk_rows=chunk_rows, settings=settings)):
        writer.write(batch)
        if progress is not None:
            progress(writer.read)
    writer.finish()


def _finish(
    folder: LogFolder, catalog: Catalog | None, max_reject_share: float, part_rows: int, unit: str | None
) -> ImportSummary:
    state, run = folder.state, folder.state.run
    seen = run.read - run.skipped.total()
    if run.rejected > max_reject_share * seen:
        rejects = pl.concat([pl.read_parquet(folder.path / name) for name in state.rejects])
        kept = keep_rejects(rejects, folder.path)
        said = too_many_rejects(run.rejected, seen, max_reject_share, run.reasons, kept, Counter())
        folder.revert()
        if unit is not None and 2 * run.reasons["time in the future"] > run.rejected:
            said += f". Most times are in the future, so their unit is probably another one: give --unit time={unit}"
        raise InputError(said)
    if not state.parts:
        folder.revert()
        why = "; ".join(f"{count:,} left out: {why}" for why, count in run.skipped.most_common(5))
        raise InputError(f"no rows to write to {folder.path}: {why or 'the input is empty'}")
    before = read_json(folder.path / "log.json") or {}
    updated = take_updates(folder)
    in_order(folder, part_rows)
    signals, requality = take_feedback(folder, [rule_of(rule, str(folder.path)) for rule in state.rules])
    rejects = _keep_rejects(folder)
    parts = [{"file": part.file, "rows": part.rows} for part in state.parts]
    cards = catalog.to_json() if catalog is not None else before.get("catalog")
    without_card = _without_card(folder, Catalog.from_json(cards)) if cards is not None else None
    state.run = Tally()
    first, last = (datetime.fromisoformat(f(moments)) for f, moments in (
        (min, [part.first for part in state.parts]), (max, [part.last for part in state.parts])
    ))  # fmt: skip
    summary = LogSummary(
        path=folder.path,
        rows=sum(part.rows for part in state.parts),
        rejected=run.rejected,
        reject_reasons=dict(run.reasons.most_common()),
        sha256=None,
        first=first,
        last=last,
    )
    info = {
        "format": LOG_FORMAT,
        "rows": summary.rows,
        "rejected": rejects.height,
        "reject_reasons": dict(rejects["reason"].str.split("; ").explode().value_counts(sort=True).iter_rows()),
        "logging": None,
        "first": first.isoformat(),
        "last": last.isoformat(),
        "sha256": None,
        "parts": parts,
        "catalog": cards,
        "meta": {"sources": sorted(state.cursors), "without_card": without_card},
    }
    folder.publish(info)
    has_rule = pl.col("w").is_not_null()
    return ImportSummary(
        log=summary,
        added=run.added,
        known=run.known,
        updated=updated,
        skipped=dict(run.skipped.most_common()),
        requality=requality,
        signals=signals.height,
        unjoined=signals.filter(has_rule & pl.col("q").is_not_null() & ~pl.col("joined") & ~pl.col("ambiguous")).height,
        ambiguous=signals.filter("ambiguous").height,
        unread=signals.filter(has_rule & pl.col("q").is_null()).height,
        without_rule=dict(signals.filter(~has_rule)["source"].value_counts(sort=True).iter_rows()),
        without_card=without_card,
    )


def _keep_rejects(folder: LogFolder) -> pl.DataFrame:
    """Adds this import's rejects to `rejects.parquet`, those that are there already left out; returns all of them."""
    kept = folder.path / "rejects.parquet"
    old = pl.read_parquet(kept) if kept.is_file() else pl.DataFrame(schema=REJECT_SCHEMA)
    if not folder.state.rejects:
        return old
    new = pl.concat([pl.read_parquet(folder.path / name) for name in folder.state.rejects])
    # A source that is read again in part says the same of the same row, under another number.
    rejects = pl.concat([old, new.join(old, on=["reason", "original"], how="anti", maintain_order="left")])
    folder.write_as(rejects, kept.name)
    folder.state.rejects = []
    return rejects


def _without_card(folder: LogFolder, catalog: Catalog) -> dict[str, int]:
    models = pl.concat([pl.read_parquet(folder.path / p.file, columns=["model"]) for p in folder.state.parts])["model"]
    unlisted = models.filter(~models.is_in(list(catalog.ids)))
    return dict(unlisted.value_counts(sort=True).iter_rows())
