"""The router: one estimate, one policy, one decision; versions named, ids unique."""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest

from router_ml.catalog import Catalog
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.policy import Policy, Rule
from router_ml.router import Router, new_id
from router_ml.types import Estimate, Message, RouteRequest


@dataclass(frozen=True)
class ByLength:
    """Longer requests are harder, and harder for the cheaper models: an estimate that can be worked out by hand."""

    models: int

    def estimate(self, request: RouteRequest) -> Estimate:
        chars = sum(len(message.text) for message in request.messages)
        p_ok = 1.0 - (np.arange(self.models, dtype=np.float32) + 1) * np.float32(chars) / np.float32(1000)
        return Estimate(np.clip(p_ok, 0, 1), np.full(self.models, 500, np.float32), chars / 4)


@pytest.fixture
def router(catalog: Catalog) -> Router:
    return Router(catalog, ByLength(len(catalog)), Policy(), "v1")


def ask(chars: int = 40, **fields: object) -> RouteRequest:
    return RouteRequest(messages=(Message("user", "x" * chars),), **fields)  # type: ignore[arg-type]


def test_an_easy_request_goes_to_the_cheapest_and_a_hard_one_to_the_best(router: Router) -> None:
    easy, hard, hopeless = (router.decide(ask(chars)) for chars in (40, 200, 900))
    assert (easy.model, easy.meets_threshold) == ("local", True)
    assert (hard.model, hard.meets_threshold) == ("frontier", True)
    assert (hopeless.model, hopeless.meets_threshold) == ("frontier", False)
    assert easy.chosen.model == easy.model and easy.propensity == 1.0 and not easy.explored
    assert [c.model for c in easy.candidates] == ["local", "hosted", "mid", "frontier"]
    assert math.isclose(easy.chosen.p_ok, 1 - 4 * 40 / 1000, rel_tol=1e-6)
    assert math.isclose(easy.chosen.expected_cost_usd, (10 * 0.05 + 500 * 0.1) / 1e6, rel_tol=1e-6)
    assert easy.excluded == {} and easy.min_probability == 0.7
    assert (easy.model_version, easy.policy_version) == ("v1", router.policy.version)


def test_the_dial_moves_the_choice(router: Router) -> None:
    models = [router.decide(ask(100, min_probability=p)).model for p in (0.55, 0.65, 0.75, 0.85)]
    assert models == ["local", "hosted", "mid", "frontier"]
    assert router.decide(ask(100, tier="economy")).model == "local"
    assert router.decide(ask(100, tier="premium")).model == "frontier"


def test_max_tokens_caps_the_expected_cost(router: Router) -> None:
    capped, free = router.decide(ask(max_tokens=100)), router.decide(ask())
    assert math.isclose(capped.chosen.expected_cost_usd, (10 * 0.05 + 100 * 0.1) / 1e6, rel_tol=1e-6)
    assert capped.chosen.expected_cost_usd < free.chosen.expected_cost_usd
    assert router.decide(ask(max_tokens=10_000)).excluded == {
        "local": "context window is smaller than the estimated 10010 tokens"
    }


def test_the_cost_limit_binds_before_the_dial(router: Router) -> None:
    decision = router.decide(ask(200, min_probability=0.75, max_cost_usd=0.002))
    assert decision.model == "mid" and not decision.meets_threshold
    assert decision.excluded == {"frontier": "expected cost is above 0.002 USD"}


def test_willingness_to_pay_weighs_what_a_dearer_model_adds(router: Router) -> None:
    stingy, generous = (router.decide(ask(100, willingness_to_pay_usd=usd, tier="economy")) for usd in (0.0001, 1.0))
    assert (stingy.model, generous.model) == ("local", "frontier")
    assert "best value at 1 USD" in generous.reason
    value = [1.0 * c.p_ok - c.expected_cost_usd for c in generous.candidates]
    assert value == sorted(value, reverse=True)
    assert router.decide(ask(100, willingness_to_pay_usd=0.0, tier="premium")).model == "frontier"  # the dial binds


def test_no_eligible_model_says_why_for_each(router: Router) -> None:
    with pytest.raises(NoEligibleModelError) as caught:
        router.decide(ask(needs=frozenset({"vision"}), region="eu", candidates=("frontier", "mid", "nobody")))
    assert caught.value.excluded == {
        "frontier": "not in region 'eu'",
        "mid": "does not support vision",
        "hosted": "not among the request's candidates",
        "local": "not among the request's candidates",
        "nobody": "not in the catalogue",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"tier": "gold"},
        {"min_probability": 1.5},
        {"max_tokens": -1},
        {"max_tokens": 10**400},
        {"max_cost_usd": -0.01},
        {"max_cost_usd": math.nan},
        {"willingness_to_pay_usd": -1.0},
        {"willingness_to_pay_usd": math.inf},
    ],
)
def test_a_dial_or_limit_that_is_not_valid(router: Router, fields: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(fields))):
        router.decide(ask(**fields))


def test_a_rule_comes_before_the_learner(router: Router) -> None:
    pinned = router.with_policy(Policy(rules=(Rule("mid", task="code"),)))
    assert pinned.decide(ask(task="code")).model == "mid"
    assert pinned.decide(ask()).model == "local"
    assert pinned.decide(ask(task="code", needs=frozenset({"vision"}))).model == "frontier"
    assert pinned.policy.version != router.policy.version
    with pytest.raises(InputError, match="'gone'"):
        router.with_policy(Policy(rules=(Rule("gone"),)))


def test_a_keys_allow_list_binds_and_is_compiled_anew_with_the_policy(router: Router) -> None:
    assert router.decide(ask(key="app")).model == "local"
    narrow = router.with_policy(Policy(keys={"app": frozenset({"mid", "frontier"})}))
    assert narrow.decide(ask(key="app")).model == "mid"
    assert narrow.decide(ask(key="other")).model == "local"


def test_exploration_visits_every_eligible_model_with_its_propensity(router: Router) -> None:
    rng = random.Random(3)
    exploring = replace(router, policy=Policy(exploration_rate=0.4), draw=rng.random)
    n = 4000
    decisions = [exploring.decide(ask(region="eu")) for _ in range(n)]
    counts = Counter(d.model for d in decisions)
    propensity = {d.model: d.propensity for d in decisions}
    assert set(counts) == {"mid", "hosted", "local"} and math.isclose(sum(propensity.values()), 1.0)
    for model, p in propensity.items():
        assert abs(counts[model] / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert all(d.propensity < 0.2 for d in decisions if d.model != "local")


def test_ids_are_unique_and_sort_by_time() -> None:
    early = new_id()
    time.sleep(0.002)
    late = [new_id() for _ in range(1000)]
    assert len({early, *late}) == 1001 and early < min(late)
    assert all(len(i) == 32 and i[12] == "7" and int(i, 16) for i in late)


def test_a_willingness_to_pay_alone_is_the_whole_dial(router: Router) -> None:
    decision = router.decide(ask(100, willingness_to_pay_usd=1e-9))
    assert decision.min_probability == 0.0
    assert decision.chosen.expected_cost_usd == min(c.expected_cost_usd for c in decision.candidates)
