"""The service's endpoints."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any, cast
from urllib.parse import unquote

from fastapi import APIRouter, Security
from fastapi.security import APIKeyHeader, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from router_ml.errors import InputError
from router_ml.policy import Policy
from serving import canary
from serving.explained import ExplanationAnswer
from serving.keys import SCOPES
from serving.policy_numbers import with_fractions
from serving.problems import MEDIA_TYPE, ProblemError, problem_of
from serving.routes import JsonRoute
from serving.schemas import (
    BatchAnswer,
    BatchBody,
    BatchItem,
    ChangesAnswer,
    HealthAnswer,
    HealthBody,
    ModelsAnswer,
    OutcomeAnswer,
    OutcomeBody,
    PlanoAnswer,
    PolicyAnswer,
    PolicyBody,
    ProblemAnswer,
    ReadyAnswer,
    RouteAnswer,
    RouteBody,
    VersionsAnswer,
)
from serving.service import Service, answer_of

log = logging.getLogger(__name__)
_CONTENT = {MEDIA_TYPE: {"schema": TypeAdapter(ProblemAnswer).json_schema()}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The body is not JSON", "content": _CONTENT},
    401: {"description": "No valid API key", "content": _CONTENT},
    402: {"description": "A budget is spent, and the policy has it stop requests", "content": _CONTENT},
    403: {"description": "The API key does not cover this", "content": _CONTENT},
    408: {"description": "The request came too slowly", "content": _CONTENT},
    413: {"description": "The body is too large", "content": _CONTENT},
    415: {"description": "The body has to be JSON", "content": _CONTENT},
    422: {"description": "The request is not valid, or no model may serve it", "content": _CONTENT},
    431: {"description": "Path and headers are too long", "content": _CONTENT},
    503: {"description": "More requests wait than can be decided in time", "content": _CONTENT},
}
_STORED: dict[int | str, dict[str, Any]] = {
    409: {"description": "The Idempotency-Key was used for another outcome", "content": _CONTENT},
    503: {"description": "The store cannot take it now", "content": _CONTENT},
}
_METRICS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
_NOT_LOADED: dict[int | str, dict[str, Any]] = {503: {"description": "It does not load", "content": _CONTENT}}
_SECURITY = [Security(HTTPBearer(auto_error=False)), Security(APIKeyHeader(name="x-api-key", auto_error=False))]
_ROUTE, _OUTCOMES, _SET_HEALTH, _ADMIN, _ = ({"x-scope": scope} for scope in SCOPES)
_IDEMPOTENT = _OUTCOMES | {
    "parameters": [
        {
            "name": "idempotency-key",
            "in": "header",
            "schema": {"type": "string", "minLength": 1, "maxLength": 256},
            "description": "The same outcome under the same key is stored once; another one under it is a 409.",
        }
    ]
}
_HEALTH = _SET_HEALTH | {
    "parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}]
}
_SET_POLICY = _ADMIN | {
    "parameters": [
        {
            "name": "if-match",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "The version that is to be replaced, as GET /policy answers it; otherwise whatever it is.",
        },
        {
            "name": "x-change-reason",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "Why, for the audit log; percent-encoded UTF-8 of at most 500 characters.",
        },
    ]
}
_PUT: dict[int | str, dict[str, Any]] = {
    409: {"description": "A policy file rules", "content": _CONTENT},
    412: {"description": "The policy is of another version than If-Match says", "content": _CONTENT},
    503: {"description": "The database does not answer", "content": _CONTENT},
}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"description": "There is no such model", "content": _CONTENT}}
api = APIRouter(route_class=JsonRoute, dependencies=_SECURITY, responses=_PROBLEMS)


@api.post("/route", summary="Choose a model for a request", openapi_extra=_ROUTE)
async def route(body: RouteBody, request: Request) -> RouteAnswer:
    """The cheapest model likely to be good enough, the fallbacks in order, and why the others are excluded."""
    return await _answer(body, request, record=True)


@api.post("/route/preview", summary="What /route would answer", openapi_extra=_ROUTE)
async def preview(body: RouteBody, request: Request) -> RouteAnswer:
    """The same answer, but nothing is recorded: its `decision_id` takes no outcomes, and it counts as no decision."""
    return await _answer(body, request, record=False)


@api.post("/route/batch", summary="Choose models for several requests", openapi_extra=_ROUTE)
async def batch(body: BatchBody, request: Request) -> BatchAnswer:
    """A decision, or a problem, for each request in order. The event loop is free for others between them.

    A body that is not valid refuses the batch whole; what only deciding finds out is that one request's problem.
    """
    results: list[BatchItem] = []
    async with request.app.state.service.batch():
        for one in body.requests:
            try:
                results.append({"decision": await _answer(one, request, record=True), "problem": None})
            except Exception as error:  # noqa: BLE001 (as at the boundary: one request's failure is no other's)
                results.append({"decision": None, "problem": cast("ProblemAnswer", problem_of(error).content())})
            await asyncio.sleep(0)
    request.scope.pop("decision", None)  # no header can speak of several
    return {"results": results}


@api.post("/routing/v1/chat/completions", summary="The order of models, as Plano asks", openapi_extra=_ROUTE)
async def plano(body: RouteBody, request: Request) -> PlanoAnswer:
    """An OpenAI chat request in; the models to try in order out. `x-` headers carry the same for proxies."""
    answer = await _answer(body, request, record=True)
    models = [candidate["model"] for candidate in answer["candidates"]]
    return {"models": models, "route": body.task, "trace_id": answer["decision_id"], "session_id": body.session}


async def _answer(body: RouteBody, request: Request, *, record: bool) -> RouteAnswer:
    service: Service = request.app.state.service
    live = service.live.live  # once: no answer mixes two versions
    service.check_size(body)
    policy = live.router.policy
    asked = service.shared.budgets.pressed(body.to_request(request.scope["caller"], policy), policy)
    session = None if asked.session is None else await service.session(asked)
    stand, started = None, None
    if live.embedding is not None:
        started = time.perf_counter()
        stand = await live.embedding.estimator(asked, service.settings.embed_deadline_ms / 1000.0)
    arms = None if service.shadow is None else service.shadow.challenger.arms(live)
    if service.shadow is not None and arms is not None:
        known = canary.Asked(asked, request.headers, session, stand, started)
        live, decision, estimate, *_ = await canary.decide(service, service.shadow, arms, body, known, record=record)
        if record:
            request.scope["decision"] = decision
    elif record:
        decision, estimate = service.decide(live, asked, request.headers, session, stand, started)
        service.record(live, body, asked, decision, estimate)
        request.scope["decision"] = decision
    else:
        decision, estimate = live.router.decide_with_estimate(
            asked, service.down(live), session, estimator=None if stand is None else stand.estimator
        )
    answer = answer_of(live, asked, decision)
    if body.explain and estimate.features is not None:
        try:
            explanation = await service.explained(live, decision, estimate.features)
        except Exception as error:  # noqa: BLE001 (the decision stands, and is recorded)
            of = decision.decision_id
            log.error("decision %s is not explained: %s", of, type(error).__name__, extra={"decision_id": of})
        else:
            if explanation is not None:
                answer["explanation"] = cast("ExplanationAnswer", explanation)
    return answer


@api.post("/outcomes", summary="Report what became of a decision", responses=_STORED, openapi_extra=_IDEMPOTENT)
async def outcomes(body: OutcomeBody, request: Request) -> OutcomeAnswer:
    """Answered when the outcome is committed. Sending it again, with or without an Idempotency-Key, stores it once."""
    service: Service = request.app.state.service
    given = request.headers.get("idempotency-key")
    if given is not None and not 1 <= len(given) <= 256:
        raise InputError("an Idempotency-Key has 1 to 256 characters")
    caller, outcome = request.scope["caller"], body.to_outcome()
    name = None if caller is None else caller.name
    receipt = await asyncio.wrap_future(service.store.add_outcome(outcome, idempotency_key=given, key=name))
    if not receipt.replayed:
        called = "status" in body.model_fields_set  # feedback alone says nothing of the call
        service.count(outcome, name, request.headers, called=called)
        service.observe(receipt.outcome_id, outcome, name, call=called)
    return {"outcome_id": receipt.outcome_id, "decision_id": body.decision_id, "request_id": body.request_id}


@api.get("/models", summary="The catalogue in force")
async def models(request: Request) -> ModelsAnswer:
    """The models that the router chooses from, with prices and clearances."""
    router = request.app.state.service.live.live.router
    return {"model_version": router.model_version, "models": router.catalog.to_json()["models"]}


@api.put("/models/{model:path}/health", summary="Set a model's circuit", openapi_extra=_HEALTH, responses=_UNKNOWN)
async def set_health(body: HealthBody, request: Request) -> HealthAnswer:
    """For a gateway that knows of an outage before its outcomes tell."""
    service, model = request.app.state.service, request.path_params["model"]
    if model not in service.providers and ("model", model) not in service.health.states():
        raise ProblemError(404, "not-found", f"the catalogue has no model {model!r}: GET /models lists them")
    service.health.set(model, body.state)
    return {"model": model, "state": service.health.states().get(("model", model), "closed")}


@api.get("/policy", summary="The policy in force")
async def policy(request: Request) -> PolicyAnswer:
    """Tiers, rules, allow-lists and the exploration rate."""
    return _policy_in_force(request)


@api.put("/policy", summary="Set the policy of all processes", openapi_extra=_SET_POLICY, responses=_PUT)
async def put_policy(body: PolicyBody, request: Request) -> PolicyAnswer:
    """Stored in the database, in force here at once and within two seconds in every process on it, restarts included.

    Where the service was started with a policy file, that one rules, and this is refused. `If-Match` with the version
    that was read keeps two changes from undoing each other.
    """
    service: Service = request.app.state.service
    if service.settings.policy is not None:
        name = service.settings.policy.name
        said = f"the file {name} sets the policy: change it there, it is followed; or start the service without it"
        raise ProblemError(409, "policy-file", said)
    put = Policy.from_json(with_fractions(body.root), "the policy")
    service.live.live.router.with_policy(put)  # it has to fit the bundle
    return await _put_policy(request, put)


@api.delete("/policy", summary="Back to the default policy", openapi_extra=_SET_POLICY, responses=_PUT)
async def delete_policy(request: Request) -> PolicyAnswer:
    """Takes away what was put, and answers the policy in force: the default one, or that of the service's file."""
    return await _put_policy(request, Policy())


async def _put_policy(request: Request, put: Policy) -> PolicyAnswer:
    service, caller, given = request.app.state.service, request.scope["caller"], request.headers.get("if-match", "*")
    expected = (
        None if given.strip() == "*" else frozenset(v.strip().removeprefix("W/").strip('"') for v in given.split(","))
    )
    who = "anyone" if caller is None else caller.name
    reason = unquote(request.headers.get("x-change-reason", "")).strip() or None
    if reason is not None and (len(reason) > 500 or "\0" in reason):
        raise InputError("an x-change-reason has at most 500 characters, and no NUL")
    await asyncio.to_thread(service.shared.put_policy, put, who, expected, reason)
    return _policy_in_force(request)


def _policy_in_force(request: Request) -> PolicyAnswer:
    policy = request.app.state.service.live.live.router.policy
    request.scope["version"] = policy.version
    return {"version": policy.version, "policy": policy.to_json()}


@api.get("/metrics", summary="Prometheus metrics", response_class=Response, responses=_METRICS)
async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(request.app.state.service.metrics.expose(), media_type=CONTENT_TYPE_LATEST)


@api.post("/admin/reload", summary="Load bundle and policy again now", openapi_extra=_ADMIN, responses=_NOT_LOADED)
async def reload(request: Request) -> VersionsAnswer:
    """What is served then; a registry that is followed is asked first.

    A registry, bundle or policy that cannot be used is an error, and what was served before still is.
    """
    service, caller = request.app.state.service, request.scope["caller"]
    who = "anyone" if caller is None else caller.name
    router = (await service.reload(who)).router
    return {"model_version": router.model_version, "policy_version": router.policy.version}


@api.get("/admin/changes", summary="The audit log", openapi_extra=_ADMIN)
async def changes(request: Request) -> ChangesAnswer:
    """Every change of model, policy and keys: who, when, before, after; oldest first."""
    found = await asyncio.to_thread(request.app.state.service.store.changes)
    return {"changes": found}


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
    answer: ReadyAnswer = {
        "status": "ready",
        "model_version": router.model_version,
        "policy_version": router.policy.version,
        "degraded": service.degraded(),
    }
    if service.shadow is not None:
        answer["challenger"] = service.shadow.challenger.model_version
    return answer
