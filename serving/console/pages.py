"""The console's files as they are: hand-written, nothing built, nothing from another host."""

from __future__ import annotations

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # a new version of the program has new files under the same names
}


def _read() -> dict[str, tuple[bytes, str]]:
    folder = files("serving.console").joinpath("static")
    kept = (entry for entry in folder.iterdir() if entry.name.rpartition(".")[2] in KINDS)
    return {entry.name: (entry.read_bytes(), KINDS[entry.name.rpartition(".")[2]]) for entry in kept}


FILES = _read()
"""By name: its bytes and media type. What is not in here is not served, whatever a path says."""


async def _page(_request: Request) -> Response:
    body, kind = FILES["index.html"]
    return Response(body, headers=HEADERS, media_type=kind)


async def _file(request: Request) -> Response:
    found = FILES.get(request.path_params["name"])
    if found is None:
        return Response("there is no such file of the console", 404, HEADERS, "text/plain; charset=utf-8")
    return Response(found[0], headers=HEADERS, media_type=found[1])


async def _whole(_request: Request) -> Response:
    return RedirectResponse("/console", headers=HEADERS)


ROUTES = (
    Route("/console", _page, include_in_schema=False),
    Route("/console/", _whole, include_in_schema=False),
    Route("/console/static/{name}", _file, include_in_schema=False),
)
