"""Whole numbers of a policy's JSON as the fractions that they are.

JavaScript writes 1.0 as 1, and a policy's version is the hash of its text: what a page has read and sent back unchanged
has to be the same version.
"""

from __future__ import annotations

from typing import Any

_WHOLE = ("max_attempts", "cache_min_tokens")


def with_fractions(value: Any, name: str = "") -> Any:
    """The same JSON with every whole number a float, but for the settings that are counts."""
    if isinstance(value, dict):
        return {key: with_fractions(each, key) for key, each in value.items()}
    if isinstance(value, list):
        return [with_fractions(each, name) for each in value]
    if isinstance(value, int) and not isinstance(value, bool) and name not in _WHOLE and abs(value) < 2**53:
        return float(value)
    return value
