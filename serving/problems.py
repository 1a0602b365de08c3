"""Errors as RFC 9457 problem details: each says what to change, none quotes a prompt."""

from __future__ import annotations

import json
import logging
import traceback
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, Route

from router_ml.errors import InputError, NoEligibleModelError, RouterError
from router_ml.outcome_queue import IdempotencyConflictError, StoreError
from router_ml.shared import StaleVersionError

log = logging.getLogger(__name__)
MEDIA_TYPE = "application/problem+json"
_SHOWN = 20  # errors of one body that are listed
_NAME = 64  # characters of the longest unknown field that is named
_DEPTH = 200  # where pydantic's parser gives up
TITLES = {
    "invalid-json": "The body is not JSON",
    "invalid-request": "The request is not valid",
    "no-eligible-model": "No model may serve this request",
    "unauthorized": "An API key is needed",
    "budget-spent": "The budget is spent",
    "forbidden": "The API key does not cover this",
    "not-found": "There is nothing here",
    "method-not-allowed": "This path takes another method",
    "misdirected": "This service is at another address",
    "stale-version": "It has changed meanwhile",
    "policy-file": "A file sets the policy",
    "busy": "Another one is at work",
    "unsupported": "This service cannot do it",
    "conflict": "The Idempotency-Key was used for something else",
    "timeout": "The request came too slowly",
    "too-large": "The body is too large",
    "head-too-large": "The request's head is too large",
    "unsupported-media-type": "The body has to be JSON",
    "overloaded": "The service has too much to do",
    "unavailable": "The service cannot do this at the moment",
    "internal": "The service failed",
}


class ProblemError(Exception):
    """An error for the caller. `kind` is the stable word that a client may branch on; `extra` adds members."""

    def __init__(
        self, status: int, kind: str, detail: str, *, headers: dict[str, str] | None = None, **extra: Any
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.detail = detail
        self.headers = headers
        self.extra = extra

    def content(self) -> dict[str, Any]:
        """The problem as JSON."""
        return {
            "type": f"urn:router-ml:problem:{self.kind}",
            "title": TITLES[self.kind],
            "status": self.status,
            "detail": self.detail,
            **self.extra,
        }

    def response(self) -> Response:
        """The problem as a response."""
        return Response(json.dumps(self.content()), self.status, self.headers, MEDIA_TYPE)


def problem_of(error: Exception) -> ProblemError:
    """The problem that an exception is to the caller. What nobody foresaw is logged without its text: it may quote."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, NoEligibleModelError):
        return ProblemError(422, "no-eligible-model", str(error), excluded=error.excluded)
    if isinstance(error, InputError):
        return ProblemError(422, "invalid-request", str(error))
    if isinstance(error, IdempotencyConflictError):
        return ProblemError(409, "conflict", str(error))
    if isinstance(error, StaleVersionError):
        return ProblemError(412, "stale-version", str(error))
    if isinstance(error, StoreError):
        return ProblemError(503, "unavailable", str(error), headers={"retry-after": "1"})
    if isinstance(error, RouterError):
        return ProblemError(503, "unavailable", str(error))
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
    name = type(error).__name__
    log.error("%s in the service, at %s", name, " <- ".join(reversed(where)), extra={"error": name})
    return ProblemError(500, "internal", "the service's log says where; the request may be sent again")


def _invalid(error: ValidationError) -> ProblemError:
    errors = error.errors(include_url=False, include_input=False)
    if errors[0]["type"] == "json_invalid":
        if "recursion limit" in errors[0]["msg"]:
            return ProblemError(
                422, "invalid-request", f"the body may be nested {_DEPTH} levels deep, and is deeper: flatten it"
            )
        return ProblemError(400, "invalid-json", f"send one JSON object; {errors[0]['msg']}")
    listed = [{"field": _field(e["loc"]), "problem": _sentence(e)} for e in errors[:_SHOWN]]
    first = f"{listed[0]['field']}: {listed[0]['problem']}"
    more = f" (and {len(errors) - 1} more, see 'errors')" if len(errors) > 1 else ""
    return ProblemError(422, "invalid-request", f"{first}{more}", errors=listed)


def _field(loc: tuple[int | str, ...]) -> str:
    """Where the mistake is. What the caller has made up is shown only where it could be a field's name."""
    parts = [str(p) if isinstance(p, int) or (p.isidentifier() and len(p) <= _NAME) else "…" for p in loc]
    return ".".join(parts) or "body"


def _sentence(error: ErrorDetails) -> str:
    """What is wrong, and where a bound is passed what to do; else pydantic's own words, which quote nothing."""
    most = error.get("ctx", {}).get("max_length")
    if error["type"] == "too_long":
        return f"may have {most:,} entries, and has more: send fewer"
    if error["type"] == "string_too_long":
        return f"may have {most} characters, and has more: send a shorter one"
    if error["type"] == "string_pattern_mismatch":
        return "may not hold control characters: leave them out"
    return error["msg"]


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Makes the framework's own errors (no such path, wrong method, a failure anywhere) problem details, too.

    `routes` are all that the app has.
    """

    async def http_error(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 500)
        headers = dict(getattr(error, "headers", None) or {})
        if status == 404:
            known = ", ".join(app.openapi()["paths"])
            return ProblemError(404, "not-found", f"the paths are {known}", headers=headers).response()
        if status == 405:
            # Starlette's own header names the methods of one route, and a path may have several.
            fit = [r for r in routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE]
            allowed = ", ".join(sorted({method for route in fit for method in route.methods or ()}))
            return ProblemError(405, "method-not-allowed", f"use {allowed}", headers={"allow": allowed}).response()
        return ProblemError(
            status, "invalid-request", "the request cannot be served as it is", headers=headers
        ).response()

    async def failure(_request: Request, error: Exception) -> Response:
        return problem_of(error).response()

    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(ProblemError, failure)
    app.add_exception_handler(Exception, failure)
