"""API keys: who may ask for what. What a key is bound to, the body of a request cannot widen."""

from __future__ import annotations

import hashlib
import hmac
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from starlette.requests import Request

from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.types import RouteRequest
from serving.problems import ProblemError

KEYS_VARIABLE = "ROUTER_ML_API_KEYS"
SCOPES = ("route", "outcomes", "health", "admin", "read")
_LISTS = ("scopes", "models", "tiers", "data_classes")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by its name and the SHA-256 of its text, with what it is bound to (None: not bound).

    `scopes` are of `SCOPES`. `models` may serve its requests, of those that policy and request allow. Of `tiers` and
    `data_classes` the first is taken where a request names none; a key that has `tiers` may set no dial of its own.
    `tenant` is whom it speaks for. Raises InputError for values that are not possible.
    """

    name: str
    sha256: str = field(repr=False)
    scopes: tuple[str, ...] = ("route", "outcomes")
    models: tuple[str, ...] | None = None
    tiers: tuple[str, ...] | None = None
    data_classes: tuple[str, ...] | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.sha256, str) or not _SHA256.fullmatch(self.sha256):
            raise InputError(
                f"API key {self.name!r} needs its SHA-256 in 64 lower-case hex digits under 'sha256': "
                'printf %s "$KEY" | sha256sum'
            )
        for name in _LISTS:
            value = getattr(self, name)
            if value is not None and not (value and all(isinstance(v, str) and v for v in value)):
                raise InputError(
                    f"API key {self.name!r}: '{name}' has to be a list of names; leave it out for no bound"
                )
        if unknown := set(self.scopes) - set(SCOPES):
            raise InputError(f"API key {self.name!r} has the scope {min(unknown)!r}: there are {', '.join(SCOPES)}")
        if self.tenant is not None and (not isinstance(self.tenant, str) or not self.tenant):
            raise InputError(f"API key {self.name!r}: 'tenant' has to be a name")

    @classmethod
    def of_table(cls, name: str, table: object) -> ApiKey:
        """A key from a table of a key file, or from its hash alone. Raises InputError."""
        if isinstance(table, str):
            return cls(name, table)
        known = {"sha256", "tenant", *_LISTS}
        if not isinstance(table, Mapping) or "sha256" not in table or set(table) - known:
            raise InputError(
                f"API key {name!r} has to be a table with 'sha256' and, of {', '.join(sorted(known))}, no other"
            )
        values: dict[str, Any] = dict(table)
        for each in _LISTS:
            if each in values:
                if isinstance(values[each], str) or not isinstance(values[each], Sequence):
                    raise InputError(f"API key {name!r}: '{each}' has to be a list of names")
                values[each] = tuple(values[each])
        return cls(name, **values)

    def bind(self, request: RouteRequest, policy: Policy) -> RouteRequest:
        """The request as this key may make it. Raises ProblemError (403) for what the key does not cover."""
        changes: dict[str, Any] = {}
        if self.tenant is not None and request.tenant != self.tenant:
            if request.tenant is not None:
                raise self._forbidden("tenant", request.tenant, (self.tenant,))
            changes["tenant"] = self.tenant
        if self.data_classes is not None:
            stated = request.data_class
            if stated is not None and stated not in self.data_classes:
                raise self._forbidden("data_class", stated, self.data_classes)
            changes["data_class"] = stated or self.data_classes[0]
        if self.tiers is not None:
            for dial in ("min_probability", "willingness_to_pay_usd", "objective", "quality_threshold"):
                if getattr(request, dial) is not None:
                    raise ProblemError(
                        403, "forbidden", f"this key may not set '{dial}': name one of its tiers instead"
                    )
            tier = request.tier or (policy.default_tier if policy.default_tier in self.tiers else self.tiers[0])
            if tier not in self.tiers:
                raise self._forbidden("tier", tier, self.tiers)
            changes["tier"] = tier
        if self.models is not None:
            changes["allowed"] = frozenset(self.models)
        return replace(request, **changes) if changes else request

    def may(self, scope: str | None) -> None:
        """Raises ProblemError (403) when the key lacks the scope; who may change things may read them, too."""
        if scope == "read" and "admin" in self.scopes:
            return
        if scope is not None and scope not in self.scopes:
            raise ProblemError(403, "forbidden", f"this needs a key of the scope '{scope}'")

    def described(self) -> dict[str, Any]:
        """What the audit log keeps of it: its bounds, and enough of the hash to see that it changed."""
        return {"sha256": f"{self.sha256[:8]}…", "tenant": self.tenant} | {n: getattr(self, n) for n in _LISTS}

    @staticmethod
    def _forbidden(name: str, value: str, allowed: Sequence[str]) -> ProblemError:
        return ProblemError(403, "forbidden", f"this key does not cover {name} {value!r}: it has {', '.join(allowed)}")


class ApiKeys:
    """The configured keys. They are long random strings, so a plain hash is enough."""

    def __init__(self, keys: Mapping[str, ApiKey]) -> None:
        self._known = [(key, bytes.fromhex(key.sha256)) for key in keys.values()]

    def caller(self, request: Request) -> ApiKey | None:
        """The key that the request carries; None when none are configured. Raises ProblemError (401)."""
        if not self._known:
            return None
        given = plain = b""
        for name, value in request.scope["headers"]:  # each look into `request.headers` takes a microsecond
            if name == b"authorization" and not given:
                scheme, _, token = value.partition(b" ")
                given = token if scheme.lower() == b"bearer" else b""
            elif name == b"x-api-key" and not plain:
                plain = value
        digest = hashlib.sha256((given or plain).strip()).digest()
        found = None
        for key, expected in self._known:  # every one of them: the time taken says nothing
            if hmac.compare_digest(digest, expected):
                found = key
        if found is None:
            raise ProblemError(
                401,
                "unauthorized",
                "send a configured key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                headers={"www-authenticate": "Bearer"},
            )
        return found


def read_api_keys(path: Path | None, variable: str | None) -> dict[str, ApiKey]:
    """API keys by name: from a TOML file, or from `NAME=SHA256,…` (the environment variable's form, without bounds).

    The file has a table per key, `[gateway]` with `sha256 = "…"` and, where wanted, `scopes`, `models`, `tiers`,
    `data_classes`, `tenant`. Raises InputError that names the file and the key at fault, and when there is something to
    read but no key in it.
    """
    keys: dict[str, ApiKey] = {}
    if path is not None:
        try:
            tables = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise InputError(f"the file of API keys {path} cannot be read: {error}") from None
        for name, table in tables.items():
            if not isinstance(table, Mapping):
                raise InputError(f"{path}: key {name!r} has to be a table with 'sha256'")
            keys[name] = _named(name, table, str(path))
    for entry in filter(None, (variable or "").split(",")):
        name, _, digest = entry.strip().partition("=")
        fresh = _named(name, digest, KEYS_VARIABLE)
        keys[name] = replace(keys[name], sha256=digest) if name in keys else fresh  # a new hash, the same bounds
    if len({key.sha256 for key in keys.values()}) < len(keys):
        raise InputError(f"{path or KEYS_VARIABLE}: two API keys have the same hash: which of them asks cannot be told")
    if not keys and (path is not None or variable):
        raise InputError(f"{path or KEYS_VARIABLE} holds no API keys: add one, or leave it out")
    return keys


def _named(name: str, table: object, source: str) -> ApiKey:
    try:
        return ApiKey.of_table(name, table)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
