"""The service's end of `router_ml.follow`: starts it, watches it, and serves what it brings.

What is served changes only when a version has been loaded, warmed up and checked; whatever fails before that leaves the
last good one in place, on disk as well (CACHE/current), from where the next start serves without the registry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from router_ml import log_lines
from router_ml.addresses import shown
from router_ml.draining import module_command
from router_ml.errors import InputError, RegistryError, RouterError
from router_ml.follow import CURRENT, INCOMING, VERSIONS, Backoff, Followed, Report
from serving.live import Holder, LiveRouter

log = logging.getLogger(__name__)
ANSWER_SECONDS = 60.0  # an answer of the follower's that is so late does not come: it is started again
RESTART_SECONDS = (0.5, 60.0)  # the first and the longest pause before that
_SOURCE = "source.json"


class Follower:
    """Keeps a `LiveRouter` at the version that an alias points to.

    `boot` gives the router to begin with, `start` follows from then on in a thread of its own. `failures` counts what
    went wrong since, `last_error` says what is wrong now (None: the alias' version is served), `version` is served, and
    `gone` says that the registry has no such alias.
    """

    def __init__(self, followed: Followed, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self.followed = followed
        self.answer_seconds = answer_seconds
        self.version = ""
        self.gone = False
        self.failures = 0
        self.restarts = 0
        self.last_error: str | None = "the registry has not been asked yet"
        self._bad = Backoff(max(followed.poll_seconds, 1.0))
        self._lock = threading.Lock()  # held for the two below, and to write to the process
        self._waiting: dict[int, Future[bool]] = {}
        self._asked = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._lines: list[bytes] = []
        self._rest = b""
        self._allowed = 0.0  # seconds that the next report may take beside `answer_seconds`
        self._wake = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def who(self) -> str:
        """Who puts the served version in its place, for the audit log."""
        return f"registry {self.followed} version {self.version}"

    @property
    def pid(self) -> int | None:
        """The follower's process, while it runs."""
        return None if self._process is None else self._process.pid

    def boot(self, load: Callable[[Path], LiveRouter]) -> LiveRouter:
        """What `load` makes of the last good version on disk, at once; where there is none, of the alias' version.

        Raises RegistryError that says what is wrong with both, InputError for a cache that cannot be used.
        """
        cache = self.followed.cache
        self._claim(cache)
        try:
            last = (cache / CURRENT).resolve(strict=True)
            live = load(last)
        except FileNotFoundError:
            last_good = f"{cache} holds no version from before"
        except RouterError as error:
            last_good = f"the last good version in {cache} cannot be served either: {error}"
        else:
            self.version = last.name
            return live
        report = self._next()
        while report is not None and report.event not in ("ready", "failed"):
            report = self._next()
        if report is None or report.version is None or report.event == "failed":
            self.close()
            self._leave(cache)
            raise RegistryError(f"{self.last_error if report is None else report.error}; {last_good}")
        try:
            live = load(cache / VERSIONS / report.version)
        except RouterError as error:
            self.close()
            raise type(error)(f"version {report.version} of {self.followed.name!r}: {error}; {last_good}") from None
        self.version, self.last_error = report.version, None
        self._keep()
        return live

    def begin(self, live: Holder) -> None:
        """Follows from now on what nobody waits for. Raises InputError for a cache that cannot be used."""
        self._claim(self.followed.cache)
        self.start(live)

    def start(self, live: Holder) -> None:
        """Follows the alias from now on."""
        self._thread = threading.Thread(target=self._run, args=(live,), name="registry-follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread and the process."""
        self._closing = True
        self._wake.set()
        with self._lock:
            if self._process is not None:
                self._process.kill()
        if self._thread is not None:
            self._thread.join(10.0)
        self._end()
        self._answer(self._asked, RegistryError("the service is going away"))

    def ask(self) -> Future[bool]:
        """Looks at once; the future tells whether another version is served since.

        It raises what was wrong: RegistryError where there is no version, and what loading it raises.
        """
        future: Future[bool] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._asked += 1
            self._waiting[self._asked] = future
            self._write([{"asked": self._asked}])
        self._wake.set()
        if self._closing:
            self._answer(self._asked, RegistryError("the service is going away"))
        return future

    def collect(self) -> Iterator[Metric]:
        """What Prometheus shows of it."""
        info = GaugeMetricFamily("router_registry_info", "The version served.", labels=["model", "version"])
        info.add_metric([str(self.followed), self.version], 1)
        yield info
        yield GaugeMetricFamily(
            "router_registry_up", "1: the alias' version is served.", 0 if self.last_error is not None else 1
        )
        yield CounterMetricFamily("router_registry_failures", "Looks that kept the last good.", self.failures)
        yield CounterMetricFamily("router_registry_restarts", "Followers that had to be replaced.", self.restarts)

    def describe(self) -> list[Metric]:
        """Nothing that would have to be known before it is collected."""
        return []

    def _run(self, live: Holder) -> None:
        pause = RESTART_SECONDS[0]
        while not self._closing:
            try:
                if (report := self._next()) is not None:
                    self._take(report, live)
            except Exception as error:  # noqa: BLE001 (no memory for a process, say: nothing may end this thread)
                self._lost(f"the registry cannot be followed ({type(error).__name__}: {error})")
                report = None
            if report is not None:
                if report.event == "ready":
                    pause = RESTART_SECONDS[0]
            elif not self._closing:
                self.restarts += 1
                self._wake.clear()
                self._wake.wait(pause)
                pause = min(2.0 * pause, RESTART_SECONDS[1])

    def _take(self, report: Report, live: Holder) -> None:
        """Serves the version that a report names, if it is another; whoever asked is told."""
        if report.event in ("looking", "downloading"):
            return
        version, swapped = report.version, False
        error: RouterError | None = None
        self.gone = report.gone
        if report.event == "failed" or version is None:
            error = RegistryError(report.error or "the registry holds no version")
            self._failed(str(error), counts=report.tried)
        elif (version, report.bundle) != (self.version, live.model_version):
            with self._lock:
                asks = any(number <= report.asked for number in self._waiting)
            put_off = None if asks else self._bad.error(version)
            if put_off is None:
                error = self._swap(version, live)
                swapped = error is None
            else:
                error = RegistryError(put_off)
        elif not self._keep():
            error = RegistryError(self.last_error or "")
        if error is None:
            if self.last_error is not None:
                log.info("%s version %s is served", self.followed, self.version)
            self.last_error = None
        self._answer(report.asked, error, swapped)

    def _swap(self, version: str, live: Holder) -> RouterError | None:
        """Loads a version and serves it; what was wrong, otherwise."""
        who = f"registry {self.followed} version {version}"
        try:
            live.reload(self.followed.cache / VERSIONS / version, who)
        except Exception as error:  # noqa: BLE001 (nothing may end the thread that follows)
            problem = error if isinstance(error, RouterError) else RegistryError(type(error).__name__)
            self._bad.failed(version, str(problem))
            self._failed(f"version {version} is not served: {problem}")
            self._send({"check": True})  # its files may have been altered since they were verified
            return problem
        self._bad.succeeded(version)
        self.version = version
        return None if self._keep() else RegistryError(self.last_error or "")

    def _keep(self) -> bool:
        """Makes the served version the one that the next start begins with, in one step."""
        link, target = self.followed.cache / CURRENT, f"{VERSIONS}/{self.version}"
        aside = link.with_name(f".{CURRENT}.{os.getpid()}")
        try:
            if not link.is_symlink() or os.readlink(link) != target:  # noqa: PTH115 (its own text, not what it leads to)
                aside.unlink(missing_ok=True)
                aside.symlink_to(target)
                aside.replace(link)
        except OSError as error:
            self._failed(f"{link} cannot be set to version {self.version} ({error.strerror}): see to its disk")
            return False
        return True

    def _failed(self, error: str, *, counts: bool = True) -> None:
        self.failures += counts
        if error != self.last_error:
            log.error("kept version %s of %s: %s", self.version or "none", self.followed, error)
        self.last_error = error

    def _answer(self, number: int, error: RouterError | None, swapped: bool = False) -> None:
        with self._lock:
            answered = [self._waiting.pop(n) for n in sorted(self._waiting) if n <= number]
        for future in answered:
            if error is None:
                future.set_result(swapped)
            else:
                future.set_exception(error)

    def _next(self) -> Report | None:
        """The next report of a process that runs; None when it died, or was ended because it did not answer."""
        if self._process is None:
            self._begin()
        process, allowed = self._process, self.answer_seconds + self._allowed
        assert process is not None and process.stdout is not None
        poll, deadline = select.poll(), time.monotonic() + allowed
        poll.register(process.stdout, select.POLLIN)
        while not self._lines:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                process.kill()
                self._lost(f"the registry {_bare(self.followed.uri)} has not answered for {allowed:.0f} s")
                return None
            data = os.read(process.stdout.fileno(), 65536)
            if not data:
                code = process.wait()
                self._lost(f"the process that follows the registry ended by itself (code {code})")
                return None
            *self._lines, self._rest = (self._rest + data).split(b"\n")
        report = Report(**json.loads(self._lines.pop(0)))
        self._allowed = report.next_s
        return report

    def _lost(self, why: str) -> None:
        self._end()
        if not self._closing:
            self._failed(why)
            self._answer(self._asked, RegistryError(why))

    def _begin(self) -> None:
        """Starts the process. What it follows goes through the pipe: an address may hold a password."""
        self._lines, self._rest, self._allowed = [], b"", 0.0
        command = module_command("router_ml.follow")
        form = {"log": log_lines.configured()}
        first: list[dict[str, object]] = [asdict(self.followed) | {"cache": str(self.followed.cache)} | form]
        with self._lock:
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._closing:
                self._process.kill()
            self._write([*first, {"asked": self._asked}] if self._waiting else first)

    def _end(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):
                    assert pipe is not None
                    pipe.close()
            process.wait()

    def _send(self, command: dict[str, object]) -> None:
        with self._lock:
            self._write([command])

    def _write(self, lines: list[dict[str, object]]) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has just died, which its other pipe tells
                self._process.stdin.write("".join(json.dumps(line) + "\n" for line in lines).encode())
                self._process.stdin.flush()

    @staticmethod
    def _leave(cache: Path) -> None:
        """Removes what a start without any version has made of the cache."""
        with contextlib.suppress(OSError):
            if not any(os.path.lexists(cache / name) for name in (CURRENT, VERSIONS)):
                (cache / _SOURCE).unlink()
                shutil.rmtree(cache / INCOMING, ignore_errors=True)
                cache.rmdir()

    def _claim(self, cache: Path) -> None:
        """Makes the cache, or takes it over: versions of another model or registry must not be served as this one's."""
        bare = hashlib.sha256(_bare(self.followed.uri).encode()).hexdigest()
        mine = {"registry": bare, "name": self.followed.name, "alias": self.followed.alias}
        try:
            cache.mkdir(parents=True, exist_ok=True)
            try:
                found = json.loads((cache / _SOURCE).read_bytes())
            except (OSError, ValueError):
                found = None
            if found is None and any(os.path.lexists(cache / name) for name in (CURRENT, VERSIONS)):
                raise InputError(f"{cache} is no cache of a registry's versions: give --cache another folder")
            if found != mine:
                if found is not None:
                    log.warning("%s held versions of another model, alias or registry: they are removed", cache)
                    (cache / CURRENT).unlink(missing_ok=True)
                    shutil.rmtree(cache / VERSIONS, ignore_errors=True)
                aside = cache / f".{_SOURCE}.{os.getpid()}"
                aside.write_text(json.dumps(mine), encoding="utf-8")
                aside.replace(cache / _SOURCE)
        except OSError as error:
            raise InputError(f"{cache} cannot be written to ({error.strerror}): give another --cache") from None


def _bare(uri: str) -> str:
    """A registry's address without credentials."""
    return shown(uri).replace("***@", "")
