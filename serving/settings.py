"""What an operator sets before the service starts, and what is refused at once."""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from router_ml.errors import InputError
from router_ml.follow import Followed
from router_ml.registry import CHAMPION
from serving.health import HealthSettings
from serving.keys import KEYS_VARIABLE, ApiKey

STORE_PROMPTS = ("none", "features", "text")
LOG_FORMATS = ("text", "json")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The service's settings.

    `bundle` is a bundle's directory or a link to one, `policy` a TOML file (None: the default policy); both are
    followed while the service runs, looked at every `watch_seconds` (0: never). Instead of `bundle`, `model` names a
    registered router as NAME@ALIAS: of the registry at `tracking_uri`, which is asked about every `poll_seconds` where
    the alias points to; the last versions are kept in the folder `cache`, and the last good one is served from there
    when the registry is away. `challenger` is the directory of a second bundle, followed, too, which scores what the
    first one decides and takes the share of the traffic that the policy's `canary` says (None: there is none). Beside a
    `model` it may be another alias of it, `challenger_alias`, which need not be there; its cache is beside `cache`.
    `store` is an SQLAlchemy URL or the path of an SQLite file. Decisions go to the folder `spool` first (default:
    beside an SQLite file, otherwise `router-ml.spool`), of at most `spool_bytes`, where a power cut loses those of
    `commit_seconds`; from there a process of its own (`drain`; "thread" does without) takes them to the store within as
    much again. `store_prompts` says what is kept of a request: "none", "features" (what the learner saw: its embedding
    and statistics, which explain the decision later and are enough to train again), or "text" beside these.
    A session is remembered for `session_seconds` after its latest decision, the latest `max_sessions` at most (0: none
    are); one that other processes have served is looked up in the store, for which a request waits
    `session_lookup_seconds` at most (0: never).
    `api_keys` maps a key's name to the key, or to its SHA-256 in hex; with none the service is open, and then only a
    loopback host is allowed. `health` says when a model that fails is left out. On SIGTERM readiness goes off at once
    and the port closes `drain_seconds` later. With more than `max_waiting` requests that have come and not begun, the
    one that has waited longest is answered 503 with Retry-After, so that the others are answered in time.
    `replicas` says how many service processes share the traffic: of a model's bounded capacity each takes its part.
    `embed_deadline_ms` is how long a request waits for its embedding where the bundle has a transformer; past it the
    bundle's static twin answers.
    Metrics compare what decisions cost with `baseline_model` (None: the model with the highest rate of acceptable
    answers in the training log). `log_format` is that of the log's lines. Spans go to the OTLP collector at
    `otlp_endpoint`, such as "http://127.0.0.1:4318" (None: where OTEL_EXPORTER_OTLP_ENDPOINT says, if it is set).
    `tradeoff` is a file of `router-ml tradeoff` that the console shows, looked at again when it has changed. With
    `model`, the console promotes versions that pass the gate on the log `release_logs` (None: on the store).
    `max_body_bytes`, `max_messages` and `max_candidates` bound one request, and its head and its body each have
    `request_seconds` to arrive.
    Raises InputError for a value out of range, and for a host beyond loopback without keys.
    """

    bundle: Path | None = None
    model: str | None = None
    tracking_uri: str = field(default="sqlite:///mlflow.db", repr=False)
    cache: Path = Path("serving-bundle")
    poll_seconds: float = 10.0
    challenger: Path | None = None
    challenger_alias: str | None = None
    policy: Path | None = None
    store: str = "router-ml.db"
    store_prompts: Literal["none", "features", "text"] = "features"
    commit_seconds: float = 0.05
    spool: Path | None = None
    spool_bytes: int = 1 << 30
    drain: Literal["thread", "process"] = "process"
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Mapping[str, ApiKey] = field(default_factory=dict, repr=False)
    tradeoff: Path | None = None
    release_logs: Path | None = None
    max_body_bytes: int = 2 * 1024 * 1024
    max_waiting: int = 100
    max_messages: int = 2_000
    max_candidates: int = 1_000
    request_seconds: float = 30.0
    health: HealthSettings = field(default_factory=HealthSettings)
    session_seconds: float = 3600.0
    max_sessions: int = 50_000
    session_lookup_seconds: float = 0.05
    watch_seconds: float = 1.0
    drain_seconds: float = 0.0
    baseline_model: str | None = None
    log_format: Literal["text", "json"] = "text"
    otlp_endpoint: str | None = None
    embed_deadline_ms: float = 150.0
    replicas: int = 1

    @property
    def folder(self) -> Path:
        """The bundle's directory."""
        assert self.bundle is not None
        return self.bundle

    @property
    def followed(self) -> Followed | None:
        """What is followed of a registry; None where a directory is served."""
        return None if self.model is None else self._follow(self.model.partition("@")[2] or CHAMPION, self.cache)

    @property
    def followed_challenger(self) -> Followed | None:
        """What is followed of it for a challenger; None where no alias is."""
        beside = self.cache.with_name(f"{self.cache.name}-challenger")
        return None if self.challenger_alias is None else self._follow(self.challenger_alias, beside)

    def _follow(self, alias: str, cache: Path) -> Followed:
        assert self.model is not None
        name, poll = self.model.partition("@")[0], self.poll_seconds
        return Followed(uri=self.tracking_uri, name=name, alias=alias, cache=cache, poll_seconds=poll)

    def __post_init__(self) -> None:
        if (self.bundle is None) == (self.model is None):
            raise InputError("give either a bundle's directory or a model, NAME@ALIAS")
        if self.model is not None and not self.model.partition("@")[0]:
            raise InputError(f"model {self.model!r} has no name: give it as NAME@ALIAS")
        if self.challenger_alias is not None and (self.model is None or self.challenger is not None):
            raise InputError("challenger_alias goes with a model, NAME@ALIAS, and without a challenger's directory")
        if self.replicas < 1:
            raise InputError(f"replicas {self.replicas} has to be 1 or more: count the processes of the service")
        if self.poll_seconds < 0.05:
            raise InputError(f"poll_seconds {self.poll_seconds} has to be at least 0.05")
        if not 0 <= self.port <= 65535:
            raise InputError(f"port {self.port} has to lie in 0..65535")
        if self.max_body_bytes < 1024:
            raise InputError("max_body_bytes has to be at least 1024")
        if min(self.max_messages, self.max_candidates) < 1:
            raise InputError("max_messages and max_candidates have to be at least 1")
        if not 0 < self.request_seconds < math.inf:
            raise InputError("request_seconds has to be more than 0")
        if min(self.watch_seconds, self.drain_seconds) < 0 or self.commit_seconds <= 0:
            raise InputError("watch_seconds and drain_seconds have to be 0 or more, commit_seconds more than 0")
        if self.max_waiting < 1:
            raise InputError("max_waiting has to be 1 or more")
        if self.spool_bytes < 1 << 20:
            raise InputError("spool_bytes has to be at least a mebibyte, 1048576")
        if min(self.session_seconds, self.max_sessions, self.session_lookup_seconds) < 0:
            raise InputError("session_seconds, max_sessions and session_lookup_seconds have to be 0 or more")
        if not 0 < self.embed_deadline_ms <= 60_000:
            raise InputError("embed_deadline_ms has to be more than 0 and at most 60000")
        if self.store_prompts not in STORE_PROMPTS:
            raise InputError(f"store_prompts has to be one of {', '.join(STORE_PROMPTS)}")
        if self.log_format not in LOG_FORMATS:
            raise InputError(f"log_format has to be one of {', '.join(LOG_FORMATS)}")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise InputError("otlp_endpoint has to be the collector's URL for OTLP over HTTP: http://127.0.0.1:4318")
        keys = {n: k if isinstance(k, ApiKey) else ApiKey.of_table(n, k) for n, k in self.api_keys.items()}
        object.__setattr__(self, "api_keys", keys)
        if not self.api_keys and not is_loopback(self.host):
            raise InputError(
                f"{self.host!r} is not a loopback address, and no API keys are configured: anyone who reaches it could "
                f"use the service. Give a file of key hashes, set {KEYS_VARIABLE}, or bind 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`: 127.0.0.0/8, ::1 or localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
