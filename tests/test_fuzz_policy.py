"""Whatever catalogue, policy, key, request and outage: nothing that is offered breaks a constraint, explored or not.

The oracle reads the tables, the key and the body as they were written, and knows nothing of the program's own reading.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from fuzzing import fuzzed
from hypothesis import event, given
from hypothesis import strategies as st

from router_ml.catalog import Catalog
from router_ml.costs import Reliability
from router_ml.errors import InputError, NoEligibleModelError
from router_ml.policy import Policy
from router_ml.router import Router
from router_ml.types import Estimate, RouteDecision, RouteRequest
from serving.health import Health, HealthSettings
from serving.keys import ApiKey
from serving.problems import ProblemError
from serving.schemas import RouteBody

TRAINED = (0.5, 0.8)
CAPABILITIES, REGIONS, CLASSES = ["tools", "vision", "json"], ["us", "eu", "ch"], ["public", "internal", "secret"]
TENANTS, TASKS, TIERS = ["acme", "other"], ["code", "chat"], ["low", "high", "rich"]
Table = dict[str, Any]


@functools.cache
def _subsets(values: tuple[str, ...], least: int) -> st.SearchStrategy[list[str]]:
    every = [list(some) for size in range(least, len(values) + 1) for some in itertools.combinations(values, size)]
    return st.sampled_from(every[::-1])


def subset(values: Sequence[str], least: int = 0) -> st.SearchStrategy[list[str]]:
    return _subsets(tuple(values), least)


@st.composite
def some(draw: st.DrawFn, most: int, **fields: st.SearchStrategy[Any]) -> Table:
    """A table of at most so many of the fields: where every constraint is stated, nobody is left to be chosen."""
    often = [name for name in fields if name in ("max_cost_usd", "needs", "exploration_rate", "previous_model")]
    names = draw(st.lists(st.sampled_from([*sorted(fields), *often, *often]), max_size=most, unique=True))
    return {name: draw(fields[name]) for name in names}


NUMBERS = [i / 20 for i in range(21)]
SHARE = st.sampled_from(NUMBERS)
# Tokens, prices and limits of the same few sizes, so that costs lie on and beside their limits.
PRICE = st.sampled_from([0.0, 1.0, 1.0, 1.5, 3.0, 10.0])
LIMIT = st.sampled_from([0.0, 1e-4, 2e-4, 2e-4, 3e-4, 3e-4, 5e-4, 1e-3, 1.0])
GRADED = some(1, quality_threshold=st.sampled_from(TRAINED), max_cost_usd=LIMIT)
CARD = st.builds(
    lambda prices, window, capabilities, regions, classes, provider: {
        "provider": provider,
        "tier": "mid-closed",
        "input_usd_per_mtok": prices[0],
        "output_usd_per_mtok": prices[1],
        "context_window": window,
        "capabilities": capabilities,
        "regions": regions,
        "data_classes": classes,
    },
    st.tuples(PRICE, PRICE),
    st.sampled_from([1, 99, 100, 101, 150, 400, 1000, 200_000, 200_000]),
    *(st.one_of(st.just(names), st.just(names), subset(names)) for names in (CAPABILITIES, REGIONS, CLASSES)),
    st.sampled_from(["acme", "nimbus"]),
)
CARDS = st.lists(CARD, min_size=1, max_size=6).map(lambda cards: [{"id": f"m{i}", **c} for i, c in enumerate(cards)])


@st.composite
def policies(draw: st.DrawFn, ids: tuple[str, ...]) -> Table:
    graded = {"min_probability": draw(SHARE), **draw(GRADED)}
    rich = {"min_probability": draw(SHARE), "objective": "quality", "max_cost_usd": draw(LIMIT)}
    return {
        "tiers": {"low": draw(SHARE), "high": graded, "rich": rich},
        "default_tier": draw(st.sampled_from(TIERS)),
        "default_model": draw(st.sampled_from(ids)),
        **draw(settings_of(ids)),
    }


@functools.cache
def settings_of(ids: tuple[str, ...]) -> st.SearchStrategy[Table]:
    when = some(2, task=st.sampled_from(TASKS), tenant=st.sampled_from(TENANTS))
    rule = st.builds(lambda model, when: {"model": model, **when}, st.sampled_from(ids), when)
    return some(
        3,
        default_data_class=st.sampled_from(CLASSES[1:]),
        exploration_rate=st.sampled_from([0.3, 1.0]),
        escalation_rate=st.sampled_from([0.0, 0.5]),
        rules=st.lists(rule, min_size=1, max_size=2),
        keys=subset(ids).map(lambda models: {"k": {"models": models}}),
        unmet=st.sampled_from(["most-probable", "default"]),
        session=st.sampled_from([{"explore": True}, {"min_gain": 0.0}, {"min_gain": 1.0}]),
    )


@functools.cache
def keys(ids: tuple[str, ...]) -> st.SearchStrategy[Table]:
    bounds = some(
        2,
        models=subset(ids, 1),
        tiers=subset(TIERS, 1),
        data_classes=subset(CLASSES, 1),
        tenant=st.sampled_from(TENANTS),
    )
    return bounds.map(lambda table: {"sha256": "0" * 64, **table})


@functools.cache
def bodies(ids: tuple[str, ...]) -> st.SearchStrategy[Table]:
    image = [{"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}]
    said = [{"role": "user", "content": "x"}]
    rest = some(
        5,
        tools=st.sampled_from([[], [{"type": "function"}]]),
        functions=st.sampled_from([[], [{"name": "f"}]]),
        response_format=st.sampled_from([{"type": "text"}, {"type": "json_object"}, {"type": "json_schema"}]),
        needs=subset(CAPABILITIES),
        max_tokens=st.sampled_from([0, 1, 50, 100, 300, 2**53 - 1]),
        max_completion_tokens=st.sampled_from([0, 1, 100]),
        tier=st.sampled_from([*TIERS, "none"]),
        min_probability=SHARE,
        willingness_to_pay_usd=LIMIT,
        max_cost_usd=LIMIT,
        quality_threshold=st.sampled_from([0.5, 0.8, 0.6]),
        objective=st.sampled_from(["cost", "quality"]),
        candidates=subset([*ids, "nobody"]),
        data_class=st.sampled_from([*CLASSES, *CLASSES, "top"]),
        region=st.sampled_from([*REGIONS, *REGIONS, "mars"]),
        tenant=st.sampled_from(TENANTS),
        task=st.sampled_from(TASKS),
        previous_model=st.sampled_from([*ids, "nobody"]),
    )
    text = st.sampled_from([{"prompt": "x"}, {"messages": said}, {"messages": said + image}])
    return st.builds(lambda a, b: a | b, text, rest)


@dataclass(frozen=True)
class Learner:
    """Says of every request what it was told to, as the learner of a bundle could."""

    said: Estimate
    thresholds: tuple[float, ...] = TRAINED

    def estimate(self, request: RouteRequest) -> Estimate:
        return self.said


@st.composite
def estimates(draw: st.DrawFn, m: int) -> Estimate:
    def row(values: list[float]) -> Any:
        return np.array(draw(st.lists(st.sampled_from(values), min_size=m, max_size=m)), dtype=np.float32)

    p_ok = row([*NUMBERS, math.nan])
    lengths = row([0.0, 50.0, 100.0, 100.0, 150.0, 200.0, 300.0, 400.0, 5000.0, math.nan, math.inf])
    claim = None if draw(st.booleans()) else np.minimum(p_ok, row(NUMBERS))
    tokens = draw(st.sampled_from([0.0, 0.5, 99.5, 100.0, 100.0, 100.5, 600.0]))
    return Estimate(p_ok, lengths, tokens, p_low=claim, p_high=p_ok, p_claim=claim)


def refusal(policy: Table, key: Table | None, body: Table) -> str | None:
    """Why nobody is asked at all: "forbidden" by the key, or "invalid"."""
    if key is not None:
        if key.get("tenant") not in (None, body.get("tenant", key.get("tenant"))):
            return "forbidden"
        if "data_classes" in key and body.get("data_class", key["data_classes"][0]) not in key["data_classes"]:
            return "forbidden"
        own = {"min_probability", "willingness_to_pay_usd", "objective", "quality_threshold"} & set(body)
        if "tiers" in key and (own or body.get("tier", key["tiers"][0]) not in key["tiers"]):
            return "forbidden"
    if "tier" in body and ("min_probability" in body or body["tier"] not in TIERS):
        return "invalid"
    tier = tier_of(policy, key, body)
    objective = body.get("objective", tier.get("objective"))
    if objective == "quality" and (budget(tier, body) == math.inf or "willingness_to_pay_usd" in body):
        return "invalid"
    return None if body.get("quality_threshold", 0.5) in TRAINED else "invalid"


def tier_of(policy: Table, key: Table | None, body: Table) -> Table:
    """The tier that the request is held to; its own dial, or a worth alone, is none."""
    name = body.get("tier")
    if name is None and key is not None and "tiers" in key:
        name = policy["default_tier"] if policy["default_tier"] in key["tiers"] else key["tiers"][0]
    if name is None:
        if "min_probability" in body or "willingness_to_pay_usd" in body:
            return {"min_probability": body.get("min_probability", 0.0)}
        name = policy["default_tier"]
    tier = policy["tiers"][name]
    return tier if isinstance(tier, dict) else {"min_probability": tier}


def budget(tier: Table, body: Table) -> float:
    return min(body.get("max_cost_usd", math.inf), tier.get("max_cost_usd", math.inf))


def costs(catalog: list[Table], estimate: Estimate, attempts: list[float], body: Table) -> list[float]:
    cap = body.get("max_completion_tokens", body.get("max_tokens", math.inf))
    return [
        (estimate.input_tokens * card["input_usd_per_mtok"] + out * card["output_usd_per_mtok"]) / 1e6 * tries
        for card, tries, length in zip(catalog, attempts, estimate.output_tokens.tolist(), strict=True)
        for out in [length if math.isnan(length) else min(length, cap)]
    ]


def may_serve(card: Table, policy: Table, key: Table | None, body: Table, tokens: float) -> bool:
    """Every constraint but the cost."""
    needs = set(body.get("needs", []))
    needs |= {"tools"} if body.get("tools") or body.get("functions") else set()
    needs |= {"vision"} if "image_url" in json.dumps(body.get("messages", [])) else set()
    needs |= {"json"} if body.get("response_format", {}).get("type", "text") != "text" else set()
    listed = [body.get("candidates"), None if key is None else key.get("models")]
    listed.append(None if key is None else policy.get("keys", {}).get("k", {}).get("models"))
    default = policy.get("default_data_class", "public")
    default = key["data_classes"][0] if key is not None and "data_classes" in key else default
    return (
        all(models is None or card["id"] in models for models in listed)
        and body.get("data_class", default) in card["data_classes"]
        and body.get("region") in [None, *card["regions"]]
        and needs <= set(card["capabilities"])
        and math.ceil(tokens) + body.get("max_completion_tokens", body.get("max_tokens", 0)) <= card["context_window"]
    )


@st.composite
def outage(draw: st.DrawFn, catalog: list[Table]) -> tuple[Health, set[str]]:
    """Circuits after calls that failed, of models that were taken out, and the models that do not answer."""
    health = Health(HealthSettings(), clock=lambda: 1000.0)
    ids = [card["id"] for card in catalog]
    failing, out = (set(draw(st.just([]) | subset(ids))) for _ in range(2))
    for card in catalog:
        for _ in range(5 * (card["id"] in failing)):
            health.report(card["id"], card["provider"], failed=True)
        if card["id"] in out:
            health.set(card["id"], "open")
    mates = [card["provider"] for card in catalog if card["id"] in failing]
    return health, failing | out | {c["id"] for c in catalog if mates.count(c["provider"]) >= 2}


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # free output of unbounded length
@fuzzed(500)
@given(data=st.data())
def test_nothing_that_is_offered_breaks_a_constraint(data: st.DataObject) -> None:
    catalog = data.draw(CARDS, label="cards")
    ids = tuple(card["id"] for card in catalog)
    policy, key = data.draw(policies(ids), label="policy"), data.draw(st.none() | keys(ids), label="key")
    body, estimate = data.draw(bodies(ids), label="body"), data.draw(estimates(len(ids)), label="estimate")
    attempts = data.draw(st.lists(st.sampled_from([1.0, 1.5]), min_size=len(ids), max_size=len(ids)))
    health, down = data.draw(outage(catalog), label="outage")
    draws = data.draw(st.tuples(*[st.sampled_from(NUMBERS[:-1])] * 2), label="draws")

    read = Policy.from_json(json.loads(json.dumps(policy)))
    router = Router(
        catalog=Catalog.from_json({"models": catalog}),
        estimator=Learner(estimate),
        policy=read,
        model_version="v",
        draw=iter(draws * 2).__next__,
        reliability=Reliability(tuple(attempts), (0.0,) * len(ids)),
        quality_threshold=0.5,
    )
    wanted = refusal(policy, key, body)
    cost = costs(catalog, estimate, attempts, body)
    limit = math.inf if wanted else budget(tier_of(policy, key, body), body)
    fit = [i for i, card in enumerate(catalog) if may_serve(card, policy, key, body, estimate.input_tokens)]
    surely = {ids[i] for i in fit if limit == math.inf or cost[i] < limit * 0.9999 or cost[i] == 0.0}
    perhaps = surely | {ids[i] for i in fit if cost[i] <= limit * 1.0001}  # the program reckons in float32
    if perhaps - down:
        perhaps, surely = (perhaps - down, surely - down) if surely - down else (perhaps, set())
    try:
        asked = RouteBody.model_validate_json(json.dumps(body)).to_request(key and ApiKey.of_table("k", key), read)
        decision = router.decide_with_estimate(asked, health.down({c["id"]: c["provider"] for c in catalog}))[0]
    except ProblemError as error:
        event("forbidden")
        assert error.status == 403 and wanted == "forbidden"
    except InputError:
        event("invalid")
        assert wanted == "invalid"
    except NoEligibleModelError as error:
        event("nobody")
        assert wanted is None and not surely and set(ids) <= set(error.excluded)
    else:
        event(f"of {len(ids)} offered {len(decision.candidates)}, explored: {decision.explored}, down: {bool(down)}")
        assert wanted is None
        offered = [candidate.model for candidate in decision.candidates]
        assert surely <= set(offered) <= perhaps and len(set(offered)) == len(offered)
        assert decision.model == offered[0] and not set(offered) & set(decision.excluded)
        assert set(ids) - set(offered) <= set(decision.excluded) and all(decision.excluded.values())
        as_the_policy_says(decision, policy, key, body, estimate, draws[0])


def as_the_policy_says(
    decision: RouteDecision, policy: Table, key: Table | None, body: Table, estimate: Estimate, draw: float
) -> None:
    """Pins, exploration and the dial, of the models that may serve at all."""
    offered = [candidate.model for candidate in decision.candidates]
    tenant = body.get("tenant", key and key.get("tenant"))
    pins = [
        rule["model"]
        for rule in policy.get("rules", [])
        if rule.get("task") in (None, body.get("task")) and rule.get("tenant") in (None, tenant)
    ]
    if pins and pins[0] in offered:
        assert (decision.model, decision.propensity, decision.explored) == (pins[0], 1.0, False)
        return
    settled = "previous_model" in body  # a session that goes on, in which nobody explores unless the policy says so
    rate = policy.get("exploration_rate", 0.0)
    rate = rate if not settled or policy.get("session", {}).get("explore") else 0.0
    assert decision.explored == (draw < rate)
    assert rate / len(offered) * 0.999 <= decision.propensity <= 1.0
    tier = tier_of(policy, key, body)
    known = estimate.p_ok if estimate.p_claim is None else estimate.p_claim
    claims = {f"m{i}": claim for i, claim in enumerate(known.tolist())}
    dial = tier["min_probability"]
    assert decision.min_probability == dial and decision.meets_threshold == (claims[decision.model] >= dial)
    if not decision.explored and not settled and body.get("objective", tier.get("objective", "cost")) == "cost":
        assert decision.meets_threshold == any(claims[model] >= dial for model in offered)
