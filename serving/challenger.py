"""The challenger: a second bundle beside the one that is served, under the same policy, which may fail as it likes.

It is loaded as the champion is, from a folder that is followed or from a registry's alias; but neither a load that
fails nor a policy that does not fit it is anybody else's business. One that raises, or is slow, several times in a row
is left alone for a while.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from router_ml.errors import InputError, RouterError
from router_ml.router import Router
from serving.follower import Follower
from serving.live import RETRY_SECONDS, Live, LiveRouter, signature

log = logging.getLogger(__name__)
SLOW_SECONDS = 0.02  # a decision that takes so long on the event loop holds up everybody
STRIKES = 3
REST_SECONDS = 30.0


@dataclass(frozen=True)
class Arms:
    """The two bundles of one moment, under one policy, and both as they choose without exploring."""

    champion: Live
    challenger: Live
    quiet_champion: Router
    quiet_challenger: Router


def _never() -> float:
    return 1.0


class Challenger:
    """What is known of the challenger. `load` and `reload` may be called from any thread, the rest from the event loop.

    `folder` is followed, or a registry's alias by `follower`. `load_error` says why the last load failed,
    `misfit` why it cannot be held under the policy in force.
    """

    def __init__(self, folder: Path | None = None, follower: Follower | None = None) -> None:
        self.folder = folder
        self.follower = follower
        self.loaded: Callable[[Live, str], None] = lambda live, who: None
        """Told of each challenger that takes another's place, and who put it there."""
        self.load_error: str | None = "it has not been loaded yet" if follower is None else None
        self.misfit: str | None = None
        self._holder: LiveRouter | None = None
        self._lock = threading.Lock()
        self._tried: tuple[Live, Live] | None = None
        self._arms: Arms | None = None
        self._strikes = 0
        self._rests_until = 0.0

    @property
    def live(self) -> Live | None:
        """The bundle; None while there is none, or its alias is gone."""
        gone = self.follower is not None and self.follower.gone
        return None if self._holder is None or gone else self._holder.live

    @property
    def model_version(self) -> str | None:
        """The version of the bundle; None while there is none."""
        return None if (live := self.live) is None else live.router.model_version

    @property
    def resting(self) -> bool:
        """Whether it is left alone, since it failed or was slow several times in a row."""
        return time.monotonic() < self._rests_until

    @property
    def degraded(self) -> bool:
        """Whether there is none although there should be one, the last load failed, or it is left alone."""
        failed = self.load_error is not None or (self._holder is not None and self._holder.last_error is not None)
        if self.follower is not None and self.follower.last_error is not None:
            failed = not self.follower.gone  # nobody has to have a challenger
        return failed or self.misfit is not None or self.resting

    def reload(self, bundle: Path | None = None, who: str = "the files") -> Live:
        """Loads `bundle` (default: the one that is followed). Blocks; raises BundleError or InputError.

        What there was before then stays.
        """
        with self._lock:
            try:
                live = self._load(bundle, who)
            except RouterError as error:
                if str(error) != self.load_error:
                    log.error("the challenger is not loaded: %s", error)
                self.load_error = str(error)
                raise
            self.load_error = None
            return live

    def _load(self, bundle: Path | None, who: str) -> Live:
        if self._holder is not None:
            return self._holder.reload(bundle, who)
        path = bundle or self.folder
        if path is None:
            raise InputError("no version of the challenger is there yet")
        holder = LiveRouter(path, what="challenger")  # under the default policy, which fits any bundle
        self.loaded(holder.live, who)
        holder.changed = lambda live, by: self.loaded(live, by)
        self._holder = holder
        log.info("loaded challenger %s", holder.live.router.model_version)
        return holder.live

    async def watch(self, seconds: float) -> None:
        """Follows the folder, and tries again where there is nothing good in it; runs until it is cancelled."""
        assert self.folder is not None
        seen, tried = await asyncio.to_thread(signature, self.folder), time.monotonic()
        while self._holder is None:
            await asyncio.sleep(seconds)
            now = await asyncio.to_thread(signature, self.folder)
            if now and (now != seen or time.monotonic() > tried + RETRY_SECONDS):
                seen, tried = now, time.monotonic()
                with contextlib.suppress(RouterError):
                    await asyncio.to_thread(self.reload)
        await self._holder.watch(seconds)

    def arms(self, champion: Live) -> Arms | None:
        """Champion and challenger for one request; None where there is none to hold against this champion."""
        challenger = self.live
        if challenger is None:
            return None
        if self._tried is None or self._tried[0] is not champion or self._tried[1] is not challenger:
            self._tried = champion, challenger
            self._arms = self._pair(champion, challenger)
        return self._arms

    def _pair(self, champion: Live, challenger: Live) -> Arms | None:
        """Both under the champion's policy; None where they are the same version, or the policy does not fit."""
        if challenger.router.model_version == champion.router.model_version:
            return None
        router = challenger.router
        try:
            router = router.with_policy(champion.router.policy)
        except InputError as error:
            self.misfit = str(error)
            log.error("the challenger is left out, the policy does not fit it: %s", error)
            return None
        self.misfit = None
        return Arms(
            champion,
            replace(challenger, router=router),
            replace(champion.router, draw=_never),
            replace(router, draw=_never),
        )

    def took(self, seconds: float) -> None:
        """Notes a decision that took so long on the event loop."""
        if seconds < SLOW_SECONDS:
            self._strikes = 0
        else:
            self._strike(f"its decisions take {seconds * 1e3:.0f} ms")

    def failed(self, error: BaseException) -> None:
        """Notes a decision that was none."""
        self._strike(f"its decisions fail ({type(error).__name__})")

    def _strike(self, why: str) -> None:
        self._strikes += 1
        if self._strikes >= STRIKES:
            self._strikes, self._rests_until = 0, time.monotonic() + REST_SECONDS
            log.error("challenger %s is left alone for %g s: %s", self.model_version, REST_SECONDS, why)
