"""Which models a log's requests may go to when they are routed again, by a router that may know other ones."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl


def allowed_models(log: pl.DataFrame, models: Sequence[str]) -> list[tuple[str, ...] | None]:
    """Per row the `models` that its request may go to; None where the log does not say: all.

    The log's `candidates` are what its policy could choose of the models that it knew then: they tell what excludes
    one of those, and nothing of a model that came later. One that no earlier row names is therefore allowed, though
    the log has no outcome of it there, which off-policy evaluation then says.
    """
    chosen = log.select("time", pl.coalesce("fallback_from", "model").alias("named"))
    listed = log.select("time", pl.col("candidates").alias("named")).explode("named")
    first = dict(pl.concat([chosen, listed]).drop_nulls().group_by("named").agg(pl.col("time").min()).iter_rows())
    ever = [model for model in models if model not in first]
    late = sorted((first[model], model) for model in models if model in first)
    newest = late[-1][0] if late else None
    found: list[tuple[str, ...] | None] = []
    for time, candidates in log.select("time", "candidates").iter_rows():
        if candidates is None:
            found.append(None)
        elif newest is not None and time >= newest and not ever:  # all are known: the usual row
            found.append(tuple(candidates))
        else:
            found.append((*candidates, *ever, *(model for since, model in late if since > time)))
    return found
