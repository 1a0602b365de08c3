"""How long the fuzzers run: `ROUTER_ML_FUZZ` multiplies their examples (`make fuzz`), else they are few and fixed."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

TIMES = int(os.environ.get("ROUTER_ML_FUZZ") or 1)
FIXED = "ROUTER_ML_FUZZ" not in os.environ


def fuzzed(examples: int) -> settings:
    """The settings of a property that an ordinary run tries on so many examples, the same ones each time."""
    return settings(
        max_examples=examples * TIMES,
        derandomize=FIXED,
        deadline=None,
        print_blob=True,
        phases=set(Phase) - {Phase.explain},  # it tries a failure hundreds of times more
        suppress_health_check=list(HealthCheck),
    )
