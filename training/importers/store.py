"""The service's own store: a row a decision, with what its outcomes reported until now."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import sqlalchemy as sa

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from router_ml.stored import PAGE, log_rows
from router_ml.tables import DECISIONS, OUTCOMES, open_database
from training.importers.batch import ROW, Batch, ReadOptions

OVERLAP = timedelta(hours=1)
ROWS = 10_000


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """The decisions of a store (an SQLite file or an SQLAlchemy URL) as rows of the log.

    `request_id` is the decision's id and `trace_id` the id that the caller gave the request, by which feedback finds
    it, too. Read again are the decisions of the hour before the cursor, since spools are emptied late, and all from the
    oldest one on that an outcome has come for since. Raises InputError where there is no such store.
    """
    if "://" not in source and not Path(source).is_file():
        raise InputError(f"there is no store at {source}: give the file or URL that 'router-ml serve' was given")
    engine = open_database(source)
    try:
        cursor = dict(options.cursor or {"decision_us": 0, "outcome_us": 0})
        with engine.connect() as connection:
            newest = connection.scalar(sa.select(sa.func.max(OUTCOMES.c.time_us))) or 0
            late = connection.scalar(_oldest_reported(cursor["outcome_us"] - _micros(OVERLAP)))
        since = cursor["decision_us"] - _micros(OVERLAP)
        since = max(0, since if late is None else min(since, late))
        done, at = 0, cursor["decision_us"]
        decisions = log_rows(engine, since)
        while rows := list(islice(decisions, ROWS)):
            frame = pl.DataFrame(rows, schema=LOG_SCHEMA).with_columns(
                (pl.int_range(1, len(rows) + 1, dtype=pl.Int64) + done).alias(ROW)
            )
            done += len(rows)
            at = max(at, int(frame.select(pl.col("time").dt.timestamp("us").max()).item()))
            yield Batch(rows=frame.join(_asked(engine, frame["request_id"]), on="request_id", how="left"),
                        cursor=cursor | {"decision_us": at})  # fmt: skip
        # Only now: one that is interrupted before has to look for late outcomes again.
        nothing = pl.DataFrame(schema={ROW: pl.Int64(), **LOG_SCHEMA})
        yield Batch(rows=nothing, cursor={"decision_us": at, "outcome_us": newest})
    finally:
        engine.dispose()


def _micros(span: timedelta) -> int:
    return span // timedelta(microseconds=1)


def _oldest_reported(since_us: int) -> sa.Select[Any]:
    """The time of the oldest decision that an outcome since then is about."""
    d, o = DECISIONS.c, OUTCOMES.c
    of_request = sa.and_(o.decision_id.is_(None), o.request_id == d.request_id, o.key.is_not_distinct_from(d.key))
    about = sa.or_(o.decision_id == d.decision_id, of_request)
    return sa.select(sa.func.min(d.time_us)).select_from(DECISIONS.join(OUTCOMES, about)).where(o.time_us >= since_us)


def _asked(engine: sa.Engine, decisions: pl.Series) -> pl.DataFrame:
    """The ids that callers gave their requests, by decision."""
    found: list[tuple[str, str | None]] = []
    with engine.connect() as connection:
        for at in range(0, len(decisions), PAGE):
            ids = decisions[at : at + PAGE].to_list()
            query = sa.select(DECISIONS.c.decision_id, DECISIONS.c.request_id).where(DECISIONS.c.decision_id.in_(ids))
            found += [tuple(row) for row in connection.execute(query)]
    return pl.DataFrame(found, schema={"request_id": pl.String(), "trace_id": pl.String()}, orient="row")
