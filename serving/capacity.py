"""What models with a bounded capacity are doing just now: calls in flight, and tokens of the last seconds.

Counted from the decisions and outcomes of this process, in memory. Models without a bound cost nothing here.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from router_ml.catalog import Catalog

FORGOTTEN_SECONDS = 60.0
"""A call whose outcome has not come by then is taken to be over."""
WINDOW_SECONDS = 10.0
_NONE: Mapping[str, str] = {}


@dataclass(slots=True)
class _Load:
    calls: OrderedDict[str, float] = field(default_factory=OrderedDict)  # decision id: when
    tokens: deque[tuple[float, float]] = field(default_factory=deque)  # when, how many
    sum: float = 0.0


class Capacity:
    """The load of one process's decisions; to be called from the event loop's thread. `clock`: monotonic seconds.

    A model is full while as many of its calls as its `max_concurrency` are in flight, or while the expected tokens of
    the decisions of the last ten seconds reach its `max_tokens_per_second`. With `replicas` processes that share the
    traffic evenly this one has their part of both, of the calls at least one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, replicas: int = 1) -> None:
        self._clock, self._replicas = clock, replicas
        self._loads: dict[str, _Load] = {}
        self._of: dict[str, str] = {}  # decision id: model

    def full(self, catalog: Catalog) -> Mapping[str, str]:
        """The models that can take no more just now, and why."""
        if not catalog.bounded or not self._loads:
            return _NONE
        now, found = self._clock(), {}
        for model, card in catalog.bounded.items():
            load = self._loads.get(model)
            if load is None:
                continue
            self._forget(load, now)
            calls = None if card.max_concurrency is None else max(1, card.max_concurrency // self._replicas)
            most = None if card.max_tokens_per_second is None else card.max_tokens_per_second / self._replicas
            if calls is not None and len(load.calls) >= calls:
                found[model] = f"at capacity: {len(load.calls)} calls of {calls} are in flight"
            elif most is not None and load.sum >= most * WINDOW_SECONDS:
                found[model] = f"at capacity: {load.sum / WINDOW_SECONDS:.0f} tokens a second of {most:.0f}"
        return found

    def decided(self, catalog: Catalog, model: str, decision_id: str, tokens: float) -> None:
        """Counts a decision for a model, of so many expected tokens, input and output together."""
        if model in catalog.bounded:
            self._begun(model, decision_id, tokens)

    def ended(self, decision_id: str) -> None:
        """Says that a decision's call is over."""
        model = self._of.pop(decision_id, None)
        if model is not None:
            self._loads[model].calls.pop(decision_id, None)

    def _begun(self, model: str, decision_id: str, tokens: float) -> None:
        load, now = self._loads.setdefault(model, _Load()), self._clock()
        self._forget(load, now)
        load.calls[decision_id] = now
        self._of[decision_id] = model
        if tokens == tokens:  # NaN: nobody knows
            load.tokens.append((now, tokens))
            load.sum += tokens

    def _forget(self, load: _Load, now: float) -> None:
        while load.calls:
            decision_id, when = next(iter(load.calls.items()))
            if when > now - FORGOTTEN_SECONDS:
                break
            del load.calls[decision_id]
            self._of.pop(decision_id, None)
        while load.tokens and load.tokens[0][0] <= now - WINDOW_SECONDS:
            load.sum -= load.tokens.popleft()[1]
        if not load.tokens:
            load.sum = 0.0  # and not what rounding has left
