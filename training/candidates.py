"""Which models a log's requests may go to when they are routed again, by a router that may know other ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

import polars as pl


def first_named(log: pl.DataFrame) -> dict[str, datetime]:
    """When each model was first chosen, or among a row's candidates; of the whole log, not of the rows judged on."""
    chosen = log.select("time", pl.coalesce("fallback_from", "model").alias("named"))
    listed = log.select("time", pl.col("candidates").alias("named")).explode("named")
    return dict(pl.concat([chosen, listed]).drop_nulls().group_by("named").agg(pl.col("time").min()).iter_rows())


def allowed_models(
    rows: pl.DataFrame, models: Sequence[str], first: Mapping[str, datetime] | None = None
) -> list[tuple[str, ...] | None]:
    """Per row the `models` that its request may go to; None where the log does not say: all.

    The log's `candidates` are what its policy could choose of the models that it knew then: they tell what excludes
    one of those, and nothing of a model that came later. One that is `first` named after a row (by default as in these
    rows) is therefore allowed there, though the log has no outcome of it, which off-policy evaluation then says.
    """
    first = first_named(rows) if first is None else first
    ever = [model for model in models if model not in first]
    late = [(first[model], model) for model in models if model in first]
    newest = max((since for since, _ in late), default=None)
    found: list[tuple[str, ...] | None] = []
    for time, candidates in rows.select("time", "candidates").iter_rows():
        if candidates is None:
            found.append(None)
        elif not ever and newest is not None and time >= newest:  # all are known: the usual row
            found.append(tuple(candidates))
        else:
            found.append((*candidates, *ever, *(model for since, model in late if since > time)))
    return found
