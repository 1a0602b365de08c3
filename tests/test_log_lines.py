"""The log's lines: each is whole and on one line, and no prompt is in any, whatever fails."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from live_service import ROOT, free_port, process

from router_ml.log_lines import LineFormatter, exception_of
from serving.settings import KEYS_VARIABLE

CANARY = "canary-4711"
TEXT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00 (INFO|WARNING|ERROR|CRITICAL) [\w.]+: \S.*")
FORMS = pytest.mark.parametrize("form", ["text", "json"])

# Everything in which a prompt could reach the log: exceptions of the endpoint, of a task, a thread, a callback and a
# finaliser, a library's traceback, a warning, a record that cannot be formatted.
FAULTY = """
import asyncio, logging, sys, threading, warnings
from pathlib import Path
from serving import endpoints
from serving.app import serve
from serving.service import Service
from serving.settings import Settings

class Unlucky:
    def __init__(self, prompt):
        self.prompt = prompt
    def __del__(self):
        raise ValueError(self.prompt)

async def fails(prompt):
    raise ValueError(prompt)

def raises(prompt):
    raise ValueError(prompt)

def record(self, live, body, asked, decision, estimate):
    prompt = body.prompt
    loop = asyncio.get_running_loop()
    if prompt.endswith("task"):
        loop.create_task(fails(prompt))
    elif prompt.endswith("thread"):
        threading.Thread(target=raises, args=(prompt,)).start()
    elif prompt.endswith("callback"):
        loop.call_soon(raises, prompt)
    elif prompt.endswith("finaliser"):
        Unlucky(prompt)
    elif prompt.endswith("library"):
        try:
            raises(prompt)
        except ValueError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application\\n")
            logging.getLogger("elsewhere").exception("while handling {'prompt': '%s'}", prompt)
    elif prompt.endswith("format"):
        logging.getLogger("serving.x").error("%d rows", prompt)
    elif prompt.endswith("field"):
        logging.getLogger("serving.x").error("two\\nlines", extra={"decision_id": decision.decision_id, "body": body})
    else:
        raise RuntimeError(prompt) from KeyError(prompt)

Service.record = record
serve(Settings(bundle=Path(sys.argv[1]), store=sys.argv[2], port=int(sys.argv[3]), log_format=sys.argv[4]))
"""
FAULTS = ("task", "thread", "callback", "finaliser", "library", "format", "field", "endpoint")


def parsed(said: str, form: str) -> list[dict[str, object]]:
    lines = said.splitlines()
    if form == "text":
        assert [line for line in lines if not TEXT.fullmatch(line)] == []
        return []
    found = [json.loads(line) for line in lines]
    assert all({"time", "level", "logger", "message"} <= set(line) for line in found)
    return found


@FORMS
def test_no_failure_brings_a_prompt_into_a_line(form: str, tiny_bundle: Path, tmp_path: Path) -> None:
    import httpx
    from live_service import wait_for

    port = free_port()
    command = [sys.executable, "-c", FAULTY, str(tiny_bundle), str(tmp_path / "store.db"), str(port), form]
    started = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:

            def ready() -> bool:
                assert started.poll() is None, started.communicate()[0]
                try:
                    return http.get("/readyz").is_success
                except httpx.TransportError:
                    return False

            wait_for(ready, 60)
            answers = {f: http.post("/route", json={"prompt": f"{CANARY} {f}"}).status_code for f in FAULTS}
            http.get(f"/{CANARY}")
        started.send_signal(signal.SIGTERM)
        said, _ = started.communicate(timeout=30)
    finally:
        started.kill()
        started.wait()
    assert answers == {fault: 500 if fault == "endpoint" else 200 for fault in FAULTS}
    assert CANARY not in said and "Traceback" not in said
    lines = parsed(said, form)
    for told in ("Task exception was never retrieved", "an exception that nobody caught: ValueError", "Exception in",
                 "RuntimeError in the service", "while handling", "cannot be written: TypeError", "Uvicorn running",
                 "Application shutdown complete"):  # fmt: skip
        assert told in said, told
    if form == "json":
        (field,) = [line for line in lines if line["message"] == "two\nlines"]
        assert re.fullmatch(r"[0-9a-f]{32}", str(field["decision_id"])) and field["body"] == "RouteBody"
        (task,) = [line for line in lines if line["message"] == "Task exception was never retrieved"]
        (error,) = task["exception"]  # type: ignore[misc]
        assert error["type"] == "ValueError" and error["at"][0].endswith(" fails")
        (serving,) = [line for line in lines if str(line["message"]).startswith("RuntimeError in the service")]
        assert serving["logger"] == "serving.problems" and serving["level"] == "ERROR"


@FORMS
def test_an_ordinary_life_in_lines(form: str, tiny_bundle: Path, tmp_path: Path) -> None:
    with process(bundle=tiny_bundle, store=tmp_path / "store.db", log_format=form) as (started, http):
        for body in ({"prompt": CANARY}, {"prompt": [CANARY]}, {"messages": [{"role": CANARY}]}):
            http.post(f"/route?{CANARY}", json=body)
        assert http.post("/admin/reload").is_success
        started.send_signal(signal.SIGTERM)
        said, _ = started.communicate(timeout=30)
    assert CANARY not in said and "Uvicorn running" in said
    lines = parsed(said, form)
    if form == "json":
        (loaded,) = [line for line in lines if "model_version" in line]
        assert str(loaded["model_version"]) in str(loaded["message"]) and loaded["logger"] == "serving.live"
        assert not any("color_message" in line for line in lines)


def test_a_start_that_fails_is_a_line_too(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from router_ml.cli import main; main()", "serve", "--log-format", "json"]
    done = subprocess.run(
        [*command, "--bundle", str(tmp_path / "nowhere"), "--store", str(tmp_path / "s.db")],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k != KEYS_VARIABLE},
        capture_output=True,
        text=True,
        timeout=60,
    )
    (line,) = parsed(done.stderr, "json")
    assert done.returncode == 2 and line["level"] == "CRITICAL" and "no bundle at" in str(line["message"])


def test_the_process_that_drains_the_spool_says_it_in_the_same_form(tiny_bundle: Path, tmp_path: Path) -> None:
    away = f"postgresql+psycopg://nobody:{CANARY}@127.0.0.1:{free_port()}/none"
    with process(bundle=tiny_bundle, store=away, spool=tmp_path / "spool", log_format="json") as (started, http):
        assert http.post("/route", json={"prompt": CANARY}).is_success
        time.sleep(1.0)
        started.kill()  # the other process ends with it
        said, _ = started.communicate(timeout=60)
    drained = [line for line in parsed(said, "json") if line["logger"] == "router_ml.drain"]
    assert drained and "the spool keeps what comes" in str(drained[0]["message"]) and CANARY not in said


def test_an_exceptions_chain_is_named_without_its_texts() -> None:
    try:
        try:
            raise KeyError(CANARY)
        except KeyError as inner:
            raise ValueError(CANARY) from inner
    except ValueError as error:
        chain = exception_of(error)
    assert [link["type"] for link in chain] == ["ValueError", "KeyError"]
    assert all(link["at"] for link in chain) and CANARY not in json.dumps(chain)


@FORMS
def test_what_json_cannot_hold_still_makes_a_line(form: str) -> None:
    extra = {"nan": float("nan"), "half": "\ud800", "n": 3, "none": None, "many": [CANARY], "message": "x"}
    record = logging.makeLogRecord({"name": "serving.x", "levelname": "INFO", "msg": "a\nb\u2028c\x1b[31m", **extra})
    line = LineFormatter(form).format(record)  # type: ignore[arg-type]
    assert CANARY not in line and len(line.splitlines()) == 1 and "\x1b" not in line
    line.encode("utf-8")
    if form == "json":
        assert json.loads(line)["nan"] == "nan" and json.loads(line)["n"] == 3
