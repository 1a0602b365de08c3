"""What would change for whom: the requests that two routers would send to different models, grouped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from training.logged import Decided, Logged
from training.ope import evaluate_slices

_LEAST_ROWS = 50
_NOBODY = "(no model)"
UNCHANGED = "(unchanged)"


def changed_models(logged: Logged, old: Decided, new: Decided, options: Mapping[str, Any]) -> pl.DataFrame:
    """A row per pair of models between which requests would move, the commonest first.

    `from`, `to`, `n`, `share` of all requests, the commonest `tasks`, `tenants` (how many), the expected cost of one
    such request before and after by the new router, `cost_usd_before` and `_after`, its probability of success,
    `p_ok_before` and `_after`, and how `quality` changes by the log, with `low` and `high`: null where fewer than 50
    requests move or the log cannot tell. The intervals hold together.
    """
    moves = moves_of(old, new)
    named = moves.select(pl.format("{} → {}", "from", "to").alias("change"), "moved")
    frame = logged.slices.with_columns(
        change=named.select(pl.when("moved").then("change").otherwise(pl.lit(UNCHANGED))).to_series()
    )
    judged: dict[str, Any] = {}
    if (frame.filter(pl.col("change") != UNCHANGED)["change"].value_counts()["count"] >= _LEAST_ROWS).any():
        values = evaluate_slices(
            replace(logged, slices=frame), new.target, by=["change"], least_rows=_LEAST_ROWS, baseline=old.target,
            **options,
        ).values  # fmt: skip
        judged = {name: value.headline for (_, name), value in values.items() if value.headline is not None}
    rows = moves.with_columns(frame.select("change", *(name for name in ("task", "tenant") if name in frame.columns)))
    grouped = (
        rows.filter("moved")
        .group_by("from", "to", "change")
        .agg(
            n=pl.len(),
            tasks=pl.col("task").value_counts(sort=True).struct.field("task").head(3),
            tenants=pl.col("tenant").n_unique(),
            **{name: pl.col(name).mean() for name in _NUMBERS},
        )
    )
    found = [judged.get(change) for change in grouped["change"]]
    return grouped.select(
        "from", "to", "n", (pl.col("n") / len(logged)).alias("share"), "tasks", "tenants", *_NUMBERS,
        *(
            pl.Series(name, [None if value is None else value[i] for value in found], dtype=pl.Float64)
            for i, name in enumerate(("quality", "low", "high"))
        ),
    ).sort("n", "from", "to", descending=[True, False, False])  # fmt: skip


def changed_for(logged: Logged, old: Decided, new: Decided) -> pl.DataFrame:
    """A row per task and per tenant: `by`, `name`, `n`, the share `changed`, expected cost before and after, USD."""
    moves = moves_of(old, new)
    frames = []
    for by in ("task", "tenant"):
        frames.append(
            moves.with_columns(logged.slices[by].alias("name"))
            .group_by("name")
            .agg(
                n=pl.len(),
                changed=pl.col("moved").mean(),
                cost_usd_before=pl.col("cost_usd_before").mean(),
                cost_usd_after=pl.col("cost_usd_after").mean(),
            )
            .select(pl.lit(by).alias("by"), pl.all())
            .sort("n", "name", descending=[True, False])
        )
    return pl.concat(frames)


_NUMBERS = ("cost_usd_before", "cost_usd_after", "p_ok_before", "p_ok_after")


def moves_of(old: Decided, new: Decided) -> pl.DataFrame:
    """A row a request: from, to, moved, and what the new router expects of either model (of the one there is)."""
    at = np.arange(len(old.choice))
    names = np.array([*new.catalog.ids, _NOBODY])
    columns: dict[str, Any] = {
        "from": names[old.choice],  # -1 is the last
        "to": names[new.choice],
        "moved": old.choice != new.choice,
    }
    for name in ("cost_usd", "p_ok"):
        expected = np.where(np.isnan(getattr(new, name)), getattr(old, name), getattr(new, name))
        for when, choice in (("before", old.choice), ("after", new.choice)):
            columns[f"{name}_{when}"] = np.where(choice < 0, np.nan, expected[at, choice])
    return pl.DataFrame(columns).with_columns(pl.col(_NUMBERS).fill_nan(None))
