"""A callback for LiteLLM: one of its model groups is served by the model that the router chooses, request by request.

In a proxy it is named in the YAML, `litellm_settings: {callbacks: [serving.litellm_plugin.router_ml]}`; around an SDK
Router it is `await router_ml.acompletion(router, model="router-ml", messages=…)`. A request for the group goes to the
chosen model's own group in LiteLLM (the router's model ids are LiteLLM's model names), with the rest of the router's
order as its fallbacks in place of any others. Its outcome is reported. Other requests pass untouched.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import litellm
from litellm.integrations.custom_logger import CustomLogger

from serving.client import (
    AsyncRouterClient,
    Routed,
    RouteFields,
    RouterRequestError,
    RouterUnavailableError,
    constraints,
)

log = logging.getLogger(__name__)
FIELDS = "router_ml"  # the metadata of a request, a key or a team under which the router's fields stand
_DECISION = (
    "router_ml_decision"  # the metadata by which callbacks find the decision again: random, so nobody guesses it
)
_SPEND_LOG = "spend_logs_metadata"
_FROM_BODY = ("tools", "functions", "response_format", "max_tokens", "max_completion_tokens")
_FROM_METADATA = frozenset(RouteFields.__annotations__) - set(_FROM_BODY) - {"explain"}
_OPEN = 10_000  # decisions that wait for their outcome; the oldest is given up, its request was broken off
_FALLBACKS = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks")


@dataclass
class _Open:
    """A decision whose outcome is not known yet, and how many attempts have begun."""

    decision_id: str
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class PluginSettings:
    """What an operator sets.

    `model_group` is LiteLLM's name of the group that is routed. Where the router gives no decision, the group's own
    deployments and fallbacks in LiteLLM serve the request. Nothing knows whether they satisfy a request's constraints
    (`serving.routed.constraints`), so such a request fails with 503 then, unless `own_order_is_safe` says that they
    are cleared for every request that the group can get.
    """

    url: str = "http://127.0.0.1:8000"
    api_key: str | None = None
    model_group: str = "router-ml"
    deadline_s: float = 0.25
    own_order_is_safe: bool = False

    @classmethod
    def from_environment(cls) -> PluginSettings:
        """Reads ROUTER_ML_URL, _API_KEY, _MODEL_GROUP, _DEADLINE_S and _OWN_ORDER_IS_SAFE ("true"), where set.

        Raises ValueError for a deadline that is not a number.
        """
        found = {name: os.environ.get(f"ROUTER_ML_{name.upper()}") for name in cls.__dataclass_fields__}
        values: dict[str, Any] = {name: value for name, value in found.items() if value}
        if "deadline_s" in values:
            values["deadline_s"] = float(values["deadline_s"])
        if "own_order_is_safe" in values:
            values["own_order_is_safe"] = values["own_order_is_safe"].lower() in ("1", "true", "yes")
        return cls(**values)


class RouterML(CustomLogger):  # type: ignore[misc]
    """The callback. Without `settings` they come from the environment, when the first request does.

    `make_client` makes the client of an event loop (None: one of the settings' URL, key and deadline); give one that
    has `default_for` to decide request by request what may be called while the router is away.
    """

    def __init__(
        self, settings: PluginSettings | None = None, make_client: Callable[[], AsyncRouterClient] | None = None
    ) -> None:
        super().__init__()
        self._settings, self._make_client = settings, make_client
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, AsyncRouterClient]
        self._clients = weakref.WeakKeyDictionary()
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._reports: set[asyncio.Task[bool]] = set()

    @property
    def settings(self) -> PluginSettings:
        """The settings in force."""
        if self._settings is None:
            self._settings = PluginSettings.from_environment()
        return self._settings

    async def routed(self, data: dict[str, Any], *operators: Mapping[str, Any] | None) -> dict[str, Any]:
        """LiteLLM's request, for the group the chosen model and its fallbacks put in.

        The router's fields are those under `router_ml` in the metadata of the request and then of `operators`, of which
        each overrides the ones before: a caller cannot undo what the operator has set for its key.
        Raises litellm.BadRequestError for fields that are unknown and for a request that no model may serve,
        litellm.ServiceUnavailableError for one with constraints while the router is away.
        """
        if data.get("model") != self.settings.model_group:
            return data
        fields: dict[str, Any] = {}
        for source in (data.get("litellm_metadata"), data.get("metadata"), *operators):
            fields |= self._fields(source)
        body = {name: data[name] for name in _FROM_BODY if data.get(name) is not None}
        messages, prompt = data.get("messages"), data.get("prompt")
        try:
            if not isinstance(messages, list) and not isinstance(prompt, str):
                raise RouterUnavailableError("the request has neither messages nor a prompt that can be routed")
            text = {"messages": _plain(messages)} if isinstance(messages, list) else {"prompt": prompt}
            decision = await self._client().route(**text, **_plain(body), **fields)
        except RouterRequestError as error:
            if error.status in (402, 403, 422):  # a spent budget, too, must not be got round
                why = "".join(f"; {model} {reason}" for model, reason in error.excluded.items())
                raise self._refused(error.detail + why) from None
            # A wrong key or URL, a body that is too long: the router's absence, but one to be mended.
            log.error("the router refuses to decide: %s", error)
            return self._own_order(data, fields, str(error))
        except RouterUnavailableError as error:
            return self._own_order(data, fields, str(error))
        return self._put(data, decision)

    def _fields(self, metadata: Mapping[str, Any] | None) -> Mapping[str, Any]:
        given = (metadata or {}).get(FIELDS) or {}
        if not isinstance(given, Mapping):
            raise self._refused(f"metadata.{FIELDS} has to be an object")
        # An unknown name could be a constraint with a slip of the pen, which nothing would then hold.
        if unknown := sorted(set(map(str, given)) - _FROM_METADATA):
            raise self._refused(f"metadata.{FIELDS} has no {', '.join(unknown)}: {', '.join(sorted(_FROM_METADATA))}")
        return given

    def _refused(self, why: str) -> Exception:
        error: Exception = litellm.BadRequestError(
            message=f"router-ml: {why}", model=self.settings.model_group, llm_provider="router-ml"
        )
        return error

    def _own_order(self, data: dict[str, Any], fields: Mapping[str, Any], why: str) -> dict[str, Any]:
        bound = [*constraints(fields), *(["candidates"] if fields.get("candidates") is not None else [])]
        if bound and not self.settings.own_order_is_safe:
            raise litellm.ServiceUnavailableError(
                message=f"router-ml: {why}; LiteLLM's own order is not known to satisfy {', '.join(bound)}",
                model=self.settings.model_group,
                llm_provider="router-ml",
            )
        log.warning("LiteLLM's own order serves a request: %s", why)
        return data

    def _put(self, data: dict[str, Any], decision: Routed) -> dict[str, Any]:
        # The request's own lists go first in LiteLLM, empty ones too: no configured fallback widens the order.
        further = [{decision.model: list(decision.fallbacks)}] if decision.fallbacks else []
        fallbacks = dict.fromkeys(_FALLBACKS, further) | {"fallbacks": list(decision.fallbacks)}
        token = secrets.token_hex(12)
        if decision.decision_id is not None:
            self._open[token] = _Open(decision.decision_id)
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        # Where LiteLLM keeps metadata of its own, `metadata` is the provider's and goes upstream.
        own = "litellm_metadata" if isinstance(data.get("litellm_metadata"), dict) else "metadata"
        given = data.get(own) or {}
        # Of a request's metadata LiteLLM's spend log keeps this alone; `router-ml import litellm` reads it there.
        said = given.get(_SPEND_LOG)
        kept = {**(said if isinstance(said, Mapping) else {}), FIELDS: _for_spend_log(decision)}
        return {**data, "model": decision.model, **fallbacks, own: {**given, _DECISION: token, _SPEND_LOG: kept}}

    async def acompletion(self, router: Any, **request: Any) -> Any:
        """`router.acompletion` of an SDK Router, routed. Raises what that and `routed` do."""
        if self not in litellm.callbacks:
            litellm.logging_callback_manager.add_litellm_callback(self)
        data = await self.routed(request)
        try:
            return await router.acompletion(**data)
        except BaseException as error:
            self._ended(data, error)
            raise

    async def close(self) -> None:
        """Waits for the reports that are under way and closes this event loop's client."""
        await asyncio.gather(*self._reports)
        if (client := self._clients.pop(asyncio.get_running_loop(), None)) is not None:
            await client.close()

    # What LiteLLM calls, by these names of the parameters.

    async def async_pre_call_hook(
        self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: str
    ) -> dict[str, Any]:
        """Before the proxy's own Router sees the request. A key's fields override its team's."""
        team, key = (getattr(user_api_key_dict, name, None) for name in ("team_metadata", "metadata"))
        return await self.routed(data, team, key)

    async def async_pre_call_deployment_hook(self, kwargs: dict[str, Any], call_type: Any) -> None:
        """An attempt begins. LiteLLM tells of a failed one only later, when a success may have been told already."""
        found = self._open.get(_token(kwargs))
        if found is not None:
            found.attempts += 1

    async def async_log_success_event(self, kwargs: Any, response_obj: Any, start_time: Any, end_time: Any) -> None:
        """An attempt has succeeded, its stream included."""
        found = self._open.pop(_token(kwargs.get("litellm_params")), None)
        if found is None:
            return
        said = kwargs.get("standard_logging_object") or {}
        cached = bool(said.get("cache_hit"))  # then neither cost nor time is the model's
        cost = said.get("response_cost") or None  # 0 is what LiteLLM says of a model without a price
        self._report(
            found,
            status="cached" if cached else "ok",
            served_model=said.get("model_group"),
            input_tokens=said.get("prompt_tokens"),
            output_tokens=said.get("completion_tokens"),
            cost_usd=0.0 if cached else cost,
            latency_ms=None if cached else (end_time - start_time).total_seconds() * 1000,
        )

    async def async_post_call_failure_hook(
        self,
        request_data: dict[str, Any],
        original_exception: Exception,
        user_api_key_dict: Any,
        traceback_str: str | None = None,
    ) -> None:
        """The proxy has given up."""
        self._ended(request_data, original_exception)

    def _ended(self, data: Mapping[str, Any], error: BaseException) -> None:
        found = self._open.pop(_token(data), None)
        if found is not None:
            self._report(found, status=_status(error))

    def _report(self, found: _Open, **outcome: Any) -> None:
        outcome = {name: value for name, value in outcome.items() if value is not None}
        report = self._client().report(found.decision_id, retries=max(found.attempts - 1, 0), **outcome)
        task = asyncio.get_running_loop().create_task(report)
        self._reports.add(task)  # a task that nobody holds may be collected before it has run
        task.add_done_callback(self._reports.discard)

    def _client(self) -> AsyncRouterClient:
        """The client of this event loop: connections belong to the loop that opened them."""
        loop = asyncio.get_running_loop()
        if loop not in self._clients:
            given = self.settings
            make = self._make_client or (
                lambda: AsyncRouterClient(given.url, api_key=given.api_key, deadline_s=given.deadline_s)
            )
            self._clients[loop] = make()
        return self._clients[loop]


def _for_spend_log(decision: Routed) -> dict[str, Any]:
    """What an evaluation has to know of a decision; the propensity only where the service made it."""
    said = {
        "decision_id": decision.decision_id,
        "policy_version": decision.policy_version,
        "propensity": decision.raw.get("propensity"),
        "candidates": [decision.model, *decision.fallbacks],
    }
    return {name: value for name, value in said.items() if value is not None}


def _token(holder: Mapping[str, Any] | None) -> str:
    for name in ("metadata", "litellm_metadata"):
        token = ((holder or {}).get(name) or {}).get(_DECISION)
        if isinstance(token, str):
            return token
    return ""


def _status(error: BaseException) -> Literal["error", "timeout", "rate_limited", "cancelled"]:
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, litellm.Timeout):
        return "timeout"
    return "rate_limited" if isinstance(error, litellm.RateLimitError) else "error"


def _plain(value: Any) -> Any:
    """JSON's own types: LiteLLM and its callers pass pydantic objects, too (an earlier answer as a message)."""
    if hasattr(value, "model_dump"):
        return value.model_dump(exclude_none=True)
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, type):
        return {"type": "json_schema"}  # a class as response_format: its schema is the provider's business
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


router_ml = RouterML()
