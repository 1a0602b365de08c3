"""The service's bodies, read and written by pydantic in Rust: models come in, typed dicts go out as they are."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints
from pydantic.config import JsonDict
from typing_extensions import TypedDict

from router_ml.conversation import request_of
from router_ml.policy import Policy
from router_ml.types import CACHED, Outcome, RouteRequest
from serving.explained import ExplanationAnswer
from serving.keys import ApiKey

SCHEMA_VERSION = 1
MAX_BATCH = 100
MAX_TOOLS = 1_000
MAX_SMALL_BYTES = 64 * 1024
"""Of a body that has no conversation in it."""
# Control characters are in no honest name; a NUL is one that Postgres cannot even store.
Name = Annotated[str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]*$")]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Amount = Annotated[float, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]


def _said(what: str) -> Any:
    return Field(description=what)


POk = Annotated[float | None, _said("P(the answer is acceptable), given that there is one.")]
PLow = Annotated[float | None, _said("Where the 90 % interval of `p_ok` begins.")]
PHigh = Annotated[float | None, _said("Where it ends.")]
PClaim = Annotated[float | None, _said("The cautious `p_ok` that the dial is held against.")]
Cost = Annotated[float | None, _said("What the call is expected to cost, retries included.")]
TotalCost = Annotated[float | None, _said("That and what follows a failure or a bad answer.")]

_ONE_TEXT: JsonDict = {
    "oneOf": [
        {"properties": {"prompt": {"type": "string"}, "messages": {"type": "null"}}, "required": ["prompt"]},
        {"properties": {"prompt": {"type": "null"}, "messages": {"type": "array"}}, "required": ["messages"]},
    ],
    "examples": [
        {"prompt": "Where is my parcel?", "tier": "standard", "data_class": "public"},
        {"messages": [{"role": "user", "content": "And in French?"}], "min_probability": 0.8, "max_cost_usd": 0.05},
    ],
}


class RouteBody(BaseModel):
    """An OpenAI chat request, or a plain prompt, with the dial and the constraints beside it.

    OpenAI's other fields (model, temperature, user, …) are accepted and ignored.
    """

    model_config = ConfigDict(extra="ignore", strict=True, json_schema_extra=_ONE_TEXT)

    prompt: str | None = Field(None, description="A plain prompt; give this or `messages`.")
    messages: list[dict[str, Any]] | None = Field(
        None, description="The conversation as OpenAI's chat API takes it, oldest first; the service bounds its length."
    )
    tools: list[dict[str, Any]] | None = Field(
        None, max_length=MAX_TOOLS, description="Tool definitions; need `tools`."
    )
    functions: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS, description="The older form of `tools`.")
    response_format: dict[str, Any] | None = Field(None, description="A JSON format makes the request need `json`.")
    max_tokens: Count | None = Field(None, description="Cap of the answer's length; caps the expected cost, too.")
    max_completion_tokens: Count | None = Field(None, description="The newer name of `max_tokens`.")
    tier: Name | None = Field(None, description="The dial by name, such as economy, standard, premium.")
    min_probability: Share | None = Field(None, description="The dial as the least probability of a good answer.")
    willingness_to_pay_usd: Amount | None = Field(
        None, description="What an acceptable answer is worth: choose by value among those that meet the dial."
    )
    max_cost_usd: Amount | None = Field(None, description="Models expected to cost more are excluded.")
    quality_threshold: Share | None = Field(
        None, description="From this quality on an answer is acceptable: one of those that the bundle was trained for."
    )
    objective: Literal["cost", "quality"] | None = Field(
        None, description="cost: the cheapest that meets the dial; quality: the most probable within `max_cost_usd`."
    )
    candidates: list[Name] | None = Field(
        None, description="Only these models; default all. The service bounds how many."
    )
    data_class: Name | None = Field(None, description="Only models cleared for it; default is the policy's.")
    region: Name | None = Field(None, description="Only models in this region.")
    needs: list[Literal["tools", "vision", "json"]] = Field([], max_length=3, description="Capabilities needed.")
    tenant: Name | None = Field(None, description="Whose request it is: budgets, sessions and rules go by it.")
    task: Name | None = Field(None, description="A tag that the policy's rules may match.")
    session: Name | None = Field(
        None, description="The conversation: it stays with its model unless there is a reason."
    )
    previous_model: Name | None = Field(None, description="The model that the conversation is with, if you know.")
    request_id: Name | None = Field(None, description="The caller's own id; outcomes may name it.")
    explain: bool = Field(False, description="Answer with an `explanation`, some milliseconds later.")

    def to_request(self, key: ApiKey | None, policy: Policy) -> RouteRequest:
        """The request in the program's own terms, as this key may make it. Raises InputError, ProblemError (403)."""
        asked = request_of(
            prompt=self.prompt,
            messages=self.messages,
            tools=[*(self.tools or ()), *(self.functions or ())] or None,
            response_format=self.response_format,
            needs=self.needs,
            max_tokens=self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens,
            tenant=self.tenant,
            key=None if key is None else key.name,
            task=self.task,
            session=self.session,
            previous_model=self.previous_model,
            request_id=self.request_id,
            data_class=self.data_class,
            region=self.region,
            candidates=None if self.candidates is None else tuple(self.candidates),
            tier=self.tier,
            min_probability=self.min_probability,
            willingness_to_pay_usd=self.willingness_to_pay_usd,
            max_cost_usd=self.max_cost_usd,
            quality_threshold=self.quality_threshold,
            objective=self.objective,
        )
        return asked if key is None else key.bind(asked, policy)


class CandidateAnswer(TypedDict):
    """A model that may serve the request. Numbers are null where nothing is known."""

    model: str
    provider: str
    p_ok: POk
    expected_cost_usd: Cost
    expected_total_cost_usd: TotalCost
    p_low: PLow
    p_high: PHigh
    p_claim: PClaim


class RouteAnswer(TypedDict):
    """A decision: call `model`; where it fails, the next of `candidates`. Fields are only ever added."""

    schema_version: int
    decision_id: Annotated[str, _said("What outcomes and explanations name.")]
    request_id: str | None
    model: Annotated[str, _said("The model to call.")]
    provider: str
    p_ok: POk
    expected_cost_usd: Cost
    expected_total_cost_usd: TotalCost
    p_low: PLow
    p_high: PHigh
    p_claim: PClaim
    candidates: Annotated[list[CandidateAnswer], _said("The order in which to try them, `model` first.")]
    excluded: Annotated[dict[str, str], _said("Per model why it may not serve.")]
    propensity: Annotated[float, _said("With which probability this model was chosen.")]
    explored: Annotated[bool, _said("Whether the model was drawn to learn of it.")]
    meets_threshold: Annotated[bool, _said("Whether its claim reaches the dial.")]
    min_probability: Annotated[float, _said("The dial that held, after tier, key and budget.")]
    quality_threshold: Annotated[float | None, _said("From this quality on an answer is acceptable.")]
    reason: str
    model_version: Annotated[str, _said("The bundle that decided.")]
    policy_version: str
    incumbent: Annotated[NotRequired[str], _said("The model that the session was with.")]
    stayed: Annotated[NotRequired[bool], _said("Whether the session stays with it.")]
    degraded: Annotated[bool, _said("Whether the bundle's twin made the estimates.")]
    reserve_usd: Annotated[float | None, _said("The most that calls of `model` may cost.")]
    explanation: NotRequired[ExplanationAnswer]


class ProblemAnswer(TypedDict, total=False):
    """RFC 9457 problem details; `errors` lists a body's mistakes, `excluded` says per model why it may not serve."""

    type: str
    title: str
    status: int
    detail: str
    errors: list[dict[str, str]]
    excluded: dict[str, str]


class BatchRequest(RouteBody):
    """One of several requests, as `/route` takes it. Without exactly one text it is refused alone, not the batch."""

    model_config = ConfigDict(json_schema_extra=None)


class BatchBody(BaseModel):
    """Several requests at once, each as `/route` takes it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    requests: list[BatchRequest] = Field(min_length=1, max_length=MAX_BATCH)


class BatchItem(TypedDict):
    """One request's decision, or its problem; one of the two is null."""

    decision: RouteAnswer | None
    problem: ProblemAnswer | None


class BatchAnswer(TypedDict):
    """The answers in the order of the requests."""

    results: list[BatchItem]


class PlanoAnswer(TypedDict):
    """Models in the order in which to try them, as Plano's routing API answers; `trace_id` is the decision's id."""

    models: list[str]
    route: str | None
    trace_id: str
    session_id: str | None


class OutcomeBody(BaseModel):
    """What became of a decision; `quality` may come alone, days later."""

    max_bytes: ClassVar[int] = MAX_SMALL_BYTES
    model_config = ConfigDict(extra="forbid", strict=True)

    decision_id: Name | None = Field(None, description="The decision's; this or `request_id`.")
    request_id: Name | None = Field(None, description="The caller's own id of the request.")
    status: Literal["ok", "error", "timeout", "rate_limited", "cancelled", "cached"] = Field(
        "ok",
        description="How the call ended; cached: the gateway's cache answered, at no cost.",
    )
    served_model: Name | None = Field(None, description="The model that answered, where it is not the chosen one.")
    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cost_usd: Amount | None = Field(None, description="What the call cost, by the provider.")
    latency_ms: Amount | None = Field(None, description="How long the answer took.")
    retries: Count = Field(0, description="Calls of the model that failed before.")
    quality: Share | None = Field(None, description="How good the answer was, 0 to 1.")
    quality_source: Name | None = Field(None, description="Who says so: user, judge, test, …")

    def to_outcome(self) -> Outcome:
        """The outcome in the program's own terms."""
        outcome = Outcome(**self.__dict__)
        if outcome.status == CACHED and outcome.cost_usd is None:
            return replace(outcome, cost_usd=0.0)
        return outcome


class OutcomeAnswer(TypedDict):
    """The receipt of a stored outcome; the same for every repetition of it."""

    outcome_id: str
    decision_id: str | None
    request_id: str | None


class HealthBody(BaseModel):
    """What a gateway knows of a model: open takes it out until further notice, auto leaves it to outcomes again."""

    max_bytes: ClassVar[int] = MAX_SMALL_BYTES
    model_config = ConfigDict(extra="forbid", strict=True)

    state: Literal["open", "closed", "auto"]


class HealthAnswer(TypedDict):
    """A model's circuit as it is now."""

    model: str
    state: Literal["open", "half-open", "closed"]


class ModelsAnswer(TypedDict):
    """The catalogue that the router chooses from."""

    model_version: str
    models: list[dict[str, Any]]


class PolicyAnswer(TypedDict):
    """The policy in force; `version` is the hash of the rest."""

    version: str
    policy: dict[str, Any]


class PolicyBody(RootModel[dict[str, Any]]):
    """A policy as `GET /policy` shows one under `policy`, or as a policy file holds it; `{}` is the default."""


class VersionsAnswer(TypedDict):
    """What is served after a reload."""

    model_version: str
    policy_version: str


class ChangeAnswer(TypedDict):
    """One change; `before` is null for the first of its kind."""

    change_id: str
    time_us: int
    kind: Literal["model", "policy", "keys", "challenger", "registry"]
    who: str
    before: dict[str, Any] | None
    after: dict[str, Any]
    reason: str | None


class ChangesAnswer(TypedDict):
    """The audit log, oldest first."""

    changes: list[ChangeAnswer]


class ReadyAnswer(TypedDict):
    """What is being served. `degraded` names the parts that do not work while routing goes on.

    `challenger` is the version of the second bundle, where the service was started with one; null while none is loaded.
    """

    status: Literal["ready"]
    model_version: str
    policy_version: str
    degraded: list[str]
    challenger: NotRequired[str | None]
