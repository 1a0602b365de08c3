"""What one client may take of the service: lengths, counts, depth and time have bounds, and a refusal says which."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import time
import timeit
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_service import Running, running, sha256

from serving.routes import MAX_VALUES, names_this_machine

SLOW = 0.5  # seconds that a head and a body have
JSON = {"content-type": "application/json"}
GOOD = {"prompt": "What is the plural of river?"}
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def live(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    store = tmp_path_factory.mktemp("limits") / "store.db"
    with running(tiny_bundle, store, max_messages=3, max_candidates=2, request_seconds=SLOW) as live:
        yield live


def refused(response: httpx.Response, status: int, says: str) -> None:
    assert response.status_code == status, response.text[:300]
    assert response.headers["content-type"] == "application/problem+json"
    assert says in response.json()["detail"] and len(response.content) < 5_000


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"messages": [USER] * 4}, "'messages' may have 3 entries, and has 4: send the newest of them"),
        ({**GOOD, "candidates": ["mid"] * 3}, "'candidates' may have 2 entries, and has 3: name fewer"),
        ({**GOOD, "tools": [{}] * 1001}, "tools: may have 1,000 entries, and has more: send fewer"),
        ({**GOOD, "functions": [{}] * 1001}, "functions: may have 1,000 entries"),
        ({**GOOD, "needs": ["json"] * 4}, "needs: may have 3 entries"),
        ({**GOOD, "session": "x" * 257}, "session: may have 256 characters, and has more: send a shorter one"),
        ({**GOOD, "candidates": ["x" * 257]}, "candidates.0: may have 256 characters"),
        ({**GOOD, "tenant": "a\x00b"}, "tenant: may not hold control characters: leave them out"),
        ({**GOOD, "task": "a\nb"}, "task: may not hold control characters"),
        ({**GOOD, "request_id": "\x7f"}, "request_id: may not hold control characters"),
        ({"messages": [{**USER, "content": [{}] * MAX_VALUES}]}, "may hold 50,000 JSON values, and holds more"),
        ({**GOOD, "x": ["y"] * MAX_VALUES}, "may hold 50,000 JSON values"),
        ({**GOOD, "x": dict.fromkeys(map(str, range(MAX_VALUES)))}, "may hold 50,000 JSON values"),
        ({**GOOD, "x": ['"\\'] * 5 * MAX_VALUES}, "may hold 50,000 JSON values"),
    ],
)
def test_what_is_too_much_is_refused_with_its_bound(live: Running, body: dict[str, Any], says: str) -> None:
    refused(live.http.post("/route", json=body), 422, says)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [USER] * 3, "candidates": ["mid", "local"], "session": "x" * 256},
        {**GOOD, "tools": [{}] * 1000, "functions": [{}] * 1000, "tenant": "Zoë 東京"},
        {**GOOD, "x": [1] * (MAX_VALUES - 5)},
        {"prompt": '[{"a", [1, 2], "\\'.join(["\\"] * (MAX_VALUES // 4))},
    ],
)
def test_what_is_just_not_too_much_is_answered(live: Running, body: dict[str, Any]) -> None:
    assert live.http.post("/route", json=body).status_code == 200


def test_depth(live: Running) -> None:
    def nested(depth: int) -> bytes:
        return b'{"prompt":"x","x":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"

    assert live.http.post("/route", content=nested(200), headers=JSON).status_code == 200
    says = "the body may be nested 200 levels deep, and is deeper: flatten it"
    refused(live.http.post("/route", content=nested(202), headers=JSON), 422, says)


def test_a_batch_is_bounded_whole_and_each_of_its_requests_alone(live: Running) -> None:
    refused(live.http.post("/route/batch", json={"requests": [GOOD] * 101}), 422, "requests: may have 100 entries")
    said = live.http.post("/route/batch", json={"requests": [GOOD, {"messages": [USER] * 4}]}).json()["results"]
    assert said[0]["decision"] and "may have 3 entries, and has 4" in said[1]["problem"]["detail"]


def test_bodies_without_a_conversation_are_short(live: Running) -> None:
    long = {"decision_id": "d", "x": "y" * 70_000}
    refused(live.http.post("/outcomes", json=long), 413, "the body may have 65536 bytes")
    refused(live.http.put("/models/mid/health", json=long), 413, "the body may have 65536 bytes")


def test_what_is_no_field_is_named_only_where_it_could_be_one(live: Running) -> None:
    for name, shown in (("qualty", "qualty"), ("my secret prompt", "…"), ("x" * 60_000, "…")):
        refused(live.http.post("/outcomes", json={"decision_id": "d", name: 1}), 422, f"{shown}: Extra inputs")


def test_a_body_that_is_encoded_is_refused(live: Running) -> None:
    headers = JSON | {"content-encoding": "gzip"}
    said = live.http.post("/route", content=gzip.compress(json.dumps(GOOD).encode()), headers=headers)
    refused(said, 415, "without a content-encoding")
    assert said.headers["accept-encoding"] == "identity"
    assert live.http.post("/route", json=GOOD, headers={"content-encoding": "identity"}).status_code == 200


HEAD = b"POST /route HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


def connect(live: Running) -> socket.socket:
    return socket.create_connection((live.http.base_url.host, live.http.base_url.port or 80), timeout=20)


def trickle(live: Running, start: bytes, more: bytes, pause: float = 0.02) -> tuple[bytes, float]:
    """Sends the start, then more and more until the service has closed: all that it said, and the seconds it took."""
    began, said = time.monotonic(), b""
    with connect(live) as client:
        with contextlib.suppress(OSError):
            client.sendall(start)
        client.settimeout(max(pause, 0.001))
        while time.monotonic() < began + 20:
            try:
                got = client.recv(65_536)
                said += got
                if not got:
                    break
            except TimeoutError:
                with contextlib.suppress(OSError):
                    client.send(more)
            except OSError:
                break
        else:
            pytest.fail("the service has held the connection")
    return said, time.monotonic() - began


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (HEAD + b"content-length: 5000\r\n\r\n", b"x"),
        (HEAD + b"content-length: 5000\r\n\r\n", b""),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (HEAD, b"x: y\r\n"),
        (HEAD, b""),
        (b"", b""),
        (b"\r\n", b"\r\n"),
    ],
)
def test_a_request_that_trickles_is_ended(live: Running, start: bytes, more: bytes) -> None:
    said, seconds = trickle(live, start, more)
    assert said.startswith(b"HTTP/1.1 408 Request Timeout") and b"urn:router-ml:problem:timeout" in said
    assert b"was not here within 0.5 s" in said and SLOW * 0.9 < seconds < SLOW + 5


def test_a_body_that_nobody_reads_is_ended(live: Running) -> None:
    said, seconds = trickle(live, HEAD.replace(b"json", b"xml") + b"transfer-encoding: chunked\r\n\r\n", b"1\r\nx\r\n")
    assert said.startswith(b"HTTP/1.1 415 ") and seconds < SLOW + 6


@pytest.mark.parametrize(
    ("start", "more", "status"),
    [
        (HEAD + b"x: ", b"y" * 60_000, b"431"),
        (b"GET /", b"y" * 60_000, b"431"),
        (HEAD, b"".join(b"x%d: y\r\n" % i for i in range(6_000)), b"431"),
        (HEAD + b"transfer-encoding: chunked\r\n\r\n1;", b"x" * 60_000, b""),
        (
            HEAD + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
            b"".join(b"x%d: y\r\n" % i for i in range(6_000)),
            b"",
        ),
    ],
)
def test_a_head_and_what_is_no_body_have_a_length(live: Running, start: bytes, more: bytes, status: bytes) -> None:
    service = live.service
    with running(
        Path(service.live.bundle), Path(service.settings.store).with_name("x.db"), max_body_bytes=1024
    ) as patient:
        said, seconds = trickle(patient, start, more, pause=0.0)
    assert said[9:12] == status and seconds < 15


def test_a_head_of_an_honest_length_is_read(live: Running) -> None:
    headers = {f"x-{i}": "y" * 1000 for i in range(50)}
    assert live.http.post("/route", json=GOOD, headers=headers).status_code == 200


def test_clients_that_hang_hold_up_nobody(live: Running) -> None:
    with contextlib.ExitStack() as stack:
        for start in (HEAD + b"content-length: 9\r\n\r\n{", HEAD, b"") * 20:
            client = stack.enter_context(connect(live))
            client.sendall(start)
        began = time.monotonic()
        assert live.http.post("/route", json=GOOD).status_code == 200
        assert time.monotonic() - began < SLOW


def test_an_answer_comes_before_the_end_that_garbage_makes(live: Running) -> None:
    body = json.dumps(GOOD).encode()
    good = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
    with connect(live) as client:
        client.sendall(good + b"GARBAGE\r\n\r\n")
        said = b"".join(iter(lambda: client.recv(65_536), b""))
    assert said.startswith(b"HTTP/1.1 200 ") and said.count(b"HTTP/1.1") == 1 and b"connection: close" in said
    with connect(live) as client:
        client.sendall(b"GARBAGE\r\n\r\n")
        said = b"".join(iter(lambda: client.recv(65_536), b""))
    assert said.startswith(b"HTTP/1.1 400 ") and b"application/problem+json" in said


def test_an_upgrade_is_not_taken_up(live: Running) -> None:
    upgrade = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "x", "sec-websocket-version": "13"}
    assert live.http.get("/healthz", headers=upgrade).status_code == 200
    upgrade = {"connection": "Upgrade, HTTP2-Settings", "UPGRADE": "h2c", "http2-settings": "x"}  # Java's client
    assert live.http.post("/route", json=GOOD, headers=upgrade).status_code == 200
    assert live.http.post("/route", json=GOOD).status_code == 200


def test_a_caller_without_a_key_is_refused_before_his_body_is_read(tiny_bundle: Path, tmp_path: Path) -> None:
    keys = {"k": sha256("k")}
    with running(tiny_bundle, tmp_path / "store.db", api_keys=keys, request_seconds=SLOW) as guarded:
        said, seconds = trickle(guarded, HEAD + b"content-length: 5000\r\n\r\n", b"x")
    assert said.startswith(b"HTTP/1.1 401 ") and seconds < SLOW + 6


@pytest.mark.parametrize("body", [{"prompt": "a\0b"}, {"messages": [{"role": "user", "content": "a\0b"}]}])
def test_no_text_keeps_a_decision_out_of_postgres(tiny_bundle: Path, postgres_url: str, body: dict[str, Any]) -> None:
    with running(tiny_bundle, postgres_url, store_prompts="text") as live:
        made = live.http.post("/route", json=body).json()["decision_id"]
        assert [row["decision_id"] for row in live.decisions()] == [made]


def test_a_method_that_a_path_does_not_take_is_told_all_that_it_takes(live: Running) -> None:
    for path, allowed in (("/policy", "DELETE, GET, PUT"), ("/models/a/b/health", "PUT"), ("/healthz", "GET")):
        said = live.http.post(path, json={})
        refused(said, 405, f"use {allowed}")
        assert said.headers["allow"] == allowed


PATHS = (("POST", "/route"), ("GET", "/policy"), ("PUT", "/policy"), ("GET", "/console"), ("GET", "/nothing"))


@pytest.mark.parametrize(
    "host", ["rebound.example:8000", "x", "", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.1.5:8000"]
)  # fmt: skip
def test_without_keys_a_name_that_is_not_this_machine_is_refused(live: Running, host: str) -> None:
    """DNS rebinding makes a foreign page the same origin as 127.0.0.1: all that tells it apart is the name it says."""
    for method, path in PATHS:
        said = live.http.request(method, path, json=GOOD, headers={"host": host})
        refused(said, 421, "use one of these as the host, or start the service with API keys")
        assert said.json()["type"] == "urn:router-ml:problem:misdirected"


def test_this_machine_by_any_of_its_names_is_served(live: Running) -> None:
    for host in ("localhost", "LocalHost:8000", "127.0.0.1:1", "127.8.9.1", "[::1]", "[::1]:8000"):
        assert live.http.post("/route", json=GOOD, headers={"host": host}).status_code == 200, host
        assert live.http.get("/console", headers={"host": host}).status_code == 200, host


def test_a_second_host_does_not_help_and_none_is_an_old_client(live: Running) -> None:
    for head, status in (
        (b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nhost: evil.example\r\n\r\n", b"421"),
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"200"),
    ):
        with connect(live) as client:
            client.sendall(head)
            assert client.recv(65_536).split(b" ")[1] == status


def test_with_keys_any_name_is_served(tiny_bundle: Path, tmp_path: Path) -> None:
    with running(tiny_bundle, tmp_path / "store.db", api_keys={"one": sha256("one")}) as keyed:
        headers = {"host": "router.example.org", "x-api-key": "one"}
        assert keyed.http.post("/route", json=GOOD, headers=headers).status_code == 200


def test_the_look_at_the_host_costs_microseconds() -> None:
    headers = [(b"host", b"127.0.0.1:8000"), *((b"x-%d" % i, b"value") for i in range(8))]
    took = min(timeit.repeat(lambda: names_this_machine(headers), number=1_000, repeat=20)) / 1_000
    assert took < 10e-6, f"{took * 1e6:.2f} us"
