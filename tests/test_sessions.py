"""Sessions over HTTP, with a trained bundle: who keeps its model, who leaves it, and who knows of whom."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from live_service import Running, running, sha256

from features.explain import explain_stored
from features.load import load_router
from router_ml.catalog import Catalog
from router_ml.session import Prefix, Session
from router_ml.types import Message, RouteRequest
from serving.health import HealthSettings
from serving.sessions import PREFIXES, Sessions, is_behind

HARD, EASY = "Prove rigorously that the comet operator is bounded.", "What is the plural of river cloud engine?"
ANSWER = "First, I shall set up the space and its norm, which takes a page. " * 60 + "Shall I go on?"
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
KEYS = {
    "red": {"sha256": sha256("red"), "tenant": "red"},
    "blue": {"sha256": sha256("blue")},
}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None = ANSWER) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": "1", "content": text}


def priced(live: Running) -> None:
    """Gives the served catalogue's models a cached price of a tenth, as if the bundle had been trained with one."""
    good = live.service.live.live
    cards = tuple(replace(c, cached_input_usd_per_mtok=c.input_usd_per_mtok / 10) for c in good.router.catalog)
    live.service.live.live = replace(good, router=replace(good.router, catalog=Catalog(cards)))


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("store") / "router.db"
    health = HealthSettings(min_calls=3, open_seconds=1000)
    with running(tiny_bundle, store, api_keys=KEYS, health=health, watch_seconds=0) as live:
        priced(live)
        yield live


class Talk:
    """A gateway's side of one conversation."""

    def __init__(self, live: Running, session: str | None, key: str = "blue", **fields: Any) -> None:
        self.live, self.key, self.fields = live, key, fields | ({"session": session} if session else {})
        self.messages: list[dict[str, Any]] = []

    def ask(self, *turns: dict[str, Any], path: str = "/route", **fields: Any) -> dict[str, Any]:
        body = self.fields | {"messages": [*self.messages, *turns]} | fields
        said = self.live.http.post(path, json=body, headers={"x-api-key": self.key})
        assert said.status_code == 200, said.text
        if path == "/route":
            self.messages += turns
        return dict(said.json())

    def tell(self, answer: dict[str, Any], **body: Any) -> None:
        body = {"decision_id": answer["decision_id"], "status": "ok", **body}
        said = self.live.http.post("/outcomes", json=body, headers={"x-api-key": self.key})
        assert said.status_code == 200, said.text


@pytest.mark.parametrize("last", ["yes", "ok, do it", "continue", "Yes, please."])
def test_a_short_follow_up_is_judged_by_the_conversation_and_keeps_its_model(live: Running, last: str) -> None:
    alone = {c["model"]: c for c in Talk(live, None).ask(user(last), min_probability=0.0)["candidates"]}
    for question in (HARD, EASY):
        talk = Talk(live, f"follow-up {last} {question}")
        first = talk.ask(user(question), min_probability=0.6)
        after = talk.ask(assistant(), user(last), min_probability=0.6)
        assert after["model"] == first["model"] == after["incumbent"] and after["stayed"] is True
        p, q = ({c["model"]: c["p_ok"] for c in a["candidates"]} for a in (first, after))
        if question == HARD:  # on which the models differ
            assert all(abs(q[m] - p[m]) < abs(q[m] - alone[m]["p_ok"]) for m in ("mid", "hosted", "local"))
            assert after["model"] in ("mid", "frontier")
        again = talk.ask(assistant(), user("continue"), min_probability=0.6)
        assert again["model"] == first["model"] and again["stayed"] is True


def test_an_agents_loop_keeps_its_model_whatever_its_tools_return(live: Running) -> None:
    talk = Talk(live, "loop", min_probability=0.6)
    first = talk.ask(user(HARD))
    for page in ("line of a file\n" * 300, "What is the plural of? " * 100, "ok", "404"):
        turn = talk.ask(assistant(None), tool(page))
        assert turn["model"] == first["model"] and turn["stayed"] is True, page


def test_what_a_session_was_with_is_stored_with_the_decision(live: Running, tiny_bundle: Path) -> None:
    talk = Talk(live, "stored")
    first = talk.ask(user(HARD + " Here is what is known. " * 400))
    second = talk.ask(assistant(), user("yes"), explain=True)
    assert "incumbent" not in first and second["incumbent"] == first["model"]
    rows = {row["decision_id"]: row for row in live.decisions()}
    before, after = rows[first["decision_id"]], rows[second["decision_id"]]
    assert (before["incumbent"], before["stayed"], before["cached_tokens"]) == (None, None, None)
    assert (after["incumbent"], after["stayed"]) == (first["model"], second["stayed"])
    assert after["cached_tokens"] > 1024 and after["propensity"] == second["propensity"]
    # An explanation says the same at once and later.
    router = load_router(tiny_bundle)
    later = explain_stored(router, after, None)
    assert later.reason == second["reason"] == second["explanation"]["reason"]
    for told, kept in zip(second["explanation"]["candidates"], later.candidates, strict=True):
        for name in ("model", "role", "p_ok", "expected_cost_usd", "expected_total_cost_usd"):
            assert told[name] == getattr(kept, name), name


def test_a_request_that_needs_another_model_moves_the_session(live: Running) -> None:
    talk = Talk(live, "vision", min_probability=0.6)
    first = talk.ask(user(HARD))
    seen = talk.ask(assistant(), user([{"type": "text", "text": "And this?"}, PICTURE]))
    assert first["model"] == "mid" and seen["model"] == "frontier" and seen["stayed"] is False
    assert seen["reason"] == "session moves from mid to frontier: does not support vision"
    counted = live.service.metrics.expose().decode()
    assert 'router_decisions_total{model="frontier",reason="moved",tier="custom"}' in counted
    assert talk.ask(assistant(), user("yes"))["incumbent"] == "frontier"


def test_an_open_circuit_moves_the_session(live: Running) -> None:
    talk = Talk(live, "circuit", min_probability=0.6)
    first = talk.ask(user(HARD))["model"]
    try:
        live.service.health.set(first, "open")
        moved = talk.ask(assistant(), user("yes"))
        assert moved["model"] != first and moved["reason"].endswith("taken out by hand")
        assert talk.ask(assistant(), user("yes"))["incumbent"] == moved["model"]
    finally:
        live.service.health.set(first, "auto")


def test_the_model_that_served_is_the_incumbent(live: Running) -> None:
    talk = Talk(live, "fallback")
    first = talk.ask(user(HARD))
    fallback = first["candidates"][1]["model"]
    talk.tell(first, served_model=fallback)
    second = talk.ask(assistant(), user("yes"))
    assert second["incumbent"] == fallback
    # What comes too late, from a stranger, or names nobody, does not.
    talk.tell(first, served_model=first["model"], retries=3)
    Talk(live, None, "red").tell(second, served_model="local")
    talk.tell(second, served_model="nobody")
    assert talk.ask(assistant(), user("yes"))["incumbent"] == second["model"]


def test_a_call_that_failed_leaves_nothing_cached(live: Running) -> None:
    talk = Talk(live, "failed")
    first = talk.ask(user(HARD + " Here is what is known. " * 400))
    talk.tell(first, status="error")
    again = talk.ask()
    third = talk.ask()
    rows = {row["decision_id"]: row for row in live.decisions()}
    assert again["incumbent"] == third["incumbent"] == first["model"]
    assert rows[again["decision_id"]]["cached_tokens"] == 0.0
    assert rows[third["decision_id"]]["cached_tokens"] > 1024


def test_a_preview_leaves_the_session_as_it_is(live: Running) -> None:
    talk = Talk(live, "preview")
    picture = user([{"type": "text", "text": "What is this?"}, PICTURE])
    assert talk.ask(picture, path="/route/preview")["model"] == "frontier"
    first = talk.ask(user(EASY))
    assert "incumbent" not in first and first["model"] != "frontier"
    moved = talk.ask(assistant(), picture, path="/route/preview")
    assert moved["incumbent"] == first["model"] and moved["model"] == "frontier"
    assert talk.ask(assistant(), user("yes"))["incumbent"] == first["model"]


def test_a_batch_is_decided_in_order(live: Running) -> None:
    turns = [user(HARD), assistant(), user("yes"), assistant(), user("continue")]
    requests = [{"messages": turns[:n], "session": "batch"} for n in (1, 3, 5)]
    said = live.http.post("/route/batch", json={"requests": requests}, headers={"x-api-key": "blue"}).json()
    one, two, three = (result["decision"] for result in said["results"])
    assert "incumbent" not in one and two["incumbent"] == one["model"] and three["incumbent"] == two["model"]


def test_one_tenants_session_is_not_anothers(live: Running) -> None:
    for key, tenant in (("red", None), ("blue", None), ("blue", "acme"), ("blue", "other")):
        body = {"tenant": tenant} if tenant else {}
        talk = Talk(live, "same name", key, **body)
        assert "incumbent" not in talk.ask(user(HARD)), (key, tenant)
        assert talk.ask(assistant(), user("yes"))["stayed"] is True


def test_a_gateway_may_say_it_itself(live: Running) -> None:
    turns = [user(HARD), assistant(), user("yes")]
    said = Talk(live, None).ask(*turns, previous_model="frontier")
    assert said["incumbent"] == "frontier"
    unknown = Talk(live, None).ask(*turns, previous_model="gpt-0")
    assert unknown["stayed"] is False and unknown["reason"].endswith("not in the catalogue")
    too_long = {"prompt": "x", "previous_model": "m" * 300}
    assert live.http.post("/route", json=too_long, headers={"x-api-key": "blue"}).status_code == 422


def test_a_side_task_between_the_turns_loses_nothing(live: Running) -> None:
    talk = Talk(live, "side", min_probability=0.6)
    first = talk.ask(user(HARD + " Here is what is known. " * 400))
    Talk(live, "side", min_probability=0.6).ask(user("Give this conversation a title."))
    row = talk.ask(assistant(), user("yes"))["decision_id"]
    (after,) = (r for r in live.decisions() if r["decision_id"] == row)
    if after["incumbent"] == first["model"]:
        assert after["cached_tokens"] > 1024


def test_another_process_learns_of_the_session_from_the_store(tiny_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    with running(tiny_bundle, store) as one, running(tiny_bundle, store) as two:
        talk = Talk(one, "shared", min_probability=0.6)
        first = talk.ask(user(HARD))
        talk.tell(first, served_model="frontier")
        one.decisions()
        talk.live = two
        second = talk.ask(assistant(), user("yes"))
        assert second["incumbent"] == "frontier"
        two.decisions()
        # The first process has an older word of it, and sees so by the answers that it has not asked for.
        with_picture = talk.ask(assistant(), user([{"type": "text", "text": "And this?"}, PICTURE]))
        two.decisions()
        talk.live = one
        assert talk.ask(assistant(), user("yes"))["incumbent"] == with_picture["model"] == "frontier"
        # Nobody else's session, and no first request, is looked up.
        other = Talk(one, "shared", tenant="other")
        assert "incumbent" not in other.ask(user(HARD), assistant(), user("yes"))


def test_a_store_that_hangs_costs_a_deadline(tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "store.db", session_lookup_seconds=0.05) as live:
        free = threading.Event()
        live.service.stored_sessions.store.session_model = lambda *_, **__: free.wait(20) and None  # type: ignore
        try:
            started = time.perf_counter()
            for name in range(3):
                said = Talk(live, f"hangs {name}").ask(user(HARD), assistant(), user("yes"))
                assert "incumbent" not in said
            assert time.perf_counter() - started < 2.0
        finally:
            free.set()


def test_an_older_store_gets_what_sessions_need(tiny_bundle: Path, tmp_path: Path) -> None:
    store = tmp_path / "store.db"
    with running(tiny_bundle, store) as live:
        Talk(live, "old").ask(user(HARD))
        live.decisions()
    with sqlite3.connect(store) as old:
        old.execute("drop index ix_decisions_session")
        for name in ("incumbent", "stayed", "cached_tokens"):
            old.execute(f"alter table decisions drop column {name}")
    with running(tiny_bundle, store) as live:
        answer = Talk(live, "old").ask(user(HARD), assistant(), user("yes"))
        assert answer["incumbent"] and [row["incumbent"] for row in live.decisions()] == [None, answer["incumbent"]]


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def request(*roles: str, session: str = "s", tenant: str | None = None) -> RouteRequest:
    return RouteRequest(messages=tuple(Message(role, role) for role in roles), session=session, tenant=tenant)


def test_a_session_is_forgotten_after_its_time() -> None:
    clock = Clock()
    sessions = Sessions(60.0, 10, clock)
    assert sessions.get(request("user")) is None
    sessions.decided(request("user"), "d1", "mid")
    clock.now += 59
    assert sessions.get(request("user")) == Session("mid", (Prefix("mid", 1, 4, 59.0),))
    clock.now += 2
    assert sessions.get(request("user")) is None
    sessions.decided(request("user", session="t"), "d2", "mid")
    assert len(sessions) == 1
    sessions.served("d1", "local")  # of a session that is gone


def test_the_latest_sessions_are_kept_and_their_latest_prompts() -> None:
    sessions = Sessions(60.0, 3, Clock())
    for number in range(6):
        sessions.decided(request("user", session=str(number)), f"d{number}", "mid")
        sessions.decided(request("user", session="0"), f"e{number}", "local")
    assert len(sessions) == 3 and sessions.get(request("user", session="0"))
    assert [bool(sessions.get(request("user", session=str(n)))) for n in range(1, 6)] == [False] * 3 + [True] * 2
    kept = sessions.get(request("user", session="0"))
    assert kept is not None and len(kept.prefixes) == PREFIXES
    sessions.served("e0", "frontier")  # not its latest decision
    assert sessions.get(request("user", session="0")) == kept
    none = Sessions(60.0, 0)
    none.decided(request("user"), "d", "mid")
    assert none.get(request("user")) is None


@pytest.mark.parametrize(
    ("sent", "roles", "behind"),
    [
        (0, "u", False),
        (0, "uau", True),
        (1, "uau", False),
        (1, "uauau", True),
        (3, "uauau", False),
        (1, "uatttatt", True),
        (1, "uattt", False),
    ],
)
def test_who_is_behind_sees_it_in_the_conversation(sent: int, roles: str, behind: bool) -> None:
    names = [{"u": "user", "a": "assistant", "t": "tool"}[r] for r in roles]
    asked = request(*names)
    prefix = Prefix("mid", sent, sum(len(name) for name in names[:sent]), 1.0)
    assert is_behind(asked, Session("mid", (prefix,)) if sent else None) is behind


def test_a_session_costs_a_decision_microseconds() -> None:
    sessions = Sessions(3600.0, 50_000)
    took = []
    for i in range(2000):
        asked = request("user", "assistant", "user", session=str(i % 500))
        started = time.perf_counter()
        is_behind(asked, sessions.get(asked))
        sessions.decided(asked, str(i), "mid")
        took.append(time.perf_counter() - started)
    assert sorted(took)[1000] < 50e-6  # the median: others use this machine


def test_nothing_of_a_prompt_is_kept(live: Running) -> None:
    secret = "my-secret-prompt-4711"
    talk = Talk(live, "secret")
    talk.ask(user(secret))
    talk.ask(assistant(secret), user("yes"))
    assert secret not in repr(live.service.sessions._entries)
    assert secret not in json.dumps([row | {"features": None} for row in live.decisions()])
