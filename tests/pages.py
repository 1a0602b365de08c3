"""A documentation page gone through from top to bottom: its files written, its commands and its Python really run.

In a page's fenced blocks ```` ```console ```` holds commands, each begun by `$ `, and ```` ```python ```` a session's
code; ```` ```toml policy.toml ```` (any language, then a name) is a file that the reader is taken to have saved.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from click.testing import CliRunner
from live_service import free_port

from router_ml.cli import main

DECISION = re.compile(r"\b[0-9a-f]{32}\b")
_HERE = re.compile(r"http://127\.0\.0\.1:8000\b")
_TAKES = {"-H": "header", "-X": "method", "-d": "body"}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the file that it is or "", and its text."""

    language: str
    file: str
    body: str

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, as a shell takes them."""
        return [command.strip() for command in re.split(r"^\$ ", self.body, flags=re.MULTILINE) if command.strip()]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    found = re.findall(r"^```(\w*)(?: +([\w./-]+))?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [Block(*one) for one in found]


@dataclass
class Reader:
    """Who goes through a page: a folder, a shell's variables, the service that was started last, its last decision."""

    folder: Path
    variables: dict[str, str] = field(default_factory=dict)
    url: str = ""
    decision: str = ""
    service: subprocess.Popen[bytes] | None = None

    def go_through(self, text: str, answers_no: dict[str, str]) -> None:
        """Does all that the page does; its Python is one session, where the last of it stands.

        `answers_no` are beginnings of commands that may exit with 1 here, and why.
        """
        found = blocks(text)
        python = [i for i, block in enumerate(found) if block.language == "python"]
        for i, block in enumerate(found):
            if block.file:
                (self.folder / block.file).write_text(block.body, encoding="utf-8")
            elif block.language == "python" and i == python[-1]:
                session = "\n".join(_HERE.sub(self.url, found[at].body) for at in python)
                self._shell(f"python -c {shlex.quote(session)}")
            elif block.language == "console":
                for command in block.commands:
                    self.run(command, {0, 1} if any(command.startswith(begin) for begin in answers_no) else {0})

    def run(self, command: str, codes: set[int]) -> str:
        """Runs one command; returns what it prints. Fails where it does not exit with one of `codes`."""
        command = command.replace("\\\n", " ")
        if self.decision:
            command = DECISION.sub(self.decision, command)
        if export := re.fullmatch(r"export (\w+)=(.*)", command, re.DOTALL):
            self.variables[export[1]] = self._shell(f"printf %s {export[2]}")
            return ""
        program = command.split(maxsplit=1)[0]
        if program not in ("router-ml", "curl"):
            return self._shell(command)
        words = self._shell(f"printf '%s\\0' {command}").split("\0")[1:-1]
        if program == "curl":
            return self._curl(words)
        if words[0] == "serve":
            return self._serve(words)
        until = time.monotonic() + 30
        done = CliRunner(env=self.variables).invoke(main, words)
        while "the store knows no decision" in done.stderr and time.monotonic() < until:
            time.sleep(0.1)  # who types is slower than the drain, which takes decisions from the spool to the store
            done = CliRunner(env=self.variables).invoke(main, words)
        crashed = done.exception is not None and not isinstance(done.exception, SystemExit)
        assert done.exit_code in codes and not crashed, f"{command}\n{done.output}\n{done.exception!r}"
        return done.stdout

    def _shell(self, command: str) -> str:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=os.environ | self.variables | {"PATH": path},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        return done.stdout

    def _curl(self, words: list[str]) -> str:
        """The request that curl makes of these words; a machine may lack curl."""
        asked: dict[str, Any] = {"method": "", "body": None}
        headers: dict[str, str] = {}
        rest = iter(words)
        for word in rest:
            if kind := _TAKES.get(word):
                value = next(rest)
                if kind == "header":
                    name, _, text = value.partition(":")
                    headers[name.strip().lower()] = text.strip()
                else:
                    asked[kind] = value
            elif word != "-s":
                assert _HERE.match(word), f"curl {word}: say here what that means"
                asked["url"] = _HERE.sub(self.url, word)
        if asked["body"] is not None:
            headers.setdefault("content-type", "application/x-www-form-urlencoded")
        method = asked["method"] or ("GET" if asked["body"] is None else "POST")
        answer = httpx.request(method, asked["url"], headers=headers, content=asked["body"], timeout=30)
        assert answer.status_code == 200, f"{shlex.join(words)}\n{answer.text}"
        if answer.headers.get("content-type") == "application/json":
            self.decision = json.loads(answer.text).get("decision_id") or self.decision
        return answer.text

    def _serve(self, words: list[str]) -> str:
        """Starts the service on a free port in a process of its own, in place of the one that ran before."""
        self.stop()
        port = free_port()
        at = [i for i, word in enumerate(words) if word == "--port"]
        given = [word for i, word in enumerate(words) if not any(i - 1 == a or i == a for a in at)]
        self.url = f"http://127.0.0.1:{port}"
        log = self.folder / "service.log"
        with log.open("wb") as file:
            self.service = subprocess.Popen(
                [sys.executable, "-m", "router_ml.cli", *given, "--port", str(port)],
                cwd=self.folder, env=os.environ | self.variables, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        until = time.monotonic() + 60
        while True:
            assert self.service.poll() is None and time.monotonic() < until, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return ""
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the service, which writes what it has; the next one finds it all."""
        if self.service is not None:
            self.service.terminate()
            self.service.wait(30)
            self.service = None


@contextlib.contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    """A reader in a folder, which is the current one meanwhile; their service is ended."""
    before = Path.cwd()
    os.chdir(folder)
    one = Reader(folder)
    try:
        yield one
    finally:
        one.stop()
        os.chdir(before)
