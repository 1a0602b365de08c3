"""OpenTelemetry spans of decisions and evaluations, by the GenAI semantic conventions; needs the extra [otel].

Imported only where tracing is configured. A request's path makes a span (some 25 us) and puts it on a bounded queue; a
thread of the SDK exports batches over OTLP/HTTP, and drops what a collector that is away leaves no room for. The
standard variables are honoured: OTEL_EXPORTER_OTLP_HEADERS, OTEL_TRACES_SAMPLER, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_…

https://opentelemetry.io/docs/specs/semconv/gen-ai/ has the names. Nothing of a prompt is ever put on a span.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from router_ml import __version__
from router_ml.errors import NoEligibleModelError
from router_ml.reasons import kind
from router_ml.types import Outcome, RouteDecision, RouteRequest

TRACES = "/v1/traces"
_AWAITED = 20_000  # decisions whose span an evaluation can still join
_GRACE_S = 3.0  # for the last batch at the end


class Tracing:
    """Makes spans and exports them; every method but `close` is for the event loop's thread.

    `endpoint` is the collector's base URL or that of its traces, None what the environment says.
    """

    def __init__(self, endpoint: str | None = None) -> None:
        url = endpoint if endpoint is None or endpoint.endswith(TRACES) else endpoint.rstrip("/") + TRACES
        own = Resource.create({"service.name": "router-ml", "service.version": __version__})
        # What the environment says of the service counts for more than what we do.
        self._provider = TracerProvider(resource=own.merge(OTELResourceDetector().detect()), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url)))
        self._tracer = self._provider.get_tracer("router_ml", __version__)
        self._propagator = TraceContextTextMapPropagator()
        self._spans: OrderedDict[str, SpanContext] = OrderedDict()

    def decided(
        self,
        headers: Mapping[str, str],
        asked: RouteRequest,
        decision: RouteDecision,
        provider: str,
        tier: str,
        ns: int,
    ) -> None:
        """A span of a decision that began at `ns` (of `time.time_ns`), below what the headers' `traceparent` names."""
        span = self._tracer.start_span(
            f"route {decision.model}",
            self._propagator.extract(headers),
            SpanKind.SERVER,
            _attributes(asked, decision, provider, tier),
            start_time=ns,
        )
        span.end()
        self._spans[decision.decision_id] = span.get_span_context()
        if len(self._spans) > _AWAITED:
            self._spans.popitem(last=False)

    def refused(self, headers: Mapping[str, str], error: NoEligibleModelError, ns: int) -> None:
        """A span of a request that no model may serve."""
        span = self._tracer.start_span("route", self._propagator.extract(headers), SpanKind.SERVER, start_time=ns)
        if span.is_recording():
            span.set_attributes({"gen_ai.operation.name": "route", "error.type": "no-eligible-model"})
            span.set_attribute("router_ml.excluded", sorted({kind(reason) for reason in error.excluded.values()}))
            span.set_status(Status(StatusCode.ERROR))
        span.end()

    def evaluated(self, headers: Mapping[str, str], outcome: Outcome, model: str | None) -> None:
        """A span with the event `gen_ai.evaluation.result` for an outcome that says how good the answer was.

        It is a child of its decision's span; where this process does not know that one, of what `traceparent` names.
        """
        if outcome.quality is None:
            return
        of = self._spans.get(outcome.decision_id or "")
        parent: Context = self._propagator.extract(headers) if of is None else set_span_in_context(NonRecordingSpan(of))
        result: dict[str, Any] = {
            "gen_ai.evaluation.name": outcome.quality_source or "quality",
            "gen_ai.evaluation.score.value": outcome.quality,
        }
        about: dict[str, Any] = {"gen_ai.operation.name": "evaluate"}
        if model is not None:
            about["gen_ai.request.model"] = model
        for name in ("decision_id", "request_id"):
            if (value := getattr(outcome, name)) is not None:
                about[f"router_ml.{name}"] = value
        now = time.time_ns()
        span = self._tracer.start_span("evaluate", parent, SpanKind.INTERNAL, about | result, start_time=now)
        span.add_event("gen_ai.evaluation.result", about | result, now)
        span.end(now)

    async def close(self) -> None:
        """Exports what waits, for at most some seconds: a collector that is away must not hold up the end."""
        # A daemon's thread: the SDK waits half a minute for a batch in flight, and the process need not.
        ending = threading.Thread(target=self._provider.shutdown, name="tracing-end", daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, _GRACE_S)


def _attributes(asked: RouteRequest, decision: RouteDecision, provider: str, tier: str) -> dict[str, Any]:
    chosen = decision.candidates[0]
    values: dict[str, Any] = {
        "gen_ai.operation.name": "route",
        "gen_ai.provider.name": provider,
        "gen_ai.request.model": decision.model,
        "router_ml.decision_id": decision.decision_id,
        "router_ml.tier": tier,
        "router_ml.min_probability": decision.min_probability,
        "router_ml.meets_threshold": decision.meets_threshold,
        "router_ml.reason": kind(decision.reason),
        "router_ml.explored": decision.explored,
        "router_ml.propensity": decision.propensity,
        "router_ml.model_version": decision.model_version,
        "router_ml.policy_version": decision.policy_version,
    }
    for name in ("p_ok", "expected_cost_usd", "expected_total_cost_usd"):
        value = getattr(chosen, name)
        if math.isfinite(value):
            values[f"router_ml.{name}"] = value
    if asked.session is not None:
        values["gen_ai.conversation.id"] = asked.session
    if asked.max_tokens is not None:
        values["gen_ai.request.max_tokens"] = asked.max_tokens
    if asked.request_id is not None:
        values["router_ml.request_id"] = asked.request_id
    return values
