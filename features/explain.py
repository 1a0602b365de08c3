"""Why a decision came out as it did: each candidate's estimate taken apart, and what past requests like it gave.

The booster's estimate is taken apart by LightGBM's own SHAP values (Lundberg et al. 2020, "From local explanations to
global understanding with explainable AI for trees"): what each feature adds to the log odds, exact and summing up to
them. Nothing here is on the way of a decision; an explanation takes some milliseconds, whenever it is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from features.neighbours import Neighbours
from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError
from router_ml.quality import LearnedEstimator
from router_ml.router import Router
from router_ml.stored import decision_of_row
from router_ml.stored_features import unpack_features
from router_ml.types import CandidateFeatures, FloatArray, RouteDecision

NEAREST = 10
"""Past requests that an explanation shows."""
LARGEST = 6
"""Features whose contributions it names; the others are summed."""
NO_NEIGHBOURS = "the bundle was made without past requests: train a new one to see them"


@dataclass(frozen=True, slots=True)
class Contribution:
    """One feature's value, and what it adds to the booster's log odds."""

    feature: str
    value: float
    log_odds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateExplanation:
    """One model of the catalogue. `excluded` is the constraint that kept it out, or None.

    `estimates` are the probabilities of an acceptable answer that are averaged and then calibrated to `p_ok`: the
    booster's and the linear parts'; `p_low`, `p_high` and `p_claim` are as in `Candidate`. The booster's is `log_odds`
    = `base_log_odds` (what it says of the average row) + the `contributions`, largest first, + `other_log_odds` (those
    of all other features). Of the nearest past requests `nearest_known` have an outcome of this model, with the mean
    quality `nearest_quality`.
    """

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
    contributions: tuple[Contribution, ...]
    other_log_odds: float
    nearest_known: int
    nearest_quality: float | None


@dataclass(frozen=True, slots=True)
class PastRequest:
    """A past request: its id in the log, its cosine to this one, and the quality of each model that it is known of."""

    request_id: str
    similarity: float
    outcomes: dict[str, float]
    prompt: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A decision explained. `candidates` are those of the decision in its order, then the excluded ones.

    `excluded` is the decision's own, with what the request named and the catalogue does not have. `note` says why there
    are no nearest requests, where there are none.
    """

    decision_id: str
    model: str
    reason: str
    explored: bool
    meets_threshold: bool
    min_probability: float
    quality_threshold: float | None
    model_version: str
    policy_version: str
    candidates: tuple[CandidateExplanation, ...]
    excluded: dict[str, str]
    nearest: tuple[PastRequest, ...]
    note: str | None

    def to_json(self, *, prompts: bool = False) -> dict[str, Any]:
        """For JSON; the beginnings of past prompts, where the bundle has them, only with `prompts`."""
        whole = asdict(self)
        for past in whole["nearest"] if not prompts else ():
            del past["prompt"]
        candidates = [c | {"contributions": list(c["contributions"])} for c in whole["candidates"]]
        return whole | {"candidates": candidates, "nearest": list(whole["nearest"])}


def explain(
    router: Router,
    decision: RouteDecision,
    features: CandidateFeatures,
    neighbours: Neighbours | None,
    *,
    nearest: int = NEAREST,
    note: str | None = None,
) -> Explanation:
    """Explains a decision of `router` on the request whose features these are.

    `neighbours` are those of the learner that estimated: the twin's for a decision that is `degraded`. `note` says why
    there are none, where it is not that the bundle has none. Raises InputError when the decision is another bundle's,
    or when the router's learner cannot be taken apart.
    """
    if decision.model_version != router.model_version:
        raise InputError(
            f"the decision was made by bundle {decision.model_version}, and this is {router.model_version}: "
            "give the folder of the bundle that made it"
        )
    estimator = _learner(router, decision)
    if not isinstance(estimator, LearnedEstimator):
        raise InputError("only a trained router's decisions can be explained")
    names, ids = estimator.featurizer.names, router.catalog.ids
    if features.rows.shape != (len(ids), len(names)):
        raise InputError(
            f"the decision's features have the shape {features.rows.shape}, not {(len(ids), len(names))}: "
            "use the version of router-ml that made it"
        )
    past, outcomes = _nearest(neighbours, features, ids, nearest)
    if neighbours is None:
        note = note or NO_NEIGHBOURS
    elif not past:
        note = "the request holds no word that the encoder knows, so no past request is near it"
    # Row-wise [m, d + 1]: a column a feature, and the average row's log odds in the last.
    shap = np.asarray(
        _booster(estimator.trees.text).predict(features.rows, pred_contrib=True, num_threads=1), dtype=np.float64
    )
    thresholds = estimator.calibration.thresholds.tolist()
    at = thresholds.index(decision.quality_threshold) if decision.quality_threshold in thresholds else 0
    estimate = estimator.score(features, at)
    probabilities = [(name, getattr(estimate, name)) for name in ("p_ok", "p_low", "p_high", "p_claim")]
    decided = {candidate.model: candidate for candidate in decision.candidates}
    excluded = [model for model in ids if model not in decided]
    candidates = []
    for model in (*decided, *excluded):
        i = router.catalog.index[model]
        log_odds = float(shap[i].sum())
        largest = np.argsort(-np.abs(shap[i, :-1]), kind="stable")[:LARGEST]
        known = outcomes[:, i][~np.isnan(outcomes[:, i])]
        of = decided.get(model)
        candidates.append(
            CandidateExplanation(
                model=model,
                role="excluded" if of is None else "chosen" if model == decision.model else "fallback",
                excluded=decision.excluded.get(model),
                **{name: None if p is None else _number(p[i]) for name, p in probabilities},
                expected_cost_usd=None if of is None else _number(of.expected_cost_usd),
                expected_total_cost_usd=None if of is None else _number(of.expected_total_cost_usd),
                estimates={
                    "booster": 1.0 / (1.0 + math.exp(-log_odds)),
                    **{name: _shortest(part[i]) for name, part in zip(names, features.parts, strict=False)},
                },
                log_odds=log_odds,
                base_log_odds=float(shap[i, -1]),
                contributions=tuple(
                    Contribution(names[j], _shortest(features.rows[i, j]), float(shap[i, j])) for j in largest
                ),
                other_log_odds=float(np.delete(shap[i, :-1], largest).sum()),
                nearest_known=len(known),
                nearest_quality=round(float(known.mean()), 6) if len(known) else None,
            )
        )
    return Explanation(
        decision_id=decision.decision_id,
        model=decision.model,
        reason=decision.reason,
        explored=decision.explored,
        meets_threshold=decision.meets_threshold,
        min_probability=decision.min_probability,
        quality_threshold=decision.quality_threshold,
        model_version=decision.model_version,
        policy_version=decision.policy_version,
        candidates=tuple(candidates),
        excluded=dict(decision.excluded),
        nearest=past,
        note=note,
    )


def explain_stored(
    router: Router, row: Mapping[str, Any], neighbours: Neighbours | None, *, nearest: int = NEAREST
) -> Explanation:
    """Explains a past decision from its row of the store: by its stored features, else by its stored prompt.

    Raises InputError when the row has neither, and as `explain` does.
    """
    decision = decision_of_row(row)
    if row["features"] is not None:
        features = unpack_features(bytes(row["features"]))
    elif (row["prompt"] or row["messages"]) and isinstance(learner := _learner(router, decision), LearnedEstimator):
        asked = request_of_log_row(row["prompt"], row["messages"], row["tools"])
        features = learner.featurizer.transform(asked)
    else:
        raise InputError(
            f"decision {decision.decision_id} was stored with neither its features nor its prompt, so nothing is left "
            f"to explain it by. It took {decision.model}: {decision.reason}"
        )
    return explain(router, decision, features, neighbours, nearest=nearest)


def _learner(router: Router, decision: RouteDecision) -> object:
    """The learner that made the decision's estimates."""
    return router.twin if decision.degraded else router.estimator


@lru_cache(maxsize=4)
def _booster(text: str) -> Any:
    """LightGBM's own model, which a decision does not need: it knows what each feature adds."""
    import lightgbm

    return lightgbm.Booster(model_str=text)


def _nearest(
    neighbours: Neighbours | None, features: CandidateFeatures, ids: tuple[str, ...], k: int
) -> tuple[tuple[PastRequest, ...], FloatArray]:
    """The nearest past requests, and their outcomes [k, m]."""
    if neighbours is None or features.embedding is None:
        return (), np.empty((0, len(ids)), dtype=np.float32)
    found = neighbours.nearest(features.embedding, k)
    outcomes = neighbours.outcomes[[row for row, _ in found]]
    past = tuple(
        PastRequest(
            neighbours.ids[row],
            similarity,
            {model: _shortest(q) for model, q in zip(ids, known, strict=True) if not np.isnan(q)},
            None if neighbours.prompts is None else neighbours.prompts[row],
        )
        for (row, similarity), known in zip(found, outcomes, strict=True)
    )
    return past, outcomes


def _number(value: float) -> float | None:
    """With the nine digits that the store keeps, so that an explanation is the same at once and later."""
    return float(f"{value:.9g}") if math.isfinite(value) else None


def _shortest(value: np.float32) -> float:
    """The shortest number that is this float32: 0.2 and not 0.20000000298."""
    return float(str(value))


def as_text(explanation: Explanation) -> str:
    """An explanation for people to read, in lines."""
    e = explanation
    lines = [
        f"decision {e.decision_id} of bundle {e.model_version}, policy {e.policy_version}",
        f"{e.model}: {e.reason}" + (" (explored)" if e.explored else ""),
        f"asked: a probability of at least {e.min_probability:g}, " + ("met" if e.meets_threshold else "not met"),
    ]
    for c in e.candidates:
        cost = "" if c.expected_cost_usd is None else f", {c.expected_cost_usd:.3g} USD"
        if c.expected_total_cost_usd is not None:
            cost += f", {c.expected_total_cost_usd:.3g} USD with retries and escalation"
        p_ok, low, high, claim = (
            "unknown" if p is None else f"{p:.3f}" for p in (c.p_ok, c.p_low, c.p_high, c.p_claim)
        )
        lines += ["", f"{c.role} {c.model}: P(ok) {p_ok}{cost}", f"  within {low} to {high}, stands for {claim}"]
        if c.excluded:
            lines.append(f"  {c.excluded}")
        lines.append("  before calibration " + ", ".join(f"{name} {p:.3f}" for name, p in c.estimates.items()))
        added = "".join(f" {x.log_odds:+.2f} {x.feature} ({x.value:.3g})" for x in c.contributions)
        lines.append(
            f"  booster's log odds {c.log_odds:+.2f} = {c.base_log_odds:+.2f} on average{added} "
            f"{c.other_log_odds:+.2f} other features"
        )
        if c.nearest_quality is not None:
            known = f"{c.nearest_known} of the {len(e.nearest)} nearest requests"
            lines.append(f"  mean quality {c.nearest_quality:.2f} on {known}, where it is known")
    unknown = {model: why for model, why in e.excluded.items() if model not in {c.model for c in e.candidates}}
    lines += ["", *(f"excluded {model}: {why}" for model, why in unknown.items())] if unknown else []
    lines += ["", "nearest past requests" if e.nearest else f"no nearest past requests: {e.note}"]
    for past in e.nearest:
        outcomes = ", ".join(f"{model} {quality:g}" for model, quality in past.outcomes.items())
        lines.append(f"  {past.similarity:.3f} {past.request_id}: {outcomes}")
        if past.prompt is not None:
            lines.append(f"        {' '.join(past.prompt.split())}")
    return "\n".join(lines)
