"""What the endpoints work with, and one decision from body to answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from router_ml.errors import InputError, NoEligibleModelError, RegistryError
from router_ml.policy import Policy
from router_ml.session import Session
from router_ml.store import Store
from router_ml.types import CACHED, CandidateFeatures, Estimate, Outcome, RouteDecision, RouteRequest
from serving.capacity import Capacity
from serving.console.releasing import Releases
from serving.console.tradeoff_file import TradeOffFile
from serving.embedding import Stand
from serving.follower import Follower
from serving.health import FAILED, Health
from serving.keys import ApiKeys
from serving.live import Live, LiveRouter
from serving.metrics import Metrics, tier_of
from serving.problems import ProblemError
from serving.schemas import SCHEMA_VERSION, RouteAnswer, RouteBody
from serving.sessions import Sessions, StoredSessions, is_behind
from serving.settings import Settings
from serving.shadow import Shadow
from serving.shared import Shared

if TYPE_CHECKING:
    from serving.tracing import Tracing

_ROUTED = 50_000
_EXPLANATIONS_WAITING = 30
_BATCHES, _BATCHES_WAITING = 2, 30
"""Batches at a time, since single requests wait for one decision of each, and how many may wait for their turn."""
REGISTRY_SECONDS = 60.0  # that a caller waits for what the registry says


@dataclass
class Service:
    """The parts of a running service; `app.state.service`."""

    settings: Settings
    keys: ApiKeys
    live: LiveRouter
    store: Store
    metrics: Metrics
    health: Health
    shared: Shared
    sessions: Sessions
    stored_sessions: StoredSessions
    releases: Releases
    routed: OrderedDict[str, tuple[tuple[str, ...], str | None]] = field(default_factory=OrderedDict)
    """The latest decisions whose outcome is awaited, by id: their models in order, and the name of the key that asked.

    Not the decisions themselves: 50,000 of them would take some 200 MB.
    """
    tracing: Tracing | None = None
    """None unless it is configured."""
    follower: Follower | None = None
    """What follows a registry's alias, where one is followed."""
    shadow: Shadow | None = None
    """What scores requests with a challenger, where there may be one."""
    tradeoff: TradeOffFile = field(default_factory=lambda: TradeOffFile(None))
    capacity: Capacity = field(default_factory=Capacity)
    draining: bool = False
    _batches: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_BATCHES))
    _batches_waiting: int = 0
    _explainers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(2, "explain"))
    _explaining: int = 0

    def note(self, live: Live, who: str) -> None:
        """Notes for the audit log what is served from now on; the log leaves out what has not changed."""
        router = live.router
        models = router.catalog.to_json()["models"]
        self.store.note_change("model", who, {"model_version": router.model_version, "models": models})
        if self.settings.policy is not None or self.shared.policy is None:  # a stored one was noted with who put it
            self.store.note_change("policy", who, {"version": router.policy.version, "policy": router.policy.to_json()})
        self.store.note_change("keys", who, {key.name: key.described() for key in self.settings.api_keys.values()})

    def note_challenger(self, live: Live, who: str) -> None:
        """Notes what a canary may be served by from now on: residency is proven against its cards, too."""
        models = live.router.catalog.to_json()["models"]
        after = {"model_version": live.router.model_version, "models": models}
        self.store.note_change("challenger", who, after)

    @property
    def providers(self) -> Mapping[str, str]:
        """The provider of each model that may serve, the challenger's included."""
        served = self.live.live.providers
        challenger = None if self.shadow is None else self.shadow.challenger.live
        return served if challenger is None else {**challenger.providers, **served}

    def down(self, live: Live) -> Mapping[str, str]:
        """The models of `live` that are not to be asked just now, and why: those that fail, and those that are full."""
        down, full = self.health.down(live.providers), self.capacity.full(live.router.catalog)
        return {**full, **down} if full else down

    def degraded(self) -> list[str]:
        """The parts that do not work while routing goes on."""
        shared, embedding = self.shared, self.live.live.embedding
        wanted, served = (shared.policy or Policy()).version, self.live.live.router.policy.version
        stale = shared.policy_error is not None or wanted != served
        states = {
            "bundle": self.live.last_error is not None,
            "registry": self.follower is not None and self.follower.last_error is not None,
            "challenger": self.shadow is not None and self.shadow.challenger.degraded,
            "encoder": embedding is not None and not embedding.embedder.alive,
            "shared": not shared.current,
            "policy": stale and self.settings.policy is None,
        }
        return self.store.degraded + [name for name, bad in states.items() if bad]

    async def explained(
        self, live: Live, decision: RouteDecision, features: CandidateFeatures
    ) -> dict[str, Any] | None:
        """The decision explained, on threads that nothing else waits for; None where too many wait for theirs."""
        if self._explaining >= _EXPLANATIONS_WAITING:
            return None
        self._explaining += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._explainers, live.explain, decision, features)
        finally:
            self._explaining -= 1

    @contextlib.asynccontextmanager
    async def batch(self) -> AsyncIterator[None]:
        """A batch's turn. Raises ProblemError (503) when too many wait for theirs."""
        if self._batches_waiting >= _BATCHES_WAITING:
            raise ProblemError(
                503, "overloaded", "more batches wait than can be decided in time: send this one again",
                headers={"retry-after": "1"},
            )  # fmt: skip
        self._batches_waiting += 1
        try:
            await self._batches.acquire()
        finally:
            self._batches_waiting -= 1
        try:
            yield
        finally:
            self._batches.release()

    async def session(self, asked: RouteRequest) -> Session | None:
        """What is known of the request's session; the store is asked where the conversation tells of more."""
        if asked.session is None:
            return None
        known = self.sessions.get(asked)
        if asked.previous_model is None and is_behind(asked, known):
            return await self.stored_sessions.get(asked, known)
        return known

    async def reload(self, who: str) -> Live:
        """Loads bundle and policy again now for `who`; what a registry's alias points to, where one is followed.

        Raises BundleError, InputError or RegistryError; what was served before then still is.
        """
        if self.follower is not None:
            waited = asyncio.wait_for(asyncio.wrap_future(self.follower.ask()), REGISTRY_SECONDS)
            try:
                if await waited:  # the policy was read with it
                    return self.live.live
            except TimeoutError:
                raise RegistryError(
                    f"the registry has not answered for {REGISTRY_SECONDS:g} s: it is asked on, see /readyz"
                ) from None
        return await asyncio.to_thread(self.live.reload, None, who)

    def check_size(self, body: RouteBody) -> None:
        """Raises InputError for more messages or candidates than the settings allow."""
        settings = self.settings
        if body.messages is not None and len(body.messages) > settings.max_messages:
            raise InputError(
                f"'messages' may have {settings.max_messages:,} entries, and has {len(body.messages):,}: send the "
                "newest of them, or have max_messages raised"
            )
        if body.candidates is not None and len(body.candidates) > settings.max_candidates:
            raise InputError(
                f"'candidates' may have {settings.max_candidates:,} entries, and has {len(body.candidates):,}: name "
                "fewer, or none for all models, or have max_candidates raised"
            )

    def decide(
        self,
        live: Live,
        asked: RouteRequest,
        headers: Mapping[str, str],
        session: Session | None = None,
        stand: Stand | None = None,
        started: float | None = None,
    ) -> tuple[RouteDecision, Estimate]:
        """Decides, counts and traces; `headers` are the request's. Raises what `Router.decide` does.

        `stand` estimates where the request was embedded, or should have been; that began when the clock said `started`.
        """
        began = 0 if self.tracing is None else time.time_ns()
        clock = time.perf_counter
        marks = [clock() if started is None else started]
        try:
            decision, estimate = live.router.decide_with_estimate(
                asked,
                self.down(live),
                session,
                estimator=None if stand is None else stand.estimator,
                estimated=lambda: marks.append(clock()),
            )
        except NoEligibleModelError as error:
            self.metrics.refused(error.excluded)
            if self.tracing is not None:
                self.tracing.refused(headers, error, began)
            raise
        if stand is not None and stand.late is not None:
            self.metrics.degraded(stand.late)
        started, estimated = marks
        self.decided(live, live, asked, headers, decision, estimated - started, clock() - estimated, began)
        return decision, estimate

    def decided(
        self,
        live: Live,
        champion: Live,
        asked: RouteRequest,
        headers: Mapping[str, str],
        decision: RouteDecision,
        estimate_s: float,
        choose_s: float,
        began: int,
    ) -> None:
        """Counts and traces a decision of `live`, begun at a time in ns since 1970; its baseline is the champion's."""
        self.metrics.decided(asked, decision, champion.router, estimate_s, choose_s)
        if self.tracing is not None:
            tier = tier_of(asked, live.router.policy)
            self.tracing.decided(headers, asked, decision, live.providers[decision.model], tier, began)

    def record(
        self, live: Live, body: RouteBody, asked: RouteRequest, decision: RouteDecision, estimate: Estimate
    ) -> None:
        """Hands a decision to the store, with as much of the request as the settings say."""
        started = time.perf_counter()
        text: dict[str, str | None] = {}
        if self.settings.store_prompts == "text":
            text = {
                # Postgres cannot hold a NUL, and would lose the decision with it.
                "prompt": None if body.prompt is None else body.prompt.replace("\0", "\N{REPLACEMENT CHARACTER}"),
                "messages": json.dumps(body.messages) if body.messages is not None else None,
                "tools": json.dumps([*(body.tools or ()), *(body.functions or ())]) if asked.tools else None,
            }
        self.routed[decision.decision_id] = (tuple([c.model for c in decision.candidates]), asked.key)
        if len(self.routed) > _ROUTED:
            self.routed.popitem(last=False)
        self.sessions.decided(asked, decision.decision_id, decision.model)
        self.health.chosen(decision.model, live.providers[decision.model], decision.decision_id)
        catalog = live.router.catalog
        if decision.model in catalog.bounded:
            tokens = estimate.input_tokens + float(estimate.output_tokens[catalog.index[decision.model]])
            self.capacity.decided(catalog, decision.model, decision.decision_id, tokens)
        features = None if self.settings.store_prompts == "none" else estimate.features
        self.store.record(asked, decision, provider=live.providers[decision.model], features=features, **text)
        self.metrics.took("record", time.perf_counter() - started)

    def count(self, outcome: Outcome, key: str | None, headers: Mapping[str, str], *, called: bool) -> None:
        """Counts and traces an outcome that a key has sent; `called` unless it is feedback alone."""
        model = self.metrics.spend.reported(outcome, called=called, key=key)
        if self.tracing is not None:
            self.tracing.evaluated(headers, outcome, model)

    def observe(self, outcome_id: str, outcome: Outcome, key: str | None, *, call: bool) -> None:
        """Takes a stored outcome's word for how the models answer: a decision's first, from the key that asked for it.

        `call` says whether it speaks of the call: feedback on the answer does not. Where the decision is another
        process's, the word counts when it has been looked up.
        """
        of = outcome.decision_id or ""
        models, asked = self.routed.get(of, ((), None))
        if not models:
            self.shared.look_up(outcome_id, outcome, key, call=call)
        elif call and asked == key:
            del self.routed[of]
            self.capacity.ended(of)
            self.heard(outcome, models)

    def heard(self, outcome: Outcome, models: tuple[str, ...]) -> None:
        """Counts how the call of a decision for `models` ended.

        Where another of its candidates served than the chosen one, the chosen one has failed.
        """
        of = outcome.decision_id or ""
        providers, chosen = self.providers, models[0]
        served = outcome.served_model or chosen
        if outcome.status in FAILED or served in models:
            self.sessions.served(of, None if outcome.status in FAILED else served)
        if outcome.status not in ("cancelled", CACHED) and served in providers and served in models:
            self.health.report(served, providers[served], failed=outcome.status in FAILED, decision_id=of)
            if served != chosen and chosen in providers:
                self.health.report(chosen, providers[chosen], failed=True, decision_id=of)


def answer_of(live: Live, asked: RouteRequest, decision: RouteDecision) -> RouteAnswer:
    """A decision as the service answers it."""
    providers, chosen = live.providers, decision.candidates[0]
    answer: RouteAnswer = {
        "schema_version": SCHEMA_VERSION,
        "decision_id": decision.decision_id,
        "request_id": asked.request_id,
        "model": decision.model,
        "provider": providers[decision.model],
        "p_ok": chosen.p_ok,
        "expected_cost_usd": chosen.expected_cost_usd,
        "expected_total_cost_usd": chosen.expected_total_cost_usd,
        "p_low": chosen.p_low,
        "p_high": chosen.p_high,
        "p_claim": chosen.p_claim,
        "candidates": [
            {
                "model": c.model,
                "provider": providers[c.model],
                "p_ok": c.p_ok,
                "expected_cost_usd": c.expected_cost_usd,
                "expected_total_cost_usd": c.expected_total_cost_usd,
                "p_low": c.p_low,
                "p_high": c.p_high,
                "p_claim": c.p_claim,
            }
            for c in decision.candidates
        ],
        "excluded": dict(decision.excluded),
        "propensity": decision.propensity,
        "explored": decision.explored,
        "meets_threshold": decision.meets_threshold,
        "min_probability": decision.min_probability,
        "quality_threshold": decision.quality_threshold,
        "reason": decision.reason,
        "model_version": decision.model_version,
        "policy_version": decision.policy_version,
        "degraded": decision.degraded,
        "reserve_usd": decision.reserve_usd,
    }
    if decision.incumbent is not None and decision.stayed is not None:
        answer["incumbent"], answer["stayed"] = decision.incumbent, decision.stayed
    return answer
