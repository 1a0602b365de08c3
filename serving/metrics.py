"""Prometheus metrics of one app, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from router_ml.policy import Policy
from router_ml.reasons import kind
from router_ml.router import Router
from router_ml.store import Store
from router_ml.types import RouteDecision, RouteRequest
from serving.health import Health
from serving.live import LiveRouter
from serving.shared import Shared
from serving.spend import Spend
from serving.timing import Durations

SECONDS = (
    *(0.00005, 0.0001, 0.00015, 0.0002, 0.0003, 0.0004, 0.0006, 0.001, 0.0015),
    *(0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
)
STAGES = ("parse", "estimate", "choose", "record", "serialise")
STAGE_SECONDS = (
    *(0.000005, 0.00001, 0.00002, 0.00003, 0.00005, 0.0001, 0.0002, 0.0004),
    *(0.001, 0.0025, 0.01, 0.05, 0.25, 1.0),
)


class Metrics:
    """What the service counts as it goes; the state of store and bundle is read when the metrics are.

    Everything that counts is to be called from the event loop's thread. Raises InputError for a `baseline_model` that
    the bundle does not have.
    """

    def __init__(
        self, live: LiveRouter, store: Store, health: Health, shared: Shared, baseline_model: str | None = None
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.registry.register(_State(live, store, health, shared))
        self.spend = Spend(live.live.router, baseline_model, shared.budgets)
        self._seconds = Durations(SECONDS)
        self._stages = {stage: Durations(STAGE_SECONDS) for stage in STAGES}
        self.registry.register(_Counted(self.spend, self._seconds, self._stages))
        self._decisions = Counter(
            "router_decisions", "Decisions made.", ["model", "tier", "reason"], registry=self.registry
        )
        self._excluded = Counter(
            "router_excluded", "Candidates excluded, by the kind of constraint.", ["constraint"], registry=self.registry
        )
        self._responses = Counter(
            "router_responses", "Responses, by path and status.", ["path", "status"], registry=self.registry
        )
        self._degraded = Counter(
            "router_degraded", "Decisions of the twin, by why there was no embedding.", ["why"], registry=self.registry
        )
        self._counters: dict[tuple[object, ...], Counter] = {}

    def decided(
        self, request: RouteRequest, decision: RouteDecision, router: Router, estimate_s: float, choose_s: float
    ) -> None:
        """Counts a decision, which took so many seconds to estimate and to choose."""
        tier = tier_of(request, router.policy)
        self._inc(self._decisions, decision.model, tier, kind(decision.reason))
        self._seconds.observe(estimate_s + choose_s)
        self._stages["estimate"].observe(estimate_s)
        self._stages["choose"].observe(choose_s)
        self.spend.decided(router, decision, tier, request)
        for reason in decision.excluded.values():
            self._inc(self._excluded, kind(reason))

    def degraded(self, why: str) -> None:
        """Counts a decision that the router's twin makes."""
        self._inc(self._degraded, why)

    def refused(self, excluded: dict[str, str]) -> None:
        """Counts the exclusions of a request that no model may serve."""
        for reason in excluded.values():
            self._inc(self._excluded, kind(reason))

    def took(self, stage: str, seconds: float) -> None:
        """Counts how long one of `STAGES` took for a request."""
        self._stages[stage].observe(seconds)

    def responded(self, path: str, status: int) -> None:
        """Counts a response."""
        self._inc(self._responses, path, str(status))

    def expose(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _inc(self, counter: Counter, *labels: str) -> None:
        # labels() takes a lock and builds a tuple each time; its children never change.
        key = (counter, *labels)
        child = self._counters.get(key)
        if child is None:
            child = self._counters[key] = counter.labels(*labels)
        child.inc()


def tier_of(request: RouteRequest, policy: Policy) -> str:
    """The dial of a request by its name; "custom" for one that states a probability of its own."""
    return "custom" if request.min_probability is not None else request.tier or policy.default_tier


class _Counted:
    """What is counted in plain numbers, as metrics."""

    def __init__(self, spend: Spend, seconds: Durations, stages: dict[str, Durations]) -> None:
        self.spend = spend
        self.seconds = seconds
        self.stages = stages

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        seconds = HistogramMetricFamily(
            "router_decision_seconds", "Time to decide, from the parsed body to the decision."
        )
        seconds.add_metric([], self.seconds.buckets(), self.seconds.total)
        yield seconds
        stages = HistogramMetricFamily(
            "router_stage_seconds",
            "Time of a decision's stages: parse (key, body, JSON), estimate, choose, record (hand over), serialise.",
            labels=["stage"],
        )
        for stage, durations in self.stages.items():
            stages.add_metric([stage], durations.buckets(), durations.total)
        yield stages
        yield from self.spend.collect()


class _State:
    """What the holder and the store know, as metrics."""

    def __init__(self, live: LiveRouter, store: Store, health: Health, shared: Shared) -> None:
        self.live = live
        self.shared = shared
        self.store = store
        self.health = health

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        now = self.live.live
        info = GaugeMetricFamily(
            "router_bundle_info", "The bundle and policy served.", labels=["model_version", "policy_version"]
        )
        info.add_metric([now.router.model_version, now.router.policy.version], 1)
        yield info
        yield GaugeMetricFamily("router_bundle_loaded_timestamp_seconds", "When it was loaded.", now.loaded_at)
        yield CounterMetricFamily("router_bundle_reloads", "Bundles loaded after the first.", self.live.reloads)
        yield CounterMetricFamily("router_bundle_reload_failures", "Loads that kept the last good.", self.live.failures)
        circuits = GaugeMetricFamily("router_circuit_open", "1 open, 0.5 half open, 0 closed.", labels=["name", "of"])
        for (of, name), state in self.health.states().items():
            circuits.add_metric([name, of], {"open": 1.0, "half-open": 0.5, "closed": 0.0}[state])
        yield circuits
        if now.embedding is not None:
            waiting = now.embedding.embedder.waiting
            yield GaugeMetricFamily("router_embedding_queue", "Texts that wait to be embedded.", waiting)
        yield GaugeMetricFamily("router_store_queue", "Rows that wait for their commit.", self.store.pending)
        counted = self.store.counters
        yield CounterMetricFamily("router_store_decisions", "Decisions committed.", counted.decisions)
        yield CounterMetricFamily("router_store_outcomes", "Outcomes committed.", counted.outcomes)
        if (spool := self.store.spool) is not None:
            yield GaugeMetricFamily("router_spool_bytes", "Bytes that wait on disk for the store.", spool.used_bytes)
            yield GaugeMetricFamily("router_spool_max_bytes", "Bytes that may wait.", spool.max_bytes)
            yield CounterMetricFamily(
                "router_spool_failures", "Writes that the spool's disk refused.", spool.counters.failures
            )
        yield CounterMetricFamily("router_store_dropped", "Rows lost: no room, or not storable.", counted.dropped)
        yield CounterMetricFamily("router_store_failures", "Commits that the database refused.", counted.failures)
        yield CounterMetricFamily(
            "router_store_unmatched", "Outcomes kept whose decision is not stored.", self.shared.unmatched
        )
        yield CounterMetricFamily(
            "router_shared_failures", "Times that other processes' news was not read.", self.shared.failures
        )
