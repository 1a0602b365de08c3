"""A budget on a trade-off whose cost and quality are known at every setting."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from router_ml.budget import Budget
from router_ml.errors import InputError
from training.gate import Limits
from training.pacing import STEPS, pace
from training.tradeoff import Scope, TradeOff
from training.tradeoff_levels import Level

REQUESTS = 3_000.0


def level(cost: float | None, quality: float) -> Level:
    values = {"quality": (quality, quality, quality), "cost_usd": None if cost is None else (cost, cost, cost)}
    return Level({**values, "latency_ms": None}, {}, (1.0,))


def curve(*costs: float | None) -> TradeOff:
    """Settings from 0 to 1; quality is 0.5 + half the setting."""
    settings = tuple(float(x) for x in np.linspace(0.0, 1.0, len(costs)))
    levels = tuple(level(cost, 0.5 + s / 2) for cost, s in zip(costs, settings, strict=True))
    scope = Scope("all", "", 100, 100, levels, {}, levels[0], None, None)
    return TradeOff(
        datetime(2026, 1, 1, tzinfo=UTC), "m", "p", {}, 0.95, REQUESTS, ("a",), settings, (scope,), (), (), Limits()
    )  # fmt: skip


def test_an_ample_budget_changes_nothing() -> None:
    found = pace(curve(0.001, 0.002, 0.003), Budget(usd=1e6, per="month", tenant="t"), 0.5)
    assert found.unpressed_usd == pytest.approx(REQUESTS * 0.002)
    assert set(found.dial) == {0.5} and found.decided == 1.0
    assert found.mean_quality == pytest.approx(found.unpressed_quality) == 0.75
    assert found.spent_usd[-1] == pytest.approx(found.unpressed_usd * (1 - 1 / STEPS))


@pytest.mark.parametrize("share", [0.95, 0.7, 0.5])
def test_a_tight_budget_holds_and_costs_quality(share: float) -> None:
    """The cheapest setting fits, and where all is spent the dial is at its floor: hardly more is spent than that."""
    found = pace(curve(0.0001, 0.002, 0.004), Budget(usd=share * REQUESTS * 0.004, per="month", tenant="t"), 1.0)
    frame = found.to_frame()
    spent = frame["spent_usd"].to_numpy()
    assert (np.diff(spent) > 0).all() and spent[-1] < 1.01 * found.budget.usd
    assert frame["dial"][0] == 1.0 and frame["dial"].min() < 1.0
    assert found.mean_quality == pytest.approx(float(frame["quality"].mean()))
    assert found.mean_quality < found.unpressed_quality == 1.0
    # Money buys quality in proportion here: the mean quality is what the money that was spent buys.
    bought = np.interp(spent[-1] / (REQUESTS * (1 - 1 / STEPS)), [0.0001, 0.002, 0.004], [0.5, 0.75, 1.0])
    assert found.mean_quality == pytest.approx(bought, abs=0.01)
    assert len(found.plot().axes[0].lines) == 4


def test_a_hard_budget_stops_and_a_day_is_a_thirtieth() -> None:
    budget = Budget(usd=0.25 * REQUESTS * 0.002 / 30, per="day", key="k", hard=True, floor=0.9)
    found = pace(curve(0.002, 0.002), budget, 0.9)
    assert found.unpressed_usd == pytest.approx(REQUESTS * 0.002 / 30)
    assert found.decided == pytest.approx(0.25, abs=0.01)
    assert found.to_frame()["dial"].null_count() == pytest.approx(0.75 * STEPS, abs=2)
    half = pace(curve(0.002, 0.002), budget, 0.9, share=0.5)
    assert half.decided == pytest.approx(0.5, abs=0.01)


def test_what_is_not_identified_or_not_possible_says_so() -> None:
    budget = Budget(usd=1.0, per="month", tenant="t")
    known = pace(curve(None, 0.002, 0.004), replace(budget, usd=1e6), 0.5)
    assert known.unpressed_usd == pytest.approx(REQUESTS * 0.002)
    with pytest.raises(InputError, match=r"identifies the settings from 0\.5 to 1, and not 0\.3"):
        pace(curve(None, 0.002, 0.004), budget, 0.3)
    with pytest.raises(InputError, match=r"identifies the settings from 0 to 0\.5, and not 0\.85"):
        pace(curve(0.002, 0.004, None), budget, 0.85)
    with pytest.raises(InputError, match=r"give the budget a floor of 0\.5"):
        pace(curve(None, 0.002, 0.004), budget, 0.9)
    with pytest.raises(InputError, match="does not identify"):
        pace(curve(None, None, 0.004), budget, 0.5)
    for values in ({"min_probability": 1.1}, {"min_probability": 0.5, "share": 0.0}):
        with pytest.raises(InputError, match="has to lie"):
            pace(curve(0.1, 0.2), budget, **values)
