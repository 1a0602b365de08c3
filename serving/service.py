"""What the endpoints work with, and one decision from body to answer."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from dataclasses import dataclass, field

from router_ml.errors import NoEligibleModelError
from router_ml.store import Store
from router_ml.types import Estimate, Outcome, RouteDecision, RouteRequest
from serving.embedding import Stand
from serving.health import FAILED, Health
from serving.keys import ApiKeys
from serving.live import Live, LiveRouter
from serving.metrics import Metrics
from serving.schemas import SCHEMA_VERSION, RouteAnswer, RouteBody
from serving.settings import Settings

_ROUTED = 50_000


@dataclass
class Service:
    """The parts of a running service; `app.state.service`."""

    settings: Settings
    keys: ApiKeys
    live: LiveRouter
    store: Store
    metrics: Metrics
    health: Health
    routed: OrderedDict[str, tuple[tuple[str, ...], str | None]] = field(default_factory=OrderedDict)
    """The latest decisions whose outcome is awaited, by id: their models in order, and the name of the key that asked.

    Not the decisions themselves: 50,000 of them would take some 200 MB.
    """
    draining: bool = False

    def note(self, live: Live, who: str) -> None:
        """Notes for the audit log what is served from now on; the log leaves out what has not changed."""
        router = live.router
        models = router.catalog.to_json()["models"]
        self.store.note_change("model", who, {"model_version": router.model_version, "models": models})
        self.store.note_change("policy", who, {"version": router.policy.version, "policy": router.policy.to_json()})
        self.store.note_change("keys", who, {key.name: key.described() for key in self.settings.api_keys.values()})

    def decide(
        self, live: Live, asked: RouteRequest, stand: Stand | None = None, started: float | None = None
    ) -> tuple[RouteDecision, Estimate]:
        """Decides and counts. Raises what `Router.decide` does.

        `stand` estimates where the request was embedded, or should have been; that began when the clock said `started`.
        """
        started = time.perf_counter() if started is None else started
        estimator = None if stand is None else stand.estimator
        try:
            decision, estimate = live.router.decide_with_estimate(asked, self.health.down(live.providers), estimator)
        except NoEligibleModelError as error:
            self.metrics.refused(error.excluded)
            raise
        if stand is not None and stand.late is not None:
            self.metrics.degraded(stand.late)
        self.metrics.decided(asked, decision, live.router.policy, time.perf_counter() - started)
        return decision, estimate

    def record(
        self, live: Live, body: RouteBody, asked: RouteRequest, decision: RouteDecision, estimate: Estimate
    ) -> None:
        """Hands a decision to the store, with as much of the request as the settings say."""
        text: dict[str, str | None] = {}
        if self.settings.store_prompts == "text":
            text = {
                "prompt": body.prompt,
                "messages": json.dumps(body.messages) if body.messages is not None else None,
                "tools": json.dumps([*(body.tools or ()), *(body.functions or ())]) if asked.tools else None,
            }
        self.routed[decision.decision_id] = (tuple([c.model for c in decision.candidates]), asked.key)
        if len(self.routed) > _ROUTED:
            self.routed.popitem(last=False)
        self.health.chosen(decision.model, live.providers[decision.model], decision.decision_id)
        features = None if self.settings.store_prompts == "none" else estimate.features
        self.store.record(asked, decision, provider=live.providers[decision.model], features=features, **text)

    def observe(self, outcome: Outcome, key: str | None) -> None:
        """Takes an outcome's word for how the models answer: a decision's first, from the key that asked for it.

        Where another of its candidates served than the chosen one, the chosen one has failed.
        """
        of = outcome.decision_id or ""
        models, asked = self.routed.get(of, ((), None))
        if not models or asked != key:
            return
        del self.routed[of]
        providers, chosen = self.live.live.providers, models[0]
        served = outcome.served_model or chosen
        if outcome.status != "cancelled" and served in providers and served in models:
            self.health.report(served, providers[served], failed=outcome.status in FAILED, decision_id=of)
            if served != chosen and chosen in providers:
                self.health.report(chosen, providers[chosen], failed=True, decision_id=of)


def answer_of(live: Live, asked: RouteRequest, decision: RouteDecision) -> RouteAnswer:
    """A decision as the service answers it."""
    providers, chosen = live.providers, decision.candidates[0]
    return {
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
    }
