"""Runs a `drain.Drainer` beside the service: in a thread, or in a process that is started again when it dies."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from router_ml import log_lines
from router_ml.drain import RETRY_SECONDS, Drainer, Progress, run

log = logging.getLogger(__name__)


def module_command(module: str) -> list[str]:
    """What `python -m module` would be, but with the modules that this process has, from wherever it has them."""
    run_main = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {module} import main; main()"
    return [sys.executable, "-P", "-c", run_main, json.dumps(sys.path)]


class Draining(Protocol):
    """A drainer at work. `progress` is its last report; `say` takes the words of `drain.run`."""

    progress: Progress

    @property
    def alive(self) -> bool: ...  # noqa: D102
    def say(self, word: str) -> None: ...  # noqa: D102
    def join(self, timeout: float) -> bool: ...  # noqa: D102


class DrainThread:
    """In a thread of this process."""

    def __init__(self, url: str, folder: Path, interval: float) -> None:
        self.progress = Progress()
        self._words: queue.Queue[str] = queue.Queue()
        drainer = Drainer(url, folder)
        self._thread = threading.Thread(
            target=run, args=(drainer, interval, self._wait, self._report), name="store-drain", daemon=True
        )
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._thread.is_alive()

    def say(self, word: str) -> None:
        """Tells it to hurry or to end."""
        self._words.put(word)

    def join(self, timeout: float) -> bool:
        """Waits for its end; False when it still runs."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _wait(self, seconds: float) -> str | None:
        with contextlib.suppress(queue.Empty):
            return self._words.get(timeout=max(seconds, 0.001))
        return None

    def _report(self, progress: Progress) -> None:
        self.progress = progress


class DrainProcess:
    """In a process of its own, which ends with this one; till then it holds `lock`, the spool folder's, too."""

    def __init__(self, url: str, folder: Path, interval: float, lock: int) -> None:
        self.progress = Progress()
        settings = {"url": url, "folder": str(folder), "interval": interval, "log": log_lines.configured()}
        self._settings = json.dumps(settings)
        self._lock = lock
        self._ending = False
        self._said = threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._supervise, name="store-drain", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def say(self, word: str) -> None:
        """Tells it to hurry or to end."""
        with self._said, contextlib.suppress(OSError):
            self._ending = self._ending or word == "close"
            assert self._process.stdin is not None
            self._process.stdin.write(f"{word}\n")
            self._process.stdin.flush()

    def join(self, timeout: float) -> bool:
        """Waits for its end; False when it still runs, and is left to end by itself."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _start(self) -> subprocess.Popen[str]:
        # The URL may hold a password, which a command line or an environment would show.
        process = subprocess.Popen(
            module_command("router_ml.drain"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(self._lock,),
        )
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(f"{self._settings}\n")
            process.stdin.flush()
        return process

    def _supervise(self) -> None:
        base, pause = Progress(), RETRY_SECONDS[0]
        while True:
            assert self._process.stdout is not None
            for line in self._process.stdout:
                with contextlib.suppress(ValueError, TypeError):
                    told = Progress(**json.loads(line))
                    for name in ("decisions", "outcomes", "dropped", "failures", "torn"):
                        setattr(told, name, getattr(told, name) + getattr(base, name))
                    told.position = max(told.position, base.position)
                    self.progress, pause = told, RETRY_SECONDS[0]
            code = self._process.wait()
            with self._said:
                if self._ending:
                    return
            log.error("the process that drains the spool ended with %s: starting it again", code)
            base, started = self.progress, False
            while not started:
                time.sleep(pause)
                pause = min(2 * pause, RETRY_SECONDS[1])
                with self._said:
                    if self._ending:
                        return
                    try:
                        self._process, started = self._start(), True
                    except OSError as error:  # no memory or descriptors for a process just now
                        log.error("the process that drains the spool cannot be started: %s", error.strerror)
