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
from router_ml.costs import Reliability
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.policy import Dial, Exploration, Policy, Rule
from router_ml.router import Router, new_id
from router_ml.session import Session
from router_ml.types import Estimate, Message, RouteRequest

PLAIN = Policy(escalation_rate=0.0)


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
    return Router(catalog, ByLength(len(catalog)), PLAIN, "v1")


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
    pinned = router.with_policy(PLAIN.with_changes(rules=(Rule("mid", task="code"),)))
    assert pinned.decide(ask(task="code")).model == "mid"
    assert pinned.decide(ask()).model == "local"
    assert pinned.decide(ask(task="code", needs=frozenset({"vision"}))).model == "frontier"
    assert pinned.policy.version != router.policy.version
    with pytest.raises(InputError, match="'gone'"):
        router.with_policy(Policy(rules=(Rule("gone"),)))


def test_a_keys_allow_list_binds_and_is_compiled_anew_with_the_policy(router: Router) -> None:
    assert router.decide(ask(key="app")).model == "local"
    narrow = router.with_policy(PLAIN.with_changes(keys={"app": frozenset({"mid", "frontier"})}))
    assert narrow.decide(ask(key="app")).model == "mid"
    assert narrow.decide(ask(key="other")).model == "local"


def test_exploration_visits_every_eligible_model_with_its_propensity(router: Router) -> None:
    rng = random.Random(3)
    exploring = replace(router, policy=PLAIN.with_changes(exploration_rate=0.4), draw=rng.random)
    n = 4000
    decisions = [exploring.decide(ask(region="eu")) for _ in range(n)]
    counts = Counter(d.model for d in decisions)
    propensity = {d.model: d.propensity for d in decisions}
    assert set(counts) == {"mid", "hosted", "local"} and math.isclose(sum(propensity.values()), 1.0)
    for model, p in propensity.items():
        assert abs(counts[model] / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert all(d.propensity < 0.2 for d in decisions if d.model != "local")


def test_an_experiment_draws_from_its_models_alone(router: Router) -> None:
    rng = random.Random(4)
    experiment = Exploration(("frontier", "mid"), 0.5, task="code")
    exploring = replace(router, policy=PLAIN.with_changes(explore=(experiment,)), draw=rng.random)
    n = 3000
    decisions = [exploring.decide(ask(task="code")) for _ in range(n)]
    counts = Counter(d.model for d in decisions)
    propensity = {d.model: d.propensity for d in decisions}
    assert propensity == {"local": 0.5, "frontier": 0.25, "mid": 0.25}
    for model, p in propensity.items():
        assert abs(counts[model] / n - p) < 4 * math.sqrt(p * (1 - p) / n)
    assert {d.model for d in decisions if d.explored} == {"frontier", "mid"}
    # Elsewhere, and where only one of the two may serve, the policy's own rate holds.
    assert {exploring.decide(ask()).propensity for _ in range(20)} == {1.0}
    assert {exploring.decide(ask(task="code", region="eu")).propensity for _ in range(20)} == {1.0}
    settled = Session("local")
    assert exploring.decide_with_estimate(ask(task="code"), session=settled)[0].propensity == 1.0


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


def test_an_unacceptable_answer_costs_what_the_strongest_takes(router: Router) -> None:
    """At 100 characters P(ok) is .9, .8, .7, .6; the arithmetic of docs/architecture.md by hand."""
    cost = {"frontier": 0.007625, "mid": 0.0010125, "hosted": 0.000305, "local": 0.00005125}
    p_ok = dict(zip(cost, (0.9, 0.8, 0.7, 0.6), strict=True))
    resort = cost["frontier"] / 0.9
    for rate in (0.0, 0.1, 0.25, 1.0):
        decision = router.with_policy(Policy(escalation_rate=rate)).decide(ask(100, min_probability=0.5))
        total = {m: cost[m] + (1 - p_ok[m]) * rate * resort for m in cost}
        assert [c.model for c in decision.candidates] == sorted(total, key=total.__getitem__)
        for c in decision.candidates:
            assert math.isclose(c.expected_total_cost_usd, total[c.model], rel_tol=1e-5)
            assert math.isclose(c.expected_cost_usd, cost[c.model], rel_tol=1e-5)
    # The whole of it: asked until it succeeds, the strongest costs just the last resort.
    assert math.isclose(total["frontier"], resort) and decision.model == "mid"
    assert decision.reason == "cheapest candidate with probability at least 0.5, escalation included"
    # Without the strongest, the next one is the last resort, and a bad answer is cheaper.
    fewer = router.with_policy(Policy()).decide(ask(100, min_probability=0.5, candidates=("hosted", "local")))
    assert [c.model for c in fewer.candidates] == ["local", "hosted"]
    assert math.isclose(fewer.chosen.expected_total_cost_usd, 0.00005125 + 0.4 * 0.000305 / 0.7, rel_tol=1e-5)


def test_retries_and_failures_are_paid_for(router: Router) -> None:
    flaky = replace(router, reliability=Reliability((1.0, 1.0, 1.5, 8.0), (0.0, 0.0, 0.0, 0.1)))
    decision = flaky.decide(ask(40))
    costs = {c.model: c.expected_cost_usd for c in decision.candidates}
    before = {c.model: c.expected_cost_usd for c in router.decide(ask(40)).candidates}
    for model, attempts in zip(router.catalog.ids, (1.0, 1.0, 1.5, 8.0), strict=True):
        assert math.isclose(costs[model], attempts * before[model], rel_tol=1e-6)
    # A call that fails goes on to the strongest even where no bad answer does.
    local = {c.model: c for c in decision.candidates}["local"]
    assert math.isclose(
        local.expected_total_cost_usd, costs["local"] + 0.1 * costs["frontier"] / (1 - 0.04), rel_tol=1e-5
    )
    assert decision.model == "hosted" and router.decide(ask(40)).model == "local"
    # The limit is on the call with its retries.
    limit = (before["local"] + costs["local"]) / 2
    assert set(router.decide(ask(40, max_cost_usd=limit)).excluded) == {"frontier", "mid", "hosted"}
    with pytest.raises(NoEligibleModelError):
        flaky.decide(ask(40, max_cost_usd=limit))


def test_a_stated_worth_stands_in_the_place_of_escalation(router: Router) -> None:
    dear = replace(router, policy=Policy())
    for usd in (0.0001, 0.003, 1.0):
        request = ask(100, willingness_to_pay_usd=usd)
        assert dear.decide(request).candidates[0].model == router.decide(request).candidates[0].model
    # The order of total costs is that of a worth as high as the last resort's cost.
    resort = 0.007625 / 0.9
    by_total = dear.decide(ask(100, min_probability=0.0))
    by_worth = router.decide(ask(100, min_probability=0.0, willingness_to_pay_usd=resort))
    assert [c.model for c in by_total.candidates] == [c.model for c in by_worth.candidates]


def test_the_most_quality_within_a_budget(router: Router) -> None:
    within = router.decide(ask(100, objective="quality", max_cost_usd=0.002))
    assert within.model == "mid" and within.excluded == {"frontier": "expected cost is above 0.002 USD"}
    assert within.reason == "most probable candidate within 0.002 USD" and within.meets_threshold
    assert [c.model for c in within.candidates] == ["mid", "hosted", "local"]
    assert router.decide(ask(100, objective="cost", max_cost_usd=0.002, min_probability=0.65)).model == "hosted"
    # What is not good enough is still the most probable, and the answer says that it is not.
    default = router.with_policy(Policy(unmet="default", default_model="local"))
    for router_ in (router, default):
        poor = router_.decide(ask(100, objective="quality", max_cost_usd=0.002, tier="premium"))
        assert poor.model == "mid" and not poor.meets_threshold and poor.min_probability == 0.85
    with pytest.raises(InputError, match="give 'max_cost_usd'"):
        router.decide(ask(objective="quality"))
    with pytest.raises(InputError, match="not both"):
        router.decide(ask(objective="quality", max_cost_usd=1.0, willingness_to_pay_usd=1.0))
    with pytest.raises(InputError, match="unknown objective 'speed': choose one of cost, quality"):
        router.decide(ask(objective="speed"))
    with pytest.raises(NoEligibleModelError):
        router.decide(ask(objective="quality", max_cost_usd=0.0))


def test_the_default_is_taken_where_nobody_meets_the_dial_and_the_answer_says_so(router: Router) -> None:
    default = router.with_policy(Policy(unmet="default", default_model="local"))
    unmet = default.decide(ask(200, tier="premium"))
    assert unmet.model == "local" and not unmet.meets_threshold and "the configured default" in unmet.reason
    assert max(c.p_ok for c in unmet.candidates) < 0.85
    met = default.decide(ask(200, tier="standard"))
    assert met.meets_threshold and met.chosen.p_ok >= 0.7


@dataclass(frozen=True)
class Graded:
    """Half the probability of a good answer for each tenth of quality above 0.5: one estimate, three thresholds."""

    inner: ByLength
    thresholds: tuple[float, ...] = (0.5, 0.6, 0.8)

    def estimate(self, request: RouteRequest) -> Estimate:
        threshold = 0.5 if request.quality_threshold is None else request.quality_threshold
        estimate = self.inner.estimate(request)
        return replace(estimate, p_ok=estimate.p_ok * np.float32(0.5 ** (10 * (threshold - 0.5))))


def test_a_quality_threshold_is_the_requests_the_tiers_or_the_bundles(router: Router, catalog: Catalog) -> None:
    graded = replace(router, estimator=Graded(ByLength(len(catalog))), quality_threshold=0.5)
    assert graded.decide(ask(40)).quality_threshold == 0.5
    best = {t: graded.decide(ask(40, quality_threshold=t)) for t in (None, 0.5, 0.6, 0.8)}
    assert best[None].chosen.p_ok == best[0.5].chosen.p_ok > best[0.6].chosen.p_ok > best[0.8].chosen.p_ok
    assert best[0.6].quality_threshold == 0.6 and not best[0.6].meets_threshold
    with pytest.raises(InputError, match=r"quality_threshold 0\.7 .* which are 0\.5, 0\.6, 0\.8"):
        graded.decide(ask(40, quality_threshold=0.7))
    strict = graded.with_policy(
        PLAIN.with_changes(tiers={"standard": 0.7, "strict": Dial(0.3, 0.6), "rich": Dial(0.1, None, "quality", 0.002)})
    )
    decision = strict.decide(ask(40, tier="strict"))
    assert decision.quality_threshold == 0.6 and decision.meets_threshold and decision.min_probability == 0.3
    assert strict.decide(ask(40, tier="strict", quality_threshold=0.5)).quality_threshold == 0.5
    assert strict.decide(ask(40)).quality_threshold == 0.5
    # A tier may say the objective and its budget, too; the lower budget holds.
    rich = strict.decide(ask(40, tier="rich"))
    assert rich.model == "mid" and rich.reason == "most probable candidate within 0.002 USD"
    assert strict.decide(ask(40, tier="rich", max_cost_usd=0.0005)).model == "hosted"
    assert strict.decide(ask(40, tier="rich", max_cost_usd=1.0)).model == "mid"
    with pytest.raises(InputError, match=r"tier 'strict': quality_threshold 0\.7"):
        graded.with_policy(Policy(tiers={"standard": 0.5, "strict": Dial(0.3, 0.7)}))
    with pytest.raises(InputError, match="which are none"):
        router.decide(ask(quality_threshold=0.5))
