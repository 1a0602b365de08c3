"""The routing service: `create_app` for a test or another server, `serve` for the command line."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, cast

import uvicorn
from fastapi import APIRouter, FastAPI, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from router_ml import __version__
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.store import Store
from serving import problems
from serving.live import LiveRouter
from serving.metrics import Metrics
from serving.problems import MEDIA_TYPE, ProblemError
from serving.routes import ApiKeys, JsonRoute
from serving.schemas import (
    SCHEMA_VERSION,
    ExplanationAnswer,
    ModelsAnswer,
    OutcomeAnswer,
    OutcomeBody,
    PolicyAnswer,
    ProblemAnswer,
    ReadyAnswer,
    RouteAnswer,
    RouteBody,
)
from serving.settings import Settings

log = logging.getLogger(__name__)


@dataclass
class Service:
    """What the endpoints work with; `app.state.service`."""

    settings: Settings
    keys: ApiKeys
    live: LiveRouter
    store: Store
    metrics: Metrics
    draining: bool = False


_CONTENT = {MEDIA_TYPE: {"schema": TypeAdapter(ProblemAnswer).json_schema()}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is not JSON", "content": _CONTENT},
    401: {"description": "No valid API key", "content": _CONTENT},
    413: {"description": "The body is too large", "content": _CONTENT},
    415: {"description": "The body has to be JSON", "content": _CONTENT},
    422: {"description": "The request is not valid, or no model may serve it", "content": _CONTENT},
}
_STORED: dict[int | str, dict[str, Any]] = {
    409: {"description": "The Idempotency-Key was used for another outcome", "content": _CONTENT},
    503: {"description": "The store cannot take it now", "content": _CONTENT},
}
_SECURITY = [Security(HTTPBearer(auto_error=False)), Security(APIKeyHeader(name="x-api-key", auto_error=False))]
api = APIRouter(route_class=JsonRoute, dependencies=_SECURITY, responses=_PROBLEMS)


@api.post("/route", summary="Choose a model for a request")
async def route(body: RouteBody, request: Request) -> RouteAnswer:
    """The cheapest model likely to be good enough, the fallbacks in order, and why the others are excluded."""
    service: Service = request.app.state.service
    live = service.live.live  # once: no answer mixes two versions
    started = time.perf_counter()
    asked = body.to_request(request.scope["caller"])
    try:
        decision, estimate = live.router.decide_with_estimate(asked)
    except NoEligibleModelError as error:
        service.metrics.refused(error.excluded)
        raise
    service.metrics.decided(asked, decision, live.router.policy, time.perf_counter() - started)
    providers = live.providers
    text: dict[str, str | None] = {}
    if service.settings.store_prompts:
        text = {
            "prompt": body.prompt,
            "messages": json.dumps(body.messages) if body.messages is not None else None,
            "tools": json.dumps([*(body.tools or ()), *(body.functions or ())]) if asked.tools else None,
        }
    features = estimate.features if service.settings.store_features else None
    service.store.record(asked, decision, provider=providers[decision.model], features=features, **text)
    chosen = decision.candidates[0]
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
    }
    if body.explain and estimate.features is not None:
        explanation = await asyncio.to_thread(live.explain, decision, estimate.features)
        answer["explanation"] = cast("ExplanationAnswer", explanation)
    return answer


@api.post("/outcomes", summary="Report what became of a decision", responses=_STORED)
async def outcomes(body: OutcomeBody, request: Request) -> OutcomeAnswer:
    """Answered when the outcome is committed. Sending it again, with or without an Idempotency-Key, stores it once."""
    service: Service = request.app.state.service
    given = request.headers.get("idempotency-key")
    if given is not None and not 1 <= len(given) <= 256:
        raise InputError("an Idempotency-Key has 1 to 256 characters")
    receipt = await asyncio.wrap_future(
        service.store.add_outcome(body.to_outcome(), idempotency_key=given, key=request.scope["caller"])
    )
    return {"outcome_id": receipt.outcome_id, "decision_id": body.decision_id, "request_id": body.request_id}


@api.get("/models", summary="The catalogue in force")
async def models(request: Request) -> ModelsAnswer:
    """The models that the router chooses from, with prices and clearances."""
    router = request.app.state.service.live.live.router
    return {"model_version": router.model_version, "models": router.catalog.to_json()["models"]}


@api.get("/policy", summary="The policy in force")
async def policy(request: Request) -> PolicyAnswer:
    """Tiers, rules, allow-lists and the exploration rate."""
    router = request.app.state.service.live.live.router
    return {"version": router.policy.version, "policy": router.policy.to_json()}


@api.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.service.metrics.expose(), media_type=CONTENT_TYPE_LATEST)


health = APIRouter()


@health.get("/healthz", summary="Liveness: depends on nothing")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@health.get(
    "/readyz",
    summary="Readiness: a bundle is loaded and the service is not going away",
    responses={503: {"description": "The service is going away", "content": _CONTENT}},
)
async def readyz(request: Request) -> ReadyAnswer:
    """What is served, and which parts do not work while routing goes on."""
    service: Service = request.app.state.service
    if service.draining:
        raise ProblemError(503, "unavailable", "the service is going away: use another instance")
    router = service.live.live.router
    degraded = [] if service.store.healthy else ["store"]
    if service.live.last_error is not None:
        degraded.append("bundle")
    return {
        "status": "ready",
        "model_version": router.model_version,
        "policy_version": router.policy.version,
        "degraded": degraded,
    }


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI app, its bundle loaded and its store open.

    Raises BundleError that names the file at fault, InputError for a policy or a store that cannot be used.
    """
    live = LiveRouter(settings.bundle, settings.policy)
    unknown = sorted(set(live.live.router.policy.keys) - set(settings.api_keys))
    if unknown:
        log.warning("the policy limits keys that the service does not know, so nobody: %s", ", ".join(unknown))
    store = Store(settings.store, interval=settings.commit_seconds)
    service = Service(settings, ApiKeys(settings.api_keys), live, store, Metrics(live, store))

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        store.start()
        watcher = asyncio.create_task(live.watch(settings.watch_seconds)) if settings.watch_seconds else None
        yield
        service.draining = True
        if watcher is not None:
            watcher.cancel()
        await asyncio.to_thread(store.close)

    # The interactive pages would load scripts from elsewhere; /openapi.json is what they show.
    app = FastAPI(title="router-ml", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    problems.install(app)
    app.include_router(api)
    app.include_router(health)
    return app


class _Server(uvicorn.Server):
    """Uvicorn that says it is going away before it goes: readiness first, the port `drain_seconds` later."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        again = self.service.draining or sig == signal.SIGINT
        self.service.draining = True
        delay = 0.0 if again else self.service.settings.drain_seconds
        asyncio.get_event_loop().call_later(delay, super().handle_exit, sig, frame)


def serve(settings: Settings) -> None:
    """Runs the service until SIGTERM or SIGINT, then finishes what is in flight.

    Raises what `create_app` raises; exits with another code than 0 when the port cannot be bound.
    """
    # Read once, when LightGBM is loaded: one thread decides, and idle OpenMP threads would only spin beside it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    app = create_app(settings)
    gc.collect()
    gc.freeze()  # the bundle lives as long as the process: the collector need not walk it again
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_concurrency,
        timeout_keep_alive=75,  # longer than a gateway's pool keeps a connection, so that the gateway closes first
    )
    _Server(config, app.state.service).run()
