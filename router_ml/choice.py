"""The decision: hard constraints first, then the choice by total cost, by value, or the most probable within a budget.

Pure functions over numpy arrays on the catalogue's model axis; nothing here learns, logs or waits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router_ml.catalog import Catalog
from router_ml.costs import total_costs
from router_ml.policy import Policy
from router_ml.session import Incumbent, settle
from router_ml.types import FloatArray, RouteRequest

BoolArray = npt.NDArray[np.bool_]
_UP: Mapping[str, str] = {}
_ALL: BoolArray = np.ones(0, dtype=bool)
"""Stands for a mask that allows every model, so that the common case costs no vector operation."""


@dataclass(frozen=True)
class Constraints:
    """The catalogue's clearances as arrays [m], compiled once so that a request costs a few vector operations."""

    catalog: Catalog
    context_window: npt.NDArray[np.int64]
    capability: Mapping[str, BoolArray]
    data_class: Mapping[str, BoolArray]
    region: Mapping[str, BoolArray]
    key: Mapping[str, BoolArray]
    least_window: int
    every: BoolArray

    @classmethod
    def compile(cls, catalog: Catalog, policy: Policy) -> Constraints:
        """Builds the arrays. What no card lists has no entry, and is refused for every model."""

        def masks(values: Sequence[frozenset[str]]) -> dict[str, BoolArray]:
            names = sorted(frozenset().union(*values))
            return {name: mask([name in v for v in values]) for name in names}

        def mask(values: list[bool]) -> BoolArray:
            return _ALL if all(values) else np.array(values)

        return cls(
            catalog=catalog,
            context_window=np.array([c.context_window for c in catalog], dtype=np.int64),
            capability=masks([c.capabilities for c in catalog]),
            data_class=masks([c.data_classes for c in catalog]),
            region=masks([c.regions for c in catalog]),
            key={k: mask([c.id in models for c in catalog]) for k, models in policy.keys.items()},
            least_window=min(c.context_window for c in catalog),
            every=np.ones(len(catalog), dtype=bool),
        )

    def eligible(
        self,
        request: RouteRequest,
        policy: Policy,
        cost_usd: FloatArray,
        input_tokens: float,
        down: Mapping[str, str] = _UP,
    ) -> tuple[BoolArray, dict[str, str]]:
        """Which models may serve the request, bool [m], and why each of the others may not.

        `down` holds the models that do not answer just now, and why. Where no other may serve the request they are
        kept: a call that may fail is better than none.
        """
        mask = self.every
        excluded: dict[str, str] = {}

        def require(allowed: BoolArray | None, reason: str) -> None:
            nonlocal mask
            if allowed is None:
                allowed = np.zeros_like(mask)
            elif allowed is _ALL:
                return
            for i in np.flatnonzero(mask & ~allowed):
                excluded[self.catalog.ids[i]] = reason
            mask = mask & allowed

        if request.candidates is not None:
            wanted = set(request.candidates)
            require(np.array([model in wanted for model in self.catalog.ids]), "not among the request's candidates")
            for model in request.candidates:
                if model not in self.catalog:
                    excluded[model] = "not in the catalogue"
        if request.key is not None and request.key in self.key:
            require(self.key[request.key], "not on the key's allow-list")
        if request.allowed is not None:
            require(np.array([model in request.allowed for model in self.catalog.ids]), "not on the key's allow-list")
        data_class = policy.default_data_class if request.data_class is None else request.data_class
        require(self.data_class.get(data_class), f"not cleared for data class {data_class!r}")
        if request.region is not None:
            require(self.region.get(request.region), f"not in region {request.region!r}")
        for need in sorted(request.needs):
            require(self.capability.get(need), f"does not support {need}")
        tokens = math.ceil(input_tokens) + (request.max_tokens or 0)
        if tokens > self.least_window:
            require(self.context_window >= tokens, f"context window is smaller than the estimated {tokens} tokens")
        if request.max_cost_usd is not None:
            most = np.float64(request.max_cost_usd)  # a float would be rounded to float32, up as well as down
            require(cost_usd <= most, f"expected cost is above {request.max_cost_usd:g} USD")
        if down:
            up = mask & np.array([model not in down for model in self.catalog.ids])
            if up.any():
                excluded |= {self.catalog.ids[i]: down[self.catalog.ids[i]] for i in np.flatnonzero(mask & ~up)}
                mask = up
        return mask, excluded


@dataclass(frozen=True, slots=True)
class Choice:
    """What the policy chose: positions on the model axis, best first, and why.

    `total_cost_usd` is aligned with `order`: the expected total cost of an acceptable answer (`costs.total_costs`).
    """

    order: tuple[int, ...]
    propensity: float
    explored: bool
    meets_threshold: bool
    reason: str
    total_cost_usd: tuple[float, ...]


def choose(
    p_ok: FloatArray,
    cost_usd: FloatArray,
    eligible: BoolArray,
    min_probability: float,
    *,
    p_claim: FloatArray | None = None,
    failure: Sequence[float] | None = None,
    escalation_rate: float = 0.0,
    willingness_to_pay_usd: float | None = None,
    budget_usd: float | None = None,
    incumbent: Incumbent | None = None,
    pinned: int | None = None,
    default: int | None = None,
    unmet: str = "most-probable",
    exploration_rate: float = 0.0,
    explored: Sequence[int] | None = None,
    draw: tuple[float, float] = (1.0, 0.0),
) -> Choice:
    """Among the eligible candidates whose probability meets the dial, the one of the least expected total cost.

    Where none meets it: the most probable; or the default, where `unmet` says so. The total cost is that of
    `costs.total_costs`; without failures and at an `escalation_rate` of 0 it is the cost of the call.

    With a willingness to pay (USD that an acceptable answer is worth; RouterBench, arXiv 2403.12031) the choice among
    those that meet the dial is the largest of worth * P(success) - cost instead, P(success) = (1 - failure) * p_ok: the
    worth stands in the place of what escalation costs, which is not counted again. With a `budget_usd`, which
    `eligible` must have taken care of already, it is the most probable candidate, the cheaper of equals, and the dial
    only says whether that one meets it.

    The dial is held against `p_claim` [m], where the learner gives it: what it stands for, at most `p_ok`.

    A session's `incumbent` is left where it is not eligible, where others meet the dial and it does not, and where the
    choice is better by enough (`session.settle`). Costs are those with what is cached of the session's prompt.

    `p_ok` and `cost_usd` (of a call, its retries included) are float32 [m], `failure` is [m] or None for no failures,
    `eligible` is bool [m] with at least one True. A NaN probability never meets a dial, a NaN cost is the highest.
    `draw` holds two uniform numbers in [0, 1): the first decides whether to explore, the second where to.
    The propensity is (1 - rate) * [greedy] + rate / eligible, exact for every candidate; a pinned model has 1. With
    `explored`, positions of eligible models, the draw is among those alone, and so is the second term.
    """
    # Lists, not arrays: for a dozen candidates plain Python is several times faster than numpy.
    p, cost = p_ok.tolist(), [c if c == c else math.inf for c in cost_usd.tolist()]
    fails = [0.0] * len(p) if failure is None else failure
    at = [i for i, allowed in enumerate(eligible.tolist()) if allowed]
    size = len(at)
    if size < len(p):
        p, cost, fails = [p[i] for i in at], [cost[i] for i in at], [fails[i] for i in at]
    claim = p
    if p_claim is not None:
        every = p_claim.tolist()
        claim = [every[i] if v == v else v for i, v in zip(at, p, strict=True)]
    total = total_costs(p, cost, fails, escalation_rate)

    # What meets the dial comes first, by what it is chosen for; then the rest by probability, unknown ones last.
    if budget_usd is not None:
        meeting: list[tuple[float, float, int]] = []
    elif willingness_to_pay_usd is None:
        meeting = sorted([(total[i], -v, i) for i, v in enumerate(p) if claim[i] >= min_probability])
    else:
        worth = willingness_to_pay_usd
        meeting = sorted(
            [(cost[i] - worth * (1.0 - fails[i]) * v, -v, i) for i, v in enumerate(p) if claim[i] >= min_probability]
        )
    order = [i for _, _, i in meeting]
    if len(order) < size:
        rest = [i for i in range(size) if budget_usd is not None or not claim[i] >= min_probability]
        order += [i for _, _, i in sorted([(-p[i] if p[i] == p[i] else 1.0, cost[i], i) for i in rest])]

    greedy, fixed = order[0], False
    known = p[greedy] == p[greedy]  # an unknown probability comes first only where all are unknown
    if claim[greedy] >= min_probability or (budget_usd is not None and known):
        if budget_usd is not None:
            reason = f"most probable candidate within {budget_usd:g} USD"
        elif willingness_to_pay_usd is not None:
            reason = f"best value at {willingness_to_pay_usd:g} USD for an acceptable answer"
        else:
            after = ", escalation included" if escalation_rate > 0.0 else ""
            reason = f"cheapest candidate with probability at least {min_probability:g}{after}"
    else:
        reason = f"no candidate's claim reaches {min_probability:g}: the most probable"
        if (unmet == "default" or not known) and default is not None and eligible[default]:
            greedy, fixed = at.index(default), True
            reason = f"no candidate's claim reaches {min_probability:g}: the configured default"
        elif not known:
            greedy = min(range(size), key=cost.__getitem__)
            reason = "no estimate for any candidate and no default that is allowed: the cheapest"
    if incumbent is not None:
        loss: list[float] | None = None if budget_usd is not None else total
        if willingness_to_pay_usd is not None:
            loss = [c + willingness_to_pay_usd * (1.0 - (1.0 - f) * v) for c, f, v in zip(cost, fails, p, strict=True)]
        good = [i for _, _, i in meeting]
        greedy, reason = settle(
            incumbent, at, greedy, reason, min_probability=min_probability, p=p, loss=loss, meeting=good, fixed=fixed
        )
    first, explores = greedy, False
    if pinned is not None and eligible[pinned]:
        first, reason = at.index(pinned), "a rule pins this model"
        propensity = 1.0
    else:
        drawn: Sequence[int] = range(size) if explored is None else [at.index(i) for i in explored]
        if exploration_rate > 0.0 and draw[0] < exploration_rate:
            first, explores = drawn[min(int(draw[1] * len(drawn)), len(drawn) - 1)], True
            reason = "exploration: drawn uniformly from the eligible candidates"
            if explored is not None:
                reason = "exploration: drawn uniformly from the models of an experiment"
        propensity = (1.0 - exploration_rate) * (first == greedy) + exploration_rate / len(drawn) * (first in drawn)
    if order[0] != first:
        order = [first, *(i for i in order if i != first)]
    return Choice(
        tuple([at[i] for i in order]),
        propensity,
        explores,
        claim[first] >= min_probability,
        reason,
        tuple([total[i] for i in order]),
    )
