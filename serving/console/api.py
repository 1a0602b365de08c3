"""What the console reads. All of it needs a key of the scope read (or admin) that speaks for no single tenant.

The page applies a policy with `PUT /policy`, as anyone does; all that changes something here is a promotion or a
rollback, which need the scope admin. Not part of the documented API.
"""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from router_ml.errors import InputError, RouterError
from router_ml.stored import find_decision
from serving.console.adding import added
from serving.console.releasing import Action
from serving.console.search import FILTERS, found_decisions, outcomes_of
from serving.problems import ProblemError
from serving.routes import JsonRoute
from serving.service import Service
from serving.spend import baseline_order

MOST_DAYS = 366
_READ, _ADMIN = {"x-scope": "read"}, {"x-scope": "admin"}
api = APIRouter(route_class=JsonRoute, prefix="/console/api", include_in_schema=False)


class MoveBody(BaseModel):
    """The version to promote, or the champion that is to be rolled back, and why."""

    max_bytes: ClassVar[int] = 16 << 10
    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
    reason: Annotated[str, Field(min_length=1, max_length=500)]


def _service(request: Request) -> Service:
    caller = request.scope["caller"]
    if caller is not None and caller.tenant is not None:
        raise ProblemError(403, "forbidden", "the console shows all tenants: use a key that is not bound to one")
    service: Service = request.app.state.service
    return service


@api.get("/me", openapi_extra=_READ)
async def me(request: Request) -> dict[str, Any]:
    """Whose key it is and what it may do, and what is served."""
    service, caller = _service(request), request.scope["caller"]
    router, settings = service.live.live.router, service.settings
    return {
        "key": None if caller is None else caller.name,
        "may_apply": settings.policy is None and (caller is None or "admin" in caller.scopes),
        "may_release": caller is None or "admin" in caller.scopes,
        "policy_file": None if settings.policy is None else settings.policy.name,
        "model_version": router.model_version,
        "policy_version": router.policy.version,
        "followed": settings.model,
        "prompts": settings.store_prompts,
        "degraded": service.degraded(),
        "time_us": time.time_ns() // 1000,
    }


@api.get("/tradeoff", openapi_extra=_READ)
async def tradeoff(request: Request) -> dict[str, Any]:
    """The trade-off file that the service was given, and whether it is about what is served."""
    service = _service(request)
    return await asyncio.to_thread(service.tradeoff.state, service.live.live.router)


@api.get("/changes", openapi_extra=_READ)
async def changes(request: Request) -> dict[str, Any]:
    """The audit log without the keys."""
    found = await asyncio.to_thread(_service(request).store.changes)
    return {"changes": [change for change in found if change["kind"] != "keys"]}


@api.get("/decisions", openapi_extra=_READ)
async def decisions(request: Request) -> dict[str, Any]:
    """A page of stored decisions, the newest first."""
    service = _service(request)
    asked = dict(request.query_params)
    if unknown := set(asked) - {*FILTERS, "after"}:
        raise InputError(f"decisions are not searched by {min(unknown)!r}: there are {', '.join(FILTERS)}")
    return await asyncio.to_thread(found_decisions, service.store.engine, asked)


@api.get("/decisions/{decision_id}", openapi_extra=_READ)
async def decision(request: Request) -> dict[str, Any]:
    """One stored decision with its outcomes, explained where the bundle that made it is the one that serves."""
    service = _service(request)
    return await asyncio.to_thread(_one, service, request.path_params["decision_id"])


def _one(service: Service, decision_id: str) -> dict[str, Any]:
    row = find_decision(service.store.engine, decision_id)
    if row is None:
        raise ProblemError(404, "not-found", f"the store has no decision {decision_id!r}")
    live, explanation, note = service.live.live, None, None
    if row["model_version"] != live.router.model_version:
        note = (
            f"bundle {row['model_version']} made it, and {live.router.model_version} serves now: use router-ml explain"
        )
    else:
        from features.explain import explain_stored

        try:
            explanation = explain_stored(live.router, row, None, nearest=0).to_json()
        except RouterError as error:
            note = str(error)
    kept = {name: value for name, value in row.items() if name != "features"}
    return {
        "decision": kept,
        "outcomes": outcomes_of(service.store.engine, row),
        "explanation": explanation,
        "note": note,
    }


@api.get("/sums", openapi_extra=_READ)
async def sums(request: Request) -> dict[str, Any]:
    """Calls, costs and savings by day, tenant, task and model, and how promises held, for the last `days`."""
    service = _service(request)
    days = request.query_params.get("days", "30")
    if not days.isdecimal() or not 1 <= int(days) <= MOST_DAYS:
        raise InputError(f"'days' has to be a whole number from 1 to {MOST_DAYS}")
    router = service.live.live.router
    baseline = request.query_params.get("baseline") or baseline_order(router, service.settings.baseline_model)[0]
    if baseline not in router.catalog:
        raise InputError(f"the baseline {baseline!r} is not in the catalogue")
    since = (time.time_ns() // 1000) // 86_400_000_000 * 86_400_000_000 - (int(days) - 1) * 86_400_000_000
    asked = {
        "url": service.store.url, "since_us": since, "baseline": baseline, "model_version": router.model_version,
        "threshold": 0.5 if router.quality_threshold is None else router.quality_threshold,
    }  # fmt: skip
    return await added(asked)


@api.get("/models", openapi_extra=_READ)
async def models(request: Request) -> dict[str, Any]:
    """The catalogue with each model's circuit and the keys of the policy that may use it."""
    service = _service(request)
    router = service.live.live.router
    states = {name: state for (of, name), state in service.health.states().items() if of == "model"}
    down = service.down(service.live.live)
    keys = router.policy.keys
    known = sorted(service.settings.api_keys)
    cards = router.catalog.to_json()["models"]
    for card in cards:
        own = card["id"]
        bound = [n for n, k in service.settings.api_keys.items() if k.models is not None and own not in k.models]
        card["circuit"], card["down"] = states.get(own, "closed"), down.get(own)
        card["not_for_keys"] = sorted({*bound, *(key for key, may in keys.items() if own not in may)})
    return {"model_version": router.model_version, "models": cards, "keys": known, "time_us": time.time_ns() // 1000}


@api.get("/releases", openapi_extra=_READ)
async def releases(request: Request) -> dict[str, Any]:
    """What is released here and how, and the latest promotion or rollback of this process; asks no registry."""
    service = _service(request)
    follower = service.follower
    return {
        **service.releases.described(),
        "served_version": None if follower is None else follower.version,
        "served_bundle": service.live.live.router.model_version,
        "problem": None if follower is None else follower.last_error,
        "time_us": time.time_ns() // 1000,
    }


@api.get("/releases/versions", openapi_extra=_READ)
async def versions(request: Request) -> dict[str, Any]:
    """The registry's versions, the newest first; seconds, unless somebody has just asked."""
    return {"versions": await _service(request).releases.versions(), "time_us": time.time_ns() // 1000}


@api.post("/releases/promote", openapi_extra=_ADMIN)
async def promote(body: MoveBody, request: Request) -> dict[str, Any]:
    """Begins to judge a version, and to promote it if every condition of the gate holds."""
    return _begin("promote", body, request)


@api.post("/releases/rollback", openapi_extra=_ADMIN)
async def rollback(body: MoveBody, request: Request) -> dict[str, Any]:
    """Begins to roll a champion back, if it is that still."""
    return _begin("rollback", body, request)


def _begin(action: Action, body: MoveBody, request: Request) -> dict[str, Any]:
    service, caller = _service(request), request.scope["caller"]
    reason = " ".join(body.reason.split())
    if not reason or not reason.isprintable():
        raise InputError("'reason' has to say why, in text without control characters")
    service.releases.start(action, body.version, reason, "anyone" if caller is None else caller.name)
    return {"run": service.releases.state()}
