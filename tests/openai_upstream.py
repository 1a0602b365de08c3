"""A provider as gateways see it: OpenAI's API over HTTP, which notes what it is asked and fails where it is told to."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Upstream:
    """`asked` are the models in the order of the calls; `fails` maps a model to the status that it answers with.

    400 is what providers say of a request that is too long. `silent` are the models whose streams say no usage.
    """

    url: str = ""
    asked: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    fails: dict[str, int] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)

    def reset(self, **fails: int) -> None:
        self.asked.clear()
        self.bodies.clear()
        self.fails = fails


USAGE = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}


@contextlib.contextmanager
def openai_upstream() -> Iterator[Upstream]:
    """Serves on a free port of 127.0.0.1."""
    state, ids = Upstream(), itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            model = body["model"]
            state.asked.append(model)
            state.bodies.append(body)
            if status := state.fails.get(model):
                long = "This model's maximum context length is 3 tokens: " if status == 400 else ""
                error = {"message": f"{long}{model} is told to fail", "type": "t", "code": str(status)}
                self._json(status, {"error": error})
                return
            base = {"id": f"answer-{next(ids)}", "created": 1, "model": model}
            if body.get("stream"):
                self._stream(base)
                return
            text = f"{model} says so"
            choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
            if self.path.endswith("/responses"):
                part = {"type": "output_text", "text": text, "annotations": []}
                output = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [part]}
                usage = {"input_tokens": 11, "output_tokens": 7, "total_tokens": 18}
                answer = {"object": "response", "created_at": 1, "status": "completed", "output": [output]}
                self._json(200, base | answer | {"usage": usage})
            elif self.path.endswith("/chat/completions"):
                choice["message"] = {"role": "assistant", "content": text}
                self._json(200, base | {"object": "chat.completion", "choices": [choice], "usage": USAGE})
            else:
                choice["text"] = text
                self._json(200, base | {"object": "text_completion", "choices": [choice], "usage": USAGE})

        def _stream(self, base: dict[str, Any]) -> None:
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("connection", "close")
            self.end_headers()
            chunk = base | {"object": "chat.completion.chunk"}
            for choice in ({"delta": {"role": "assistant", "content": "so"}}, {"delta": {}, "finish_reason": "stop"}):
                self._event(chunk | {"choices": [{"index": 0} | choice]})
            if base["model"] not in state.silent:
                self._event(chunk | {"choices": [], "usage": USAGE})
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def _event(self, content: dict[str, Any]) -> None:
            self.wfile.write(b"data: " + json.dumps(content).encode() + b"\n\n")

        def _json(self, status: int, content: dict[str, Any]) -> None:
            raw = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(raw)))
            self.end_headers()
            self.wfile.write(raw)

        def log_message(self, *_args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
