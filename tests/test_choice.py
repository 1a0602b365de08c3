"""The decision: no constraint is ever broken, the choice is the least of what it says, propensities are exact."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_ml.catalog import Catalog
from router_ml.choice import Choice, Constraints, choose
from router_ml.policy import Policy
from router_ml.reasons import kind
from router_ml.types import Message, ModelCard, RouteRequest

NAMES = st.sampled_from(["public", "internal", "secret"])
REGIONS = st.sampled_from(["us", "eu", "ch"])
NEEDS = st.sampled_from(["tools", "vision", "json", "telepathy"])
IDS = [f"m{i}" for i in range(6)]
CARD = ModelCard(
    id="m0", provider="acme", tier="mid-closed", input_usd_per_mtok=1.0, output_usd_per_mtok=1.0, context_window=100
)
FLOATS = st.floats(0, 1, width=32) | st.just(math.nan)
COSTS = st.floats(0, 10, width=32) | st.sampled_from([math.nan, math.inf])


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    return Catalog(
        tuple(
            ModelCard(
                id=name,
                provider="acme",
                tier="mid-closed",
                input_usd_per_mtok=1.0,
                output_usd_per_mtok=1.0,
                context_window=draw(st.integers(1, 200)),
                capabilities=draw(st.frozensets(st.sampled_from(["tools", "vision", "json"]))),
                regions=draw(st.frozensets(st.sampled_from(["us", "eu"]))),
                data_classes=draw(st.frozensets(st.sampled_from(["public", "internal"]))),
            )
            for name in IDS[: draw(st.integers(1, len(IDS)))]
        )
    )


@st.composite
def requests(draw: st.DrawFn) -> RouteRequest:
    def maybe(strategy: st.SearchStrategy) -> object:
        return draw(st.none() | strategy)

    return RouteRequest(
        messages=(Message("user", "hello"),),
        max_tokens=maybe(st.integers(0, 300)),
        needs=draw(st.frozensets(NEEDS)),
        key=maybe(st.sampled_from(["open", "narrow", "closed"])),
        task=maybe(st.sampled_from(["code", "chat"])),
        data_class=maybe(NAMES),
        region=maybe(REGIONS),
        candidates=maybe(st.lists(st.sampled_from([*IDS, "unknown"]), max_size=4).map(tuple)),
        max_cost_usd=maybe(st.floats(0, 10)),
    )


def allowed(card: ModelCard, request: RouteRequest, policy: Policy, cost: float, tokens: float) -> bool:
    """What the constraints mean, said again without arrays."""
    return (
        (request.candidates is None or card.id in request.candidates)
        and (request.key not in policy.keys or card.id in policy.keys[request.key])
        and (request.data_class or policy.default_data_class) in card.data_classes
        and (request.region is None or request.region in card.regions)
        and request.needs <= card.capabilities
        and math.ceil(tokens) + (request.max_tokens or 0) <= card.context_window
        and (request.max_cost_usd is None or cost <= request.max_cost_usd)
    )


def test_a_limit_between_two_float32_numbers_is_kept() -> None:
    catalog = Catalog((CARD,))
    request = RouteRequest(messages=(Message("user", "hello"),), max_cost_usd=1.7)
    cost = np.array([1.7], dtype=np.float32)
    assert float(cost[0]) > 1.7
    assert not Constraints.compile(catalog, Policy()).eligible(request, Policy(), cost, 0.0)[0].any()


@settings(max_examples=400, deadline=None)
@given(data=st.data(), catalog=catalogs(), request=requests(), tokens=st.floats(0, 250))
def test_no_constraint_is_ever_broken(data: st.DataObject, catalog: Catalog, request: RouteRequest, tokens: float):
    m = len(catalog)
    policy = Policy(
        keys={"narrow": frozenset(data.draw(st.sets(st.sampled_from(catalog.ids)))), "closed": frozenset()},
        default_data_class=data.draw(NAMES),
    )
    cost = np.array(data.draw(st.lists(COSTS, min_size=m, max_size=m)), dtype=np.float32)
    p_ok = np.array(data.draw(st.lists(FLOATS, min_size=m, max_size=m)), dtype=np.float32)
    eligible, excluded = Constraints.compile(catalog, policy).eligible(request, policy, cost, tokens)
    want = [allowed(card, request, policy, float(cost[i]), tokens) for i, card in enumerate(catalog)]
    assert eligible.tolist() == want
    # Every model is either eligible or excluded with a reason of a known kind.
    out = {card.id for card, fine in zip(catalog, want, strict=True) if not fine}
    assert set(excluded) == out | {c for c in request.candidates or () if c not in catalog}
    for reason in excluded.values():
        assert kind(reason) in (
            *("candidates", "catalogue", "key", "data_class", "region", "capability", "context_window", "max_cost"),
        )
    if not any(want):
        return
    choice = choose(
        p_ok,
        cost,
        eligible,
        data.draw(st.floats(0, 1)),
        pinned=data.draw(st.none() | st.integers(0, m - 1)),
        default=data.draw(st.none() | st.integers(0, m - 1)),
        unmet=data.draw(st.sampled_from(["most-probable", "default"])),
        exploration_rate=data.draw(st.sampled_from([0.0, 0.1, 1.0])),
        draw=(data.draw(st.floats(0, 1, exclude_max=True)), data.draw(st.floats(0, 1, exclude_max=True))),
    )
    # The order, fallbacks included, is the eligible models, each once.
    assert sorted(choice.order) == np.flatnonzero(eligible).tolist()
    assert 0.0 < choice.propensity <= 1.0


@settings(max_examples=300, deadline=None)
@given(data=st.data(), m=st.integers(1, 6), dial=st.floats(0, 1))
def test_the_rule_is_the_cheapest_that_is_likely_enough(data: st.DataObject, m: int, dial: float) -> None:
    p = np.array(data.draw(st.lists(FLOATS, min_size=m, max_size=m)), dtype=np.float32)
    cost = np.array(data.draw(st.lists(COSTS, min_size=m, max_size=m)), dtype=np.float32)
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=m, max_size=m).filter(any)))
    choice = choose(p, cost, eligible, dial)
    chosen = choice.order[0]
    at = np.flatnonzero(eligible)
    price = np.where(np.isnan(cost), np.inf, cost)
    good = [i for i in at if float(p[i]) >= dial]
    known = [i for i in at if not np.isnan(p[i])]
    assert choice.meets_threshold == bool(good) and choice.propensity == 1.0 and not choice.explored
    if good:
        assert price[chosen] == min(price[i] for i in good) and kind(choice.reason) == "cheapest"
        # Fallbacks: those that meet the dial by cost, then the others by probability.
        meeting, rest = choice.order[: len(good)], choice.order[len(good) :]
        assert set(meeting) == set(good) and list(price[list(meeting)]) == sorted(price[good])
        tail = [-p[i] if not np.isnan(p[i]) else 1.0 for i in rest]
        assert tail == sorted(tail)
    elif known:
        assert p[chosen] == max(p[i] for i in known) and kind(choice.reason) == "most_probable"
    else:
        assert price[chosen] == min(price[i] for i in at) and kind(choice.reason) == "no_estimate"


def last_resort(p: np.ndarray, price: np.ndarray, fail: list[float], at: np.ndarray) -> float:
    """What the strongest candidate costs until it succeeds, said again without the module's own code."""
    known = [i for i in at if not np.isnan(p[i]) and np.isfinite(price[i])]
    if not known:
        return 0.0
    most = max(float(p[i]) for i in known)
    strong = [i for i in known if float(p[i]) >= most - 0.01]
    return min(float(price[i]) / max((1 - fail[i]) * float(p[i]), 0.1) for i in strong)


@settings(max_examples=400, deadline=None)
@given(
    data=st.data(),
    m=st.integers(1, 6),
    dial=st.floats(0, 1),
    rate=st.floats(0, 1),
    worth=st.none() | st.floats(0, 100),
    within=st.booleans(),
)
def test_the_chosen_one_is_the_least_of_what_is_documented(
    data: st.DataObject, m: int, dial: float, rate: float, worth: float | None, within: bool
) -> None:
    p = np.array(data.draw(st.lists(FLOATS, min_size=m, max_size=m)), dtype=np.float32)
    cost = np.array(data.draw(st.lists(COSTS, min_size=m, max_size=m)), dtype=np.float32)
    fail = data.draw(st.lists(st.floats(0, 1), min_size=m, max_size=m))
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=m, max_size=m).filter(any)))
    budget = 10.0 if within and worth is None else None
    choice = choose(
        p, cost, eligible, dial, failure=fail, escalation_rate=rate, willingness_to_pay_usd=worth, budget_usd=budget
    )
    at = np.flatnonzero(eligible)
    assert sorted(choice.order) == at.tolist() and choice.propensity == 1.0
    price = np.where(np.isnan(cost), np.inf, cost)
    resort = last_resort(p, price, fail, at)

    def total(i: int) -> float:
        return float(price[i]) + (fail[i] + (1 - fail[i]) * (1 - float(p[i])) * rate) * resort

    np.testing.assert_allclose(choice.total_cost_usd, [total(i) for i in choice.order], rtol=1e-9)
    known = [i for i in at if not np.isnan(p[i])]
    good = [i for i in known if float(p[i]) >= dial]
    first = choice.order[0]
    assert choice.meets_threshold == (float(p[first]) >= dial)
    if not known or not (good or budget is not None):
        assert not choice.meets_threshold and (not known or p[first] == max(p[i] for i in known))
    elif budget is not None:
        most = max(p[i] for i in known)
        assert p[first] == most and price[first] == min(price[i] for i in known if p[i] == most)
        assert kind(choice.reason) == "most_quality" and choice.meets_threshold == bool(good)
    elif worth is not None:
        value = {i: worth * (1 - fail[i]) * float(p[i]) - float(price[i]) for i in good}
        assert value[first] >= max(value.values()) - 1e-9 and kind(choice.reason) == "best_value"
    else:
        assert total(first) <= min(total(i) for i in good) * (1 + 1e-12) and kind(choice.reason) == "cheapest"


def test_the_last_resort_is_the_cheapest_of_the_strongest() -> None:
    every = np.ones(3, bool)
    near, far = np.array([0.9, 0.895, 0.5], np.float32), np.array([0.9, 0.85, 0.5], np.float32)
    # A hair below the strongest at a fifth of the price: whoever escalates asks that one.
    beside = choose(near, COST, every, 0.0, escalation_rate=1.0).total_cost_usd
    assert math.isclose(beside[0], 1 + 0.5 * 5 / 0.895, rel_tol=1e-6)
    assert math.isclose(choose(far, COST, every, 0.0, escalation_rate=1.0).total_cost_usd[-1], 9 / 0.9, rel_tol=1e-6)
    # Hopeless for all: nobody goes on asking for ever.
    hopeless = choose(np.zeros(3, np.float32), COST, every, 0.0, escalation_rate=1.0)
    assert hopeless.order[0] == 2 and hopeless.total_cost_usd[0] == 1 + 1 / 0.1
    # The cost of the strongest is not known: the next one is the last resort.
    blind = choose(near, np.array([math.nan, 5, 1], np.float32), every, 0.0, escalation_rate=1.0)
    assert blind.order == (2, 1, 0) and blind.total_cost_usd[-1] == math.inf


@settings(max_examples=200, deadline=None)
@given(data=st.data(), m=st.integers(1, 6), dial=st.floats(0, 1), rate=st.floats(0, 1))
def test_propensities_over_the_eligible_sum_to_one(data: st.DataObject, m: int, dial: float, rate: float) -> None:
    p = np.array(data.draw(st.lists(FLOATS, min_size=m, max_size=m)), dtype=np.float32)
    cost = np.array(data.draw(st.lists(COSTS, min_size=m, max_size=m)), dtype=np.float32)
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=m, max_size=m).filter(any)))
    pinned = data.draw(st.none() | st.integers(0, m - 1))
    size = int(eligible.sum())

    def at(draw: tuple[float, float]) -> Choice:
        return choose(p, cost, eligible, dial, pinned=pinned, exploration_rate=rate, draw=draw)

    propensity = {}
    for draw in [(0.9999999, 0.0)] * (rate < 0.9999999) + [(0.0, (i + 0.5) / size) for i in range(size)] * (rate > 0):
        choice = at(draw)
        assert propensity.setdefault(choice.order[0], choice.propensity) == choice.propensity
    assert math.isclose(sum(propensity.values()), 1.0, rel_tol=1e-9)
    assert all(eligible[i] for i in propensity)


@pytest.mark.parametrize("among", [None, [0, 2], [1, 2]])
def test_propensities_are_the_frequencies(among: list[int] | None) -> None:
    p, cost = np.array([0.9, 0.8, 0.95, 0.99], np.float32), np.array([3, 2, 4, 1], np.float32)
    eligible = np.array([True, True, True, False])
    rng, n = np.random.default_rng(7), 40_000
    seen: dict[int, list[float]] = {}
    explored = 0
    for draw in rng.random((n, 2)).tolist():
        choice = choose(p, cost, eligible, 0.7, exploration_rate=0.3, explored=among, draw=(draw[0], draw[1]))
        seen.setdefault(choice.order[0], []).append(choice.propensity)
        explored += choice.explored
    assert set(seen) == {1, *(among or [0, 2])}
    for propensities in seen.values():
        (propensity,) = set(propensities)
        assert abs(len(propensities) / n - propensity) < 4 * math.sqrt(propensity * (1 - propensity) / n)
    assert abs(explored / n - 0.3) < 0.01


def test_every_reason_is_of_a_kind() -> None:
    assert kind("something new") == "other"
    value = choose(P, COST, ALL, 0.3, willingness_to_pay_usd=100.0)
    assert value.order == (0, 1, 2) and kind(value.reason) == "best_value"
    assert choose(P, COST, ALL, 0.3, willingness_to_pay_usd=30.0).order == (1, 0, 2)


@pytest.mark.parametrize("data_class", ["confidential", "never heard of", "Public", "", None])
def test_an_unknown_data_class_excludes_every_model_not_cleared_for_it(
    catalog: Catalog, data_class: str | None
) -> None:
    request = RouteRequest(messages=(Message("user", "x"),), data_class=data_class)
    constraints = Constraints.compile(catalog, Policy())
    eligible, excluded = constraints.eligible(request, Policy(), np.zeros(4, np.float32), 10)
    cleared = {"confidential": ["local"], None: list(catalog.ids)}.get(data_class, [])
    assert [m for m, fine in zip(catalog.ids, eligible, strict=True) if fine] == cleared
    assert all(repr(data_class) in reason for reason in excluded.values())


P, COST, ALL = np.array([0.9, 0.8, 0.4], np.float32), np.array([9, 5, 1], np.float32), np.ones(3, bool)


def test_a_rule_pins_its_model_while_the_constraints_allow_it() -> None:
    pinned = choose(P, COST, ALL, 0.7, pinned=2, exploration_rate=0.5, draw=(0.0, 0.0))
    assert pinned.order == (2, 1, 0) and pinned.propensity == 1.0 and not pinned.explored
    assert not pinned.meets_threshold and kind(pinned.reason) == "pinned"
    assert choose(P, COST, np.array([True, True, False]), 0.7, pinned=2).order == (1, 0)


def test_the_default_serves_when_nobody_is_good_enough_and_the_policy_says_so() -> None:
    assert choose(P, COST, ALL, 0.95, default=2).order == (0, 1, 2)
    unmet = choose(P, COST, ALL, 0.95, default=2, unmet="default")
    assert unmet.order == (2, 0, 1) and kind(unmet.reason) == "default" and not unmet.meets_threshold
    assert choose(P, COST, np.array([True, True, False]), 0.95, default=2, unmet="default").order == (0, 1)
    nothing = np.full(3, math.nan, np.float32)
    assert choose(nothing, COST, ALL, 0.0, default=1).order[0] == 1
    assert kind(choose(nothing, COST, ALL, 0.0).reason) == "no_estimate"
    explored = choose(P, COST, ALL, 0.95, default=2, unmet="default", exploration_rate=0.3, draw=(0.1, 0.5))
    assert explored.order[0] == 1 and math.isclose(explored.propensity, 0.1)
    assert kind(explored.reason) == "explored"
