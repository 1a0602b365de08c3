"""How a request gets to its endpoint: the caller's key, a bounded JSON body, the answer."""

from __future__ import annotations

import asyncio
import functools
import math
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, cast, get_type_hints

from fastapi import FastAPI
from fastapi.routing import APIRoute, APIRouter
from msgspec.json import Encoder
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.problems import ProblemError, problem_of
from serving.settings import is_loopback

encode = Encoder().encode  # half of the time that pydantic takes; what is not finite becomes null, too
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
MAX_VALUES = 50_000
"""JSON values in a body. Each becomes a Python object: 2 MB of them would hold everybody up for most of a second."""


class JsonRoute(APIRoute):
    """A FastAPI route whose handler goes straight to the endpoint.

    The endpoint is declared and documented as any other, but its body is parsed by pydantic's JSON parser from bytes
    that were bounded as they came, and its answer is serialized as it is. FastAPI's own handler, which resolves
    dependencies, parses with `json` and validates answers, takes some 100 us more. No error gets past it.
    """

    def get_route_handler(self) -> Handler:
        """The handler: authenticates, reads the body, calls the endpoint, counts the response."""
        endpoint, path = self.endpoint, self.path_format
        hints = get_type_hints(endpoint)
        scope = (self.openapi_extra or {}).get("x-scope")
        body_type: type[BaseModel] | None = hints.get("body")
        limit: float = getattr(body_type, "max_bytes", math.inf)
        to_json = None if hints["return"] is Response else encode

        async def handle(request: Request) -> Response:
            service = request.app.state.service
            began = parsed = time.perf_counter()
            try:
                caller = service.keys.caller(request)
                if caller is not None:
                    caller.may(scope)
                request.scope["caller"] = caller
                if body_type is None:
                    answer = await endpoint(request)
                else:
                    raw = await read_body(request, min(limit, service.settings.max_body_bytes))
                    body = body_type.model_validate_json(raw)
                    parsed = time.perf_counter()
                    answer = await endpoint(body, request)
                if to_json is None:
                    response: Response = answer
                else:
                    answered = time.perf_counter()
                    response = _Answered(to_json(answer), answer_headers(request))
                    if "decision" in request.scope:
                        service.metrics.took("parse", parsed - began)
                        service.metrics.took("serialise", time.perf_counter() - answered)
            except ClientDisconnect:
                response = Response(status_code=400)  # nobody reads it
            except Exception as error:  # noqa: BLE001 (the boundary: a traceback outside could quote the prompt)
                response = problem_of(error).response()
            service.metrics.responded(path, response.status_code)
            return response

        self.straight = handle
        return handle


OVERLOADED = ProblemError(
    503,
    "overloaded",
    "more requests wait than can be decided in time: send this one again",
    headers={"retry-after": "1"},
).response()


MISDIRECTED = ProblemError(
    421,
    "misdirected",
    "without API keys this service answers to localhost, 127.0.0.1 and [::1] alone, since by another name any web page "
    "could reach it: use one of these as the host, or start the service with API keys",
).response()
_LONGEST_HOST = 255  # characters of a name in DNS, its port aside


class _Answered(Response):
    """A JSON body with status 200 and its headers as they go out: starlette takes three times as long to make them."""

    def __init__(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        self.status_code, self.body, self.background = 200, body, None
        self.raw_headers = [(b"content-length", b"%d" % len(body)), (b"content-type", b"application/json"), *headers]


class Front(FastAPI):
    """A FastAPI app that takes a request to a `JsonRoute` of a plain path straight to its handler.

    The way through middleware, exit stacks, dependencies and the matching of routes takes as long as half of a
    decision, and has nothing to do for these: their handler checks the key, reads the body and lets no error past.
    """

    arrived: Callable[[], int] | None = None
    """How many requests the server has taken in and not ended; None where it does not say."""
    max_waiting: int = 0
    """Of these, how many may not have begun before the one whose turn it is is turned away."""
    local_only: bool = False
    """Whether a request has to name this machine as its host, as one without a key has to."""
    _begun: int = 0

    def take(self, router: APIRouter) -> None:
        """Includes a router, whose plain paths are then answered straight."""
        self.include_router(router)
        self.straight: dict[tuple[str, str], Handler] = {
            (method, route.path): route.straight
            for route in router.routes
            if isinstance(route, JsonRoute) and "{" not in route.path
            for method in route.methods or ()
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers, or goes the whole way for what is not a plain path."""
        handle = self.straight.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        counts = self.arrived is not None and scope["type"] == "http"
        if counts:
            self._begun += 1
            cast("asyncio.Task[None]", asyncio.current_task()).add_done_callback(self._ended)
        if self.local_only and scope["type"] == "http" and not names_this_machine(scope["headers"]):
            if handle is not None:
                self.state.service.metrics.responded(scope["path"], 421)
            await MISDIRECTED(scope, receive, send)
            return
        if handle is None:
            await super().__call__(scope, receive, send)
            return
        scope["app"] = self
        if self.arrived is not None and self.arrived() - self._begun >= self.max_waiting and scope["method"] == "POST":
            # Of those that wait this one has waited longest: its caller is the likeliest to be gone.
            self.state.service.metrics.responded(scope["path"], 503)
            await OVERLOADED(scope, receive, send)
            return
        response = await handle(Request(scope, receive))
        await response(scope, receive, send)

    def _ended(self, _task: asyncio.Task[None]) -> None:
        self._begun -= 1


def names_this_machine(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Whether the `host` is a loopback one, with any port. A page whose name was rebound to 127.0.0.1 sends its own.

    Without one it is taken: that is an HTTP/1.0 client, and no browser.
    """
    return all(len(value) <= _LONGEST_HOST and _local(value) for name, value in headers if name == b"host")


@functools.lru_cache(maxsize=64)  # clients say the same at each request
def _local(value: bytes) -> bool:
    host = value.decode("latin-1").strip().lower()
    name = host[: host.find("]") + 1] if host.startswith("[") else host.partition(":")[0]
    return is_loopback(name)


def answer_headers(request: Request) -> list[tuple[bytes, bytes]]:
    """The decision for proxies that read headers alone. A name that no header can hold is left to the body.

    Otherwise the version of what was answered, where the endpoint has said one.
    """
    decision = request.scope.get("decision")
    if decision is None:
        version = request.scope.get("version")
        return [] if version is None else [(b"etag", f'"{version}"'.encode())]
    headers = [(b"x-router-decision-id", decision.decision_id.encode())]
    if decision.model.isascii() and decision.model.isprintable():
        headers.append((b"x-router-model", decision.model.encode()))
    if decision.degraded:
        headers.append((b"x-router-degraded", b"true"))
    return headers


async def read_body(request: Request, limit: float) -> bytes:
    """The body, of at most `limit` bytes and `MAX_VALUES` values. How long it takes, `connections` bounds.

    Raises ProblemError (413 when it is longer, 415 when it is not plain JSON, 422 for more values).
    """
    kind = length = encoding = b""
    for name, value in request.scope["headers"]:  # once over the raw ones: each look into `request.headers` takes 1 us
        if name == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
        elif name == b"content-length":
            length = value
        elif name == b"content-encoding":
            encoding = value.strip().lower()
    if kind != b"application/json" and not kind.endswith(b"+json"):
        raise ProblemError(415, "unsupported-media-type", "send the body with 'content-type: application/json'")
    if encoding not in (b"", b"identity"):
        raise ProblemError(
            415,
            "unsupported-media-type",
            "send the body as it is, without a content-encoding",
            headers={"accept-encoding": "identity"},
        )
    if length.isdigit() and (len(length) > 18 or int(length) > limit):
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    raw = b"".join(chunks)
    if size > MAX_VALUES and _values(raw) > MAX_VALUES:
        raise ProblemError(
            422,
            "invalid-request",
            f"the body may hold {MAX_VALUES:,} JSON values, and holds more: send fewer messages, parts or tools",
        )
    return raw


def _too_large(limit: float) -> ProblemError:
    detail = f"the body may have {limit:.0f} bytes: send less of the conversation, or raise the service's limit"
    return ProblemError(413, "too-large", detail, headers={"connection": "close"})


def _values(raw: bytes) -> int:
    """At least as many as a JSON text holds values, what its strings hold left out; 5 ms for 2 MB of text."""
    most = _separators(raw)
    if most <= MAX_VALUES:
        return most
    plain = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = plain.count(b'"') // 2
    if strings > 2 * MAX_VALUES:  # each of them a value, or the key of one
        return strings
    return _separators(b"".join(plain.split(b'"')[::2]))


def _separators(raw: bytes) -> int:
    return raw.count(b",") + raw.count(b"[") + raw.count(b"{")
