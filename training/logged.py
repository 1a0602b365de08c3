"""What off-policy evaluation works on: the log's decisions as arrays, and what another policy would have done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from router_ml.canary import probability
from router_ml.catalog import Catalog
from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.router import Router
from router_ml.types import RouteRequest
from training.candidates import allowed_models
from training.dataset import FAILURES
from training.slices import context_of, slices_of

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Logged:
    """Decisions of a log, one row each, in its order: n rows, m models in the catalogue's order.

    `action`: the policy's choice as a position in the catalogue, also where a fallback served, int64 [n];
    `metrics`: what came of it by name, float64 [n], NaN where it is not known (quality without feedback);
    `propensity`: the probability with which the policy made that choice, NaN where it was not logged, float64 [n];
    `eligible`: what the policy could have chosen, bool [n, m]; `cluster`: rows of a cluster are not independent of
    each other, int64 [n]; `slices`: a frame of n rows; `context`: numbers that describe the request, float64 [n, k];
    `notes`: sentences on what had to be assumed; `certain`: where an outcome of a metric is known whoever gives
    feedback, bool [n] (a call that failed for good).
    """

    catalog: Catalog
    action: IntArray
    metrics: Mapping[str, Array]
    propensity: Array
    eligible: BoolArray
    cluster: IntArray
    time: pl.Series
    slices: pl.DataFrame
    context: Array
    notes: tuple[str, ...] = ()
    certain: Mapping[str, BoolArray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.action)

    def take(self, rows: npt.NDArray[Any]) -> Logged:
        """The decisions at these positions, or where this mask is true."""
        at = np.flatnonzero(rows) if rows.dtype == bool else rows
        return replace(
            self,
            action=self.action[at],
            metrics={name: values[at] for name, values in self.metrics.items()},
            propensity=self.propensity[at],
            eligible=self.eligible[at],
            cluster=self.cluster[at],
            time=self.time.gather(at),
            slices=self.slices[at],
            context=self.context[at],
            certain={name: known[at] for name, known in self.certain.items()},
        )


def one_row_a_request(log: pl.DataFrame) -> pl.DataFrame:
    """The log with one row a request; the same rows, in order, where each request has one already.

    A request that was sent to several models (their propensities are all 1) keeps one of them, drawn evenly by a hash
    of its id, with the propensity of that draw: what then is estimated holds for the request as for any other. Align
    target and predictions with the frame that this returns.
    """
    if not log["request_id"].is_duplicated().any():
        return log
    order = pl.struct("request_id", "model").hash(3)
    return (
        log.with_columns(propensity=pl.col("propensity") / pl.len().over("request_id"))
        .filter(order == order.min().over("request_id"))
        .unique("request_id", keep="first", maintain_order=True)
    )


def logged_of(
    log: pl.DataFrame,
    catalog: Catalog,
    *,
    cluster: str = "session",
    metrics: Sequence[str] = ("quality", "cost_usd"),
    failed_quality: float | None = 0.0,
) -> Logged:
    """The decisions of a log (`LOG_SCHEMA`, one row a request: see `one_row_a_request`) as arrays.

    `cluster` is the column whose values are taken to be independent of each other, "session" or "tenant"; a row
    without one stands alone. Rows that the log's column `cluster` puts together (what a canary drew as one) stay
    together, whatever else they have in common. `metrics` are columns of numbers. A call that failed for good has the
    quality `failed_quality` (None: not known), for its user got nothing; what a fallback answered counts for the
    policy's choice. Raises InputError for an empty log, several rows a request, a missing column, and a model that the
    catalogue does not list.
    """
    if log.is_empty():
        raise InputError("the log has no rows: there is nothing to evaluate a policy on")
    for name in (cluster, *metrics):
        if name not in log.columns:
            raise InputError(f"the log has no column {name!r}; it has {', '.join(log.columns)}")
    if log["request_id"].is_duplicated().any():
        raise InputError(
            "the log has several rows of one request: call training.logged.one_row_a_request on it first, and give "
            "that frame to whatever has to be aligned with it"
        )
    chosen = log.select(pl.coalesce("fallback_from", "model").alias("model")).to_series()
    if unknown := sorted(set(chosen.unique().to_list()) - set(catalog.ids)):
        raise InputError(f"the log's policy chose models that the catalogue does not list: {', '.join(unknown)}")
    action = chosen.replace_strict(catalog.index, return_dtype=pl.Int64).to_numpy()
    eligible = _eligible(log, catalog)
    eligible[np.arange(len(log)), action] = True
    values, certain = {}, {}
    for name in metrics:
        column = pl.col(name).cast(pl.Float64)
        if name == "quality" and failed_quality is not None:
            failed = (column.is_null() & pl.col("status").is_in(FAILURES)).fill_null(False)
            certain[name] = log.select(failed).to_series().to_numpy().copy()
            column = pl.when(failed).then(failed_quality).otherwise(column)
        values[name] = log.select(column.fill_null(np.nan)).to_series().to_numpy().copy()
    slices = slices_of(log)
    tokens = log["input_tokens"].cast(pl.Float64).fill_null(np.nan).to_numpy()
    return Logged(
        catalog,
        action.copy(),
        values,
        log["propensity"].cast(pl.Float64).fill_null(np.nan).to_numpy().copy(),
        eligible,
        _clusters(log, cluster),
        log["time"],
        slices,
        context_of(slices, tokens),
        certain=certain,
    )


def _clusters(log: pl.DataFrame, column: str) -> IntArray:
    """Numbers of the groups that rows form by sharing a value of `column`, or of the log's own `cluster`; int64 [n]."""
    n = len(log)
    names = [column, *(["cluster"] if "cluster" in log.columns and column != "cluster" else [])]
    at, to, nodes = [], [], n
    for name in names:
        known = log.select(pl.col(name).is_not_null()).to_series().to_numpy()
        code = log[name].rank("dense").fill_null(0).to_numpy().astype(np.int64)
        at.append(np.flatnonzero(known))
        to.append(nodes + code[known])
        nodes += int(code.max(initial=0)) + 1
    one, other = np.concatenate(at), np.concatenate(to)
    edges = csr_array((np.ones(len(one), dtype=np.int8), (one, other)), shape=(nodes, nodes))
    _, group = connected_components(edges, directed=False)
    _, found = np.unique(group[:n], return_inverse=True)
    return found.astype(np.int64)


def _eligible(log: pl.DataFrame, catalog: Catalog) -> BoolArray:
    """What each row's `candidates` allow; all models where the log does not say; bool [n, m]."""
    lists = log["candidates"]
    columns = [lists.list.contains(model).fill_null(True).to_numpy() for model in catalog.ids]
    return np.stack(columns, axis=1).astype(bool)


def requests_of(
    log: pl.DataFrame,
    models: Sequence[str] | None = None,
    first: Mapping[str, datetime] | None = None,
    **dial: Any,
) -> list[RouteRequest]:
    """The requests of a log's rows with what the log knows of each; `dial` sets further fields (`tier="premium"`).

    `models` are those of the router that they are for, and `first` when the log first named each
    (`candidates.allowed_models`); without, a row's candidates are
    taken as they are. A column `tier` of the log is taken, where there is one. Rows without a prompt are requests
    without text.
    """
    names = ["tenant", "key", "task", *(["tier"] if "tier" in log.columns and "tier" not in dial else [])]
    may: Any = log["candidates"] if models is None else allowed_models(log, models, first)
    made = []
    for candidates, (prompt, messages, tools, *rest) in zip(
        may, log.select("prompt", "messages", "tools", *names).iter_rows(), strict=True
    ):
        known = dict(zip(names, rest, strict=True)) | {"candidates": candidates} | dial
        if known["candidates"] is not None:
            known["candidates"] = tuple(known["candidates"])
        made.append(replace(request_of_log_row(prompt, messages, tools), **known))
    return made


@dataclass(frozen=True, eq=False)
class Decided:
    """What a router would do with a log's rows, and what it expects: n rows, m models of `catalog`.

    `target`: probability of each model, exploration included; a request that the policy may not serve by any model has
    a row of zeros, which counts as unsupported. `choice`: position of the model without exploration, -1 where there is
    none, int64 [n]. `eligible`: what it might have chosen, bool [n, m]. `p_ok` and `cost_usd`: what it expects of every
    model, NaN of one that it does not know.
    """

    catalog: Catalog
    target: Array
    choice: IntArray
    eligible: BoolArray
    p_ok: Array
    cost_usd: Array

    @property
    def predictions(self) -> dict[str, Array]:
        """What sharpens the model of outcomes inside the estimators, by metric."""
        return {"quality": self.p_ok, "cost_usd": self.cost_usd}


def decided(
    router: Router,
    log: pl.DataFrame,
    catalog: Catalog | None = None,
    first: Mapping[str, datetime] | None = None,
    **dial: Any,
) -> Decided:
    """Routes every row of the log; `first` as in `requests_of`, `dial` sets fields of requests (`tier="premium"`).

    `catalog` (default: the router's) sets the model axis; it has to be that of the `Logged`. Each request is routed by
    itself, as a session's first one would be: what a session's model is depends on the policy itself, so a log of
    another one does not know. Raises InputError where the router chooses a model that the catalogue does not list.
    """
    catalog = router.catalog if catalog is None else catalog
    greedy = replace(router, draw=lambda: 1.0)  # never below an exploration rate
    shape = len(log), len(catalog)
    target, p_ok, cost = np.zeros(shape), np.full(shape, np.nan), np.full(shape, np.nan)
    choice, eligible = np.full(len(log), -1), np.zeros(shape, dtype=bool)
    known = [model for model in router.catalog.ids if model in catalog]
    here = [catalog.index[model] for model in known]
    there = [router.catalog.index[model] for model in known]
    for row, request in enumerate(requests_of(log, router.catalog.ids, first, **dial)):
        try:
            decision, estimate = greedy.decide_with_estimate(request)
        except NoEligibleModelError:
            estimate = router.estimator.estimate(request)
        else:
            for model in (candidate.model for candidate in decision.candidates):
                share = probability(decision, model)
                if model in catalog:
                    target[row, catalog.index[model]] = share
                    eligible[row, catalog.index[model]] = True
                elif share > 0.0:
                    raise InputError(f"the router may choose {model!r}, which the catalogue does not list")
            choice[row] = catalog.index[decision.model]
        p_ok[row, here] = estimate.p_ok[there]
        cost[row, here] = router.expected_cost(request, estimate)[there]
    return Decided(catalog, target, choice, eligible, p_ok, cost)


def target_of(router: Router, log: pl.DataFrame, catalog: Catalog | None = None, **dial: Any) -> Array:
    """Probability of each model under the router's policy per row of the log, float64 [n, m]; see `decided`."""
    return decided(router, log, catalog, None, **dial).target


def predictions_of(router: Router, log: pl.DataFrame, catalog: Catalog | None = None, **dial: Any) -> dict[str, Array]:
    """What the router expects of every model per row of the log, by metric: "quality" and "cost_usd", float64 [n, m].

    NaN for a model that it does not know. They sharpen the model of outcomes inside the estimators. The rows must not
    be those that the router was trained on: it would seem to know them better than it knows new ones.
    """
    return decided(router, log, catalog, None, **dial).predictions
