"""Shadow decisions: what the other of two bundles would have decided on a request, kept beside the decision served."""

from __future__ import annotations

import math
import time
from typing import Any, Literal

from router_ml.canary import probability
from router_ml.types import RouteDecision

Bundle = Literal["champion", "challenger"]


def shadow_row(bundle: Bundle, served: RouteDecision, shadow: RouteDecision) -> dict[str, Any]:
    """A row for the table `shadows`. `shadow` was made on the same request, by that `bundle`, without exploring.

    `model`, `p_ok` and the costs are of the model that it prefers, `propensity` is how probably it would choose that.
    `served_probability` is how probably it would have chosen the model that was served: the target's probability in an
    importance weight. `served_p_ok` is what it expected of that one, whose outcome comes (None: not a candidate to it).
    """
    chosen = shadow.chosen
    served_p_ok = next((c.p_ok for c in shadow.candidates if c.model == served.model), math.nan)
    return {
        "decision_id": served.decision_id,
        "time_us": time.time_ns() // 1000,
        "bundle": bundle,
        "model_version": shadow.model_version,
        "policy_version": shadow.policy_version,
        "model": chosen.model,
        "p_ok": _number(chosen.p_ok),
        "expected_cost_usd": _number(chosen.expected_cost_usd),
        "expected_total_cost_usd": _number(chosen.expected_total_cost_usd),
        "propensity": shadow.propensity,
        "meets_threshold": shadow.meets_threshold,
        "served_probability": probability(shadow, served.model),
        "served_p_ok": _number(served_p_ok),
        "degraded": shadow.degraded,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
