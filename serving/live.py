"""The router being served: one reference to a frozen object, swapped whole; a failed load keeps the last good one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from router_ml.errors import BundleError, NoEligibleModelError, RouterError
from router_ml.policy import Policy
from router_ml.router import Router
from router_ml.types import CandidateFeatures, Message, RouteDecision, RouteRequest
from serving.embedding import Embedding

if TYPE_CHECKING:
    from features.neighbours import Neighbours

log = logging.getLogger(__name__)
RETRY_SECONDS = 30.0  # after a failed load with nothing changed on disk since
SETTLE_SECONDS = 0.1  # files that have changed are read when they have been left alone for so long
SETTLE_LOOKS = 50
WARM_UP = RouteRequest(messages=(Message("user", "Which of these two numbers is larger, 9.11 or 9.9?"),))
Signature = tuple[tuple[str, int, int, int], ...]


class Holder(Protocol):
    """What keeps a bundle, as who brings another one sees it."""

    @property
    def model_version(self) -> str | None:
        """The version of the bundle that it holds."""
        ...

    def reload(self, bundle: Path | None = None, who: str = "the files") -> object:
        """Takes another one, or raises BundleError or InputError and keeps what it has."""
        ...


@dataclass(frozen=True)
class Live:
    """What one request is answered from; a request takes the reference once and keeps it."""

    router: Router
    bundle: Path
    loaded_at: float
    providers: dict[str, str] = field(repr=False)
    embedding: Embedding | None = None
    """Where requests are embedded, for a router that takes milliseconds for it."""

    def explain(self, decision: RouteDecision, features: CandidateFeatures) -> dict[str, Any]:
        """Why this router's `decision` on a request of these `features` came out so, for JSON; takes milliseconds.

        Past requests come without their texts, even where the bundle has them: the caller may be another tenant.
        """
        from features.explain import explain

        note = None
        try:
            neighbours = self._twins_neighbours if decision.degraded else self._neighbours
        except BundleError as error:
            log.warning("explained without past requests: %s", error)
            neighbours, note = None, "the bundle's past requests cannot be read just now"
        return explain(self.router, decision, features, neighbours, note=note).to_json()

    @cached_property
    def _neighbours(self) -> Neighbours | None:
        """The bundle's past requests, read when the first explanation wants them."""
        from features.load import load_neighbours

        return load_neighbours(self.bundle, self.router.model_version)

    @cached_property
    def _twins_neighbours(self) -> Neighbours | None:
        from features.load import load_neighbours

        return load_neighbours(self.bundle, self.router.model_version, twin=True)


class LiveRouter:
    """Holds the `Live` router and follows the bundle's directory (or the link to it) and the policy's file.

    Without a file the policy is what `stored` says when a bundle is loaded (None: the default), and `set_policy` since.
    `what` it holds is for the log's lines.

    Raises BundleError or InputError when there is no good bundle and policy to begin with.
    """

    def __init__(
        self,
        bundle: Path,
        policy: Path | None = None,
        stored: Callable[[], Policy | None] = lambda: None,
        *,
        what: str = "bundle",
    ) -> None:
        self.what = what
        self.bundle = bundle
        self.policy = policy
        self._stored = stored
        self.reloads = 0
        self.failures = 0
        self.last_error: str | None = None
        self.changed: Callable[[Live, str], None] = lambda live, who: None
        """Told of each router that takes another's place, and who put it there."""
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._retry_at = 0.0
        self.live = self._load(bundle)

    @property
    def model_version(self) -> str:
        """The version of the bundle."""
        return self.live.router.model_version

    def reload(self, bundle: Path | None = None, who: str = "the files") -> Live:
        """Loads `bundle` (default: the one that is followed) and the policy, warms them up and swaps them in for `who`.

        A `bundle` that could be loaded is followed from then on. Blocks for as long as loading takes: call it off the
        event loop. When it raises BundleError or InputError, the router that was served before still is.
        """
        with self._lock:
            seen = self._signature(bundle)
            self._seen = seen if bundle is None else self._seen
            try:
                live = self._load(bundle or self.bundle)
            except RouterError as error:
                self.failures += 1
                if bundle is None:
                    self.last_error = str(error)
                    self._retry_at = time.monotonic() + RETRY_SECONDS
                log.error("kept %s %s: %s", self.what, self.live.router.model_version, error)
                raise
            self.bundle, self._seen, self.live = bundle or self.bundle, seen, live
            self.changed(live, who)
            self.reloads += 1
            self.last_error = None
            versions = {"model_version": live.router.model_version, "policy_version": live.router.policy.version}
            if self.what == "bundle":
                log.info("serving bundle %s, policy %s", *versions.values(), extra=versions)
            else:
                log.info("loaded %s %s", self.what, live.router.model_version)
            return live

    def set_policy(self, policy: Policy) -> None:
        """Serves under another policy from now on. Raises InputError, and changes nothing, where it does not fit."""
        with self._lock:
            if policy.version == self.live.router.policy.version:
                return
            self.live = replace(self.live, router=self.live.router.with_policy(policy))
            self._retry_at = 0.0  # a bundle that did not fit the policy before may fit this one
            log.info("serving under policy %s", policy.version)

    async def watch(self, seconds: float) -> None:
        """Reloads whenever the files have changed; runs until it is cancelled."""
        while True:
            await asyncio.sleep(seconds)
            now = await asyncio.to_thread(self._signature)
            retry = self.last_error is not None and time.monotonic() >= self._retry_at
            # No signature: the bundle is being replaced at this moment, or gone.
            if now and now != self._seen:  # someone may be writing still: half a policy is another policy
                for _ in range(SETTLE_LOOKS):
                    if now == (now := await self._later()):
                        break
            if now and (now != self._seen or retry):
                with contextlib.suppress(RouterError):
                    await asyncio.to_thread(self.reload)

    async def _later(self) -> Signature | None:
        await asyncio.sleep(SETTLE_SECONDS)
        return await asyncio.to_thread(self._signature)

    def _load(self, bundle: Path) -> Live:
        from features.load import load_router  # it imports LightGBM, whose threads are to be set first

        try:
            target = bundle.resolve()  # once, so that a link that moves meanwhile cannot mix two bundles
            router = load_router(target, Policy.load(self.policy) if self.policy else self._stored())
            with contextlib.suppress(NoEligibleModelError):
                router.decide(WARM_UP)
                if router.twin is not None:
                    router.decide_with_estimate(WARM_UP, estimator=router.twin)
            embedding = Embedding.of(router)
        except RouterError:
            raise
        except Exception as error:
            raise BundleError(f"{bundle} cannot be loaded ({type(error).__name__}: {error}): train it again") from error
        return Live(router, target, time.time(), {card.id: card.provider for card in router.catalog}, embedding)

    def _signature(self, bundle: Path | None = None) -> Signature | None:
        return signature(bundle or self.bundle, self.policy)


def signature(bundle: Path, policy: Path | None = None) -> Signature | None:
    """What changes when a file of the bundle or the policy does; None when the bundle is not there."""
    try:
        files = [*sorted(bundle.resolve().iterdir()), *([policy] if policy else [])]
        stats = [(str(path), path.stat()) for path in files]
    except OSError:
        return None
    return tuple((name, stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats)
