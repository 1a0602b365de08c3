"""One decision where there is a challenger: whose is served, with which propensity, and what the other would choose."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from router_ml.canary import Assignment, assign, mixture
from router_ml.errors import NoEligibleModelError
from router_ml.session import Session
from router_ml.types import Estimate, RouteDecision, RouteRequest
from serving.challenger import Arms
from serving.embedding import Stand
from serving.live import Live
from serving.schemas import RouteBody
from serving.shadow import Scored, Shadow

if TYPE_CHECKING:
    from serving.service import Service


class Served(NamedTuple):
    """What is answered, and the bundle that decided it. `other` is the other bundle's decision, where it was needed.

    `later` says that the challenger is to be scored after the answer.
    """

    live: Live
    decision: RouteDecision
    estimate: Estimate
    other: RouteDecision | None = None
    later: bool = False


class Asked(NamedTuple):
    """A request with what the service knows of it; `stand` and `started` as `Service.decide` takes them."""

    request: RouteRequest
    headers: Mapping[str, str]
    session: Session | None
    stand: Stand | None
    started: float | None


async def decide(
    service: Service, shadow: Shadow, arms: Arms, body: RouteBody, asked: Asked, *, record: bool
) -> Served:
    """Decides, and keeps what is kept where it is to be recorded. Raises what the champion raises."""
    down = service.down(arms.challenger)
    served = await _served(service, shadow, arms, asked, down, record=record)
    if record:
        service.record(served.live, body, asked.request, served.decision, served.estimate)
        if served.other is not None:
            shadow.keep("challenger" if served.live is arms.champion else "champion", served.decision, served.other)
        elif served.later:
            shadow.add(arms, asked.request, asked.session, down, served.decision)
    return served


async def _served(
    service: Service, shadow: Shadow, arms: Arms, asked: Asked, down: Mapping[str, str], *, record: bool
) -> Served:
    policy = arms.champion.router.policy.canary
    if not policy.share:
        return _champion(service, arms, asked, record=record)._replace(later=True)
    request, session = asked.request, asked.session
    assigned = assign(policy, arms.challenger.router.model_version, request, random.random())
    # Within a unit of several requests a session's model tells of the arm, which is no longer random then: the arm is
    # part of the context, as the model is.
    within = assigned.unit != "request" and (session is not None or request.previous_model is not None)
    if within and not assigned.challenger:
        return _noted(service, shadow, arms, asked, assigned, record=record)._replace(later=True)
    why, scored = "resting", None
    if not shadow.challenger.resting:
        router = arms.challenger.router if assigned.challenger else arms.quiet_challenger
        embed_seconds = service.settings.embed_deadline_ms / 1000.0
        made = await shadow.decide(arms.challenger, router, request, session, down, embed_seconds)
        why, scored = (made, None) if isinstance(made, str) else ("", made)
    if scored is None:  # in either arm where both are asked, so that it depends on the request and not on the draw
        served = _champion(service, arms, asked, record=record)
        if record:
            shadow.instead[why] += 1
        if within:  # the champion's arm has not asked: the request counts in its own arm, whoever serves it
            own = served.decision.propensity
            return served._replace(decision=replace(served.decision, arm=assigned.arm(own)))
        return served
    if not assigned.challenger:
        return _noted(service, shadow, arms, asked, assigned, scored, record=record)
    return _challenger(service, shadow, arms, asked, assigned, scored, within=within, record=record)


def _champion(service: Service, arms: Arms, asked: Asked, *, record: bool) -> Served:
    live, stand = arms.champion, asked.stand
    if record:
        made = service.decide(live, asked.request, asked.headers, asked.session, stand, asked.started)
    else:
        estimator = None if stand is None else stand.estimator
        down = service.down(live)
        made = live.router.decide_with_estimate(asked.request, down, asked.session, estimator=estimator)
    return Served(live, *made)


def _noted(
    service: Service,
    shadow: Shadow,
    arms: Arms,
    asked: Asked,
    assigned: Assignment,
    scored: Scored | None = None,
    *,
    record: bool,
) -> Served:
    """The champion's decision in its arm; `scored` is what the challenger prefers, where the arm was random."""
    live, own, estimate, *_ = _champion(service, arms, asked, record=record)
    if record:
        shadow.canary["champion"] += 1
    other = None if scored is None else scored.decision
    over_the_draw = own.propensity if other is None else mixture(assigned, own, other)
    decision = replace(own, propensity=over_the_draw, arm=assigned.arm(own.propensity))
    return Served(live, decision, estimate, other)


def _challenger(
    service: Service,
    shadow: Shadow,
    arms: Arms,
    asked: Asked,
    assigned: Assignment,
    scored: Scored,
    *,
    within: bool,
    record: bool,
) -> Served:
    """The challenger's decision in its arm. A request that the champion refuses is refused."""
    champion, stand, request = arms.champion, asked.stand, asked.request
    estimator = None if stand is None else stand.estimator
    down = service.down(champion)
    try:
        other, _ = arms.quiet_champion.decide_with_estimate(request, down, asked.session, estimator=estimator)
    except NoEligibleModelError:
        return _champion(service, arms, asked, record=record)  # which counts the refusal
    own = scored.decision
    over_the_draw = own.propensity if within else mixture(assigned, own, other)
    decision = replace(own, propensity=over_the_draw, arm=assigned.arm(own.propensity))
    if record:
        shadow.canary["challenger"] += 1
        if scored.late is not None:
            service.metrics.degraded(scored.late)
        service.decided(arms.challenger, champion, request, asked.headers, decision, *scored.took, scored.began)
    return Served(arms.challenger, decision, scored.estimate, other)
