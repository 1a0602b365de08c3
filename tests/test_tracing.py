"""Traces over OTLP: the service over HTTP, a real collector on loopback, the protocol's own decoder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_service import ROOT, Running, free_port, process, running, sha256, wait_for
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes
from otlp_collector import Collector, attributes, collecting, deaf

from router_ml.errors import InputError
from serving.app import create_app
from serving.settings import Settings

CANARY = "canary-4711"
PROMPT = {"prompt": f"What is the plural of river cloud engine, {CANARY}?"}
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GEN_AI = {value for name, value in vars(gen_ai_attributes).items() if name.isupper() and isinstance(value, str)}


@pytest.fixture(scope="module", autouse=True)
def fast() -> Iterator[None]:
    """Batches leave after 20 ms: a standard variable, read when a service starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("store") / "router.db"
    with running(tiny_bundle, store, otlp_endpoint=collector.url) as live:
        yield live


def span_of(collector: Collector, decision_id: str, name: str = "route") -> Span:
    """The span that speaks of this decision, when it has come."""
    found: list[Span] = []

    def there() -> bool:
        found[:] = [
            span
            for span in collector.spans
            if span.name.split()[0] == name and attributes(span.attributes).get("router_ml.decision_id") == decision_id
        ]
        return bool(found)

    wait_for(there)
    (span,) = found
    return span


def test_a_decision_is_a_span_below_the_callers(live: Running, collector: Collector) -> None:
    body = {**PROMPT, "tier": "premium", "session": "s-1", "request_id": "r-1", "max_tokens": 50}
    before = time.time_ns()
    answer = live.http.post("/route", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).json()
    after = time.time_ns()
    span = span_of(collector, answer["decision_id"])
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == f"route {answer['model']}" and span.kind == Span.SPAN_KIND_SERVER
    assert before <= span.start_time_unix_nano < span.end_time_unix_nano <= after
    told = attributes(span.attributes)
    assert told == {
        "gen_ai.operation.name": "route",
        "gen_ai.provider.name": answer["provider"],
        "gen_ai.request.model": answer["model"],
        "gen_ai.request.max_tokens": 50,
        "gen_ai.conversation.id": "s-1",
        "router_ml.request_id": "r-1",
        "router_ml.decision_id": answer["decision_id"],
        "router_ml.tier": "premium",
        "router_ml.min_probability": answer["min_probability"],
        "router_ml.meets_threshold": answer["meets_threshold"],
        "router_ml.reason": told["router_ml.reason"],
        "router_ml.explored": False,
        "router_ml.propensity": 1.0,
        "router_ml.model_version": answer["model_version"],
        "router_ml.policy_version": answer["policy_version"],
        "router_ml.p_ok": answer["p_ok"],
        "router_ml.expected_cost_usd": answer["expected_cost_usd"],
        "router_ml.expected_total_cost_usd": answer["expected_total_cost_usd"],
    }
    assert told["router_ml.reason"] in ("cheapest", "most_probable")
    assert collector.resource["service.name"] == "router-ml" and collector.resource["service.version"]


def test_the_names_are_the_conventions(live: Running, collector: Collector) -> None:
    answer = live.http.post("/route", json=PROMPT).json()
    span_of(collector, answer["decision_id"])
    names = {pair.key for span in collector.spans for pair in span.attributes}
    assert {name for name in names if name.startswith("gen_ai.")} <= GEN_AI
    assert all(name.startswith(("gen_ai.", "router_ml.", "error.type")) for name in names)


def test_feedback_is_an_evaluation_below_its_decision(live: Running, collector: Collector) -> None:
    answer = live.http.post("/route", json=PROMPT).json()
    of = answer["decision_id"]
    decided = span_of(collector, of)
    assert decided.trace_id and not decided.parent_span_id
    call = {"decision_id": of, "status": "ok", "cost_usd": 0.01}
    judged = {"decision_id": of, "quality": 0.75, "quality_source": "judge"}
    for outcome in (call, judged, judged):  # the last one is a repetition
        assert live.http.post("/outcomes", json=outcome).is_success
    span = span_of(collector, of, "evaluate")
    time.sleep(0.1)
    assert span_of(collector, of, "evaluate") == span  # and no other
    assert (span.trace_id, span.parent_span_id) == (decided.trace_id, decided.span_id)
    (event,) = span.events
    told = attributes(event.attributes)
    assert event.name == "gen_ai.evaluation.result"
    assert told["gen_ai.evaluation.name"] == "judge" and told["gen_ai.evaluation.score.value"] == 0.75
    assert told["router_ml.decision_id"] == of
    unknown = live.http.post(
        "/outcomes",
        json={"decision_id": "of-long-ago", "quality": 0.0},
        headers={"traceparent": f"00-{TRACE}-{PARENT}-01"},
    )
    assert unknown.is_success
    assert span_of(collector, "of-long-ago", "evaluate").parent_span_id.hex() == PARENT


def test_a_refusal_is_an_error(live: Running, collector: Collector) -> None:
    parent = "c7ad6b7169203332"
    refused = live.http.post(
        "/route", json={**PROMPT, "data_class": "top"}, headers={"traceparent": f"00-{TRACE}-{parent}-01"}
    )
    assert refused.status_code == 422
    wait_for(lambda: any(s.parent_span_id.hex() == parent for s in collector.spans))
    (span,) = [s for s in collector.spans if s.parent_span_id.hex() == parent]
    assert span.status.code == Status.STATUS_CODE_ERROR
    assert attributes(span.attributes)["error.type"] == "no-eligible-model"
    assert attributes(span.attributes)["router_ml.excluded"] == ["data_class"]


@pytest.mark.parametrize("given", ["", "nonsense", f"00-{'0' * 32}-{PARENT}-01", f"ff-{TRACE}-{PARENT}-01-x" * 900])
def test_a_traceparent_that_is_none_begins_a_trace(live: Running, collector: Collector, given: str) -> None:
    answer = live.http.post("/route", json=PROMPT, headers={"traceparent": given})
    assert answer.is_success
    span = span_of(collector, answer.json()["decision_id"])
    assert span.trace_id and not span.parent_span_id


def test_what_the_caller_does_not_sample_is_not_sent(live: Running, collector: Collector) -> None:
    unsampled = live.http.post("/route", json=PROMPT, headers={"traceparent": f"00-{TRACE}-{PARENT}-00"}).json()
    for answer in live.http.post("/route/batch", json={"requests": [PROMPT, PROMPT]}).json()["results"]:
        span_of(collector, answer["decision"]["decision_id"])
    sent = {attributes(span.attributes).get("router_ml.decision_id") for span in collector.spans}
    assert unsampled["decision_id"] not in sent
    preview = live.http.post("/route/preview", json=PROMPT).json()
    time.sleep(0.1)
    assert preview["decision_id"] not in {
        attributes(s.attributes).get("router_ml.decision_id") for s in collector.spans
    }


def test_nothing_of_a_prompt_is_sent(live: Running, collector: Collector) -> None:
    span_of(collector, live.http.post("/route", json=PROMPT).json()["decision_id"])
    assert collector.bodies and not any(CANARY.encode() in body for body in collector.bodies)


def test_the_standard_variables_are_enough_and_the_last_batch_is_sent(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")  # only the end sends
    monkeypatch.setenv("OTEL_SERVICE_NAME", "our-router")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=acme")
    monkeypatch.setenv("FASTAPI_OTEL_AUTO_CONFIGURE", "true")  # which sends the texts of exceptions
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        with process(bundle=tiny_bundle, store=tmp_path / "store.db") as (started, http):
            answer = http.post("/route", json=PROMPT).json()
            assert http.post("/route", json={"prompt": [CANARY]}).status_code == 422
            started.send_signal(signal.SIGTERM)
            started.communicate(timeout=30)
        span_of(collector, answer["decision_id"])
        assert collector.resource["service.name"] == "our-router"
        assert collector.headers[0]["x-tenant"] == "acme"
        assert set(collector.paths) == {"/v1/traces"} and len(collector.spans) == 1


def test_a_collector_that_is_away_or_deaf_hurts_nobody(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "16")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "8")
    with deaf() as url:
        for endpoint in (url, f"http://127.0.0.1:{free_port()}"):
            store = tmp_path / f"{len(list(tmp_path.iterdir()))}.db"
            with process(bundle=tiny_bundle, store=store, otlp_endpoint=endpoint) as (started, http):
                times = []
                for _ in range(100):
                    began = time.perf_counter()
                    assert http.post("/route", json=PROMPT).is_success
                    times.append(time.perf_counter() - began)
                began = time.monotonic()
                started.send_signal(signal.SIGTERM)
                said, _ = started.communicate(timeout=30)
            assert max(times) < 5.0 and sorted(times)[50] < 0.05
            assert time.monotonic() - began < 9.0
            assert "Traceback" not in said and CANARY not in said


def test_not_configured_it_is_not_imported(tiny_bundle: Path, tmp_path: Path) -> None:
    # FastAPI itself imports opentelemetry-api, which only has the interfaces.
    code = (
        "import json, sys\nfrom pathlib import Path\nfrom serving.app import create_app\n"
        "from serving.settings import Settings\n"
        "create_app(Settings(bundle=Path(sys.argv[1]), store=sys.argv[2]))\n"
        "print(json.dumps([n for n in sys.modules if n.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))]))"
    )

    def imported(**variables: str) -> tuple[list[str], str]:
        command = [sys.executable, "-c", code, str(tiny_bundle), str(tmp_path / "store.db")]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, check=True)
        return json.loads(done.stdout), done.stderr

    endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"}
    assert imported()[0] == []
    assert imported(**endpoint, OTEL_SDK_DISABLED="true")[0] == []
    modules, said = imported(**endpoint, OTEL_EXPORTER_OTLP_PROTOCOL="grpc")
    assert modules == [] and "http/protobuf" in said
    assert imported(**endpoint)[0] != []


def test_without_the_extra_only_who_asked_is_refused(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [n for n in sys.modules if n.startswith("opentelemetry.exporter") or n == "serving.tracing"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter", None)  # as where it is not installed
    settings: dict[str, Any] = {"bundle": tiny_bundle, "store": str(tmp_path / "store.db")}
    with pytest.raises(InputError, match=r"router-ml\[otel\]"):
        create_app(Settings(**settings, otlp_endpoint="http://127.0.0.1:4318"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    assert create_app(Settings(**settings)).state.service.tracing is None
    assert "router-ml[otel]" in caplog.text


def test_an_endpoint_that_is_no_url_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(InputError, match="otlp_endpoint"):
        Settings(bundle=tiny_bundle, otlp_endpoint="collector:4317", api_keys={"k": sha256("k")})
