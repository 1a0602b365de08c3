"""What a router would choose at many settings of its dial: one estimate a request, then a few array operations each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.conversation import request_of_log_row
from router_ml.costs import HAIR, LEAST_SUCCESS, Reliability
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.quality import LearnedEstimator
from router_ml.router import Router
from router_ml.types import RouteRequest
from training.candidates import allowed_models

Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Kind = Literal["min_probability", "willingness_to_pay_usd"]
KINDS: tuple[Kind, ...] = ("min_probability", "willingness_to_pay_usd")


class Setting(NamedTuple):
    """One setting of one dial: a request's field of that name, and its value."""

    kind: Kind
    value: float


def sequence(kind: Kind) -> tuple[Setting, ...]:
    """The settings of a dial from the safest to the cheapest; the same for every log, so that no outcome enters.

    Least probabilities from 0.99 to 0 in steps of 0.01; worths from 10 USD an answer to a millionth, sixteen a decade.
    """
    if kind == "min_probability":
        return tuple(Setting(kind, round(0.01 * i, 2)) for i in range(99, -1, -1))
    return tuple(Setting(kind, float(f"{10 ** (1 - i / 16):.3g}")) for i in range(113))


@dataclass(frozen=True)
class Seen:
    """What a router sees of n requests: everything that its choice depends on but the dial, m models each.

    `p_ok`, `claim` and `cost` (USD of the call, retries included) are float64 [n, m], `eligible` is bool [n, m] with at
    least one True a row, `pinned` int64 [n] is a rule's model, or -1. The policy draws the share `rate` [n] evenly from
    `drawn`, bool [n, m]. A session's incumbent is not known: choices are
    those of a session's first request.
    """

    p_ok: Array
    claim: Array
    cost: Array
    eligible: BoolArray
    pinned: IntArray
    rate: Array
    drawn: BoolArray
    failure: Array
    policy: Policy
    default: int = -1

    def __len__(self) -> int:
        return len(self.p_ok)

    def take(self, rows: IntArray | BoolArray) -> Seen:
        """Some of the requests."""
        names = ("p_ok", "claim", "cost", "eligible", "pinned", "rate", "drawn")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})

    @property
    def total(self) -> Array:
        """`costs.total_costs` of every request, float64 [n, m]; NaN where the probability is not known."""
        cost = np.where(np.isnan(self.cost), np.inf, self.cost)
        p = np.where(self.eligible & np.isfinite(cost), self.p_ok, np.nan)
        unknown = np.isnan(p)
        strongest = np.max(np.where(unknown, -1.0, p), axis=1, keepdims=True)
        strong = ~unknown & (p >= strongest - HAIR)
        calls = cost / np.maximum((1.0 - self.failure) * self.p_ok, LEAST_SUCCESS)
        resort = np.min(np.where(strong, calls, np.inf), axis=1, keepdims=True)
        resort[~np.isfinite(resort)] = 0.0
        f, e = self.failure, self.policy.escalation_rate
        total: Array = cost + (f + (1.0 - f) * (1.0 - self.p_ok) * e) * resort
        return total

    def choices(self, setting: Setting, total: Array | None = None) -> IntArray:
        """Position of the model that `choice.choose` takes at this setting without exploring, int64 [n]."""
        cost = np.where(np.isnan(self.cost), np.inf, self.cost)
        known = self.eligible & ~np.isnan(self.p_ok)
        claim = np.where(known & ~np.isnan(self.claim), self.claim, np.where(known, self.p_ok, -np.inf))
        if setting.kind == "min_probability":
            meets, loss = claim >= setting.value, self.total if total is None else total
        else:
            meets = known & (claim >= 0.0)
            loss = cost - setting.value * (1.0 - self.failure) * self.p_ok
        p = np.where(known, self.p_ok, -np.inf)
        chosen = _least(np.where(meets, loss, np.inf), meets, -p)
        none = ~meets.any(axis=1)
        if none.any():
            probable = _least(np.where(known, -p, np.inf), known, cost)
            cheapest = _least(np.where(self.eligible, cost, np.inf), self.eligible, np.zeros_like(cost))
            blind = ~known.any(axis=1)
            otherwise = np.where(blind, cheapest, probable)
            if self.default >= 0:
                wanted = self.eligible[:, self.default] & (blind | (self.policy.unmet == "default"))
                otherwise = np.where(wanted, self.default, otherwise)
            chosen = np.where(none, otherwise, chosen)
        return np.where(self.pinned >= 0, self.pinned, chosen)


def _least(loss: Array, among: BoolArray, then: Array) -> IntArray:
    """Position of the least loss a row, of equals that of the least `then`, of those the first; int64 [n]."""
    best = among & (loss == np.min(loss, axis=1, keepdims=True))
    then = np.where(best, then, np.inf)
    position: IntArray = np.where(np.isfinite(then).any(axis=1), then.argmin(axis=1), best.argmax(axis=1))
    return position


def seen_of_log(
    router: Router, rows: pl.DataFrame, first: Mapping[str, datetime] | None = None
) -> tuple[Seen, BoolArray]:
    """What the router sees of a log's rows, which need a prompt or messages; and which rows some model may serve, [n].

    `Seen` has those rows only. A row's candidates, task, tenant and key hold as they did; of models that the log named
    only later (`first`, see `candidates.allowed_models`) its candidates say nothing. Raises InputError where no
    row has a text.
    """
    texts = ["prompt", "messages", "tools"]
    requests: list[RouteRequest] = []
    has_text = rows.select(pl.col("prompt").is_not_null() | pl.col("messages").is_not_null()).to_series().to_numpy()
    if not has_text.any():
        raise InputError("none of the rows has a prompt or messages: log prompts, or give the store with --store")
    may = allowed_models(rows, router.catalog.ids, first)
    for named, (prompt, messages, tools, task, tenant, key) in zip(
        may, rows.select(*texts, "task", "tenant", "key").iter_rows(), strict=True
    ):
        request = request_of_log_row(prompt, messages, tools)
        requests.append(replace(request, task=task, tenant=tenant, key=key, candidates=named))
    return seen_of_requests(router, requests, has_text)


def seen_of_requests(
    router: Router, requests: Sequence[RouteRequest], among: BoolArray | None = None
) -> tuple[Seen, BoolArray]:
    """The same from requests; those outside `among` [n] count as none that a model may serve."""
    estimator = router.estimator
    if isinstance(estimator, LearnedEstimator):
        estimates = estimator.estimate_many(requests)
    else:
        estimates = [estimator.estimate(request) for request in requests]
    m = len(router.catalog)
    p_ok, claim, cost = (np.full((len(requests), m), np.nan) for _ in range(3))
    eligible = np.zeros((len(requests), m), dtype=bool)
    asked = [(request.task, request.tenant) for request in requests]
    for i, (request, estimate) in enumerate(zip(requests, estimates, strict=True)):
        usd = router.expected_cost(request, estimate)
        p_ok[i], cost[i] = estimate.p_ok, usd
        claim[i] = estimate.p_ok if estimate.p_claim is None else estimate.p_claim
        eligible[i] = router.constraints.eligible(request, router.policy, usd, estimate.input_tokens)[0]
    if among is not None:
        eligible[~among] = False
    return _seen(router, p_ok, claim, cost, eligible, asked)


def seen_of_decisions(router: Router, decisions: Sequence[Mapping[str, Any]]) -> tuple[Seen, BoolArray]:
    """The same from stored decisions: what the bundle said then, without the prompts.

    Decisions of other bundles, and of a stand-in, are left out: their estimates are not this router's.
    """
    n, m = len(decisions), len(router.catalog)
    p_ok, claim, cost = (np.full((n, m), np.nan) for _ in range(3))
    eligible = np.zeros((n, m), dtype=bool)
    for i, row in enumerate(decisions):
        if row["model_version"] != router.model_version or row["degraded"]:
            continue
        for candidate in row["candidates"]:
            j = router.catalog.index.get(candidate["model"])
            if j is not None:
                eligible[i, j] = True
                for into, name in ((p_ok, "p_ok"), (claim, "p_claim"), (cost, "expected_cost_usd")):
                    value = candidate.get(name)
                    into[i, j] = np.nan if value is None else value
    return _seen(router, p_ok, claim, cost, eligible, [(row["task"], row["tenant"]) for row in decisions])


def _seen(
    router: Router,
    p_ok: Array,
    claim: Array,
    cost: Array,
    eligible: BoolArray,
    asked: Sequence[tuple[str | None, str | None]],
) -> tuple[Seen, BoolArray]:
    """`asked` holds each request's task and tenant, which rules and experiments go by."""
    served: BoolArray = np.asarray(eligible.any(axis=1))
    pinned, rate = np.full(len(served), -1), np.full(len(served), router.policy.exploration_rate)
    drawn, at = eligible.copy(), router.catalog.index
    special = router.policy.rules or router.policy.explore
    for i in map(int, np.flatnonzero(served if special else False)):
        task, tenant = asked[i]
        rule = next((r for r in router.policy.rules if r.task in (None, task) and r.tenant in (None, tenant)), None)
        if rule is not None and eligible[i, at[rule.model]]:
            pinned[i], rate[i] = at[rule.model], 0.0
            continue
        experiment = router.policy.exploration(task, tenant)
        if experiment is not None:
            among = [j for model in experiment.models if eligible[i, j := at[model]]]
            if len(among) > 1:
                rate[i], drawn[i] = experiment.rate, False
                drawn[i, among] = True
    known = router.reliability or Reliability.perfect(len(router.catalog))
    default = router.policy.default_model
    seen = Seen(
        p_ok, claim, cost, eligible, pinned, rate, drawn, np.array(known.failure), router.policy,
        -1 if default is None else at[default],
    )  # fmt: skip
    return seen.take(served), served
