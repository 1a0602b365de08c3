"""The routing service: `create_app` for a test or another server, `serve` for the command line."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from router_ml import __version__
from router_ml.store import Store
from serving import endpoints, problems
from serving.health import Health
from serving.keys import ApiKeys
from serving.live import LiveRouter
from serving.metrics import Metrics
from serving.routes import Front
from serving.service import Service
from serving.settings import Settings

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> FastAPI:
    """The service as an ASGI app, its bundle loaded and its store open.

    Raises BundleError that names the file at fault, InputError for a policy or a store that cannot be used.
    """
    live = LiveRouter(settings.bundle, settings.policy)
    unknown = sorted(set(live.live.router.policy.keys) - set(settings.api_keys))
    if unknown:
        log.warning("the policy limits keys that the service does not know, so nobody: %s", ", ".join(unknown))
    store = Store(
        settings.store, interval=settings.commit_seconds, spool=settings.spool, spool_bytes=settings.spool_bytes,
        drain=settings.drain, patient=True,
    )  # fmt: skip
    health = Health(settings.health)
    service = Service(settings, ApiKeys(settings.api_keys), live, store, Metrics(live, store, health), health)

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        store.start()
        live.changed = service.note
        service.note(live.live, "the start")
        watcher = asyncio.create_task(live.watch(settings.watch_seconds)) if settings.watch_seconds else None
        yield
        service.draining = True
        if watcher is not None:
            watcher.cancel()
        if live.live.embedding is not None:
            live.live.embedding.embedder.close()
        await asyncio.to_thread(store.close)

    # The interactive pages would load scripts from elsewhere; /openapi.json is what they show.
    app = Front(title="router-ml", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    problems.install(app)
    app.take(endpoints.api)
    app.include_router(endpoints.health)
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
