"""Requests of a log as a tuned or compared router needs them: what it sees of each, and what the log knows of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import polars as pl

from router_ml.errors import InputError
from router_ml.router import Router
from training.dataset import FAILURES
from training.dials import Array, BoolArray, IntArray, Seen, seen_of_decisions, seen_of_log


@dataclass(frozen=True)
class Judged:
    """What became of n requests that a router sees as `seen`, for models [m].

    `quality` float64 [n, m] is NaN where nothing is known. `propensity` [n] is the probability with which the log's
    policy took its `action` [n] (-1: a model that the router does not have), 1 where the request was sent to every
    eligible model (`full` [n]). `unit` [n] are the sessions, whose requests are not independent of each other.
    """

    seen: Seen
    quality: Array
    action: IntArray
    propensity: Array
    full: BoolArray
    unit: IntArray

    def __len__(self) -> int:
        return len(self.action)

    def take(self, rows: IntArray | BoolArray) -> Judged:
        """Some of the requests; one that is taken twice becomes two units."""
        names = ("quality", "action", "propensity", "full", "unit")
        return replace(self, seen=self.seen.take(rows), **{name: getattr(self, name)[rows] for name in names})

    @property
    def randomised(self) -> BoolArray:
        """Requests of which the log can tell what another model would have done, or that had no other; bool [n]."""
        alone = self.seen.eligible.sum(axis=1) == 1
        return np.asarray(self.full | (self.propensity < 1.0) | alone)

    @property
    def told(self) -> BoolArray:
        """Requests of whose answers at least one has a quality, bool [n]."""
        return np.asarray((~np.isnan(self.quality)).any(axis=1))


def judged_of(router: Router, rows: pl.DataFrame, first: Mapping[str, datetime] | None = None) -> Judged:
    """A log's rows, each with what the router sees of it and what the log knows; needs prompts. `first`: `seen_of_log`.

    Rows of one request_id whose propensities are 1 are one request that was sent to all of these models. After a
    fallback the action is the policy's choice, and the quality that of the answer which came in the end; a call that
    failed for good has the quality 0.
    """
    each = rows.group_by("request_id", maintain_order=True).agg(pl.all().first(), sent=pl.len())
    seen, served = seen_of_log(router, each, first)
    return judge(router, seen, each.filter(pl.Series(served)), rows)


def judged_of_decisions(router: Router, decisions: Sequence[Mapping[str, Any]], rows: pl.DataFrame) -> Judged:
    """The same from a store's decisions and its rows of the log, without prompts. Raises InputError where none is new.

    The bundle has made these decisions itself, so it has not learnt from them.
    """
    seen, served = seen_of_decisions(router, decisions)
    if not len(seen):
        raise InputError(
            f"the store has no decision of bundle {router.model_version}: give the bundle that served, or --logs"
        )
    kept = [row["decision_id"] for row, ok in zip(decisions, served, strict=True) if ok]
    first = pl.DataFrame({"request_id": kept}).join(rows, on="request_id", how="left", maintain_order="left")
    return judge(router, seen, first, rows)


def judge(router: Router, seen: Seen, first: pl.DataFrame, rows: pl.DataFrame) -> Judged:
    """Puts what the log knows (`rows`) beside what the router sees of the requests `first`, in their order."""
    index = {identity: i for i, identity in enumerate(first["request_id"])}
    quality = np.full(seen.p_ok.shape, np.nan)
    action = np.full(len(seen), -1, dtype=np.int64)
    propensity = np.full(len(seen), np.nan)
    sent = np.zeros(seen.p_ok.shape, dtype=bool)
    chosen = pl.coalesce("fallback_from", "model")
    failed = pl.when(pl.col("status").is_in(FAILURES)).then(0.0)
    columns = rows.select("request_id", chosen, "propensity", pl.coalesce("quality", failed))
    for identity, model, p, value in columns.iter_rows():
        i, j = index.get(identity), router.catalog.index.get(model, -1)
        if i is None:
            continue
        propensity[i], action[i] = np.nan if p is None else p, j
        if j >= 0:
            sent[i, j] = True
            quality[i, j] = np.nan if value is None else value
    session = first["session"].to_list()
    _, unit = np.unique([f"r{i}" if s is None else f"s{s}" for i, s in enumerate(session)], return_inverse=True)
    full = (sent | ~seen.eligible).all(axis=1) & (sent.sum(axis=1) > 1)
    return Judged(seen, quality, action, propensity, full, unit.astype(np.int64))
