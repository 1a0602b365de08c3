"""The words of a gateway's side: what it asks, what it gets, and which requests only the service can judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

# What a local order of models may disregard: the text, and wishes that no order can break. All else is a constraint,
# so that one which this client has never heard of is not broken either.
_FREE = frozenset(
    {"messages", "prompt", "tools", "functions", "response_format", "max_tokens", "max_completion_tokens"}
    | {"tier", "min_probability", "willingness_to_pay_usd", "quality_threshold", "objective"}
    | {"candidates", "tenant", "task", "session", "previous_model", "request_id", "explain"}
)


class RouterUnavailableError(Exception):
    """No decision could be had in time, and no local order of models may stand in for it."""


class RouterRequestError(Exception):
    """The service refused the request (4xx): `detail` says what to change, `excluded` per model why it may not serve.

    `kind` is the stable last word of the problem's type, such as "no-eligible-model"; "" where there is none.
    """

    def __init__(self, status: int, kind: str, detail: str, excluded: Mapping[str, str]) -> None:
        super().__init__(f"{status}: {detail}")
        self.status, self.kind, self.detail, self.excluded = status, kind, detail, excluded


class RouteFields(TypedDict, total=False):
    """What a request may carry beside its text; see the service's `/openapi.json`."""

    tools: Sequence[Mapping[str, Any]] | None
    functions: Sequence[Mapping[str, Any]] | None
    response_format: Mapping[str, Any] | None
    max_tokens: int | None
    max_completion_tokens: int | None
    tier: str | None
    min_probability: float | None
    willingness_to_pay_usd: float | None
    max_cost_usd: float | None
    quality_threshold: float | None
    objective: Literal["cost", "quality"] | None
    candidates: Sequence[str] | None
    data_class: str | None
    region: str | None
    needs: Sequence[str] | None
    tenant: str | None
    task: str | None
    session: str | None
    previous_model: str | None
    request_id: str | None
    explain: bool | None


class OutcomeFields(TypedDict, total=False):
    """What became of a decision: costs in USD, latency in milliseconds, quality in [0, 1]."""

    request_id: str | None
    status: Literal["ok", "error", "timeout", "rate_limited", "cancelled", "cached"]
    served_model: str | None
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    latency_ms: float | None
    retries: int
    quality: float | None
    quality_source: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """Call `model`; where it fails, the next of `fallbacks`. What a local order does not know is None."""

    model: str
    fallbacks: tuple[str, ...]
    local: bool
    reason: str
    decision_id: str | None = None
    provider: str | None = None
    p_ok: float | None = None
    expected_cost_usd: float | None = None
    model_version: str | None = None
    policy_version: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False)


def constraints(fields: Mapping[str, Any]) -> list[str]:
    """The fields of a request that bind which models may serve it, and that only the service can check.

    These are `data_class`, `region`, `needs`, `max_cost_usd`, and every field that this client does not know.
    `candidates` is none of them, since any order can be restricted to them. What a body only implies (tools need
    `tools`) is none either: a model that cannot do it says so itself, and no data goes where it must not.
    """
    return sorted(name for name, value in fields.items() if name not in _FREE and value not in (None, [], (), ""))
