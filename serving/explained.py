"""An explanation as the service answers it."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict


class ContributionAnswer(TypedDict):
    """A feature's value, and what it adds to the booster's log odds (SHAP)."""

    feature: str
    value: float
    log_odds: float


class CandidateExplanationAnswer(TypedDict):
    """A model's estimate taken apart. `log_odds` is the sum of the base, the contributions and the other features'."""

    model: str
    role: Literal["chosen", "fallback", "excluded"]
    excluded: str | None
    p_ok: float | None
    p_low: float | None
    p_high: float | None
    p_claim: float | None
    expected_cost_usd: float | None
    expected_total_cost_usd: float | None
    estimates: dict[str, float]
    log_odds: float
    base_log_odds: float
    contributions: list[ContributionAnswer]
    other_log_odds: float
    nearest_known: int
    nearest_quality: float | None


class PastRequestAnswer(TypedDict):
    """A past request by its id in the log, its similarity to this one, and the quality of the models that served it."""

    request_id: str
    similarity: float
    outcomes: dict[str, float]


class ExplanationAnswer(TypedDict):
    """Why the decision came out as it did. `note` says why there are no nearest requests, where there are none."""

    decision_id: str
    model: str
    reason: str
    explored: bool
    meets_threshold: bool
    min_probability: float
    quality_threshold: float | None
    model_version: str
    policy_version: str
    candidates: list[CandidateExplanationAnswer]
    excluded: dict[str, str]
    nearest: list[PastRequestAnswer]
    note: str | None
