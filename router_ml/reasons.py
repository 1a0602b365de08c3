"""The few kinds behind the sentences in a decision's `reason` and `excluded`, for counting them."""

from __future__ import annotations

_KINDS = {
    "cheapest candidate": "cheapest",
    "best value": "best_value",
    "most probable candidate within": "most_quality",
    "a rule pins": "pinned",
    "exploration": "explored",
    "session stays": "stayed",
    "session moves": "moved",
    "no estimate": "no_estimate",
    "not among the request": "candidates",
    "not in the catalogue": "catalogue",
    "not on the key": "key",
    "not cleared for": "data_class",
    "not in region": "region",
    "does not support": "capability",
    "context window": "context_window",
    "expected cost": "max_cost",
    "circuit open": "circuit",
    "taken out by": "circuit",
    "at capacity": "capacity",
}


def kind(reason: str) -> str:
    """The kind of a `RouteDecision.reason` or of one of its `excluded` reasons: a word from a short, fixed list."""
    for start, name in _KINDS.items():
        if reason.startswith(start):
            return name
    if reason.startswith("no candidate's claim reaches"):
        return "default" if ": the configured default" in reason else "most_probable"
    return "other"
