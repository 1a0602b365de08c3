"""Versions of the registry, and their promotion and rollback, by child processes: MLflow and training stay out of here.

A child runs `router-ml history`, `promote` or `rollback` (`router_ml.told`): no shell, no word of a request that could
become an option, everything else from the settings. It is niced, bounded in time and in what it may say, and ends with
this process. One promotion or rollback runs at a time in this process, which alone knows what is at work. The audit log
has what was asked for from its start, and every end that is not a good one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from router_ml.addresses import shown
from router_ml.draining import module_command
from router_ml.registry import CHAMPION
from router_ml.router import new_id
from router_ml.store import Store
from serving.problems import ProblemError
from serving.settings import Settings

LIST_SECONDS, MOVE_SECONDS = 120.0, 3600.0
NICE = {"list": 5, "promote": 10, "rollback": 5}
"""Niceness of the children: a gate computes for minutes, and on a full machine a 19 would hardly get on at all."""
KEEP_SECONDS = 30.0
LONGEST_LINE, MOST_BYTES = 1 << 20, 8 << 20
"""Of what a child may say."""
_TAIL = 40  # lines of its stderr that are kept
_SAID = 2_000  # characters of an error that are shown
_NEEDS = ("mlflow", "polars", "sklearn", "training")
log = logging.getLogger(__name__)
Action = Literal["promote", "rollback"]


@dataclass
class Run:
    """One promotion or rollback: times in microseconds since 1970, `stage` what it is at, `says` what came of it.

    `refused` is a promotion of which a condition of the gate does not hold; `failed` is whatever else moved nothing, or
    may have: where it was `moving`, and so began to write to the registry, the versions tell.
    """

    action: Action
    version: str
    reason: str
    who: str
    started_us: int
    id: str = field(default_factory=new_id)
    state: Literal["running", "done", "refused", "failed"] = "running"
    stage: str = "starting"
    ended_us: int | None = None
    says: str = ""
    result: dict[str, Any] = field(default_factory=dict)
    moving: bool = False


class Releases:
    """What the console knows of releases; `moved` is called when the champion is another one."""

    def __init__(self, settings: Settings, store: Store, moved: Callable[[], object] = lambda: None) -> None:
        self.settings = settings
        self.store = store
        self.moved = moved
        self.run: Run | None = None
        """The latest promotion or rollback that was asked of this process."""
        self._task: asyncio.Task[None] | None = None
        self._listing: asyncio.Task[list[dict[str, Any]]] | None = None
        self._listed = 0.0

    @property
    def name(self) -> str | None:
        """The registered model, where one is followed."""
        return None if self.settings.model is None else self.settings.model.partition("@")[0]

    @property
    def why_not(self) -> str | None:
        """Why versions can be neither shown nor moved from here; None where they can."""
        if self.settings.model is None:
            return (
                "this service serves a bundle from a folder, and knows no registry: start it with --model "
                "NAME@champion and --tracking-uri"
            )
        if missing := [package for package in _NEEDS if find_spec(package) is None]:
            return (
                f"this service is installed without {missing[0]}, which the registry and its gate need: pip install "
                "'router-ml[serve,train]' where it runs, or give the commands where training is installed"
            )
        return None

    def described(self) -> dict[str, Any]:
        """What the releases are of, and how the gate judges here."""
        logs = self.settings.release_logs
        return {
            "name": self.name, "followed": self.settings.model, "champion_alias": CHAMPION,
            "registry": None if self.name is None else shown(self.settings.tracking_uri),
            "why_not": self.why_not, "run": self.state(),
            "judged_by": "the service's store" if logs is None else f"the log {logs.name}",
        }  # fmt: skip

    def state(self) -> dict[str, Any] | None:
        """The latest run as JSON values; None where this process has had none."""
        return None if self.run is None else asdict(self.run)

    async def versions(self) -> list[dict[str, Any]]:
        """The registry's versions (`router_ml.releases`), at most `KEEP_SECONDS` old. Raises ProblemError (503)."""
        stale = time.monotonic() > self._listed + KEEP_SECONDS
        if self._listing is None or (self._listing.done() and (stale or self._listing.exception() is not None)):
            self._listing = asyncio.create_task(self._list())
            self._listed = time.monotonic()
        return await asyncio.shield(self._listing)  # who looks twice waits for one and the same

    def start(self, action: Action, version: str, reason: str, who: str) -> Run:
        """Begins to promote `version`, or to roll the champion `version` back. Raises ProblemError (409)."""
        if (why := self.why_not) is not None:
            raise ProblemError(409, "unsupported", why)
        if self.run is not None and self.run.state == "running":
            doing = "promotion" if self.run.action == "promote" else "rollback"
            raise ProblemError(
                409, "busy", f"a {doing} that {self.run.who} asked for is at work already: wait for its end"
            )
        self.run = Run(action, version, reason, who, _now_us())
        self._note(self.run, asked=True)  # a service that is killed meanwhile leaves this
        self._task = asyncio.create_task(self._move(self.run))
        return self.run

    async def close(self) -> None:
        """Ends what is at work."""
        for task in (self._task, self._listing):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _list(self) -> list[dict[str, Any]]:
        if (why := self.why_not) is not None:
            raise ProblemError(409, "unsupported", why)
        found: list[dict[str, Any]] = []
        words = ["history", "--full", *self._registry(), "--", str(self.name)]
        try:
            async with aclosing(_told(words, NICE["list"], LIST_SECONDS)) as rows:
                found += [row async for row in rows if "version" in row]
        except _ChildError as error:
            raise ProblemError(503, "unavailable", f"the registry's versions could not be read: {error}") from None
        return found

    async def _move(self, run: Run) -> None:
        common = [f"--reason={run.reason}", f"--who={run.who}", f"--store={self.settings.store}", "--json"]
        words = [run.action, *common, *self._registry()]
        if run.action == "rollback":
            words += [f"--expected={run.version}", "--", str(self.name)]
        else:
            words += [f"--policy={self.settings.policy}"] if self.settings.policy is not None else []
            words += [f"--logs={self.settings.release_logs}"] if self.settings.release_logs is not None else []
            words += ["--", str(self.name), run.version]
        try:
            async with aclosing(_told(words, NICE[run.action], MOVE_SECONDS)) as rows:
                async for row in rows:
                    if isinstance(row.get("stage"), str):
                        run.stage, run.moving = row["stage"][:200], bool(row.get("moving"))
                    elif isinstance(row.get("result"), dict):
                        run.result = row["result"]
            run.state, run.says = "done", str(run.result.get("says", "it has ended"))
        except _ChildError as error:
            run.state, run.says = "failed", str(error)
            if run.result.get("moved") is False and error.code == 1:
                run.state, run.says = "refused", str(run.result.get("says"))
        except asyncio.CancelledError:
            run.state, run.says = "failed", "the service is going away, and it was ended"
            raise
        except Exception as error:  # noqa: BLE001 (no process could be made, say: whoever waits has to be told)
            log.error("a %s has failed: %s", run.action, type(error).__name__)
            run.state, run.says = "failed", f"it could not be done here ({type(error).__name__}): see the service's log"
        finally:
            run.ended_us = _now_us()
            self._listing = None  # what is read of the registry now may be older than this
            if run.state == "failed" and run.moving:  # what the command noted before may not have come to pass
                self._note(run, failed=f"was ended during the move; the versions tell ({run.says[:250]})", unsure=True)
                run.says += "; it was ended during the move, and whether the champion has moved, the versions tell"
            elif run.state != "done":
                self._note(run, failed=run.says[:300])
        if run.state == "done":
            self.moved()

    def _note(self, run: Run, **how: Any) -> None:
        conditions = {c["name"]: {"holds": c["holds"], "value": c["value"]} for c in run.result.get("conditions", ())}
        moved = {"name": self.name, "version": run.version, "before": run.result.get("before")}
        self.store.note_change(
            "registry",
            run.who,
            {
                "id": run.id, **moved, "bundle": run.result.get("bundle"), "action": run.action, "reason": run.reason,
                "forced": False, **how,
                "gate": {"passed": False, "conditions": conditions} if conditions else None,
            },
        )  # fmt: skip

    def _registry(self) -> list[str]:
        return [f"--tracking-uri={self.settings.tracking_uri}"]


class _ChildError(Exception):
    """A child did not come to a good end; `code` is its exit code, None where it was ended."""

    def __init__(self, says: str, code: int | None = None) -> None:
        super().__init__(says)
        self.code = code


async def _told(words: Sequence[str], nice: int, seconds: float) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON objects that a `router-ml` command says, as they come, in a process group of its own.

    Raises _ChildError where it exits with another code than 0, takes longer than `seconds`, or says too much.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *module_command("router_ml.told"), stdin=pipe, stdout=pipe, stderr=pipe, limit=LONGEST_LINE,
        start_new_session=True,  # what it starts itself is ended with it
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    tail: deque[str] = deque(maxlen=_TAIL)
    errors = asyncio.create_task(_drain(process.stderr, tail))
    deadline, read = time.monotonic() + seconds, 0
    try:
        with contextlib.suppress(OSError):  # it has just died, which its other pipe tells
            process.stdin.write(json.dumps({"words": list(words), "nice": nice}).encode() + b"\n")
            await process.stdin.drain()
        while line := await asyncio.wait_for(process.stdout.readline(), max(deadline - time.monotonic(), 0.001)):
            read += len(line)
            if read > MOST_BYTES:
                raise ValueError
            if (row := _object(line)) is not None:
                yield row
        code = await asyncio.wait_for(process.wait(), max(deadline - time.monotonic(), 0.001))
        await errors
        if code:
            raise _ChildError(_error_of(tail, code), code)
    except TimeoutError:
        raise _ChildError(f"it took longer than {seconds:g} s and was ended") from None
    except ValueError:
        raise _ChildError("it said more than can be shown and was ended") from None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        await process.wait()
        errors.cancel()


async def _drain(stream: asyncio.StreamReader, tail: deque[str]) -> None:
    """Keeps the last lines, so that the child never waits for room, whatever it says."""
    rest = b""
    while data := await stream.read(65536):
        *lines, rest = (rest + data).split(b"\n")
        tail.extend(line.decode(errors="replace")[:_SAID] for line in lines)
        rest = rest[-_SAID:]
    if rest:
        tail.append(rest.decode(errors="replace"))


def _object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None for whatever else a library may print."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _error_of(tail: Sequence[str], code: int) -> str:
    """What the command itself says of its end; a traceback may quote what was judged, and stays out of answers."""
    said = [line for line in tail if line.strip()]
    for prefix in ("router-ml: ", "Error: "):
        for line in reversed(said):
            if line.startswith(prefix):
                return line.removeprefix(prefix).strip()[:_SAID]
    kind = said[-1].partition(":")[0][:100] if said else "it said nothing"
    log.error("router-ml has ended with code %s: %s", code, kind)
    return f"it ended with code {code} ({kind})"


def _now_us() -> int:
    return time.time_ns() // 1000
