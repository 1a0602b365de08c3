"""The product in one file: a request comes in, the learner estimates, the policy decides."""

from __future__ import annotations

import math
import os
import random
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np

from router_ml.budget import pressed
from router_ml.catalog import Catalog
from router_ml.choice import BoolArray, Constraints, choose
from router_ml.costs import Reliability, most_input_tokens
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.policy import Policy, check_threshold
from router_ml.session import Incumbent, Session, cached_shares, follow_up, session_of
from router_ml.types import Candidate, Estimate, FloatArray, ModelCard, RouteDecision, RouteRequest

_UP: Mapping[str, str] = {}


class Estimator(Protocol):
    """The learner as the router sees it.

    It may have `thresholds`, a tuple of the quality thresholds that it was trained for: what `p_ok` is the probability
    of then follows the request's `quality_threshold`, None being the router's own.
    """

    def estimate(self, request: RouteRequest) -> Estimate:
        """Probabilities and tokens per model for one request."""
        ...


class _Calls(NamedTuple):
    """Calls of each model with their retries: USD per token, float32 [m], and the failure rates [m]."""

    input_price: FloatArray
    output_price: FloatArray
    cache_discount: FloatArray
    failure: tuple[float, ...]
    most: tuple[tuple[float, float, float, int], ...]
    """For each model: USD per token of input and of output without retries, longest answer, context window."""


@dataclass(frozen=True)
class Router:
    """An immutable router: one catalogue, one learner, one policy. A new version is a new object, swapped whole.

    `reliability` is how calls of each model went in the log (None: all at the first attempt); `quality_threshold` is
    the one that requests have which name none (None: not known). `twin` is a learner of the same log that answers in
    microseconds, for a service whose own learner is late (None: there is none).
    """

    catalog: Catalog
    estimator: Estimator
    policy: Policy
    model_version: str
    draw: Callable[[], float] = random.random
    reliability: Reliability | None = None
    quality_threshold: float | None = None
    twin: Estimator | None = None

    @cached_property
    def constraints(self) -> Constraints:
        """The catalogue's clearances, compiled once."""
        return Constraints.compile(self.catalog, self.policy.check_models(self.catalog))

    def with_policy(self, policy: Policy) -> Router:
        """The same learner under another policy.

        Raises InputError when that names a model not in the catalogue, or a quality threshold that was not trained.
        """
        return replace(self, policy=policy.check_models(self.catalog).check_thresholds(self.thresholds))

    @cached_property
    def thresholds(self) -> tuple[float, ...]:
        """The quality thresholds that a request may ask for."""
        own = () if self.quality_threshold is None else (self.quality_threshold,)
        return getattr(self.estimator, "thresholds", None) or own

    @cached_property
    def _calls_by_length(self) -> tuple[_Calls, ...]:
        """What calls cost up to the first of the catalogue's `price_steps`, up to the next, and so on."""
        known = self.reliability or Reliability.perfect(len(self.catalog))
        attempts = np.array(known.attempts, dtype=np.float32)
        return tuple(
            _Calls(
                of.input_price * attempts,
                of.output_price * attempts,
                of.cache_discount * attempts,
                known.failure,
                tuple(_most(card) for card in of),
            )
            for of in (self.catalog.priced_at(tokens) for tokens in (*self.catalog.price_steps, math.inf))
        )

    def _calls(self, input_tokens: float) -> _Calls:
        return self._calls_by_length[bisect_left(self.catalog.price_steps, input_tokens)]

    def decide(self, request: RouteRequest) -> RouteDecision:
        """Routes one request. Raises what `decide_with_estimate` does."""
        return self.decide_with_estimate(request)[0]

    def decide_with_estimate(
        self,
        request: RouteRequest,
        down: Mapping[str, str] = _UP,
        session: Session | None = None,
        *,
        estimator: Estimator | None = None,
        estimated: Callable[[], object] | None = None,
    ) -> tuple[RouteDecision, Estimate]:
        """Routes one request, and hands out the estimate behind the decision: what explains it.

        `down` holds the models that do not answer just now, and why: they are excluded while another may serve.
        `session` is what the caller knows of the request's session, None for its first request. `estimator` estimates
        in the learner's place: the rest of it, where the request was embedded elsewhere, or the `twin`, which the
        decision then names. `estimated` is called between the estimate and the choice, by who measures the two.

        Raises NoEligibleModelError when the hard constraints leave no model, InputError when the dial or a limit is
        not valid.
        """
        policy = self.policy
        for name in ("max_tokens", "max_cost_usd", "willingness_to_pay_usd"):
            limit = getattr(request, name)
            if limit is not None and not 0 <= limit < 2**53:
                raise InputError(f"{name} has to be a number of 0 or more")
        dial = policy.dial(request)
        min_probability, threshold = dial.min_probability, dial.quality_threshold
        if threshold is not None:
            check_threshold(threshold, self.thresholds)
        if threshold != request.quality_threshold or dial.max_cost_usd != request.max_cost_usd:  # the tier's
            request = replace(request, quality_threshold=threshold, max_cost_usd=dial.max_cost_usd)
        estimate = (estimator or self.estimator).estimate(request)
        if estimated is not None:
            estimated()
        cost = self.expected_cost(request, estimate)
        session, cached = session_of(request, session), None
        if session is not None:
            cached = self._cached_tokens(request, session, estimate)
            saved = cached * self._calls(estimate.input_tokens).cache_discount
            cost = np.maximum(cost - saved, np.float32(0.0))
        eligible, excluded = self.constraints.eligible(request, policy, cost, estimate.input_tokens, down)
        if eligible is not self.constraints.every and not eligible.any():
            raise NoEligibleModelError(
                "no model satisfies the request's constraints: relax one of them, or clear a model for it", excluded
            )
        rate, explored = policy.exploration_rate, None
        if policy.explore:
            rate, explored = self.exploration(request, eligible)
        explore = rate > 0.0 and (session is None or policy.session.explore)
        incumbent, known = None, -1
        if session is not None:
            known = self.catalog.index.get(session.model, -1)
            why = excluded.get(session.model, "not in the catalogue")
            at = known if known >= 0 and eligible[known] else None
            incumbent = Incumbent(
                session.model, at, why, self.catalog.ids, saved.tolist(), policy.session.min_gain, follow_up(request)
            )
        worth, pressure = request.willingness_to_pay_usd, request.pressure
        if worth is not None and pressure is not None:
            worth *= 1.0 - pressure.moved
        choice = choose(
            estimate.p_ok,
            cost,
            eligible,
            min_probability,
            p_claim=estimate.p_claim,
            failure=self._calls_by_length[0].failure,
            escalation_rate=policy.escalation_rate,
            budget_usd=dial.max_cost_usd if dial.objective == "quality" else None,
            willingness_to_pay_usd=worth,
            incumbent=incumbent,
            pinned=self._pinned(request) if policy.rules else None,
            default=self.catalog.index[policy.default_model] if policy.default_model else None,
            unmet=policy.unmet,
            exploration_rate=rate if explore else 0.0,
            explored=explored,
            draw=(self.draw(), self.draw()) if explore else (1.0, 0.0),
        )
        ids, p_ok, costs = self.catalog.ids, estimate.p_ok.tolist(), cost.tolist()
        if estimate.p_claim is None or estimate.p_low is None or estimate.p_high is None:
            bounds = [(math.nan, math.nan, math.nan)] * len(ids)
        else:
            bounds = list(
                zip(estimate.p_low.tolist(), estimate.p_high.tolist(), estimate.p_claim.tolist(), strict=True)
            )
        decision = RouteDecision(
            decision_id=new_id(),
            model=ids[choice.order[0]],
            candidates=tuple(
                [
                    Candidate(ids[i], p_ok[i], costs[i], t, *bounds[i])
                    for i, t in zip(choice.order, choice.total_cost_usd, strict=True)
                ]
            ),
            excluded=excluded,
            propensity=choice.propensity,
            explored=choice.explored,
            drawn=None if explored is None else tuple([ids[i] for i in explored]),
            meets_threshold=choice.meets_threshold,
            min_probability=min_probability,
            reason=choice.reason if pressure is None else f"{choice.reason}; {pressed(pressure, min_probability)}",
            model_version=self.model_version,
            policy_version=policy.version,
            quality_threshold=self.quality_threshold if threshold is None else threshold,
            data_class=policy.default_data_class if request.data_class is None else request.data_class,
            incumbent=None if session is None else session.model,
            stayed=None if session is None else choice.order[0] == known,
            cached_tokens=None if cached is None else float(cached[known]) if known >= 0 else 0.0,
            degraded=estimator is not None and estimator is self.twin,
            reserve_usd=self._reserve(request, choice.order[0], estimate.input_tokens),
        )
        return decision, estimate

    def _reserve(self, request: RouteRequest, model: int, input_tokens: float) -> float:
        """The most that the calls of one model may cost, USD."""
        prompt = max(input_tokens, most_input_tokens(request))
        into, out, longest, window = self._calls(prompt).most[model]
        answer = min(longest, window if request.max_tokens is None else request.max_tokens, window)
        prompt = min(prompt, window)
        if (over := prompt + answer - window) > 0:  # both have to be in the window: what is cheaper gives way
            prompt, answer = (prompt, answer - over) if into > out else (prompt - over, answer)
        return self.policy.max_attempts * (prompt * into + answer * out)

    def _cached_tokens(self, request: RouteRequest, session: Session, estimate: Estimate) -> FloatArray:
        """Tokens of the prompt that each model's cache is taken to hold, float32 [m]."""
        policy, cached = self.policy.session, np.zeros(len(self.catalog), dtype=np.float32)
        for model, share in cached_shares(request, session, policy.cache_seconds).items():
            tokens = share * estimate.input_tokens
            if model in self.catalog and tokens >= policy.cache_min_tokens:
                cached[self.catalog.index[model]] = tokens
        return cached

    def _pinned(self, request: RouteRequest) -> int | None:
        return next((self.catalog.index[rule.model] for rule in self.policy.rules if rule.matches(request)), None)

    def exploration(self, request: RouteRequest, eligible: BoolArray) -> tuple[float, list[int] | None]:
        """(share of such requests that is drawn, among which positions; None: all that are `eligible`, bool [m])."""
        experiment = self.policy.exploration(request.task, request.tenant)
        if experiment is not None:
            among = [i for model in experiment.models if eligible[i := self.catalog.index[model]]]
            if len(among) > 1:
                return experiment.rate, among
        return self.policy.exploration_rate, None

    def expected_cost(self, request: RouteRequest, estimate: Estimate) -> FloatArray:
        """Expected cost of one call per model in USD, its retries included, float32 [m].

        Every attempt counts as a whole one, and nothing as cached. A request's `max_tokens` caps the output. An input
        that is longer than a step of a model's `long_context` has that step's prices.
        """
        output = estimate.output_tokens
        if request.max_tokens is not None:
            output = np.minimum(output, np.float32(request.max_tokens))
        calls = self._calls(estimate.input_tokens)
        return np.float32(estimate.input_tokens) * calls.input_price + output * calls.output_price


def _most(card: ModelCard) -> tuple[float, float, float, int]:
    dearest = max(card.output_usd_per_mtok, card.reasoning_usd_per_mtok or 0.0)
    longest = math.inf if card.max_output_tokens is None else float(card.max_output_tokens)
    return card.input_usd_per_mtok * 1e-6, dearest * 1e-6, longest, card.context_window


def new_id() -> str:
    """A decision id of 32 hex digits that sorts by time (the layout of UUID version 7, without its dashes)."""
    return f"{time.time_ns() // 1_000_000:012x}7{os.urandom(10).hex()[1:]}"
