"""What both clients do: a call as steps within a deadline, the circuit, and what stands in where nobody answers."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ssl import SSLContext
from types import MappingProxyType
from typing import Any, TypeVar

import httpx

from serving.routed import Routed, RouterRequestError, RouterUnavailableError, constraints

log = logging.getLogger(__name__)
T = TypeVar("T")
_PAUSE = 0.02  # seconds before the first repetition where the service names no time; doubled for each further one


@dataclass(frozen=True, slots=True)
class Send:
    """One exchange to make: `deadline` is of `time.monotonic`, in seconds."""

    path: str
    content: bytes
    headers: Mapping[str, str]
    deadline: float


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    content: bytes


# A call as steps that either client takes: an exchange to make, or seconds to wait.
Steps = Generator[Send | float, Reply | httpx.RequestError | None, T]


class _Circuit:
    """Closed until `limit` failures in a row, then open but for one probe every `cool_down_s` seconds."""

    def __init__(self, limit: int, cool_down_s: float) -> None:
        self._limit, self._cool_down_s = limit, cool_down_s
        self._lock = threading.Lock()
        self._failures, self._shut_until = 0, 0.0

    def allows(self) -> bool:
        """Whether to ask the service now. A probe that never comes back delays the next one, and no more."""
        with self._lock:
            now = time.monotonic()
            if self._failures < self._limit:
                return True
            if now < self._shut_until:
                return False
            self._shut_until = now + self._cool_down_s
            return True

    def note(self, *, answered: bool) -> None:
        """Counts a call."""
        with self._lock:
            self._failures = 0 if answered else self._failures + 1
            if self._failures >= self._limit:
                self._shut_until = time.monotonic() + self._cool_down_s


class _Timeouts(dict[str, float]):
    """What is left of a deadline, worked out anew for each phase in which httpcore asks for its timeout."""

    def __init__(self, deadline: float, connect_s: float) -> None:
        super().__init__()
        self._deadline, self._connect_s = deadline, connect_s

    def get(self, name: str, default: Any = None) -> Any:
        left = max(self._deadline - time.monotonic(), 0.001)
        return min(left, self._connect_s) if name == "connect" else left


class Caller:
    """What both clients share: all but how bytes are exchanged and time is waited for, which `_open` prepares."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        deadline_s: float = 0.25,
        connect_timeout_s: float = 0.1,
        report_deadline_s: float = 2.0,
        default: Sequence[str] = (),
        default_for: Callable[[Mapping[str, Any]], Sequence[str]] | None = None,
        failures_to_open: int = 5,
        cool_down_s: float = 5.0,
        max_connections: int = 100,
        verify: bool | SSLContext = True,
    ) -> None:
        """A client of the service at `url`, such as "http://127.0.0.1:8000". All `_s` are seconds.

        A decision takes at most `deadline_s`, its repetition included, and an outcome `report_deadline_s`.

        Without a decision (nobody there, too late, 5xx) the model ids of `default` stand in, in their order and of the
        request's `candidates` alone. They do so only for requests without `constraints`: nothing here knows which
        model is cleared for a data class or a region, and during an outage data must not go where it could not go
        before. A request with constraints gets the models that `default_for` names for it, and without one it gets
        RouterUnavailableError. `default_for` is called with the request's fields, is asked for every request in place
        of `default`, and is taken at its word; no models mean that there is no default for such a request. Give it,
        too, where the service holds requests to constraints that they do not state: a policy with a
        `default_data_class`, an API key that is bound to models or data classes.

        After `failures_to_open` calls in a row without an answer the service is not asked for `cool_down_s`, and then
        by one call at a time until it answers: an outage does not cost every request its deadline. Decisions and
        outcomes are counted apart, since an outcome can fail for the store alone.

        Proxies of the environment are not used: requests hold prompts. Raises ValueError for values out of range.
        """
        scheme, _, rest = url.partition("://")
        if scheme not in ("http", "https") or not rest:
            raise ValueError(f"the service's URL has to begin with http:// or https://, and {url!r} does not")
        if min(deadline_s, connect_timeout_s, report_deadline_s) <= 0 or cool_down_s < 0 or failures_to_open < 1:
            raise ValueError("deadlines and failures_to_open have to be more than 0, cool_down_s 0 or more")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("an API key has to be printable ASCII")
        self._deadline_s, self._report_deadline_s = deadline_s, report_deadline_s
        self._connect_timeout_s = connect_timeout_s
        self._default, self._default_for = tuple(default), default_for
        self._circuits = {path: _Circuit(failures_to_open, cool_down_s) for path in ("/route", "/outcomes")}
        headers = {"content-type": "application/json"}
        if api_key is not None:
            headers["authorization"] = f"Bearer {api_key}"
        self._options: dict[str, Any] = {
            "base_url": url,
            "headers": headers,
            "verify": verify,
            "trust_env": False,
            # Idle connections are given up before the service does, which is after 75 s.
            "limits": httpx.Limits(max_connections=max_connections, keepalive_expiry=60.0),
        }
        self._open()

    def _open(self) -> None:
        raise NotImplementedError

    def _request(self, http: httpx.Client | httpx.AsyncClient, send: Send) -> httpx.Request:
        """The request of one exchange, whose timeouts end with its deadline."""
        timeouts = _Timeouts(send.deadline, self._connect_timeout_s)
        return http.build_request(
            "POST", send.path, content=send.content, headers=send.headers, extensions={"timeout": timeouts}
        )

    def _routing(self, fields: Mapping[str, Any]) -> Steps[Routed]:
        """One decision. Raises what `RouterClient.route` does."""
        content = _json(fields)
        try:
            return _routed((yield from self._call("/route", content, {}, self._deadline_s, attempts=2)))
        except RouterUnavailableError as error:
            return self._local(fields, error)

    def _reporting(self, decision_id: str, outcome: Mapping[str, Any], idempotency_key: str | None) -> Steps[bool]:
        """One outcome: whether it is stored."""
        content = _json({"decision_id": decision_id, **outcome})
        # The content names the decision: the same outcome has the same key, and another one of the decision another.
        headers = {"idempotency-key": idempotency_key or hashlib.sha256(content).hexdigest()}
        try:
            reply = yield from self._call("/outcomes", content, headers, self._report_deadline_s, attempts=4)
            if reply.status == 200:
                return True
            raise _refusal(reply)
        except (RouterUnavailableError, RouterRequestError) as error:
            of = {"decision_id": decision_id}
            log.warning("an outcome of decision %s is not reported: %s", decision_id, error, extra=of)
            return False

    def _call(
        self, path: str, content: bytes, headers: Mapping[str, str], seconds: float, *, attempts: int
    ) -> Steps[Reply]:
        """The service's answer below 500. Raises RouterUnavailableError that says why there is none."""
        circuit, deadline = self._circuits[path], time.monotonic() + seconds
        if not circuit.allows():
            raise RouterUnavailableError("the router has not answered of late and is left alone for a while")
        for attempt in range(attempts):
            wait = _PAUSE * 2**attempt
            reply = yield Send(path, content, headers, deadline)
            if isinstance(reply, Reply):
                if reply.status < 500 and reply.status != 429:
                    circuit.note(answered=True)
                    return reply
                why = f"it answered {reply.status}"
                again = reply.status in (429, 503)
                wait = _retry_after(reply.headers.get("retry-after"), wait)
            else:
                # Sending twice does no harm: an outcome has its key, and a decision that nobody reads gets no outcome.
                why = type(reply).__name__
                again = isinstance(reply, httpx.ConnectTimeout) or not isinstance(reply, httpx.TimeoutException)
            if not again or attempt + 1 == attempts or time.monotonic() + wait >= deadline:
                break
            yield wait
        circuit.note(answered=False)
        raise RouterUnavailableError(f"the router is unavailable: {why}")

    def _local(self, fields: Mapping[str, Any], error: RouterUnavailableError) -> Routed:
        if self._default_for is not None:
            order = tuple(self._default_for(MappingProxyType(dict(fields))))
        elif unchecked := constraints(fields):
            raise RouterUnavailableError(
                f"{error}; the default models are not known to satisfy {', '.join(unchecked)}"
            ) from error
        else:
            order = self._default
        candidates = fields.get("candidates")
        order = tuple(model for model in dict.fromkeys(order) if candidates is None or model in candidates)
        if not order:
            raise RouterUnavailableError(f"{error}; no default models for this request") from error
        return Routed(model=order[0], fallbacks=order[1:], local=True, reason=f"{error}: the default order")


def _json(fields: Mapping[str, Any]) -> bytes:
    given = {name: value for name, value in fields.items() if value is not None}
    text = json.dumps(given, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")  # half a surrogate pair is no reason to leave a request unrouted


def _retry_after(value: str | None, otherwise: float) -> float:
    """The seconds that a Retry-After asks for, as a number or a date."""
    try:
        seconds = float(value) if value else otherwise
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value or "") - datetime.now(UTC)).total_seconds()
        except (TypeError, ValueError):
            return otherwise
    return max(seconds, 0.0) if math.isfinite(seconds) else otherwise


def _object(content: bytes) -> dict[str, Any]:
    """A JSON object; {} for anything else."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _routed(reply: Reply) -> Routed:
    if 400 <= reply.status < 500:
        raise _refusal(reply)
    raw = _object(reply.content) if reply.status == 200 else {}
    try:
        order = [candidate["model"] for candidate in raw["candidates"]]
        names = ("decision_id", "provider", "p_ok", "expected_cost_usd", "model_version", "policy_version")
        return Routed(
            model=raw["model"],
            fallbacks=tuple(order[1:]),
            local=False,
            reason=raw["reason"],
            raw=raw,
            **{name: raw[name] for name in names},
        )
    except (KeyError, TypeError):
        raise RouterUnavailableError(f"what answered {reply.status} is not the router") from None


def _refusal(reply: Reply) -> RouterRequestError:
    problem = _object(reply.content)
    kind = str(problem.get("type", "")).removeprefix("urn:router-ml:problem:")
    detail = str(problem.get("detail") or "the answer says no more")
    excluded = problem.get("excluded")
    return RouterRequestError(reply.status, kind, detail, excluded if isinstance(excluded, dict) else {})
