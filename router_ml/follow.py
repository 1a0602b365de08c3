"""Follows an alias of the registry for a service, in a process of its own: MLflow's 200 MB stay out of the service.

`serving/follower.py` starts, feeds and watches it. They speak JSON, a line each. On stdin comes what to follow
(`Followed`), then {"asked": n} to look at once, with "check" to verify the version's files again; the end of stdin ends
the process. On stdout goes a `Report` before and after each look: an alias is resolved to an immutable version, which
is downloaded aside, held against its hashes, and renamed to CACHE/versions/N. What cannot be had is reported and tried
again later and later.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from router_ml import log_lines, registry
from router_ml.addresses import redacted, shown
from router_ml.bundle import read_bundle, swap
from router_ml.errors import BundleError, NoAliasError, RegistryError, RouterError

VERSIONS, CURRENT, INCOMING = "versions", "current", "incoming"
KEEP = 3  # versions on disk, the served one among them: a rollback need not download
MOST_DOUBLINGS = 4  # of the time between looks, while the registry fails
BAD_SECONDS = 900.0  # the longest pause before a version that cannot be used is tried again
DOWNLOAD_SECONDS = 900.0
IMPORT_SECONDS = 60.0  # MLflow's import on a busy machine
_LITTER_SECONDS = 3600.0
# MLflow makes a list of texts of what its threads run into.
_NO_ROOM = tuple(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


@dataclass(frozen=True, kw_only=True)
class Followed:
    """What is followed: `alias` of the model `name` in the registry at `uri`; looked at about every `poll_seconds`."""

    uri: str
    name: str
    alias: str
    cache: Path
    poll_seconds: float

    def __str__(self) -> str:
        return f"{self.name}@{self.alias}"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One line of the follower's.

    "looking" and "downloading" say that it is at work and may take `next_s` seconds, besides what any answer takes.
    "ready" says that the alias points to `version`, whose files are in the cache and verified and are the bundle of
    version `bundle`; "failed" why there is none, and whether it was `tried` or is only said again. After these the next
    report comes within `next_s`. `asked` is the latest request that this answers. `gone` says that the registry has no
    such alias.
    """

    event: Literal["looking", "downloading", "ready", "failed"]
    version: str | None = None
    bundle: str | None = None
    error: str | None = None
    tried: bool = True
    next_s: float = 0.0
    asked: int = 0
    gone: bool = False


class Backoff:
    """When a version that failed may be tried again: pauses double from `first` seconds to `BAD_SECONDS`."""

    def __init__(self, first: float) -> None:
        self.first = first
        self._failed: dict[str, tuple[int, float, str]] = {}

    def failed(self, version: str, error: str) -> None:
        """Notes a failure of `version`."""
        times = self._failed.get(version, (0, 0.0, ""))[0] + 1
        pause = min(self.first * 2.0 ** min(times, 30), BAD_SECONDS)
        self._failed[version] = (times, time.monotonic() + pause, error)

    def succeeded(self, version: str) -> None:
        """Forgets the failures of `version`."""
        self._failed.pop(version, None)

    def error(self, version: str) -> str | None:
        """Why `version` is not to be tried now; None where it may be."""
        _, until, error = self._failed.get(version, (0, 0.0, ""))
        return error if time.monotonic() < until else None


def follow(followed: Followed, asked: queue.Queue[dict[str, Any]], say: Callable[[Report], None]) -> None:
    """Looks and reports for ever."""
    bad, failures, number = Backoff(followed.poll_seconds), 0, 0
    verified: tuple[str, str] | None = None  # the version, and its bundle's
    command: dict[str, Any] = {}
    allowed = IMPORT_SECONDS
    while True:
        number = command.get("asked", number)
        verified = None if "check" in command else verified
        say(Report(event="looking", next_s=allowed))
        version, allowed, gone = None, 0.0, False
        try:
            version, stated = _resolve(followed)
            failures = 0
            reason = None if "asked" in command else bad.error(version)  # who asks is not put off
            tried = reason is None
            if reason is None:
                verified = _have(followed, version, stated, verified, say)
                bad.succeeded(version)
        except Exception as error:  # noqa: BLE001 (whatever MLflow makes of a registry's answer must not end this)
            reason, tried, gone = _said(error, followed), True, isinstance(error, NoAliasError)
            if version is None:
                failures += 1
            else:
                bad.failed(version, reason)
        pause = followed.poll_seconds * 2.0 ** min(failures, MOST_DOUBLINGS) * random.uniform(0.9, 1.1)
        event: Literal["ready", "failed"] = "ready" if reason is None else "failed"
        bundle = verified[1] if reason is None and verified else None
        said = Report(
            event=event, version=version, bundle=bundle, error=reason, tried=tried, next_s=pause, asked=number
        )
        say(replace(said, gone=gone))
        command = _wait(asked, pause)


def _wait(asked: queue.Queue[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """What is asked within so many seconds, several as one; nothing where nothing is."""
    try:
        found = [asked.get(timeout=seconds)]
    except queue.Empty:
        return {}
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(asked.get_nowait())
    return {key: value for command in found for key, value in command.items()}


def _resolve(followed: Followed) -> tuple[str, str | None]:
    """The version that the alias points to, and of which bundle it says it is."""
    found = registry.resolve(followed.uri, followed.name, followed.alias)
    version = found.version
    if not (version.isascii() and version.isdecimal()):  # it becomes a folder's name
        raise RegistryError(f"the registry calls a version of {followed.name!r} {version[:40]!r}, which is no number")
    return version, found.tags.get("bundle_version")


def _have(
    followed: Followed,
    version: str,
    stated: str | None,
    verified: tuple[str, str] | None,
    say: Callable[[Report], None],
) -> tuple[str, str]:
    """Sees to it that the version is in the cache, whole; returns it and its bundle's version.

    A registry that was made anew has other bundles under the same numbers: what is there has to be the `stated` one.
    Raises RegistryError, BundleError or OSError.
    """
    to = followed.cache / VERSIONS / version
    if verified is not None and version == verified[0] and stated in (None, verified[1]) and to.is_dir():
        return verified
    try:
        bundle: str | None = read_bundle(to).version
    except BundleError:
        bundle = None
    if bundle is None or stated not in (None, bundle):
        say(Report(event="downloading", version=version, next_s=DOWNLOAD_SECONDS))
        bundle = _download(followed, version, stated, to)
    with contextlib.suppress(OSError):
        os.utime(to)
        _prune(followed.cache, version)
    return version, bundle


def _download(followed: Followed, version: str, stated: str | None, to: Path) -> str:
    incoming = followed.cache / INCOMING
    incoming.mkdir(parents=True, exist_ok=True)
    for left in incoming.iterdir():  # by one that was killed
        if left.stat().st_mtime < time.time() - _LITTER_SECONDS:
            shutil.rmtree(left, ignore_errors=True)
    aside = Path(tempfile.mkdtemp(dir=incoming, prefix=f"{version}."))
    try:
        new = registry.download(followed.uri, followed.name, version, aside / version)
        try:
            bundle = read_bundle(new).version
            if stated not in (None, bundle):
                raise BundleError(f"it holds bundle {bundle}, and its tag 'bundle_version' says {stated}")
        except BundleError as error:
            raise BundleError(
                f"version {version} of {followed.name!r} in the registry cannot be used: {error}"
            ) from None
        for file in new.iterdir():  # a power cut must not leave a last good bundle of empty files
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        to.parent.mkdir(exist_ok=True)
        swap(new, to, aside / "old")
        return bundle
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _prune(cache: Path, version: str) -> None:
    """Leaves the `KEEP` versions that were served last, and in any case this one and the current one."""
    needed = {version, Path(os.path.realpath(cache / CURRENT)).name}
    there = sorted((cache / VERSIONS).iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in there[KEEP:]:
        if path.name not in needed:
            shutil.rmtree(path, ignore_errors=True)


def _said(error: Exception, followed: Followed) -> str:
    """What went wrong, without the credentials that a registry's address may hold."""
    if any(text in str(e) for e in _chain(error) for text in _NO_ROOM):
        text = f"{followed.cache} has no room for a new version: make room on its disk, or give another --cache"
    elif isinstance(error, RouterError):
        text = str(error)
    else:
        text = (
            f"the model registry {shown(followed.uri)} answered what cannot be understood ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): check that an MLflow server is at that address"
        )
    return redacted(text, followed.uri)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def main() -> None:
    """Follows what the first line of stdin says until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)  # what libraries print is not for the service
    with contextlib.suppress(OSError):
        os.nice(5)  # importing MLflow takes seconds of a core that the service may need
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # there is always a next look
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    first = sys.stdin.readline()
    if not first:
        return
    stated = json.loads(first)
    log_lines.configure(stated.pop("log", "text"))
    log_lines.log_uncaught()
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")  # it would write lines of its own format
    asked: queue.Queue[dict[str, Any]] = queue.Queue()

    def listen() -> None:
        try:
            for line in sys.stdin:
                asked.put(json.loads(line))
        finally:
            os._exit(0)  # the service is gone: also in the midst of a download

    threading.Thread(target=listen, daemon=True).start()

    def say(report: Report) -> None:
        out.write(json.dumps(asdict(report)) + "\n")

    with contextlib.suppress(BrokenPipeError):
        follow(Followed(**stated | {"cache": Path(stated["cache"])}), asked, say)
