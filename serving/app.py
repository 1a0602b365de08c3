"""The routing service: `create_app` for a test or another server, `serve` for the command line."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from fastapi import FastAPI
from sqlalchemy.exc import SQLAlchemyError

from router_ml import __version__, log_lines
from router_ml.errors import InputError, RouterError
from router_ml.policy import Policy
from router_ml.store import Store, default_spool
from serving import endpoints, problems
from serving.capacity import Capacity
from serving.challenger import Challenger
from serving.connections import BoundedProtocol
from serving.console import api as console
from serving.console import pages
from serving.console.releasing import Releases
from serving.console.tradeoff_file import TradeOffFile
from serving.follower import Follower
from serving.health import Health
from serving.keys import ApiKeys
from serving.live import LiveRouter
from serving.metrics import Metrics
from serving.routes import Front
from serving.service import Service
from serving.sessions import Sessions, StoredSessions
from serving.settings import Settings
from serving.shadow import Shadow
from serving.shared import Shared

if TYPE_CHECKING:
    from serving.tracing import Tracing

log = logging.getLogger(__name__)


def create_app(settings: Settings) -> Front:
    """The service as an ASGI app, its bundle loaded and its store open.

    Raises BundleError that names the file at fault, InputError for a policy or a store that cannot be used, and
    RegistryError where neither a registry nor its cache has a version to serve.
    """
    health = Health(settings.health)
    spool = settings.spool or default_spool(settings.store)
    shared = Shared(settings.store, health, spool.with_name(f"{spool.name}.policy.json"))

    def load(bundle: Path) -> LiveRouter:
        return LiveRouter(bundle, settings.policy, lambda: shared.policy)

    follower = None if settings.followed is None else Follower(settings.followed)
    live = load(settings.folder) if follower is None else follower.boot(load)
    store = Store(
        settings.store, interval=settings.commit_seconds, spool=settings.spool, spool_bytes=settings.spool_bytes,
        drain=settings.drain, patient=True,
    )  # fmt: skip
    sessions = Sessions(settings.session_seconds, settings.max_sessions)
    stored = StoredSessions(store, settings.session_lookup_seconds, settings.session_seconds)
    _catch_up(shared, live, settings)
    unknown = sorted(set(live.live.router.policy.keys) - set(settings.api_keys))
    if unknown:
        log.warning("the policy limits keys that the service does not know, so nobody: %s", ", ".join(unknown))
    if live.live.router.policy.canary.share and settings.challenger is None and settings.challenger_alias is None:
        log.warning("the policy has a canary, and the service no challenger: give --challenger or --challenger-alias")
    metrics = Metrics(live, store, health, shared, settings.baseline_model)
    if follower is not None:
        metrics.registry.register(follower)
    shadow = _shadow(settings, store)
    if shadow is not None:
        metrics.registry.register(shadow)
    releases = Releases(settings, store, (lambda: None) if follower is None else follower.ask)  # served without a wait
    service = Service(
        settings, ApiKeys(settings.api_keys), live, store, metrics, health, shared, sessions, stored, releases,
        follower=follower, tracing=_tracing(settings), shadow=shadow, tradeoff=TradeOffFile(settings.tradeoff),
        capacity=Capacity(replicas=settings.replicas),
    )  # fmt: skip
    shared.heard = service.heard

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        store.start()
        shared.start()
        live.changed = service.note
        service.note(live.live, "the start" if follower is None else f"the start, {follower.who}")
        if follower is not None:
            follower.start(live)
        tasks = [live.watch(settings.watch_seconds)] if settings.watch_seconds else []
        if shadow is not None:
            challenger = shadow.challenger
            challenger.loaded = service.note_challenger
            if challenger.live is not None:
                service.note_challenger(challenger.live, "the start")
            tasks.append(shadow.run())
            if challenger.follower is not None:
                try:
                    challenger.follower.begin(challenger)
                except RouterError as error:
                    log.error("the challenger is not followed: %s", error)
            elif settings.watch_seconds:
                tasks.append(challenger.watch(settings.watch_seconds))
        running = [asyncio.create_task(task) for task in tasks]
        yield
        service.draining = True
        for task in running:
            task.cancel()
        await service.releases.close()
        for following in (follower, None if shadow is None else shadow.challenger.follower):
            if following is not None:
                await asyncio.to_thread(following.close)
        stored.close()
        for each in (live.live, None if shadow is None else shadow.challenger.live):
            if each is not None and each.embedding is not None:
                each.embedding.embedder.close()
        await asyncio.to_thread(shared.close)
        await asyncio.to_thread(store.close)
        if service.tracing is not None:
            await service.tracing.close()

    # The interactive pages would load scripts from elsewhere; /openapi.json is what they show.
    app = Front(
        title="router-ml",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # The framework's own would send exceptions with their texts, which may quote a prompt, to whoever set it up.
        telemetry={
            "tracing": False,
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "auto_configure": False,
        },
    )
    app.state.service = service
    app.local_only = not settings.api_keys
    problems.install(app, [*endpoints.api.routes, *endpoints.health.routes, *console.api.routes, *pages.ROUTES])
    app.take(endpoints.api)
    app.include_router(endpoints.health)
    app.include_router(console.api)
    app.router.routes.extend(pages.ROUTES)
    return app


def _tracing(settings: Settings) -> Tracing | None:
    """What makes spans, where settings or the environment ask for them; OpenTelemetry is imported only then."""
    asked = settings.otlp_endpoint is not None
    if not asked:
        get = os.environ.get
        if not (get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or get("OTEL_EXPORTER_OTLP_ENDPOINT")):
            return None
        if get("OTEL_SDK_DISABLED", "").lower() == "true" or get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
            return None
        protocol = get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or get("OTEL_EXPORTER_OTLP_PROTOCOL")
        if protocol not in (None, "", "http/protobuf"):
            log.warning("no traces: OTLP is spoken over http/protobuf, and the environment says %s", protocol)
            return None
    try:
        from serving.tracing import Tracing
    except ModuleNotFoundError as error:
        need = "traces need the extra otel: pip install 'router-ml[otel]'"
        if asked:
            raise InputError(need) from error
        log.warning("no traces, although OTEL_EXPORTER_OTLP_ENDPOINT is set: %s", need)  # a whole cluster's setting
        return None
    return Tracing(settings.otlp_endpoint)


def _shadow(settings: Settings, store: Store) -> Shadow | None:
    """What scores requests with a challenger; None where there is to be none."""
    if settings.followed_challenger is not None:
        return Shadow(Challenger(follower=Follower(settings.followed_challenger)), store)
    if settings.challenger is None:
        return None
    challenger = Challenger(settings.challenger)
    with contextlib.suppress(RouterError):  # it is logged and tried again: that is no reason not to start
        challenger.reload()
    return Shadow(challenger, store)


def _catch_up(shared: Shared, live: LiveRouter, settings: Settings) -> None:
    """Begins with what the other processes know. Raises InputError where the policy that is stored cannot be used."""

    def take(policy: Policy) -> None:
        live.set_policy(policy)
        shared.budgets.follow(policy)

    shared.budgets.follow(live.live.router.policy)  # the first round reads what they have spent
    if settings.policy is None:
        shared.policy_changed = take
    try:
        shared.round()
    except (RouterError, SQLAlchemyError) as error:
        log.error("started without what other processes share: %s", type(error).__name__)
        shared.recall()
    if settings.policy is None and (problem := shared.policy_error or _misfit(shared.policy, live)):
        raise InputError(
            f"the policy that PUT /policy has stored cannot be used: {problem}. Put another one where a service still "
            "runs; or start one with a policy file, and take the stored one away there with DELETE /policy"
        )


def _misfit(policy: Policy | None, live: LiveRouter) -> str | None:
    try:
        live.live.router.with_policy(policy or Policy())
    except InputError as error:
        return str(error)
    return None


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


def configured(app: FastAPI, settings: Settings, **options: Any) -> uvicorn.Config:
    """How uvicorn serves the app; `options` are further ones of its own."""
    protocol = functools.partial(
        BoundedProtocol, seconds=settings.request_seconds, max_body_bytes=settings.max_body_bytes
    )
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=cast("Any", protocol),
        ws="none",
        proxy_headers=False,  # nobody asks who the caller is but his key
        access_log=False,
        server_header=False,
        timeout_keep_alive=75,  # longer than a gateway's pool keeps a connection, so that the gateway closes first
        **options,
    )


def serve(settings: Settings) -> None:
    """Runs the service until SIGTERM or SIGINT, then finishes what is in flight.

    Raises what `create_app` raises; exits with another code than 0 when the port cannot be bound.
    """
    # Read once, when LightGBM is loaded: one thread decides, and idle OpenMP threads would only spin beside it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    log_lines.configure(settings.log_format)
    log_lines.log_uncaught()
    app = create_app(settings)
    gc.collect()
    gc.freeze()  # the bundle lives as long as the process: the collector need not walk it again
    server = _Server(configured(app, settings, log_config=None), app.state.service)  # its lines go where all lines go
    app.arrived, app.max_waiting = server.server_state.tasks.__len__, settings.max_waiting
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises it again once it has ended in order
        server.run()
