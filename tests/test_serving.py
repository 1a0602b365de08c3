"""The service over HTTP, with a trained bundle: decisions, outcomes, errors that say what to change, who may ask."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live_service import Running, running, sha256

from features.load import load_router
from router_ml.conversation import request_of, request_of_log_row
from router_ml.policy import Policy
from router_ml.router import Router
from router_ml.types import Estimate, RouteRequest

EASY, HARD = "What is the plural of river cloud engine?", "Prove rigorously that the comet operator is bounded."
SECRET = "my-secret-prompt-4711"
POLICY = """
exploration_rate = 0.0
[tiers]
economy = 0.5
standard = 0.7
premium = 0.9
[[rules]]
model = "hosted"
task = "translate"
[keys.narrow]
models = ["mid", "frontier"]
"""


@pytest.fixture(scope="module")
def policy_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "policy.toml"
    path.write_text(POLICY)
    return path


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, policy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("store") / "router.db"
    with running(tiny_bundle, store, policy=policy_file, max_body_bytes=300_000) as live:
        yield live


@pytest.fixture(scope="module")
def router(tiny_bundle: Path, policy_file: Path) -> Router:
    return load_router(tiny_bundle, Policy.load(policy_file))


def ask(live: Running, **body: Any) -> dict[str, Any]:
    response = live.http.post("/route", json=body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json", response.text
    said = response.json()
    assert (response.status_code, said["status"], said["type"]) == (status, status, f"urn:router-ml:problem:{kind}")
    assert said["title"] and said["detail"]
    assert SECRET not in response.text
    return said


@pytest.mark.parametrize("prompt", [EASY, HARD])
def test_the_answer_is_the_routers_decision(live: Running, router: Router, prompt: str) -> None:
    answer = ask(live, prompt=prompt, request_id="mine")
    decision = router.decide(request_of(prompt=prompt))
    assert answer["candidates"] == [
        {
            "model": c.model,
            "provider": router.catalog[c.model].provider,
            "p_ok": pytest.approx(c.p_ok, rel=1e-12),
            "expected_cost_usd": pytest.approx(c.expected_cost_usd, rel=1e-12),
            "expected_total_cost_usd": pytest.approx(c.expected_total_cost_usd, rel=1e-12),
            "p_low": pytest.approx(c.p_low, rel=1e-12),
            "p_high": pytest.approx(c.p_high, rel=1e-12),
            "p_claim": pytest.approx(c.p_claim, rel=1e-12),
        }
        for c in decision.candidates
    ]
    assert all(0.0 < c["p_low"] < c["p_ok"] < c["p_high"] < 1.0 for c in answer["candidates"])
    assert all(0.0 < c["p_claim"] < c["p_ok"] for c in answer["candidates"])
    first = answer["candidates"][0]
    assert {name: answer[name] for name in first} == first
    assert len(answer["decision_id"]) == 32 and answer["request_id"] == "mine"
    for name in ("reason", "propensity", "meets_threshold", "min_probability", "model_version", "policy_version"):
        assert answer[name] == getattr(decision, name)
    assert answer["quality_threshold"] == decision.quality_threshold
    assert answer["excluded"] == {} and answer["explored"] is False and answer["schema_version"] == 1


def test_models_that_the_log_hardly_knows_are_answered_with_wide_intervals(sparse_bundle: Path, tmp_path: Path) -> None:
    with running(sparse_bundle, tmp_path / "store.db") as sparse:
        answer = ask(sparse, prompt=HARD, min_probability=0.0)
        width = {c["model"]: c["p_high"] - c["p_low"] for c in answer["candidates"]}
        assert width["local"] < 0.6 * min(width["frontier"], width["hosted"], width["mid"])
        first = answer["candidates"][0]
        between = min(1.0, max(c["p_claim"] for c in answer["candidates"]) + 1e-6)
        unmet = ask(sparse, prompt=HARD, min_probability=between)
    assert first["p_claim"] < first["p_ok"] and not unmet["meets_threshold"]
    assert any(c["p_ok"] >= between for c in unmet["candidates"]), "a probability alone would have done"


def test_what_was_learnt_decides(live: Running) -> None:
    easy, hard = ask(live, prompt=EASY), ask(live, prompt=HARD)
    assert easy["model"] == "local" and hard["model"] in ("mid", "frontier")
    assert hard["expected_cost_usd"] > easy["expected_cost_usd"]
    assert ask(live, prompt=HARD, tier="economy")["min_probability"] == 0.5
    assert ask(live, prompt=HARD, min_probability=0.0, willingness_to_pay_usd=0.0)["model"] == "local"
    valued = ask(live, prompt=HARD, min_probability=0.0, willingness_to_pay_usd=1000.0)
    assert valued["p_ok"] == max(c["p_ok"] for c in valued["candidates"])


@pytest.mark.parametrize("prompt", [EASY, HARD])
def test_the_chosen_one_has_the_least_total_cost_of_those_that_meet_the_dial(live: Running, prompt: str) -> None:
    for dial in (0.0, 0.5, 0.7):
        answer = ask(live, prompt=prompt, min_probability=dial)
        meeting = [c for c in answer["candidates"] if c["p_claim"] >= dial]
        assert answer["meets_threshold"] and answer["expected_total_cost_usd"] == min(
            c["expected_total_cost_usd"] for c in meeting
        )
        assert all(c["expected_total_cost_usd"] >= c["expected_cost_usd"] for c in answer["candidates"])


def test_the_most_quality_within_a_budget(live: Running) -> None:
    every = {c["model"]: c for c in ask(live, prompt=HARD)["candidates"]}
    costs = sorted(c["expected_cost_usd"] for c in every.values())
    limit = (costs[-2] + costs[-1]) / 2
    answer = ask(live, prompt=HARD, objective="quality", max_cost_usd=limit, min_probability=1.0)
    affordable = [c for c in every.values() if c["expected_cost_usd"] <= limit]
    assert answer["p_ok"] == max(c["p_ok"] for c in affordable) and len(affordable) == 3
    assert not answer["meets_threshold"] and answer["reason"] == f"most probable candidate within {limit:g} USD"
    assert ask(live, prompt=HARD, objective="quality", max_cost_usd=limit, min_probability=0.0)["meets_threshold"]
    labels = f'model="{answer["model"]}",reason="most_quality",tier="custom"'
    assert live.metric(f"router_decisions_total{{{labels}}}") == 2


def test_a_quality_threshold_that_was_not_trained_is_refused_with_those_that_were(live: Running) -> None:
    assert ask(live, prompt=EASY, quality_threshold=0.5)["quality_threshold"] == 0.5
    body = {"prompt": SECRET, "quality_threshold": 0.83}
    said = problem(live.http.post("/route", json=body), 422, "invalid-request")
    assert "quality_threshold 0.83" in said["detail"] and "which are 0.5" in said["detail"]


def test_where_no_candidate_meets_the_dial_the_answer_says_so(tiny_bundle: Path, tmp_path: Path, live: Running) -> None:
    unmet = ask(live, prompt=HARD, min_probability=1.0)
    assert not unmet["meets_threshold"] and unmet["p_ok"] == max(c["p_ok"] for c in unmet["candidates"])
    policy = tmp_path / "policy.toml"
    policy.write_text(
        'unmet = "default"\ndefault_model = "hosted"\n[tiers]\nstandard = 0.7\n'
        'spend = { min_probability = 1.0, quality_threshold = 0.5, objective = "quality", max_cost_usd = 10.0 }\n'
    )
    with running(tiny_bundle, tmp_path / "store.db", policy=policy) as other:
        default = ask(other, prompt=HARD, min_probability=1.0)
        assert default["model"] == "hosted" and not default["meets_threshold"]
        assert default["reason"] == "no candidate's claim reaches 1: the configured default"
        assert ask(other, prompt=EASY)["meets_threshold"]
        spend = ask(other, prompt=HARD, tier="spend")
        assert spend["p_ok"] == max(c["p_ok"] for c in spend["candidates"]) and not spend["meets_threshold"]
        rows = {row["decision_id"]: row for row in other.decisions()}
    for answer in (default, spend):
        row = rows[answer["decision_id"]]
        assert (row["meets_threshold"], row["quality_threshold"]) == (False, 0.5)
        assert [c["expected_total_cost_usd"] for c in row["candidates"]] == pytest.approx(
            [c["expected_total_cost_usd"] for c in answer["candidates"]], rel=1e-8
        )


def test_an_openai_body_is_understood_and_the_rest_of_it_ignored(live: Running, router: Router) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": HARD}, image]},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    answer = ask(
        live,
        model="gpt-4o",
        messages=messages,
        tools=tools,
        max_completion_tokens=7,
        response_format={"type": "json_object"},
        temperature=0.2,
        stream=True,
        user="someone",
        n=1,
        logit_bias={"5": -1},
    )
    assert answer["model"] == "frontier"
    assert answer["excluded"]["mid"] == "does not support vision"
    assert set(answer["excluded"]) == {"mid", "hosted", "local"}
    decision = router.decide(request_of(messages=messages, tools=tools, needs={"json"}, max_tokens=7))
    assert answer["expected_cost_usd"] == pytest.approx(decision.chosen.expected_cost_usd)
    older = ask(live, messages=messages[:1], functions=[{"name": "f"}])
    assert older["excluded"]["local"] == "does not support tools"


@pytest.mark.parametrize(
    ("constraint", "excluded", "says"),
    [
        ({"candidates": ["mid", "local", "nobody"]}, {"frontier", "hosted", "nobody"}, "candidates|catalogue"),
        ({"region": "us"}, {"hosted", "local"}, "not in region 'us'"),
        ({"data_class": "confidential"}, {"frontier", "mid", "hosted"}, "not cleared for data class"),
        ({"needs": ["tools"]}, {"hosted", "local"}, "does not support tools"),
        ({"max_tokens": 100_000}, {"hosted", "local"}, "context window"),
    ],
)
def test_constraints_bind_the_fallbacks_too(live: Running, constraint: dict, excluded: set[str], says: str) -> None:
    answer = ask(live, prompt=HARD, **constraint)
    assert set(answer["excluded"]) == excluded
    assert {c["model"] for c in answer["candidates"]} == {"frontier", "mid", "hosted", "local"} - excluded
    for reason in answer["excluded"].values():
        assert any(part in reason for part in says.split("|"))


def test_the_cost_limit_binds(live: Running) -> None:
    costs = {c["model"]: c["expected_cost_usd"] for c in ask(live, prompt=HARD)["candidates"]}
    cheaper, dearer = sorted(costs, key=costs.__getitem__)[:2], sorted(costs, key=costs.__getitem__)[2:]
    limit = (costs[cheaper[-1]] + costs[dearer[0]]) / 2
    answer = ask(live, prompt=HARD, max_cost_usd=limit, tier="premium")
    assert {c["model"] for c in answer["candidates"]} == set(cheaper)
    assert answer["excluded"] == dict.fromkeys(answer["excluded"], f"expected cost is above {limit:g} USD")


def test_no_eligible_model_is_a_422_that_says_why_for_each(live: Running) -> None:
    before = live.metric('router_excluded_total{constraint="data_class"}')
    said = problem(
        live.http.post("/route", json={"prompt": SECRET, "data_class": "top-secret"}), 422, "no-eligible-model"
    )
    assert said["excluded"] == dict.fromkeys(
        ("frontier", "mid", "hosted", "local"), "not cleared for data class 'top-secret'"
    )
    assert "relax" in said["detail"]
    assert live.metric('router_excluded_total{constraint="data_class"}') == before + 4


def test_a_rule_pins_a_task(live: Running) -> None:
    assert ask(live, prompt=HARD, task="translate")["model"] == "hosted"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("content", "status", "kind", "says"),
    [
        (b"", 400, "invalid-json", "send one JSON object"),
        (b"{" + SECRET.encode(), 400, "invalid-json", "line 1"),
        (b'{"prompt": "' + b"\xff\xfe" + b'"}', 400, "invalid-json", "JSON"),
        (b'{"prompt": "\\ud800"}', 400, "invalid-json", "JSON"),
        (b"[" * 5000, 422, "invalid-request", "nested 200 levels deep"),
        (b"[]", 422, "invalid-request", "body"),
        (b'"' + SECRET.encode() + b'"', 422, "invalid-request", "body"),
        (b"{}", 422, "invalid-request", "exactly one of 'prompt'"),
        ({"prompt": SECRET, "messages": []}, 422, "invalid-request", "exactly one of 'prompt'"),
        ({"prompt": [SECRET]}, 422, "invalid-request", "prompt: Input should be a valid string"),
        ({"messages": SECRET}, 422, "invalid-request", "messages"),
        ({"messages": []}, 422, "invalid-request", "'messages' is empty"),
        ({"messages": [SECRET]}, 422, "invalid-request", "messages.0"),
        ({"messages": [{"role": SECRET, "content": ""}]}, 422, "invalid-request", "messages[0].role"),
        ({"messages": [{"role": "user", "content": {SECRET: 1}}]}, 422, "invalid-request", "messages[0].content"),
        ({"prompt": SECRET, "tier": "gold"}, 422, "invalid-request", "choose one of economy, standard, premium"),
        ({"prompt": SECRET, "tier": ""}, 422, "invalid-request", "tier"),
        ({"prompt": SECRET, "min_probability": 1.5}, 422, "invalid-request", "min_probability"),
        ({"prompt": SECRET, "min_probability": True}, 422, "invalid-request", "min_probability"),
        (b'{"prompt": "x", "min_probability": NaN}', 422, "invalid-request", "min_probability"),
        ({"prompt": SECRET, "min_probability": 0.5, "tier": "economy"}, 422, "invalid-request", "not both"),
        ({"prompt": SECRET, "max_cost_usd": -1}, 422, "invalid-request", "max_cost_usd"),
        ({"prompt": SECRET, "objective": "speed"}, 422, "invalid-request", "'cost' or 'quality'"),
        ({"prompt": SECRET, "objective": "quality"}, 422, "invalid-request", "give 'max_cost_usd'"),
        ({"prompt": SECRET, "quality_threshold": 1.5}, 422, "invalid-request", "quality_threshold"),
        ({"prompt": SECRET, "max_tokens": -1}, 422, "invalid-request", "max_tokens"),
        ({"prompt": SECRET, "max_tokens": 1e400}, 422, "invalid-request", "max_tokens"),
        ({"prompt": SECRET, "max_tokens": 10**30}, 422, "invalid-request", "max_tokens"),
        ({"prompt": SECRET, "candidates": "mid"}, 422, "invalid-request", "candidates"),
        ({"prompt": SECRET, "candidates": ["m"] * 1001}, 422, "invalid-request", "candidates"),
        ({"prompt": SECRET, "needs": ["telepathy"]}, 422, "invalid-request", "'tools', 'vision' or 'json'"),
        ({"prompt": SECRET, "tools": SECRET}, 422, "invalid-request", "tools"),
        ({"prompt": SECRET, "session": "x" * 257}, 422, "invalid-request", "session"),
    ],
)
def test_what_is_wrong_is_said_and_never_quoted(
    live: Running, caplog: pytest.LogCaptureFixture, content: Any, status: int, kind: str, says: str
) -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    with caplog.at_level(logging.DEBUG):
        said = problem(live.http.post("/route", content=raw, headers=JSON), status, kind)
    assert says in said["detail"]
    assert SECRET not in caplog.text


def test_all_of_a_bodys_mistakes_are_listed_at_once(live: Running) -> None:
    body = {"prompt": SECRET, "tier": 5, "max_tokens": "many", "region": ["us"]}
    said = problem(live.http.post("/route", json=body), 422, "invalid-request")
    assert {e["field"] for e in said["errors"]} == {"tier", "max_tokens", "region"}
    assert "2 more" in said["detail"]


def test_only_json_of_bounded_size_is_read(live: Running) -> None:
    form = live.http.post("/route", data={"prompt": SECRET})
    assert "content-type: application/json" in problem(form, 415, "unsupported-media-type")["detail"]
    problem(live.http.post("/route", content=b"{}", headers={"content-type": ""}), 415, "unsupported-media-type")
    huge = json.dumps({"prompt": SECRET * 20_000}).encode()
    assert "300000 bytes" in problem(live.http.post("/route", content=huge, headers=JSON), 413, "too-large")["detail"]
    chunks = (huge[i : i + 65_536] for i in range(0, len(huge), 65_536))
    problem(live.http.post("/route", content=chunks, headers=JSON), 413, "too-large")
    assert ask(live, prompt="x" * 290_000)["candidates"]
    assert live.http.post(
        "/route", content=b'{"prompt": "x"}', headers={"content-type": "application/json; x=1"}
    ).is_success


def test_other_paths_and_methods_are_problems_too(live: Running) -> None:
    said = problem(live.http.get(f"/{SECRET}"), 404, "not-found")
    assert "/route" in said["detail"] and "/outcomes" in said["detail"]
    response = live.http.get("/route")
    assert "POST" in problem(response, 405, "method-not-allowed")["detail"]
    assert response.headers["allow"] == "POST"


@dataclass(frozen=True)
class Failing:
    """A learner that fails and quotes the request, as libraries do."""

    def estimate(self, request: RouteRequest) -> Estimate:
        raise RuntimeError(f"cannot read {request.messages[0].text}")


@dataclass(frozen=True)
class Unsure:
    """A learner that knows nothing of the second model, and nothing of what the first costs."""

    inner: Any

    def estimate(self, request: RouteRequest) -> Estimate:
        estimate = self.inner.estimate(request)
        p_ok, tokens = estimate.p_ok.copy(), estimate.output_tokens.copy()
        p_ok[1] = tokens[0] = math.nan
        return replace(estimate, p_ok=p_ok, output_tokens=tokens)


def test_a_failure_inside_is_a_500_that_leaks_nothing(live: Running, caplog: pytest.LogCaptureFixture) -> None:
    holder = live.service.live
    good = holder.live
    holder.live = replace(good, router=replace(good.router, estimator=Failing()))
    try:
        said = problem(live.http.post("/route", json={"prompt": SECRET}), 500, "internal")
    finally:
        holder.live = good
    assert "RuntimeError" in caplog.text and "test_serving.py" in caplog.text
    assert SECRET not in caplog.text + json.dumps(said)
    assert ask(live, prompt=EASY)["model"] == "local"


def test_what_is_not_known_is_null(live: Running) -> None:
    holder = live.service.live
    good = holder.live
    holder.live = replace(good, router=replace(good.router, estimator=Unsure(good.router.estimator)))
    try:
        answer = ask(live, prompt=EASY, candidates=["frontier", "mid"])
    finally:
        holder.live = good
    by_model = {c["model"]: c for c in answer["candidates"]}
    assert by_model["mid"]["p_ok"] is None and by_model["frontier"]["expected_cost_usd"] is None
    (row,) = [row for row in live.decisions() if row["decision_id"] == answer["decision_id"]]
    assert {c["model"]: c["p_ok"] for c in row["candidates"]}["mid"] is None


def test_decisions_are_stored_without_their_prompts(live: Running) -> None:
    answer = ask(live, prompt=SECRET, tenant="acme", session="s1", task="chat", region="eu", needs=["json"])
    (row,) = [row for row in live.decisions() if row["decision_id"] == answer["decision_id"]]
    assert (row["tenant"], row["session"], row["task"], row["region"]) == ("acme", "s1", "chat", "eu")
    assert row["needs"] == ["json"] and row["key"] is None and row["provider"] == answer["provider"]
    assert [c["model"] for c in row["candidates"]] == [c["model"] for c in answer["candidates"]]
    for name in ("model", "excluded", "propensity", "reason", "model_version", "policy_version", "min_probability"):
        assert row[name] == answer[name]
    assert SECRET.encode() not in row["features"]
    assert SECRET not in json.dumps(row | {"features": None})


def test_stored_prompts_can_be_trained_on(tiny_bundle: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": HARD}, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    with running(tiny_bundle, tmp_path / "store.db", store_prompts="text") as live:
        ask(live, prompt=EASY)
        ask(live, messages=messages, tools=tools)
        live.decisions()
        first, second = live.service.store.iter_log_rows()
    assert request_of_log_row(first["prompt"], first["messages"], first["tools"]) == request_of(prompt=EASY)
    assert request_of_log_row(second["prompt"], second["messages"], second["tools"]) == request_of(
        messages=messages, tools=tools
    )


def test_an_outcome_is_stored_once_and_answered_the_same(live: Running) -> None:
    made = ask(live, prompt=EASY)["decision_id"]
    body = {"decision_id": made, "status": "ok", "input_tokens": 10, "cost_usd": 0.001, "latency_ms": 12.5}
    first, again = (live.http.post("/outcomes", json=body) for _ in range(2))
    assert first.status_code == again.status_code == 200 and first.content == again.content
    assert first.json()["decision_id"] == made
    late = live.http.post("/outcomes", json={"decision_id": made, "quality": 0.75, "quality_source": "user"})
    assert late.json()["outcome_id"] != first.json()["outcome_id"]
    live.decisions()
    (row,) = [row for row in live.service.store.iter_log_rows() if row["request_id"] == made]
    assert (row["quality"], row["cost_usd"], row["status"]) == (0.75, 0.001, "ok")


def test_idempotency_keys(live: Running) -> None:
    header = {"idempotency-key": "k1"}
    body = {"decision_id": "of another day", "quality": 1.0}
    before = live.service.store.counts()["unmatched_outcomes"]
    first = live.http.post("/outcomes", json=body, headers=header)
    assert live.http.post("/outcomes", json=body, headers=header).content == first.content
    conflict = live.http.post("/outcomes", json={**body, "quality": 0.0}, headers=header)
    assert "use a new key" in problem(conflict, 409, "conflict")["detail"]
    assert live.service.store.counts()["unmatched_outcomes"] == before + 1
    too_long = live.http.post("/outcomes", json=body, headers={"idempotency-key": "k" * 257})
    problem(too_long, 422, "invalid-request")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"quality": 1.0}, "decision_id"),
        ({"decision_id": "d", "quality": 1.5}, "quality"),
        ({"decision_id": "d", "quality": True}, "quality"),
        ({"decision_id": "d", "qualty": 1.0}, "qualty: Extra inputs are not permitted"),
        ({"decision_id": "d", "status": "fine"}, "'ok', 'error'"),
        ({"decision_id": "d", "cost_usd": -1}, "cost_usd"),
        ({"decision_id": "d", "output_tokens": 2**60}, "output_tokens"),
        ({"decision_id": 5}, "decision_id"),
    ],
)
def test_an_outcome_that_is_wrong_is_refused(live: Running, body: dict[str, Any], says: str) -> None:
    before = live.service.store.counts()["outcomes"]
    assert says in problem(live.http.post("/outcomes", json=body), 422, "invalid-request")["detail"]
    assert live.service.store.counts()["outcomes"] == before


def test_models_policy_health_and_readiness(live: Running, router: Router) -> None:
    models = live.http.get("/models").json()
    assert models == {"model_version": router.model_version, "models": router.catalog.to_json()["models"]}
    policy = live.http.get("/policy").json()
    assert policy == {"version": router.policy.version, "policy": router.policy.to_json()}
    assert live.http.get("/healthz").json() == {"status": "ok"}
    assert live.http.get("/readyz").json() == {
        "status": "ready",
        "model_version": router.model_version,
        "policy_version": router.policy.version,
        "degraded": [],
    }


def test_metrics_count_what_happens(live: Running, router: Router) -> None:
    line = 'router_decisions_total{model="local",reason="cheapest",tier="economy"}'
    custom = 'router_decisions_total{model="local",reason="cheapest",tier="custom"}'
    bad = 'router_responses_total{path="/route",status="422"}'
    before = [live.metric(name) for name in (line, custom, bad, "router_decision_seconds_count")]
    for _ in range(3):
        ask(live, prompt=EASY, tier="economy")
    ask(live, prompt=EASY, min_probability=0.5)
    live.http.post("/route", json={})
    after = [live.metric(name) for name in (line, custom, bad, "router_decision_seconds_count")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, 1, 4]
    version = f'model_version="{router.model_version}",policy_version="{router.policy.version}"'
    assert live.metric(f"router_bundle_info{{{version}}}") == 1
    live.decisions()
    assert live.metric("router_store_queue") == 0 and live.metric("router_store_decisions_total") > 0
    assert live.metric("router_store_dropped_total") == 0
    assert 'le="0.0002"' in live.http.get("/metrics").text


def test_the_openapi_document_names_bodies_answers_and_problems(live: Running) -> None:
    document = live.http.get("/openapi.json").json()
    assert set(document["paths"]) == {
        *("/route", "/route/preview", "/route/batch", "/routing/v1/chat/completions", "/outcomes"),
        *(
            "/models",
            "/policy",
            "/metrics",
            "/models/{model}/health",
            "/admin/reload",
            "/admin/changes",
            "/healthz",
            "/readyz",
        ),
    }
    route = document["paths"]["/route"]["post"]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RouteBody")
    assert route["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/RouteAnswer")
    assert list(route["responses"]["422"]["content"]) == ["application/problem+json"]
    assert "409" in document["paths"]["/outcomes"]["post"]["responses"]


@pytest.fixture(scope="module")
def guarded(tiny_bundle: Path, policy_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = {"narrow": sha256("key-one"), "wide": sha256("key-two-ü")}
    store = tmp_path_factory.mktemp("guarded") / "router.db"
    with running(tiny_bundle, store, policy=policy_file, api_keys=keys) as live:
        yield live


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer key-three"},
        {"authorization": "Basic key-one"},
        {"authorization": "Bearer"},
        {"x-api-key": ""},
        {"x-api-key": sha256("key-one")},
    ],
)
def test_without_a_configured_key_nothing_is_answered(guarded: Running, headers: dict[str, str]) -> None:
    for method, path in [
        ("POST", "/route"),
        ("POST", "/outcomes"),
        *(("GET", f"/{p}") for p in ("models", "policy", "metrics")),
    ]:
        response = guarded.http.request(method, path, headers=headers, content=b"{}" if method == "POST" else None)
        assert "x-api-key" in problem(response, 401, "unauthorized")["detail"]
        assert response.headers["www-authenticate"] == "Bearer"
    assert guarded.http.get("/healthz").is_success and guarded.http.get("/readyz").is_success


def test_the_callers_key_sets_what_it_may_use(guarded: Running) -> None:
    narrow = guarded.http.post("/route", json={"prompt": EASY, "key": "wide"}, headers={"x-api-key": "key-one"}).json()
    assert {c["model"] for c in narrow["candidates"]} == {"mid", "frontier"}
    assert narrow["excluded"]["local"] == "not on the key's allow-list"
    wide = {"authorization": "bearer key-two-ü".encode()}
    answer = guarded.http.post("/route", json={"prompt": EASY}, headers=wide).json()
    assert answer["model"] == "local"
    assert [row["key"] for row in guarded.decisions()] == ["narrow", "wide"]


FIELDS = """requests prompt messages tools functions response_format max_tokens tier min_probability needs max_cost_usd
candidates data_class region task role content type text tool_calls decision_id request_id quality status"""
KEYS = st.sampled_from(FIELDS.split())
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["user", "assistant", "standard", "json", "mid", "public", "text"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.dictionaries(KEYS, VALUES, max_size=6) | VALUES,
    path=st.sampled_from(["/route", "/outcomes", "/route/preview", "/route/batch", "/routing/v1/chat/completions"]),
)
def test_whatever_is_sent_it_is_answered_or_refused(live: Running, body: Any, path: str) -> None:
    response = live.http.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert response.status_code in (200, 400, 422), response.text


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda t: b'{"prompt": "' + t.encode() + b'"}'))
def test_whatever_the_bytes_are(live: Running, content: bytes) -> None:
    assert live.http.post("/route", content=content, headers=JSON).status_code in (200, 400, 422)
