"""What a choice will have cost once there is an acceptable answer: retries, failures and escalation included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from router_ml.errors import InputError
from router_ml.types import RouteRequest

HAIR = 0.01
"""Probabilities this close to the highest count as equal to it: estimates are no finer, and prices differ by tens."""
LEAST_SUCCESS = 0.1
"""The last resort is asked at most ten times: after that nobody goes on asking."""


MESSAGE_TOKENS = 16
"""More than what marks a message off from the next in any chat template."""
TOOL_TOKENS = 1_000
"""More than what providers say that they add to the prompt where there are tools."""


def most_input_tokens(request: RouteRequest) -> float:
    """The most tokens that the prompt can be, whatever the tokenizer: no token is shorter than a byte of UTF-8.

    Infinite where there are images, files or audio, whose tokens their number does not bound.
    """
    if any(m.attachments for m in request.messages):
        return math.inf
    # JSON that was written in ASCII has no fewer characters than the text that it stands for has bytes.
    text = sum([_bytes(m.text) + m.extra_chars for m in request.messages]) + request.tools_chars
    return text + MESSAGE_TOKENS * (len(request.messages) + 1) + (TOOL_TOKENS if request.tools else 0)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


@dataclass(frozen=True, slots=True)
class Reliability:
    """How calls of each model went in the log, in catalogue order [m]; the same for every request.

    `attempts` is the mean number of attempts a call takes (1 + retries), at least 1; `failure` is the share of calls
    that end without an answer (error, timeout, rate limit, or a fallback to another model), in [0, 1].
    """

    attempts: tuple[float, ...]
    failure: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.attempts) != len(self.failure):
            raise InputError("reliability has to give attempts and failure for the same models")
        if not all(1.0 <= a < math.inf for a in self.attempts) or not all(0.0 <= f <= 1.0 for f in self.failure):
            raise InputError("reliability needs attempts of 1 or more, and failure rates in [0, 1]")

    @classmethod
    def perfect(cls, models: int) -> Reliability:
        """Every call of each of `models` answers at the first attempt: what is assumed where nothing was learnt."""
        return cls((1.0,) * models, (0.0,) * models)

    def to_json(self) -> dict[str, list[float]]:
        """The two lists as JSON."""
        return {"attempts": list(self.attempts), "failure": list(self.failure)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Reliability:
        """The inverse of `to_json`. Raises InputError for numbers that are not possible."""
        return cls(tuple(map(float, data["attempts"])), tuple(map(float, data["failure"])))


def last_resort_usd(p_ok: Sequence[float], cost_usd: Sequence[float], failure: Sequence[float]) -> float:
    """What it costs to ask the strongest candidate until it succeeds, USD; 0 where no candidate is known.

    A call costs `cost_usd` [m] (its retries included) and succeeds with probability (1 - failure) * p_ok, so that
    cost / success is the mean of a geometric number of calls (at most 1 / `LEAST_SUCCESS` of them). The strongest is
    the most probable one, or the cheapest of those within a `HAIR` of it. Candidates whose probability is NaN or whose
    cost is not finite cannot be it. Calls are taken to succeed independently of each other; a request that has failed
    once is likelier to be hard, so this is the least that it costs.
    """
    strongest = -1.0
    for v, c in zip(p_ok, cost_usd, strict=True):
        if v > strongest and c < math.inf:
            strongest = v
    strong = [i for i, v in enumerate(p_ok) if v >= strongest - HAIR and cost_usd[i] < math.inf]
    return min([cost_usd[i] / max((1.0 - failure[i]) * p_ok[i], LEAST_SUCCESS) for i in strong], default=0.0)


def total_costs(
    p_ok: Sequence[float], cost_usd: Sequence[float], failure: Sequence[float], escalation_rate: float
) -> list[float]:
    """Expected total cost of an acceptable answer per candidate, USD [m], if it is asked first.

    T = cost + (failure + (1 - failure) * (1 - p_ok) * escalation_rate) * last resort: a call that fails always goes on
    to the last resort, an answer that is not acceptable does in `escalation_rate` of the cases. Because T is, at a rate
    of 1, cost - worth * P(success) + worth with worth = last resort, this order is the value order of
    `willingness_to_pay_usd` at the worth that the candidates themselves imply: nobody need pay more for an acceptable
    answer than the last resort takes. NaN where the probability is.
    """
    resort = last_resort_usd(p_ok, cost_usd, failure)
    return [
        c + (f + (1.0 - f) * (1.0 - v) * escalation_rate) * resort
        for v, c, f in zip(p_ok, cost_usd, failure, strict=True)
    ]
