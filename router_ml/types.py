"""The words that the whole program is said in: frozen dataclasses, no framework in them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Tier = Literal["frontier-closed", "mid-closed", "hosted-open", "self-hosted-open"]
TIERS: tuple[Tier, ...] = ("frontier-closed", "mid-closed", "hosted-open", "self-hosted-open")
CAPABILITIES = ("tools", "vision", "json")
Objective = Literal["cost", "quality"]
CACHED = "cached"
"""The status of an answer that came from the gateway's cache: no model was called, and it cost nothing."""
MOST_USD, MOST_TOKENS = 1e6, 10**10
"""What no call costs or has: a greater number is another unit, and would drown every sum."""
STATUSES = ("ok", "error", "timeout", "rate_limited", "cancelled", CACHED)


@dataclass(frozen=True, slots=True, kw_only=True)
class LongContext:
    """The prices of a whole call whose input is above so many tokens, USD per million tokens; None is not known."""

    above_tokens: int
    input_usd_per_mtok: float
    output_usd_per_mtok: float
    cached_input_usd_per_mtok: float | None = None
    batch_input_usd_per_mtok: float | None = None
    batch_output_usd_per_mtok: float | None = None
    batch_cached_input_usd_per_mtok: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is declared of one candidate model. Prices are USD per million tokens, windows are tokens.

    `capabilities`, `regions` and `data_classes` are what the model is cleared for: what is not listed is not allowed.
    `sibling` names the model of the catalogue that it most resembles: what is expected of it until outcomes are known.
    `cached_input_usd_per_mtok` is the price of input that is read from the provider's prompt cache. None, not known,
    counts as `input_usd_per_mtok` in routing: no session is held to a model by a discount that nobody has stated.
    Batch prices are those of calls through the provider's batch interface, `long_context` those of long calls, by
    rising `above_tokens`. `reasoning_usd_per_mtok` is the price of reasoning tokens where it is not that of output.
    `prices.price_call` bills by them. `max_output_tokens` is the longest answer that the model gives.
    `max_concurrency` calls and `max_tokens_per_second` of input and output together are what the model can take, where
    that is bounded: past it, the next candidate. A self-hosted model's prices are its effective ones (`selfhost`).
    `guessed` names fields that an import had to guess, and `price_source` says where the prices come from.
    """

    id: str
    provider: str
    tier: Tier
    input_usd_per_mtok: float
    output_usd_per_mtok: float
    context_window: int
    capabilities: frozenset[str] = frozenset()
    regions: frozenset[str] = frozenset()
    data_classes: frozenset[str] = frozenset({"public"})
    sibling: str | None = None
    cached_input_usd_per_mtok: float | None = None
    batch_input_usd_per_mtok: float | None = None
    batch_output_usd_per_mtok: float | None = None
    batch_cached_input_usd_per_mtok: float | None = None
    reasoning_usd_per_mtok: float | None = None
    long_context: tuple[LongContext, ...] = ()
    max_output_tokens: int | None = None
    max_concurrency: int | None = None
    max_tokens_per_second: float | None = None
    price_source: str | None = None
    guessed: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `text` is its readable text, `attachments` counts its images, files and audio.

    `extra_chars` is what a model reads beside the text: tool calls as JSON, and a nominal length for each attachment.
    """

    role: str
    text: str
    attachments: int = 0
    extra_chars: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteRequest:
    """One request to be routed. The dial is `tier` or `min_probability`, or `willingness_to_pay_usd`; see `policy`.

    An answer is acceptable from `quality_threshold` on (None: the tier's, or the bundle's own). `objective` "quality"
    asks for the most probable model within `max_cost_usd` (None: the tier's, which is "cost" unless it says otherwise).
    `messages` holds the conversation, oldest first (a plain prompt is one user message); `tools_chars` is the length of
    the tool definitions as JSON; `needs` are capabilities that the request cannot do without. `candidates` are the
    models that the request names, `allowed` those that its API key may use (None: all). `session` names the
    conversation, `previous_model` the model that it is with, where the caller knows (see `session`). `pressure` is what
    the budget of its tenant or key asks of the dial, where one does.
    """

    messages: tuple[Message, ...]
    tools: int = 0
    tools_chars: int = 0
    max_tokens: int | None = None
    needs: frozenset[str] = frozenset()
    tenant: str | None = None
    key: str | None = None
    task: str | None = None
    session: str | None = None
    previous_model: str | None = None
    request_id: str | None = None
    data_class: str | None = None
    region: str | None = None
    candidates: tuple[str, ...] | None = None
    allowed: frozenset[str] | None = None
    tier: str | None = None
    min_probability: float | None = None
    willingness_to_pay_usd: float | None = None
    max_cost_usd: float | None = None
    quality_threshold: float | None = None
    objective: Objective | None = None
    pressure: Pressure | None = None


class Pressure(NamedTuple):
    """What a budget asks of a request's dial: to move by the share `moved` (0 to 1) towards `floor`, and `why`."""

    moved: float
    floor: float
    why: str


class Candidate(NamedTuple):
    """One eligible model with its calibrated probability of an acceptable answer and its expected costs in USD.

    `expected_cost_usd` is that of the call, retries included; `expected_total_cost_usd` adds what follows when the call
    fails or its answer is not acceptable (`costs.total_costs`). `p_low` and `p_high` bound the 90 % interval of `p_ok`,
    and `p_claim` is what the dial is held against (NaN: the learner does not say, the dial is held against `p_ok`).
    A decision makes one for every model: a tuple takes a third of the time of a frozen dataclass.
    """

    model: str
    p_ok: float
    expected_cost_usd: float
    expected_total_cost_usd: float = math.nan
    p_low: float = math.nan
    p_high: float = math.nan
    p_claim: float = math.nan


class Arm(NamedTuple):
    """Which of two bundles made a decision while a canary ran: the "champion" or the "challenger" (`canary`).

    `unit` is what was drawn for ("request", "session", "tenant"), `cluster` names it (None: this request alone) and
    `share` is the challenger's. `propensity` is that of the choice within the arm; the decision's own is over the draw.
    """

    name: str
    unit: str
    share: float
    propensity: float
    cluster: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteDecision:
    """The answer to a `RouteRequest`: the chosen model first in `candidates`, then the fallbacks in order.

    `propensity` is the exact probability with which the policy chose `model` for this request (exploration included);
    `excluded` maps each ineligible model to the constraint that kept it out. Every `p_ok` is the probability of an
    answer of at least `quality_threshold` (None: the learner does not say which). `data_class` is the one that every
    candidate is cleared for: the request's, or the policy's default. `incumbent` is the model that the session was
    with (None: no session, or its first request), `stayed` whether that one was chosen, and `cached_tokens` what its
    prompt cache was taken to hold of this request. `degraded` says that the router's twin made the estimates, since its
    own learner was late. `arm` says which bundle's it is, where a canary ran. `drawn` are the models that exploration
    draws from, where these are not all candidates. `reserve_usd` is the most that calls of `model` may cost: the
    estimated input and the longest answer, at full price, as often as the policy's `max_attempts`.
    """

    decision_id: str
    model: str
    candidates: tuple[Candidate, ...]
    excluded: Mapping[str, str]
    propensity: float
    explored: bool
    meets_threshold: bool
    min_probability: float
    reason: str
    model_version: str
    policy_version: str
    quality_threshold: float | None = None
    data_class: str | None = None
    incumbent: str | None = None
    stayed: bool | None = None
    cached_tokens: float | None = None
    degraded: bool = False
    arm: Arm | None = None
    drawn: tuple[str, ...] | None = None
    reserve_usd: float | None = None

    @property
    def chosen(self) -> Candidate:
        """The chosen model with its probability and expected cost."""
        return self.candidates[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of a decision. `quality` is in [0, 1] and may be absent, or come later in another outcome."""

    decision_id: str | None = None
    request_id: str | None = None
    status: str = "ok"
    served_model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost_usd: float | None = None
    latency_ms: float | None = None
    retries: int = 0
    quality: float | None = None
    quality_source: str | None = None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the learner says of one request, aligned with the catalogue's order: shapes [m].

    `features` is what it saw, where it keeps that: enough to explain the estimate later. `p_low` and `p_high` bound the
    90 % interval of `p_ok` (how well the model is known, not the chance in one answer); `p_claim`, at most `p_ok`, is
    what a least probability is held against. None: the learner does not say.
    """

    p_ok: FloatArray
    output_tokens: FloatArray
    input_tokens: float
    features: CandidateFeatures | None = None
    p_low: FloatArray | None = None
    p_high: FloatArray | None = None
    p_claim: FloatArray | None = None


@dataclass(frozen=True, slots=True)
class CandidateFeatures:
    """What the learner sees of one request, a row per candidate in catalogue order.

    `rows` is float32 [m, d], `parts` float32 [k, m] holds the k linear estimates of P(ok) that are also columns of
    `rows`, `output_tokens` float32 [m] and `input_tokens` are token counts for the cost. `embedding` float32 [e] is the
    request's own, by which its nearest past requests are found.
    """

    rows: FloatArray
    parts: FloatArray
    output_tokens: FloatArray
    input_tokens: float
    embedding: FloatArray | None = None


class Featurizer(Protocol):
    """One request to numbers: the same function in training and in serving."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of `CandidateFeatures.rows`."""
        ...

    def transform(self, request: RouteRequest) -> CandidateFeatures:
        """The features of one request; they depend on nothing else, bit for bit."""
        ...
