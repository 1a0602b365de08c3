"""The service against clients that send anything: never a 5xx, never a hang, no prompt in an error or in the log."""

from __future__ import annotations

import gzip
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fuzzing import FIXED, TIMES, fuzzed
from hypothesis import given
from hypothesis import strategies as st
from live_service import process, sha256

KEY = "every-scope"
# Longer than a name may be, so that it is quoted nowhere for one, either.
CANARY = "canary 4711 " * 25
PROMPT = {"prompt": "Prove rigorously that the comet operator is bounded."}
SLOW = 0.4  # seconds that a head and a body have
DEADLINE = 10.0  # seconds within which any client has its answer, or the connection its end


@dataclass(frozen=True)
class Service:
    """A service in a process of its own, and all that it has said."""

    url: httpx.URL
    http: httpx.Client
    output: Path

    def healthy(self) -> None:
        """It answers as ever, it failed nowhere, and its log holds no prompt."""
        said = self.http.post("/route/preview", json=PROMPT)
        assert said.status_code == 200 and said.json()["model"] in ("mid", "frontier")
        log = self.output.read_text(errors="replace")
        assert "canary" not in log and "Traceback" not in log and "ERROR" not in log, log[-3000:]
        counted = [line for line in self.http.get("/metrics").text.splitlines() if 'status="5' in line]
        assert not counted, counted


@pytest.fixture(scope="module")
def service(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("fuzz")
    keys = {"all": {"sha256": sha256(KEY), "scopes": ["route", "outcomes", "health", "admin"]}}
    with (folder / "output").open("w") as output:
        options = {"bundle": tiny_bundle, "store": folder / "store.db", "api_keys": keys, "request_seconds": SLOW}
        with process(output=output, max_body_bytes=100_000, **options) as (_, http):
            http.headers["x-api-key"] = KEY
            service = Service(http.base_url, http, folder / "output")
            yield service
            service.healthy()


def test_the_service_does_what_its_document_says(service: Service, tmp_path: Path) -> None:
    command = [
        *(
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            str(service.url.join("/openapi.json")),
            "--no-color",
        ),
        *("--header", f"x-api-key: {KEY}", "--generation-with-security-parameters", "false"),
        # No schema knows which tiers and models there are, so not all that fits it is accepted.
        *("--checks", "all", "--exclude-checks", "positive_data_acceptance", "--request-timeout", str(DEADLINE)),
        *("--max-examples", str(5 * TIMES), "--continue-on-failure"),
        *(["--generation-deterministic"] if FIXED else ["--generation-database", "none"]),
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "Selected: 15/15" in done.stdout and "15 passed" in done.stdout
    for model in ("frontier", "mid", "hosted", "local"):  # it has found out their names, and opened some
        assert service.http.put(f"/models/{model}/health", json={"state": "auto"}).status_code == 200
    assert service.http.delete("/policy").status_code == 200
    service.healthy()


def request(body: bytes, path: str = "/route", *headers: bytes, framed: bytes | None = None) -> bytes:
    """A POST as bytes; `framed` stands in for the header that says the body's length."""
    head = [
        f"POST {path} HTTP/1.1".encode(),
        b"host: x",
        b"x-api-key: " + KEY.encode(),
        *(headers or [b"content-type: application/json"]),
        b"content-length: %d" % len(body) if framed is None else framed,
    ]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def exchange(service: Service, *pieces: bytes, pause: float = 0.0) -> tuple[int, bytes]:
    """Sends the pieces, and reads one answer: its status (0: the connection was closed without one) and its body.

    Fails where neither comes in time.
    """
    end = time.monotonic() + DEADLINE
    data = b""
    with socket.create_connection((service.url.host, service.url.port or 80), timeout=DEADLINE) as client:
        try:
            for piece in pieces:
                client.sendall(piece)
                if pause:
                    time.sleep(pause)
        except OSError:
            pass  # it has closed already: what it said is there to be read
        while (size := answer_size(data)) is None or len(data) < size:
            client.settimeout(max(end - time.monotonic(), 0.001))
            try:
                got = client.recv(65_536)
            except ConnectionResetError:
                got = b""
            if not got:
                break
            data += got
    assert b"canary" not in data
    while data.startswith(b"HTTP/1.1 1"):  # 100 Continue
        data = data.partition(b"\r\n\r\n")[2]
    return int(data.split(b" ", 2)[1]) if data else 0, data.partition(b"\r\n\r\n")[2]


def answer_size(data: bytes) -> int | None:
    """How many bytes the first answer has, once its head is there; answers in between (100 Continue) are skipped."""
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    if head.startswith(b"HTTP/1.1 1"):
        after = answer_size(rest)
        return None if after is None else len(head) + 4 + after
    lengths = [line[15:] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return len(head) + 4 + int(lengths[0])


TEXT = {"role": "user", "content": CANARY}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/route", {"prompt": CANARY}),
    ("/route/preview", {"prompt": CANARY, "candidates": ["mid"], "max_tokens": 5, "needs": ["json"], "region": "eu"}),
    ("/routing/v1/chat/completions", {"messages": [{"role": "system", "content": "x"}, TEXT], "tools": [{"a": 1}]}),
    ("/route", {"messages": [{"role": "user", "content": [{"type": "text", "text": CANARY}, {"type": "image_url"}]}]}),
    (
        "/route",
        {"prompt": CANARY, "objective": "quality", "max_cost_usd": 1.0, "explain": True, "data_class": "public"},
    ),
    ("/route/batch", {"requests": [{"prompt": CANARY, "tier": "economy"}, {"messages": [TEXT], "session": "s"}]}),
    ("/outcomes", {"decision_id": "d", "quality": 0.5, "status": "ok", "input_tokens": 5, "cost_usd": 0.1}),
]
VALUES = [
    *(
        "null",
        "true",
        "0",
        "-0.0",
        "-1",
        "1.5",
        "1e999",
        "-1e999",
        "NaN",
        "-Infinity",
        "9" * 400,
        "9" * 5000,
        "1e-9999999",
    ),
    *(
        '""',
        '"\\u0000"',
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\x7f"',
        '"mid"',
        '"' + "y" * 257 + '"',
        '"' + "\U0001f600" * 99 + '"',
    ),
    *(
        "[]",
        "{}",
        "[[]]",
        '[""]',
        "[null]",
        '[{"role":"user","content":null}]',
        '{"type":"json_schema"}',
        '["mid","nobody"]',
    ),
    *("[" * 150 + "]" * 150, "[" * 250 + "]" * 250, '{"a":' * 150 + "1" + "}" * 150, "[" + "[]," * 3000 + "1]", CANARY),
]
SNIPPETS = [
    *(
        b"\xff",
        b"\x00",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\\ud800",
        b"\\",
        b'"',
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b"\xef\xbb\xbf",
    ),
    *(
        b'"prompt":1,',
        b'"prompt":"y",',
        b'"messages":[],',
        b'"explain":true,',
        b"/*x*/",
        b"\n",
        b" " * 3000,
        b"[" * 250,
    ),
]


@st.composite
def bodies(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and valid JSON for it, in which values are others, keys come twice, or bytes have been disturbed."""
    path, body = draw(st.sampled_from(BODIES))
    pairs = [(json.dumps(name), json.dumps(value)) for name, value in body.items()]
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(pairs) - 1))
        name = draw(
            st.sampled_from([pairs[at][0]] * 3 + ['"tier"', '"tools"', '"retries"', '"min_probability"', '"x"'])
        )
        pairs.insert(at + draw(st.integers(0, 1)), (name, draw(st.sampled_from(VALUES))))
    data = b"{" + ",".join(f"{name}:{value}" for name, value in pairs).encode() + b"}"
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        at = draw(st.integers(0, len(data)))
        to = draw(st.integers(at, min(len(data), at + 60)))
        data = (
            data[:at] + draw(st.sampled_from(SNIPPETS) | st.binary(max_size=6) | st.just(data[at:to] * 9)) + data[to:]
        )
    return draw(st.sampled_from([path] * 9 + ["/outcomes"])), data


ANYTHING = st.tuples(st.sampled_from([path for path, _ in BODIES]), st.binary(max_size=300))


@fuzzed(300)
@given(sent=st.one_of(bodies(), bodies(), bodies(), ANYTHING))
def test_any_body_is_answered_or_refused(service: Service, sent: tuple[str, bytes]) -> None:
    path, body = sent
    status, said = exchange(service, request(body, path))
    assert status in (200, 400, 409, 413, 422), said
    answer = json.loads(said)
    if status != 200:
        assert answer["status"] == status and answer["detail"] and len(said) < 10_000
        return
    json.loads(body)  # what is accepted is JSON to others, too
    decided = answer["results"] if path == "/route/batch" else [{"decision": answer}]
    assert path == "/outcomes" or all(item["decision"] or item["problem"]["detail"] for item in decided)


@st.composite
def chunks(draw: st.DrawFn, body: bytes, lies: bool) -> bytes:
    """The body in chunks, which with `lies` may not be what they say."""
    out, at = b"", 0
    lied = st.sampled_from([0, 0, 0, 0, 3, -1, 2**40, 2**70]) if lies else st.just(0)
    ends = st.sampled_from([b"\r\n"] * 6 + [b"\n", b""]) if lies else st.just(b"\r\n")
    while at < len(body):
        part = body[at : at + draw(st.integers(max(1, len(body) // 9), len(body)))]
        extension = draw(st.sampled_from([b"", b"", b"", b";x=y", b";" + b"z" * 3000]))
        out += b"%x" % max(len(part) + draw(lied), 0) + extension + b"\r\n" + part + draw(ends)
        at += len(part)
    last = [b"0\r\n\r\n", b"0\r\nx: y\r\n\r\n"]
    return out + draw(st.sampled_from([*last, b"", b"0\r\n", b"-1\r\n\r\n"] if lies else last))


GOOD = [
    b"x: \xff\xfe",
    b"x:" + b"y" * 5000,
    b"content-encoding: identity",
    b"expect: 100-continue",
    b"connection: close",
]
GOOD += [b"x-forwarded-for: \xff, ,", b"idempotency-key: \xe4", b"accept-encoding: gzip", b"accept: text/html"]
BAD = [
    b"content-encoding: gzip",
    b"host: y",
    b"content-type: text/plain",
    b"content-length: \xb2",
    b"bad header",
    b" folded",
]
BAD += [b"connection: upgrade\r\nupgrade: websocket", b"connection: upgrade\r\nupgrade: h2c", b"x y: z", b"\x00: x"]
BAD += [b"transfer-encoding: identity", b"transfer-encoding: gzip", b"x-api-key: other", b"authorization: Bearer \xff"]


@st.composite
def framed(draw: st.DrawFn, lies: bool) -> bytes:
    """A good body in its frame, under further headers; with `lies` they may contradict each other, and more follows."""
    path, content = draw(st.sampled_from(BODIES))
    body = json.dumps(content).encode()
    headers = draw(st.lists(st.sampled_from(GOOD), max_size=2, unique=True))
    if lies:
        headers += draw(st.lists(st.sampled_from(BAD), max_size=1))
        body = gzip.compress(body) if b"content-encoding: gzip" in headers else body
    size = len(body) + (draw(st.sampled_from([0] * 6 + [5, -5, 2**31, 2**64, 10**30])) if lies else 0)
    length, encoding = b"content-length: %d" % size, b"transfer-encoding: chunked"
    frame = draw(st.sampled_from([length, encoding] + ([b"x: y", length + b"\r\n" + encoding] if lies else [])))
    data = request(
        draw(chunks(body, lies)) if encoding in frame else body,
        draw(st.sampled_from([path] * 6 + ["*", "//\xff%00%ed%a0%80", "/models/mid/health"])) if lies else path,
        *(b"content-type: application/json", *headers),
        framed=frame,
    )
    if not lies:
        return data
    if draw(st.integers(0, 5)) == 0:
        at = draw(st.integers(0, len(data) - 1))
        data = data[:at] + draw(st.binary(max_size=6)) + data[at + draw(st.integers(0, 3)) :]
    after = [b"GARBAGE\r\n\r\n", b"\x16\x03\x01", data, b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n" * 9]
    return data + draw(st.sampled_from([b""] * 5 + after))


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    return [data[a:b] for a, b in itertools.pairwise([0, *sorted(cuts), len(data)])]


CUTS = st.lists(st.integers(0, 600), max_size=3)


@fuzzed(50)
@given(data=framed(lies=False), cuts=CUTS)
def test_a_good_request_is_understood_however_it_is_framed(service: Service, data: bytes, cuts: list[int]) -> None:
    status, said = exchange(service, *pieces(data, cuts))
    assert status == 200 or (status == 409 and b"idempotency-key" in data), said


@fuzzed(80)
@given(data=st.one_of(*[framed(lies=True)] * 5, st.binary(max_size=200)), cuts=CUTS)
def test_any_bytes_are_answered_or_the_connection_ends(service: Service, data: bytes, cuts: list[int]) -> None:
    status, said = exchange(service, *pieces(data, cuts))
    assert status < 500, said
