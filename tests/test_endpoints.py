"""The other ways to ask: a preview that leaves no trace, several at once, Plano's shape, headers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_service import Running, running

HARD = "Prove rigorously that the comet operator is bounded."
CHAT = {"model": "any", "messages": [{"role": "user", "content": HARD}]}


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_bundle, tmp_path_factory.mktemp("endpoints") / "store.db") as live:
        yield live


def without_id(answer: dict[str, Any]) -> dict[str, Any]:
    return {**answer, "decision_id": ""}


def test_a_preview_is_the_same_answer_and_leaves_no_trace(live: Running) -> None:
    body = {"prompt": HARD, "tier": "premium", "candidates": ["frontier", "mid"]}
    real = live.http.post("/route", json=body)
    rows, counted = len(live.decisions()), live.metric("router_decision_seconds_count")
    said = live.http.post("/route/preview", json=body)
    assert said.status_code == 200
    assert without_id(said.json()) == without_id(real.json())
    assert "x-router-decision-id" not in said.headers
    assert len(live.decisions()) == rows and live.metric("router_decision_seconds_count") == counted
    assert live.http.post("/route/preview", json={"prompt": HARD, "explain": True}).json()["explanation"]["candidates"]


def test_a_batch_answers_in_order_and_one_mistake_is_no_others(live: Running) -> None:
    requests: list[dict[str, Any]] = [
        {"prompt": HARD, "request_id": "b1"},
        {"prompt": "x", "candidates": ["nobody"], "request_id": "b2"},
        {"prompt": "x", "tier": "luxury", "request_id": "b3"},
        {"prompt": "What is the plural of river?", "request_id": "b4"},
    ]
    said = live.http.post("/route/batch", json={"requests": requests})
    assert said.status_code == 200 and "x-router-model" not in said.headers
    results = said.json()["results"]
    assert [r["decision"] and r["decision"]["request_id"] for r in results] == ["b1", None, None, "b4"]
    assert results[1]["problem"]["excluded"]["nobody"] == "not in the catalogue"
    assert results[2]["problem"]["status"] == 422 and "luxury" in results[2]["problem"]["detail"]
    assert results[0]["problem"] is None
    assert {row["request_id"] for row in live.decisions()} >= {"b1", "b4"}
    alone = live.http.post("/route", json=requests[0]).json()
    assert without_id(alone) == without_id(results[0]["decision"])


@pytest.mark.parametrize("body", [{"requests": []}, {"requests": [{"prompt": "x"}] * 101}, {"request": []}, []])
def test_a_batch_that_is_none_is_refused(live: Running, body: Any) -> None:
    assert live.http.post("/route/batch", json=body).status_code == 422


def test_plano_gets_models_in_order(live: Running) -> None:
    said = live.http.post("/routing/v1/chat/completions", json={**CHAT, "task": "maths", "session": "s1"})
    assert said.status_code == 200
    answer = said.json()
    (row,) = [row for row in live.decisions() if row["decision_id"] == answer["trace_id"]]
    assert answer["models"] == [c["model"] for c in row["candidates"]] and answer["models"][0] == row["model"]
    assert (answer["route"], answer["session_id"]) == ("maths", "s1")
    assert said.headers["x-router-model"] == row["model"]


def test_headers_say_what_the_body_says(live: Running) -> None:
    said = live.http.post("/route", json=CHAT)
    assert said.headers["x-router-model"] == said.json()["model"]
    assert said.headers["x-router-decision-id"] == said.json()["decision_id"]
    refused = live.http.post("/route", json={"prompt": "x", "candidates": ["nobody"]})
    assert refused.status_code == 422 and "x-router-model" not in refused.headers
