"""The client for gateways, on httpx: within a deadline the service's decision, or the gateway's own order of models.

Importing it brings httpx and the standard library alone, so a gateway needs none of what the service is made of.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self, Unpack

import httpx

from serving.calls import Caller, Reply, Send, Steps, T
from serving.routed import OutcomeFields, Routed, RouteFields, RouterRequestError, RouterUnavailableError, constraints

__all__ = [
    "AsyncRouterClient",
    "OutcomeFields",
    "RouteFields",
    "Routed",
    "RouterClient",
    "RouterRequestError",
    "RouterUnavailableError",
    "constraints",
]


class RouterClient(Caller):
    """The client for threads, which may share one. A service that answers byte by byte may take twice the deadline."""

    def _open(self) -> None:
        self._http = httpx.Client(**self._options)

    def route(
        self,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt: str | None = None,
        **fields: Unpack[RouteFields],
    ) -> Routed:
        """The decision for OpenAI-shaped `messages`, or a `prompt`.

        Raises RouterRequestError when the service refuses the request, RouterUnavailableError when it gives no decision
        in time and no default may stand in, TypeError or ValueError for what is not JSON.
        """
        return self._run(self._routing({"messages": messages, "prompt": prompt, **fields}))

    def report(
        self, decision_id: str | None, *, idempotency_key: str | None = None, **outcome: Unpack[OutcomeFields]
    ) -> bool:
        """Whether the service has stored the outcome. It is sent again until then or until `report_deadline_s`.

        A report must not fail the request that it is about: what the network or the service does wrong, a refusal
        included, is a warning in the log and False. A local order's decision_id (None) has nothing to report to: False.
        """
        return decision_id is not None and self._run(self._reporting(decision_id, outcome, idempotency_key))

    def _run(self, steps: Steps[T]) -> T:
        reply: Reply | httpx.RequestError | None = None
        try:
            while True:
                step = steps.send(reply)
                if isinstance(step, Send):
                    reply = self._exchange(step)
                else:
                    time.sleep(step)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    def _exchange(self, send: Send) -> Reply | httpx.RequestError:
        try:
            response = self._http.send(self._request(self._http, send), stream=True)
            with contextlib.closing(response):
                content = b""
                for chunk in response.iter_bytes():
                    content += chunk
                    if time.monotonic() > send.deadline:
                        return httpx.ReadTimeout("the deadline")
            return Reply(response.status_code, response.headers, content)
        except httpx.RequestError as error:
            return error

    def close(self) -> None:
        """Closes its connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()


class AsyncRouterClient(Caller):
    """The client for one event loop of asyncio."""

    def _open(self) -> None:
        self._http = httpx.AsyncClient(**self._options)

    async def route(
        self,
        *,
        messages: Sequence[Mapping[str, Any]] | None = None,
        prompt: str | None = None,
        **fields: Unpack[RouteFields],
    ) -> Routed:
        """The decision for OpenAI-shaped `messages`, or a `prompt`. Raises what `RouterClient.route` does."""
        return await self._run(self._routing({"messages": messages, "prompt": prompt, **fields}))

    async def report(
        self, decision_id: str | None, *, idempotency_key: str | None = None, **outcome: Unpack[OutcomeFields]
    ) -> bool:
        """Whether the service has stored the outcome; like `RouterClient.report`."""
        return decision_id is not None and await self._run(self._reporting(decision_id, outcome, idempotency_key))

    async def _run(self, steps: Steps[T]) -> T:
        reply: Reply | httpx.RequestError | None = None
        try:
            while True:
                step = steps.send(reply)
                if isinstance(step, Send):
                    reply = await self._exchange(step)
                else:
                    await asyncio.sleep(step)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]

    async def _exchange(self, send: Send) -> Reply | httpx.RequestError:
        try:
            async with asyncio.timeout(send.deadline - time.monotonic()):
                response = await self._http.send(self._request(self._http, send))
            return Reply(response.status_code, response.headers, response.content)
        except httpx.RequestError as error:
            return error
        except TimeoutError:
            return httpx.ReadTimeout("the deadline")

    async def close(self) -> None:
        """Closes its connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_raised: object) -> None:
        await self.close()
