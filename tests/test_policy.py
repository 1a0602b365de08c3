"""The policy: no constraint is ever broken, propensities are exact, and a policy file's mistakes are named."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.policy import Choice, Constraints, Policy, Rule, choose
from router_ml.reasons import kind
from router_ml.types import Message, ModelCard, RouteRequest

NAMES = st.sampled_from(["public", "internal", "secret"])
REGIONS = st.sampled_from(["us", "eu", "ch"])
NEEDS = st.sampled_from(["tools", "vision", "json", "telepathy"])
IDS = [f"m{i}" for i in range(6)]
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


def test_propensities_are_the_frequencies() -> None:
    p, cost = np.array([0.9, 0.8, 0.95, 0.99], np.float32), np.array([3, 2, 4, 1], np.float32)
    eligible = np.array([True, True, True, False])
    rng, n = np.random.default_rng(7), 40_000
    seen: dict[int, list[float]] = {}
    explored = 0
    for draw in rng.random((n, 2)).tolist():
        choice = choose(p, cost, eligible, 0.7, exploration_rate=0.3, draw=(draw[0], draw[1]))
        seen.setdefault(choice.order[0], []).append(choice.propensity)
        explored += choice.explored
    assert set(seen) == {0, 1, 2}
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


def request_at(**dial: object) -> RouteRequest:
    return RouteRequest(messages=(), **dial)  # type: ignore[arg-type]


def test_tiers_are_probabilities() -> None:
    policy = Policy(tiers={"low": 0.1, "high": 0.9}, default_tier="high")
    assert policy.min_probability(request_at()) == 0.9
    assert policy.min_probability(request_at(tier="low")) == 0.1
    assert policy.min_probability(request_at(min_probability=0.0)) == 0.0
    with pytest.raises(InputError, match="unknown tier 'standard': choose one of low, high"):
        policy.min_probability(request_at(tier="standard"))
    with pytest.raises(InputError, match="not both"):
        policy.min_probability(request_at(tier="low", min_probability=0.5))
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(InputError, match="min_probability"):
            policy.min_probability(request_at(min_probability=wrong))


@pytest.mark.parametrize(
    ("rule", "task", "tenant", "applies"),
    [
        (Rule("m"), None, None, True),
        (Rule("m", task="code"), "code", "acme", True),
        (Rule("m", task="code"), "chat", None, False),
        (Rule("m", task="code"), None, None, False),
        (Rule("m", task="code", tenant="acme"), "code", "other", False),
        (Rule("m", tenant="acme"), "code", "acme", True),
    ],
)
def test_a_rule_applies_to_its_task_and_tenant(rule: Rule, task: str | None, tenant: str | None, applies: bool) -> None:
    assert rule.matches(request_at(task=task, tenant=tenant)) is applies


POLICY = """
default_tier = "fast"
default_model = "mid"
default_data_class = "internal"
exploration_rate = 0.05
unmet = "default"
[tiers]
fast = 0.4
good = 0.9
[[rules]]
model = "local"
task = "code"
[keys.gateway]
models = ["mid", "local"]
"""


def test_a_policy_file_says_it_all(tmp_path: Path, catalog: Catalog) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY)
    policy = Policy.load(path).check_models(catalog)
    assert policy.rules == (Rule("local", "code"),) and policy.keys == {"gateway": frozenset({"mid", "local"})}
    assert (policy.default_tier, policy.exploration_rate, policy.unmet) == ("fast", 0.05, "default")
    again = Policy.from_json(json.loads(json.dumps(policy.to_json())))
    assert again == policy and len(policy.version) == 12
    changed = policy.with_changes(exploration_rate=0.06)
    assert changed.version != policy.version and changed.rules == policy.rules


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tiers = 3", "'tiers' has to be a table"),
        ("[tiers]", "at least one tier"),
        ("[tiers]\nstandard = 1.5", "tier 'standard' has to be a number in"),
        ("[tiers]\nstandard = nan", "tier 'standard' has to be a number in"),
        ("[tiers]\nstandard = true", "tier 'standard' has to be a number in"),
        ("default_tier = 'gold'", "default_tier 'gold' is not one of the tiers economy"),
        ("default_tier = ['gold']", "is not one of the tiers"),
        ("default_data_class = 7", "default_data_class"),
        ("default_model = 7", "default_model"),
        ("exploration_rate = 'often'", "exploration_rate"),
        ("exploration_rate = -0.1", "exploration_rate"),
        ("unmet = 'cry'", "'unmet'"),
        ("unmet = 'default'", "needs a 'default_model'"),
        ("rules = 'code'", "'rules' has to be an array"),
        ("rules = ['code']", "every rule has to be a table"),
        ("[[rules]]\ntask = 'code'", "every rule has to be a table with a model"),
        ("[[rules]]\nmodel = 'm'\ntopic = 'code'", "nothing else"),
        ("[[rules]]\nmodel = 3", "have to be strings"),
        ("keys = []", "'keys' has to be a table"),
        ("[keys]\na = 'm'", "key 'a' has to be a table"),
        ("[keys.a]\nmodels = 'm'", "'models' has to be an array"),
        ("[keys.a]\nmodels = [3]", "models of key 'a'"),
        ("[keys.a]\nmodel = ['m']", "key 'a' has to be a table"),
        ("teirs = {}", "unknown setting 'teirs'; known are"),
        ("version = 'mine'", "unknown setting 'version'"),
        ("not toml", "not readable TOML"),
    ],
)
def test_a_policy_files_mistake_is_named(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        Policy.load(path)
    assert str(path) in str(caught.value)


def test_a_policy_file_that_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no policy file at"):
        Policy.load(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not readable TOML"):
        Policy.load(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    "policy",
    [
        Policy(default_model="gone"),
        Policy(rules=(Rule("gone"),)),
        Policy(keys={"k": frozenset({"mid", "gone"})}),
    ],
)
def test_a_model_that_the_catalogue_does_not_list_is_named(catalog: Catalog, policy: Policy) -> None:
    with pytest.raises(InputError, match="'gone'"):
        policy.check_models(catalog)
