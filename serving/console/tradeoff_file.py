"""The file that `router-ml tradeoff` writes, as the service shows it: data, looked at and never run."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from router_ml.router import Router

FORMAT = 1
MOST_BYTES = 64 << 20
_NEEDED = (
    *("made", "model_version", "policy_version", "source", "confidence", "requests_a_month", "models", "settings"),
    *("scopes", "tiers", "examples", "days_a_month"),
)


class TradeOffFile:
    """Reads the file (None: there is none) again when it has changed; one that cannot be read keeps nothing back."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._found: dict[str, Any] | None = None
        self._problem: str | None = None

    def state(self, router: Router) -> dict[str, Any]:
        """`tradeoff` as written (or null), `problem` where there is none, and `warnings`: it is of something else."""
        if self.path is None:
            return {
                "tradeoff": None,
                "problem": "the service has no trade-off: start it with --tradeoff FILE",
                "warnings": [],
            }
        with self._lock:
            self._look(self.path)
            found, problem = self._found, self._problem
        warnings = []
        if found is not None:
            if found["model_version"] != router.model_version:
                warnings.append(
                    f"it is of bundle {found['model_version']}, and {router.model_version} serves: run "
                    "router-ml tradeoff again"
                )
            if found["policy_version"] != router.policy.version:
                warnings.append(
                    f"it was judged under policy {found['policy_version']}, and {router.policy.version} is in force: "
                    '"today" is the setting of that time'
                )
        return {"tradeoff": found, "problem": problem, "warnings": warnings, "file": self.path.name}

    def _look(self, path: Path) -> None:
        try:
            stat = path.stat()
        except OSError as error:
            self._seen, self._found, self._problem = None, None, f"{path.name} cannot be read: {error.strerror}"
            return
        seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        if seen == self._seen:
            return
        self._seen, self._found, self._problem = seen, None, None
        if stat.st_size > MOST_BYTES:
            self._problem = f"{path.name} is larger than {MOST_BYTES >> 20} MiB, which no trade-off is"
            return
        try:
            found = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            self._problem = f"{path.name} is not JSON: write it with router-ml tradeoff"
            return
        self._problem = _problem(found, path.name)
        if self._problem is None:
            self._found = found


def _problem(found: Any, name: str) -> str | None:
    """Why the file is no trade-off that this program shows."""
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        return f"{name} is no trade-off of format {FORMAT}: write it with this version's router-ml tradeoff"
    if missing := [key for key in _NEEDED if key not in found]:
        return f"{name} lacks {missing[0]!r}: write it again with router-ml tradeoff"
    settings = found["settings"]
    good = isinstance(settings, list) and all(isinstance(v, float | int) and 0 <= v <= 1 for v in settings)
    lists = all(isinstance(found[key], list) for key in ("models", "scopes", "tiers", "examples"))
    try:
        datetime.fromisoformat(found["made"]).astimezone(UTC)
        sized = all(len(scope["settings"]) == len(settings) for scope in found["scopes"])
        sized &= all(len(tier["changes"]) in (0, len(settings)) for tier in found["tiers"])
    except (TypeError, KeyError, ValueError):
        sized = False
    return None if good and lists and sized and found["scopes"] else f"{name} does not hold together: write it again"
