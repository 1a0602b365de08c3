"""Budgets: paced over their period, the dial that moves and says so, sums that all processes share."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from live_service import running, wait_for
from small_demo import Demo, small_demo

from router_ml.budget import NEARLY, Budget, moved
from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.reasons import kind
from router_ml.router import Router
from router_ml.types import Estimate, LongContext, Message, Pressure, RouteRequest
from serving.budgets import Budgets
from serving.problems import ProblemError

ASK = RouteRequest(messages=(Message("user", "hello"),), tenant="acme")
DAY = Budget(usd=10.0, per="day", tenant="acme")


class _Fixed:
    def estimate(self, request: RouteRequest) -> Estimate:
        p = np.array([0.9, 0.8, 0.6, 0.3], dtype=np.float32)
        return Estimate(p, np.full(4, 100.0, dtype=np.float32), 1000.0)


@pytest.fixture
def router(catalog: Catalog) -> Router:
    return Router(catalog, _Fixed(), Policy(escalation_rate=0.0, default_tier="premium", budget=(DAY,)), "v")


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"usd": 1, "per": "day"}, "of a tenant or of a key"),
        ({"usd": 1, "per": "day", "tenant": "a", "key": "b"}, "of a tenant or of a key"),
        ({"usd": 1, "per": "week", "key": "b"}, 'per has to be "day" or "month"'),
        ({"usd": 0, "per": "day", "key": "b"}, "usd has to be a number from"),
        ({"usd": 1, "per": "day", "key": "b", "floor": 1.1}, "floor has to be"),
        ({"usd": 1, "per": "day", "key": "b", "hard": 1}, "hard has to be"),
        ({"usd": 1, "per": "day", "key": "b", "pace": 1}, "nothing else"),
        ({"usd": True, "per": "day", "key": "b"}, "usd has to be"),
        ({"per": "day", "key": "b"}, "a table with usd"),
    ],
)
def test_budgets_that_cannot_be_are_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match="the policy: ") as error:
        Policy.from_json({"budget": [table]}, "the policy")
    assert says in str(error.value)


def test_the_policy_keeps_its_budgets_and_its_version_without_them() -> None:
    assert "budget" not in Policy().to_json() and "max_attempts" not in Policy().to_json()
    policy = Policy(budget=(DAY, Budget(usd=3.0, per="month", key="ci", hard=True, floor=0.4)), max_attempts=3)
    again = Policy.from_json(policy.to_json())
    assert again == policy and again.version != Policy().version
    with pytest.raises(InputError, match="keep one"):
        Policy(budget=(DAY, replace(DAY, usd=5.0)))
    with pytest.raises(InputError, match="max_attempts"):
        Policy(max_attempts=0)


def test_periods_are_utc_days_and_months() -> None:
    east = datetime(2026, 3, 1, 1, 0, tzinfo=UTC).astimezone(tz=None)
    assert DAY.period(east) == ("2026-03-01", pytest.approx(1 / 24))
    month = replace(DAY, per="month")
    assert month.period(datetime(2026, 2, 15, tzinfo=UTC)) == ("2026-02", 0.5)
    assert month.period(datetime(2026, 2, 28, 23, 59, 59, tzinfo=UTC)).elapsed < 1.0


CENTS = st.integers(0, 3000).map(lambda cents: cents / 100)


@given(CENTS, st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(0.0, 0.5))
def test_the_more_is_spent_the_further_the_dial_moves(spent: float, elapsed: float, floor: float, ahead: float) -> None:
    budget = replace(DAY, floor=floor, ahead=ahead)
    asked = budget.pressure(spent, elapsed)
    if spent / 10.0 <= min(elapsed + ahead, NEARLY):
        assert asked is None
        return
    assert asked is not None and 0.0 < asked.moved <= 1.0 and (asked.moved == 1.0) == (spent >= 10.0)
    more = budget.pressure(spent + 1.0, elapsed)
    assert more is not None and more.moved >= asked.moved
    for p in (0.2, 0.7, 1.0):
        assert min(floor, p) - 1e-12 <= moved(p, asked) <= p


def test_the_dial_moves_and_the_answer_says_so(router: Router) -> None:
    plain = router.decide(ASK)
    assert (plain.model, plain.min_probability) == ("frontier", 0.85) and ";" not in plain.reason
    pressed = router.decide(replace(ASK, pressure=Pressure(0.5, 0.0, "half is spent")))
    assert pressed.model == "hosted" and pressed.min_probability == pytest.approx(0.425)
    assert pressed.reason.endswith("; the dial moved to 0.425: half is spent") and kind(pressed.reason) == "cheapest"
    floor = router.decide(replace(ASK, pressure=Pressure(1.0, 0.7, "all is spent")))
    assert floor.model == "mid" and floor.min_probability == pytest.approx(0.7)
    below = router.decide(replace(ASK, min_probability=0.2, pressure=Pressure(1.0, 0.7, "all is spent")))
    assert below.model == "local" and below.min_probability == 0.2, "a floor does not raise a dial"


def test_the_other_dials_move_too(router: Router) -> None:
    pressure = Pressure(1.0, 0.0, "all is spent")
    worth = replace(ASK, willingness_to_pay_usd=1.0)
    assert router.decide(worth).model == "frontier"
    assert router.decide(replace(worth, pressure=pressure)).model == "local"
    best = replace(ASK, objective="quality", max_cost_usd=1.0)
    assert router.decide(best).model == "frontier"
    assert router.decide(replace(best, pressure=pressure)).model == "local"


class Clock:
    now = datetime(2026, 11, 26, 6, 0, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def _spend(budgets: Budgets, router: Router, cost: float, ask: RouteRequest = ASK) -> str:
    decision = router.decide(ask)
    budgets.decided(router.policy, ask, decision)
    budgets.settled(decision.decision_id, cost, ask.key)
    return decision.decision_id


def test_charges_are_expected_costs_until_they_are_settled(router: Router) -> None:
    clock = Clock()
    budgets = Budgets(clock)
    decision = router.decide(ASK)
    budgets.decided(router.policy, ASK, decision)
    spent = budgets.spent_usd(DAY.name, "2026-11-26")
    assert spent == pytest.approx(decision.chosen.expected_cost_usd, abs=1e-9)
    budgets.settled(decision.decision_id, 1.0, "another key")
    assert budgets.spent_usd(DAY.name, "2026-11-26") == spent
    for cost in (2.5, 2.0, 2.0):  # a correction takes the place of what was said before
        budgets.settled(decision.decision_id, cost, None)
    assert budgets.spent_usd(DAY.name, "2026-11-26") == 2.0
    _spend(budgets, router, 1.0, replace(ASK, tenant="other"))
    assert budgets.spent_usd(DAY.name, "2026-11-26") == 2.0
    assert budgets.pressed(ASK, router.policy) is ASK  # 20 % at a quarter of the day
    _spend(budgets, router, 5.0)
    asked = budgets.pressed(ASK, router.policy)
    assert asked.pressure is not None and asked.pressure.moved == pytest.approx((0.7 - 0.35) / 0.65)
    assert asked.pressure.why == "70% of the 10 USD a day of tenant 'acme' is spent, 25% of the day gone"
    clock.now += timedelta(days=1)
    assert budgets.pressed(ASK, router.policy) is ASK, "a new day is a new budget"
    unknown = replace(decision, decision_id="n", candidates=(decision.chosen._replace(expected_cost_usd=math.nan),))
    budgets.decided(router.policy, ASK, unknown)
    budgets.settled("n", 3.0, None)
    assert budgets.spent_usd(DAY.name, "2026-11-27") == 3.0, "what nobody expected is charged when it is known"


def test_a_hard_budget_stops_and_the_strongest_counts(router: Router) -> None:
    budgets = Budgets(Clock())
    key = Budget(usd=1.0, per="month", key="ci", floor=0.5)
    policy = router.policy.with_changes(budget=(DAY, key))
    router = router.with_policy(policy)
    ask = replace(ASK, key="ci")
    _spend(budgets, router, 4.0, ask)
    asked = budgets.pressed(ask, policy)
    assert asked.pressure is not None and asked.pressure.floor == 0.5 and asked.pressure.moved == 1.0
    hard = policy.with_changes(budget=(DAY, replace(key, hard=True)))
    with pytest.raises(ProblemError, match="key 'ci' has spent its 1 USD of this month") as error:
        budgets.pressed(ask, hard)
    assert error.value.status == 402
    assert budgets.pressed(ASK, hard).pressure is not None, "the tenant's budget is another"


def test_the_reserve_is_the_most_that_calls_may_cost(router: Router, catalog: Catalog) -> None:
    card = catalog["frontier"]
    decision = router.decide(replace(ASK, max_tokens=500))
    assert decision.reserve_usd == pytest.approx((1000 * 5.0 + 500 * 15.0) * 1e-6)  # the estimate is above the bytes
    thrice = router.with_policy(router.policy.with_changes(max_attempts=3)).decide(replace(ASK, max_tokens=500))
    assert thrice.reserve_usd == pytest.approx(3 * (decision.reserve_usd or 0.0))
    unbounded = router.decide(ASK).reserve_usd
    assert unbounded == pytest.approx(card.context_window * 15.0 * 1e-6)
    limited = [replace(c, max_output_tokens=2000, reasoning_usd_per_mtok=20.0) for c in catalog]
    bound = replace(router, catalog=Catalog(tuple(limited))).decide(ASK)
    assert bound.reserve_usd == pytest.approx((1000 * 5.0 + 2000 * 20.0) * 1e-6)
    # Whatever the tokenizer makes of it: a token is a byte at least, and this has three a character.
    chinese = replace(ASK, messages=(Message("user", "合同" * 2_000),), max_tokens=64)
    assert router.decide(chinese).reserve_usd == pytest.approx((12_000 + 32) * 5e-6 + 64 * 15e-6)
    tools = replace(chinese, tools=1, tools_chars=700)
    assert router.decide(tools).reserve_usd == pytest.approx((12_000 + 32 + 1_700) * 5e-6 + 64 * 15e-6)
    image = replace(ASK, messages=(Message("user", "?", 1, 3_000),), max_tokens=64)
    assert router.decide(image).reserve_usd == pytest.approx((card.context_window - 64) * 5e-6 + 64 * 15e-6)
    steps = (LongContext(above_tokens=10_000, input_usd_per_mtok=50.0, output_usd_per_mtok=60.0),)
    long = replace(router, catalog=Catalog(tuple(replace(c, long_context=steps) for c in catalog)))
    assert long.decide(chinese).reserve_usd == pytest.approx((12_032 * 50.0 + 64 * 60.0) * 1e-6)
    for each in (decision, bound):
        assert each.reserve_usd is not None and each.reserve_usd >= each.chosen.expected_cost_usd


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return small_demo(tmp_path_factory)


def test_two_processes_spend_one_budget(demo: Demo, store_url: str, tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text('default_tier = "premium"\n[[budget]]\ntenant = "acme"\nusd = 2.0\nper = "month"\nahead = 1.0\n')
    ask = {"prompt": "Where is my parcel?", "tenant": "acme"}
    series = 'router_budget_spent_usd{budget="acme",of="tenant",per="month"}'
    options = {"policy": policy}
    one_spool, two_spool = tmp_path / "one", tmp_path / "two"
    with (
        running(demo.out / "bundle", store_url, spool=one_spool, **options) as one,
        running(demo.out / "bundle", store_url, spool=two_spool, **options) as two,
    ):
        first = one.http.post("/route", json=ask).json()
        assert first["min_probability"] == 0.85 and first["reserve_usd"] >= first["expected_cost_usd"]
        assert one.service.store.flush()
        said = {"decision_id": first["decision_id"], "status": "ok", "cost_usd": 1.9}
        assert two.http.post("/outcomes", json=said).status_code == 200  # another process than the one that decided
        wait_for(lambda: abs(one.metric(series) - 1.9) < 1e-6 and abs(two.metric(series) - 1.9) < 1e-6)
        assert one.metric('router_budget_usd{budget="acme",of="tenant",per="month"}') == 2.0
        for service in (one, two):
            answer = service.http.post("/route", json=ask).json()
            assert 0.42 < answer["min_probability"] < 0.43  # 95 %: half of the way from 90 %
            assert "the dial moved to 0.42" in answer["reason"] and "95% of the 2 USD a month" in answer["reason"]
        other = two.http.post("/route", json=ask | {"tenant": "other"}).json()
        assert other["min_probability"] == 0.85 and "dial moved" not in other["reason"]
        policy.write_text(policy.read_text().replace("usd = 2.0", "usd = 1.0\nhard = true"))
        wait_for(lambda: two.http.post("/route", json=ask).status_code == 402, 10)
        problem = two.http.post("/route", json=ask).json()
        assert problem["type"].endswith(":budget-spent") and "raise the budget" in problem["detail"]
        batch = {"requests": [ask, ask | {"tenant": "other"}]}
        assert [r["problem"] is None for r in two.http.post("/route/batch", json=batch).json()["results"]] == [
            False,
            True,
        ]
    with running(demo.out / "bundle", store_url, spool=one_spool, **options) as again:  # a new process knows
        assert again.http.post("/route", json=ask).status_code == 402
        rows = [row for row in again.decisions() if row["decision_id"] == first["decision_id"]]
        assert rows[0]["reserve_usd"] == pytest.approx(first["reserve_usd"])
        assert rows[0]["expected_cost_usd"] == pytest.approx(first["expected_cost_usd"])
