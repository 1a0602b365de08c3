"""Scores requests with the challenger after they have been answered, and counts how the two bundles differ.

One task of the event loop takes from a short queue, one request between two turns of the loop: what it scores has been
answered. Where the loop is late, requests come faster than they can be decided, and shadows are left out; so they are
where the queue is full, and while the challenger rests. Whatever it raises is counted and goes no further.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from router_ml.errors import InputError, NoEligibleModelError
from router_ml.router import Router
from router_ml.session import Session
from router_ml.shadow import Bundle, shadow_row
from router_ml.store import Store
from router_ml.types import Estimate, RouteDecision, RouteRequest
from serving.challenger import Arms, Challenger
from serving.embedding import Late, Stand
from serving.live import Live
from serving.timing import Durations

log = logging.getLogger(__name__)
ROOM = 64
LATE_SECONDS = 0.01  # between being queued and being scored: some twenty requests are ahead by then
EMBED_SECONDS = 1.0  # nobody waits for a shadow's embedding
_SECONDS = (0.0001, 0.0002, 0.0003, 0.0004, 0.0006, 0.001, 0.0015, 0.0025, 0.005, 0.01, 0.05, 0.25, 1.0)
_SUMS = (
    ("router_shadow_expected_cost_usd", "Expected cost in USD of the calls that each bundle prefers, retries included"),
    ("router_shadow_expected_answer_cost_usd", "Expected cost in USD of acceptable answers by what each prefers"),
    ("router_shadow_expected_ok", "Expected number of acceptable first answers by what each prefers"),
)


class Job(NamedTuple):
    """A request that was answered with `served`, to be scored by the challenger of `arms`; `down` as it was then."""

    arms: Arms
    asked: RouteRequest
    session: Session | None
    down: Mapping[str, str]
    served: RouteDecision
    at: float


class Scored(NamedTuple):
    """The challenger's decision: `took` so many seconds to estimate and to choose, from `began` (ns since 1970).

    `late` says why its twin made it, where it did.
    """

    decision: RouteDecision
    estimate: Estimate
    took: tuple[float, float]
    began: int
    late: Late | None


class Shadow:
    """The queue and its task, the canary's counts beside them; all of it for the event loop's thread alone."""

    def __init__(self, challenger: Challenger, store: Store) -> None:
        self.challenger = challenger
        self.canary: Counter[str] = Counter()
        """Decisions by arm."""
        self.instead: Counter[str] = Counter()
        """Decisions of the champion in a canary because the challenger made none, by why."""
        self._store = store
        self._jobs: deque[Job] = deque()
        self._wake = asyncio.Event()
        self._shed: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._agreed: Counter[bool] = Counter()
        self._sums: dict[Bundle, list[float]] = {"champion": [0.0] * 3, "challenger": [0.0] * 3}
        self._seconds = Durations(_SECONDS)

    def add(
        self, arms: Arms, asked: RouteRequest, session: Session | None, down: Mapping[str, str], served: RouteDecision
    ) -> None:
        """Queues a request that is about to be answered."""
        if self.challenger.resting:
            self._shed["resting"] += 1
        elif len(self._jobs) >= ROOM:
            self._shed["full"] += 1
        else:
            self._jobs.append(Job(arms, asked, session, down, served, time.monotonic()))
            self._wake.set()

    async def run(self) -> None:
        """Scores what is queued; runs until it is cancelled."""
        while True:
            while self._jobs:
                await self.score_next()
                await asyncio.sleep(0)
            self._wake.clear()
            await self._wake.wait()

    async def score_next(self) -> None:
        """Scores what has been in the queue for longest, or sheds it."""
        job = self._jobs.popleft()
        if time.monotonic() > job.at + LATE_SECONDS:
            self._shed["late"] += 1
            return
        try:
            await self._score(job)
        except Exception as error:  # noqa: BLE001 (nothing may end the task)
            self._failed["error"] += 1
            log.error("a shadow decision was not kept: %s", type(error).__name__)

    async def _score(self, job: Job) -> None:
        made = await self.decide(
            job.arms.challenger, job.arms.quiet_challenger, job.asked, job.session, job.down, EMBED_SECONDS
        )
        if isinstance(made, str):
            self._failed[made] += 1
        else:
            self.keep("challenger", job.served, made.decision)

    async def decide(
        self,
        live: Live,
        router: Router,
        asked: RouteRequest,
        session: Session | None,
        down: Mapping[str, str],
        embed_seconds: float,
    ) -> Scored | str:
        """The challenger's decision, or in a word why there is none. `router` is that of `live`, exploring or not."""
        began, clock = time.time_ns(), time.perf_counter
        marks: list[float] = []
        stand: Stand | None = None
        try:
            if live.embedding is not None:
                embedded = live.embedding.estimator(asked, embed_seconds)
                # Without a twin it would wait for as long as the embedding takes.
                stand = await (embedded if live.router.twin else asyncio.wait_for(embedded, embed_seconds))
            marks.append(clock())
            decision, estimate = router.decide_with_estimate(
                asked,
                down,
                session,
                estimator=None if stand is None else stand.estimator,
                estimated=lambda: marks.append(clock()),
            )
            marks.append(clock())
        except NoEligibleModelError:
            return "no_model"
        except InputError:
            return "request"  # asks for a quality threshold, say, that only the champion was trained for
        except Exception as error:  # noqa: BLE001 (whatever it is, it is no reason to fail)
            self.challenger.failed(error)
            return "error"
        started, estimated, chosen = marks
        self.challenger.took(chosen - started)
        self._seconds.observe(chosen - started)
        late = None if stand is None else stand.late
        return Scored(decision, estimate, (estimated - started, chosen - estimated), began, late)

    def keep(self, bundle: Bundle, served: RouteDecision, shadow: RouteDecision) -> None:
        """Counts and stores what `bundle` would have decided beside what was served."""
        self._agreed[served.model == shadow.model] += 1
        self._store.record_shadow(shadow_row(bundle, served, shadow))
        one, other = served.chosen, shadow.chosen
        sums = [(c.expected_cost_usd, c.expected_total_cost_usd, c.p_ok) for c in (one, other)]
        if all(math.isfinite(value) for each in sums for value in each):  # like with like
            bundles: tuple[Bundle, Bundle] = ("champion", "challenger")
            for name, each in zip(bundles if bundle == "challenger" else bundles[::-1], sums, strict=True):
                self._sums[name] = [a + b for a, b in zip(self._sums[name], each, strict=True)]

    def describe(self) -> list[Metric]:
        """Nothing that would have to be known before it is collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """What Prometheus shows of it."""
        info = GaugeMetricFamily("router_challenger_info", "The challenger's bundle.", labels=["model_version"])
        if (version := self.challenger.model_version) is not None:
            info.add_metric([version], 1)
        yield info
        up = 0 if self.challenger.degraded else 1
        yield GaugeMetricFamily("router_challenger_up", "1: there is one, and it decides.", up)
        agreed = {str(same).lower(): self._agreed[same] for same in (True, False)}
        for name, said, label, counted in (
            ("router_canary_decisions", "Decisions while a canary runs, by arm.", "arm", self.canary),
            ("router_canary_fallbacks", "Of the champion's, since the challenger made none.", "why", self.instead),
            ("router_shadow_decisions", "Requests scored by both, by whether both choose the same.", "agrees", agreed),
            ("router_shadow_failures", "Shadow decisions that were none, by why.", "why", self._failed),
            ("router_shadow_shed", "Shadow decisions left out, by why.", "why", self._shed),
        ):
            family = CounterMetricFamily(name, said, labels=[label])
            for value, count in counted.items():
                family.add_metric([value], count)
            yield family
        for i, (name, said) in enumerate(_SUMS):
            family = CounterMetricFamily(name, f"{said}, each by its own estimates.", labels=["bundle"])
            for bundle, values in self._sums.items():
                family.add_metric([bundle], values[i])
            yield family
        seconds = HistogramMetricFamily("router_shadow_seconds", "Time of the challenger's decisions.")
        seconds.add_metric([], self._seconds.buckets(), self._seconds.total)
        yield seconds
