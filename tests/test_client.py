"""The client for gateways, sync and async, against the real service and servers that are late, cut off or gone."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from faulty_server import DIE, HANG, Answer, Faulty, faulty
from live_service import ROOT, Running, free_port, running, sha256

from serving.client import (
    AsyncRouterClient,
    OutcomeFields,
    Routed,
    RouteFields,
    RouterClient,
    RouterRequestError,
    RouterUnavailableError,
    constraints,
)
from serving.schemas import OutcomeBody, RouteBody

EASY, HARD = "What is the plural of river cloud engine?", "Prove rigorously that the comet operator is bounded."
SECRET = "my-secret-prompt-4711"
GOOD = Answer(
    body=json.dumps(
        {
            "decision_id": "d1", "model": "a", "provider": "p", "p_ok": 0.9, "expected_cost_usd": 0.01, "reason": "r",
            "model_version": "m", "policy_version": "v", "candidates": [{"model": "a"}, {"model": "b"}],
        }
    ).encode()
)  # fmt: skip
DEFAULT = ("local", "mid")


class OnLoop:
    """The async client, called from a thread: one event loop, as a gateway has one."""

    def __init__(self, url: str, **options: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._client = AsyncRouterClient(url, **options)

    def _wait(self, call: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result(30)

    def route(self, **fields: Any) -> Routed:
        return self._wait(self._client.route(**fields))

    def report(self, decision_id: str | None, **outcome: Any) -> bool:
        return self._wait(self._client.report(decision_id, **outcome))

    def close(self) -> None:
        self._wait(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


Make = Callable[..., RouterClient]


@pytest.fixture(params=[RouterClient, OnLoop])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[Any] = []

    def one(server: Faulty | Running | str, **options: Any) -> Any:
        url = (
            server
            if isinstance(server, str)
            else server.url
            if isinstance(server, Faulty)
            else str(server.http.base_url)
        )
        made.append(request.param(url, **options))
        return made[-1]

    yield one
    for client in made:
        client.close()


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tiny_bundle, tmp_path_factory.mktemp("store") / "router.db") as live:
        yield live


def took(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


# --- the real service


def test_a_decision_of_the_service(make: Make, live: Running) -> None:
    client = make(live, deadline_s=5)
    easy = client.route(prompt=EASY, request_id="mine")
    hard = client.route(messages=[{"role": "user", "content": HARD}], candidates=["mid", "frontier"], tier=None)
    assert (easy.model, easy.local, easy.provider) == ("local", False, "self")
    assert easy.raw["request_id"] == "mine" and len(easy.fallbacks) == 3 and easy.decision_id == easy.raw["decision_id"]
    assert easy.p_ok is not None and easy.expected_cost_usd is not None and 0 < easy.p_ok < 1
    assert {hard.model, *hard.fallbacks} == {"mid", "frontier"}
    assert [hard.model, *hard.fallbacks] == [c["model"] for c in hard.raw["candidates"]]
    assert (hard.model_version, hard.policy_version) == (easy.raw["model_version"], easy.raw["policy_version"])


def test_what_the_service_refuses_is_raised_with_its_reasons_and_no_default_hides_it(make: Make, live: Running) -> None:
    client = make(live, deadline_s=5, default=DEFAULT)
    with pytest.raises(RouterRequestError) as none_left:
        client.route(prompt=SECRET, data_class="secret")
    error = none_left.value
    assert (error.status, error.kind) == (422, "no-eligible-model") and SECRET not in str(error)
    assert set(error.excluded) == {"frontier", "mid", "hosted", "local"} and "secret" in error.excluded["local"]
    with pytest.raises(RouterRequestError, match="tier"):
        client.route(prompt=EASY, tier="no such tier")
    with pytest.raises(RouterRequestError) as both:
        client.route()
    assert both.value.kind == "invalid-request" and both.value.detail and both.value.excluded == {}


def test_an_outcome_is_stored_once_however_often_it_is_reported(make: Make, live: Running) -> None:
    client = make(live, deadline_s=5)
    routed = client.route(prompt=EASY)
    for _ in range(3):
        assert client.report(
            routed.decision_id, status="ok", output_tokens=7, cost_usd=0.5, served_model="mid", retries=1
        )
    assert client.report(routed.decision_id, quality=0.5, quality_source="user")
    assert live.service.store.flush()
    rows = [r for r in live.service.store.iter_log_rows() if r["request_id"] == routed.decision_id]
    assert [(r["output_tokens"], r["quality"], r["model"], r["retries"]) for r in rows] == [(7, 0.5, "mid", 1)]
    assert client.report(routed.decision_id, idempotency_key="k" + routed.decision_id, quality=0.1)
    assert not client.report(routed.decision_id, idempotency_key="k" + routed.decision_id, quality=0.9), "a conflict"


def test_reporting_never_raises_for_what_the_service_says(make: Make, live: Running, caplog: Any) -> None:
    client = make(live)
    with caplog.at_level(logging.WARNING, "serving.calls"):
        assert not client.report("d", quality=7.0)
    assert "422" in caplog.text
    assert not client.report(None, quality=1.0)


def test_an_api_key_is_sent(make: Make, tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "store.db", api_keys={"gateway": sha256("k-1")}) as guarded:
        assert make(guarded, api_key="k-1", deadline_s=5).route(prompt=EASY).model == "local"
        with pytest.raises(RouterRequestError) as refused:
            make(guarded, api_key="k-2", deadline_s=5, default=DEFAULT).route(prompt=EASY)
        assert refused.value.status == 401


def test_connections_are_kept(make: Make) -> None:
    with faulty(GOOD) as server:
        client = make(server)
        assert [client.route(prompt=EASY).fallbacks for _ in range(5)] == [("b",)] * 5
    assert server.connections == 1


def test_threads_share_a_client(live: Running) -> None:
    with RouterClient(str(live.http.base_url), deadline_s=20) as client, ThreadPoolExecutor(8) as pool:
        routed = list(pool.map(lambda _: client.route(prompt=EASY), range(40)))
    assert {r.model for r in routed} == {"local"} and len({r.decision_id for r in routed}) == 40


def test_tasks_share_an_async_client(live: Running) -> None:
    async def many() -> list[Routed]:
        async with AsyncRouterClient(str(live.http.base_url), deadline_s=20) as client:
            return await asyncio.gather(*(client.route(prompt=EASY) for _ in range(40)))

    assert {r.model for r in asyncio.run(many())} == {"local"}


# --- nobody there, too late, broken


BROKEN = [
    HANG, DIE, Answer(500), Answer(503), Answer(429), Answer(200, b"<html>"), Answer(200, b"[1]"), Answer(200, b"{}"),
    Answer(302, headers={"location": "/"}), Answer(200, GOOD.body, cut=20),
    Answer(200, b'{"candidates": [], "model": 1}'),
]  # fmt: skip


@pytest.mark.parametrize("answer", BROKEN)
def test_without_a_decision_the_default_order_stands_in(make: Make, answer: Answer) -> None:
    with faulty(answer) as server:
        routed = make(server, default=DEFAULT).route(prompt=EASY, tier="premium", min_probability=None)
        with pytest.raises(RouterUnavailableError):
            make(server).route(prompt=EASY)
    assert (routed.local, routed.model, routed.fallbacks, routed.decision_id) == (True, "local", ("mid",), None)
    assert routed.p_ok is routed.expected_cost_usd is routed.provider is None and routed.raw == {}


def test_where_nobody_listens_the_default_order_stands_in(make: Make) -> None:
    assert make(f"http://127.0.0.1:{free_port()}", default=DEFAULT).route(prompt=EASY).local


def test_the_default_order_keeps_to_the_candidates(make: Make) -> None:
    client = make(f"http://127.0.0.1:{free_port()}", default=("a", "b", "c", "a"))
    routed = client.route(prompt=EASY, candidates=["c", "a", "z"])
    assert (routed.model, routed.fallbacks) == ("a", ("c",))
    for none in (["z"], []):
        with pytest.raises(RouterUnavailableError, match="no default models"):
            client.route(prompt=EASY, candidates=none)


CONSTRAINED: list[dict[str, Any]] = [
    {"data_class": "internal"}, {"region": "eu"}, {"needs": ["vision"]}, {"max_cost_usd": 0.0}, {"a_new_field": True},
]  # fmt: skip


@pytest.mark.parametrize("fields", CONSTRAINED)
def test_a_request_with_constraints_never_gets_an_order_that_was_not_declared_for_it(
    make: Make, fields: dict[str, Any]
) -> None:
    with faulty(Answer(503)) as server:
        (name,) = fields
        with pytest.raises(RouterUnavailableError, match=name):
            make(server, default=DEFAULT).route(prompt=EASY, **fields)
        asked: list[Any] = []

        def declared(request: Any) -> tuple[str, ...]:
            asked.append(request)
            return ("safe", "safer") if request.get(name) == fields[name] else ()

        client = make(server, default=DEFAULT, default_for=declared)
        routed = client.route(prompt=EASY, **fields)
        assert (routed.model, routed.fallbacks, routed.local) == ("safe", ("safer",), True)
        assert client.route(prompt=EASY, candidates=["safer"], **fields).model == "safer"
        for other in ({}, {"candidates": ["unsafe"], **fields}):
            with pytest.raises(RouterUnavailableError):
                client.route(prompt=EASY, **other)
        with pytest.raises(TypeError):
            asked[0]["data_class"] = "public"


def test_every_field_of_the_service_is_known_and_is_a_wish_or_a_constraint() -> None:
    assert set(RouteFields.__annotations__) | {"messages", "prompt"} == set(RouteBody.model_fields)
    assert set(OutcomeFields.__annotations__) | {"decision_id"} == set(OutcomeBody.model_fields)
    binding = {"data_class", "region", "needs", "max_cost_usd"}
    assert set(constraints(dict.fromkeys(RouteBody.model_fields, "x"))) == binding
    assert constraints({"needs": [], "data_class": None, "region": "", "x": None}) == []


# --- time


@pytest.mark.parametrize(
    "answer", [HANG, Answer(503, headers={"retry-after": "30"}), Answer(body=GOOD.body, after_s=2)]
)
def test_no_call_takes_longer_than_its_deadline(make: Make, answer: Answer) -> None:
    with faulty(answer) as server:
        client = make(server, deadline_s=0.2, report_deadline_s=0.3, default=DEFAULT)
        assert took(lambda: client.route(prompt=EASY)) < 0.6
        assert took(lambda: client.report("d", quality=1.0)) < 0.8


def test_an_answer_that_comes_byte_by_byte_ends_with_the_deadline_too(make: Make) -> None:
    with faulty(Answer(body=GOOD.body, drip_s=0.02)) as server:
        assert took(lambda: make(server, deadline_s=0.2, default=DEFAULT).route(prompt=EASY)) < 0.9


def test_a_host_that_does_not_answer_costs_the_connect_timeout(make: Make) -> None:
    # A full backlog: the kernel drops further SYNs, as a host that is gone does.
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fill = [socket.socket() for _ in range(4)]
        for one in fill:
            one.setblocking(False)
            one.connect_ex(listener.getsockname())
        client = make(
            f"http://127.0.0.1:{listener.getsockname()[1]}", deadline_s=5, connect_timeout_s=0.1, default=DEFAULT
        )
        assert took(lambda: client.route(prompt=EASY)) < 1.0
        for one in fill:
            one.close()


# --- once more


def soon() -> str:
    return format_datetime(datetime.now(UTC) - timedelta(seconds=5), usegmt=True)


@pytest.mark.parametrize(
    "first",
    [Answer(503), Answer(503, headers={"retry-after": "0.1"}), Answer(503, headers={"retry-after": "x"}), DIE,
     Answer(503, headers={"retry-after": soon()}), Answer(200, GOOD.body, cut=20)],
)  # fmt: skip
def test_one_repetition(make: Make, first: Answer) -> None:
    with faulty(first, GOOD) as server:
        client = make(server, deadline_s=2.0)
        assert took(lambda: client.route(prompt=EASY)) >= float(first.headers.get("retry-after") == "0.1") / 10
    assert len(server.seen) == 2 and server.seen[0][2] == server.seen[1][2]


def test_no_second_repetition_and_none_of_other_failures(make: Make) -> None:
    with faulty(Answer(503)) as server:
        make(server, deadline_s=5, default=DEFAULT).route(prompt=EASY)
    assert len(server.seen) == 2
    with faulty(Answer(500)) as server:
        make(server, deadline_s=5, default=DEFAULT).route(prompt=EASY)
    assert len(server.seen) == 1


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(make: Make) -> None:
    with faulty(Answer(503, headers={"retry-after": "1"})) as server:
        client = make(server, deadline_s=0.5, default=DEFAULT)
        assert took(lambda: client.route(prompt=EASY)) < 0.4
    assert len(server.seen) == 1


def test_a_report_is_sent_until_it_is_stored_under_one_key(make: Make) -> None:
    with faulty(Answer(503), DIE, Answer(503), Answer(200)) as server:
        assert make(server, report_deadline_s=10).report("d1", quality=1.0)
        assert make(server).report("d1", quality=0.0) and make(server).report("d2", quality=1.0)
        assert make(server).report("d1", quality=1.0, idempotency_key="mine")
    keys = [headers["idempotency-key"] for _path, headers, _body in server.seen]
    assert len(set(keys[:4])) == 1 and len({*keys[3:6]}) == 3 and keys[6] == "mine"
    assert json.loads(server.seen[0][2]) == {"decision_id": "d1", "quality": 1.0}


# --- the circuit


def test_after_failures_in_a_row_the_service_is_left_alone_then_probed(make: Make) -> None:
    with faulty(*[HANG] * 3, GOOD) as server:
        client = make(server, deadline_s=0.1, default=DEFAULT, failures_to_open=3, cool_down_s=1.0)
        for _ in range(3):
            assert client.route(prompt=EASY).local
        assert took(lambda: [client.route(prompt=EASY) for _ in range(50)]) < 0.5
        assert len(server.seen) == 3
        assert client.report("d", quality=1.0), "outcomes are counted apart"
        time.sleep(1.0)
        assert not client.route(prompt=EASY).local and not client.route(prompt=EASY).local


def test_one_probe_at_a_time(make: Make) -> None:
    with faulty(Answer(500)) as server:
        client = make(server, deadline_s=0.5, default=DEFAULT, failures_to_open=2, cool_down_s=0.4)
        for _ in range(10):
            client.route(prompt=EASY)
        assert len(server.seen) == 2
        server.script[:] = [HANG]
        time.sleep(0.4)
        with ThreadPoolExecutor(8) as pool:
            assert all(r.local for r in pool.map(lambda _: client.route(prompt=EASY), range(8)))
        assert len(server.seen) == 3


def test_a_refusal_is_an_answer_and_one_success_forgives(make: Make) -> None:
    with faulty(*[Answer(500), Answer(422)] * 4, *[Answer(500), GOOD] * 4) as server:
        client = make(server, default=DEFAULT, failures_to_open=2)
        for _ in range(4):
            client.route(prompt=EASY)
            with pytest.raises(RouterRequestError):
                client.route(prompt=EASY)
        assert [client.route(prompt=EASY).local for _ in range(8)] == [True, False] * 4


# --- its manners


def test_text_that_is_not_quite_unicode_and_numbers_that_are_not_json(make: Make, live: Running) -> None:
    client = make(live, deadline_s=5)
    assert client.route(prompt=EASY + " \ud800 é 水").model
    with pytest.raises(ValueError, match="JSON"):
        client.route(prompt=EASY, max_cost_usd=float("nan"))


@pytest.mark.parametrize(
    ("url", "options"),
    [("127.0.0.1:8000", {}), ("ftp://x", {}), ("http://x", {"deadline_s": 0}), ("http://x", {"failures_to_open": 0}),
     ("http://x", {"api_key": "schlüssel"}), ("http://x", {"cool_down_s": -1})],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_once(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has to|have to"):
        RouterClient(url, **options)


def test_no_proxy_of_the_environment_sees_a_prompt(make: Make, live: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty(GOOD) as proxy:
        for name in ("http_proxy", "all_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert make(live, deadline_s=5).route(prompt=EASY).model == "local"
    assert proxy.seen == []


def test_importing_it_brings_httpx_and_the_standard_library_alone() -> None:
    said = "import sys; old = set(sys.modules); import httpx; with_httpx = set(sys.modules); import serving.client;"
    said += "print(sorted({m.partition('.')[0] for m in set(sys.modules) - with_httpx} - set(sys.stdlib_module_names)))"
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['serving']"
