"""Sessions in the decision: no constraint is broken, staying costs little, nothing changes where there is none."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router_ml.catalog import Catalog
from router_ml.choice import choose
from router_ml.conversation import request_of
from router_ml.errors import InputError
from router_ml.policy import Policy, Rule
from router_ml.reasons import kind
from router_ml.router import Router
from router_ml.session import Incumbent, Prefix, Session, SessionPolicy, cached_shares, follow_up, lengths
from router_ml.types import Estimate, Message, RouteRequest

FLOATS = st.floats(0, 1, width=32) | st.just(math.nan)
COSTS = st.floats(0, 10, width=32) | st.sampled_from([math.nan, math.inf])
NAMES = ("frontier", "mid", "hosted", "local")


@settings(max_examples=300, deadline=None)
@given(
    data=st.data(),
    m=st.integers(1, 6),
    dial=st.floats(0, 1),
    gain=st.floats(0, 1),
    worth=st.none() | st.floats(0, 100),
    within=st.booleans(),
    follows=st.sampled_from([None, "words", "tools"]),
)
def test_staying_breaks_nothing_and_costs_no_more_than_it_may(
    data: st.DataObject, m: int, dial: float, gain: float, worth: float | None, within: bool, follows: Any
) -> None:
    p = np.array(data.draw(st.lists(FLOATS, min_size=m, max_size=m)), dtype=np.float32)
    claim = (p * np.float32(data.draw(st.floats(0.5, 1)))).astype(np.float32)
    cost = np.array(data.draw(st.lists(COSTS, min_size=m, max_size=m)), dtype=np.float32)
    saved = data.draw(st.lists(st.floats(0, 5), min_size=m, max_size=m))
    eligible = np.array(data.draw(st.lists(st.booleans(), min_size=m, max_size=m).filter(any)))
    position = data.draw(st.none() | st.sampled_from(np.flatnonzero(eligible).tolist()))
    pinned = data.draw(st.none() | st.integers(0, m - 1))
    default = data.draw(st.none() | st.integers(0, m - 1))
    rate = data.draw(st.sampled_from([0.0, 0.3]))
    draw = (data.draw(st.floats(0, 1, exclude_max=True)), data.draw(st.floats(0, 1, exclude_max=True)))
    names = [f"m{i}" for i in range(m)]
    of = Incumbent("x" if position is None else names[position], position, "gone", names, saved, gain, follows)
    budget = 10.0 if within and worth is None else None
    gain = 1.0 if follows == "words" else gain  # a few words are no reason to move

    def decide(**fields: Any) -> Any:
        return choose(
            p, cost, eligible, dial, p_claim=claim, escalation_rate=0.5, willingness_to_pay_usd=worth,
            budget_usd=budget, unmet="most-probable" if default is None else "default", default=default, **fields,
        )  # fmt: skip

    without, choice = decide(), decide(incumbent=of)
    assert sorted(choice.order) == np.flatnonzero(eligible).tolist()
    assert kind(choice.reason) != "other"
    first, greedy = choice.order[0], without.order[0]
    total = dict(zip(choice.order, choice.total_cost_usd, strict=True))
    assert total == pytest.approx(dict(zip(without.order, without.total_cost_usd, strict=True)), nan_ok=True)
    if position is None:
        assert choice.order == without.order and kind(choice.reason) == "moved"
    if first != position:
        assert kind(choice.reason) == "moved" and choice.meets_threshold == without.meets_threshold
    elif first != greedy:
        assert kind(choice.reason) == "stayed" or total[first] == total[greedy] or worth is not None
        if without.meets_threshold and budget is None:
            # It is as good as what the dial asks, or it is a follow-up that its probability is enough for.
            assert choice.meets_threshold or (follows and p[first] >= dial)
            price = np.where(np.isnan(cost), np.inf, cost)
            loss = {i: total[i] if worth is None else price[i] + worth * (1 - float(p[i])) for i in (first, greedy)}
            assert gain == 1.0 or loss[first] * (1 - gain) <= loss[greedy] * (1 + 1e-6)
        elif not math.isnan(p[greedy]):
            assert p[greedy] - p[first] <= gain * (1 - p[first]) + 1e-6
    # The propensity is that of the choice as the session makes it, and a rule comes first.
    drawn = decide(incumbent=of, pinned=pinned, exploration_rate=rate, draw=draw)
    if pinned is not None and eligible[pinned]:
        assert drawn.order[0] == pinned and drawn.propensity == 1.0 and kind(drawn.reason) == "pinned"
    else:
        assert drawn.propensity == pytest.approx((1 - rate) * (drawn.order[0] == first) + rate / eligible.sum())


@dataclass(frozen=True)
class Stated:
    """Probabilities as they are stated; 300 tokens of answer, four characters a token."""

    p_ok: tuple[float, ...] = (0.95, 0.9, 0.85, 0.6)
    claim: tuple[float, ...] | None = None

    def estimate(self, request: RouteRequest) -> Estimate:
        p = np.array(self.p_ok, dtype=np.float32)
        claim = p if self.claim is None else np.array(self.claim, dtype=np.float32)
        return Estimate(p, np.full(len(p), 300, np.float32), lengths(request)[-1] / 4, None, claim, p, claim)


@pytest.fixture
def router(catalog: Catalog) -> Router:
    cached = {"frontier": 0.5, "mid": 0.05, "hosted": None, "local": None}
    cards = tuple(replace(card, cached_input_usd_per_mtok=cached[card.id], context_window=200_000) for card in catalog)
    return Router(Catalog(cards), Stated(), Policy(escalation_rate=0.0), "v1")


def talk(*chars: int, last: str = "", **fields: Any) -> RouteRequest:
    """A conversation of so many characters a turn, from the user first, and a last turn of his."""
    turns = [Message("user" if i % 2 == 0 else "assistant", "x" * size) for i, size in enumerate(chars)]
    return RouteRequest(messages=(*turns, Message("user", last or "y" * 100)), **fields)


def decide(router: Router, request: RouteRequest, session: Session | None) -> Any:
    return router.decide_with_estimate(request, session=session)[0]


def sent(model: str, request: RouteRequest, messages: int, age: float = 10.0) -> Prefix:
    return Prefix(model, messages, lengths(request)[messages], age)


LONG = talk(40_000, 400)


def test_the_cached_part_of_the_prompt_is_billed_at_its_price(router: Router) -> None:
    session = Session("mid", (sent("mid", LONG, 1),))
    costs = {c.model: c.expected_cost_usd for c in decide(router, LONG, session).candidates}
    fresh = {c.model: c.expected_cost_usd for c in router.decide(LONG).candidates}
    assert costs["mid"] == pytest.approx(fresh["mid"] - 10_000 * (0.5 - 0.05) / 1e6, rel=1e-5)
    assert {m: c for m, c in costs.items() if m != "mid"} == {m: c for m, c in fresh.items() if m != "mid"}
    # The limit on cost is held against what will be paid.
    limit = (costs["mid"] + fresh["mid"]) / 2
    assert "mid" not in decide(router, replace(LONG, max_cost_usd=limit), session).excluded
    assert "mid" in router.decide(replace(LONG, max_cost_usd=limit)).excluded


@pytest.mark.parametrize(
    ("prefix", "why"),
    [
        (sent("mid", LONG, 1, age=301.0), "cold"),
        (Prefix("mid", 1, 39_000, 10.0), "rewritten"),
        (Prefix("mid", 9, 40_000, 10.0), "longer than the conversation is now"),
        (sent("hosted", LONG, 1), "no cached price is known"),
        (sent("gone", LONG, 1), "no such model"),
    ],
)
def test_what_is_not_cached_costs_as_ever(router: Router, prefix: Prefix, why: str) -> None:
    decision = decide(router, LONG, Session("mid", (prefix, sent("mid", LONG, 1, age=301.0))))
    assert {c.model: c.expected_cost_usd for c in decision.candidates} == {
        c.model: c.expected_cost_usd for c in router.decide(LONG).candidates
    }, why
    assert decision.cached_tokens == 0.0


def test_a_short_prompt_is_not_cached(router: Router) -> None:
    short = talk(4 * 1000, 400)
    assert cached_shares(short, Session("mid", (sent("mid", short, 1),)), 300.0) == {"mid": 4000 / 4500}
    assert decide(router, short, Session("mid", (sent("mid", short, 1),))).cached_tokens == 0.0
    fine = router.with_policy(Policy(escalation_rate=0.0, session=SessionPolicy(cache_min_tokens=500)))
    assert decide(fine, short, Session("mid", (sent("mid", short, 1),))).cached_tokens == pytest.approx(1000)


def test_a_session_stays_while_the_cache_is_worth_more_than_the_gain(router: Router) -> None:
    assert router.decide(LONG).model == "hosted"
    warm = decide(router, LONG, Session("mid", (sent("mid", LONG, 1),)))
    assert (
        warm.model == "mid" and warm.stayed and warm.incumbent == "mid" and warm.cached_tokens == pytest.approx(10_000)
    )
    assert warm.reason == (
        "session stays with mid: switching to hosted would save 0.00346 USD but lose a prompt cache worth 0.0045 USD"
    )
    cold = decide(router, LONG, Session("mid"))
    assert cold.model == "hosted" and cold.stayed is False
    assert cold.reason == "session moves from mid to hosted: switching saves 0.00346 USD"
    # A small gain is none.
    close = replace(router, catalog=Catalog(tuple(replace(c, input_usd_per_mtok=0.21) for c in router.catalog)))
    stay = decide(close, LONG, Session("hosted"))
    assert router.decide(LONG).model == stay.model == "hosted" and kind(stay.reason) == "cheapest"
    tight = router.with_policy(Policy(escalation_rate=0.0, session=SessionPolicy(min_gain=0.7)))
    assert decide(tight, LONG, Session("mid")).reason == (
        "session stays with mid: switching to hosted would save 0.00346 USD, a gain of less than 70%"
    )


def test_a_session_moves_where_it_has_to(router: Router) -> None:
    session = Session("mid", (sent("mid", LONG, 1),))

    def moved(request: RouteRequest, **down: str) -> tuple[str, str]:
        decision = router.decide_with_estimate(request, down, session)[0]
        assert decision.stayed is False and kind(decision.reason) == "moved" and decision.incumbent == "mid"
        return decision.model, decision.reason.partition(": ")[2]

    assert moved(replace(LONG, needs=frozenset({"vision"}))) == ("frontier", "does not support vision")
    assert moved(LONG, mid="taken out by hand") == ("hosted", "taken out by hand")
    assert moved(replace(LONG, data_class="internal"))[1] == "not cleared for data class 'internal'"
    assert moved(replace(LONG, allowed=frozenset({"hosted"}))) == ("hosted", "not on the key's allow-list")
    assert moved(replace(LONG, min_probability=0.93)) == ("frontier", "the former's claim does not reach 0.93")
    gone = decide(router, LONG, Session("retired"))
    assert gone.reason == "session moves from retired to hosted: not in the catalogue" and gone.stayed is False


def test_a_follow_up_is_not_left_for_a_hair_below_the_dial(router: Router) -> None:
    unsure = replace(router, estimator=Stated((0.95, 0.72, 0.6, 0.5), (0.93, 0.68, 0.5, 0.4)))
    question, yes = LONG, talk(40_000, 400, last="ok, do it")
    session = Session("mid", (sent("mid", LONG, 1),))
    assert decide(unsure, question, session).model == "frontier"
    stays = decide(unsure, yes, session)
    assert stays.model == "mid" and not stays.meets_threshold
    assert stays.reason == "session stays with mid: a follow-up of few words, and its probability reaches 0.7"
    cheaper = decide(router, yes, Session("frontier"))
    assert cheaper.model == "frontier" and cheaper.reason.endswith(", a follow-up of few words")
    assert decide(router, question, Session("frontier")).model == "hosted"
    worse = replace(router, estimator=Stated((0.95, 0.69, 0.6, 0.5), (0.93, 0.68, 0.5, 0.4)))
    assert decide(worse, yes, session).model == "frontier"


@pytest.mark.parametrize(
    ("roles", "last", "follows"),
    [
        ("ua u", "yes", "words"),
        ("ua u", "What about this one? " * 5, None),
        ("uat", "a page of results " * 100, "tools"),
        ("u", "yes", None),
        ("a", "hello", None),
    ],
)
def test_what_a_follow_up_is(roles: str, last: str, follows: str | None) -> None:
    names = [{"u": "user", "a": "assistant", "t": "tool"}[r] for r in roles.replace(" ", "")]
    messages = [Message(role, "so") for role in names[:-1]] + [Message(names[-1], last)]
    assert follow_up(RouteRequest(messages=tuple(messages))) == follows


def test_where_nobody_meets_the_dial_it_stays_with_the_most_probable_or_one_as_good(router: Router) -> None:
    hopeless = replace(LONG, min_probability=0.99)
    near = decide(replace(router, estimator=Stated((0.5, 0.47, 0.4, 0.3))), hopeless, Session("mid"))
    assert near.model == "mid" and near.reason == (
        "session stays with mid: frontier is hardly more probable (0.500, not 0.470)"
    )
    far = decide(replace(router, estimator=Stated((0.6, 0.47, 0.4, 0.3))), hopeless, Session("mid"))
    assert far.reason == "session moves from mid to frontier: more probable (0.600, not 0.470)"
    default = router.with_policy(Policy(unmet="default", default_model="local"))
    assert decide(default, hopeless, Session("mid")).reason.startswith(
        "session moves from mid to local: no candidate's"
    )
    within = replace(LONG, objective="quality", max_cost_usd=1.0)
    assert decide(router, within, Session("mid")).model == "frontier"
    unknown = replace(router, estimator=Stated((math.nan,) * 4))
    assert decide(unknown, LONG, Session("mid")).reason == "session stays with mid: no estimate for any candidate"


def test_rules_come_first_and_exploration_is_for_first_requests(router: Router) -> None:
    session = Session("mid", (sent("mid", LONG, 1),))
    pinned = router.with_policy(router.policy.with_changes(rules=(Rule("local", task="code"),)))
    decision = decide(pinned, replace(LONG, task="code"), session)
    assert decision.model == "local" and decision.reason == "a rule pins this model" and decision.stayed is False
    rng = random.Random(1)
    exploring = replace(router, policy=router.policy.with_changes(exploration_rate=0.5), draw=rng.random)
    assert {decide(exploring, LONG, session).model for _ in range(50)} == {"mid"}
    assert decide(exploring, LONG, session).propensity == 1.0
    assert {decide(exploring, LONG, None).model for _ in range(200)} == set(NAMES)
    within = exploring.with_policy(exploring.policy.with_changes(session=SessionPolicy(explore=True)))
    drawn = [decide(within, LONG, session) for _ in range(200)]
    assert {d.model: d.propensity for d in drawn} == {m: 0.125 + 0.5 * (m == "mid") for m in NAMES}


def test_the_callers_word_is_enough(router: Router) -> None:
    said = decide(router, replace(LONG, previous_model="mid"), None)
    assert said.model == "mid" and said.cached_tokens == pytest.approx(10_000) and said.stayed
    # What is known of the cache is better than what has to be assumed.
    cold = Session("local", (sent("mid", LONG, 1, age=1000.0),))
    assert decide(router, replace(LONG, previous_model="mid"), cold).cached_tokens == 0.0
    # Without an answer in it nothing has been sent.
    assert decide(router, talk(previous_model="mid"), None).cached_tokens == 0.0


def test_without_a_session_nothing_changes(router: Router) -> None:
    """A session's name alone, of which nothing is known, leaves every number of the decision as it is."""
    for request in (LONG, talk(last="yes"), replace(LONG, min_probability=0.99)):
        plain, named = router.decide(request), router.decide(replace(request, session="s"))
        assert replace(named, decision_id=plain.decision_id) == plain and plain.incumbent is None is plain.stayed
    priced = router.decide(LONG)
    unpriced = Catalog(tuple(replace(c, cached_input_usd_per_mtok=None) for c in router.catalog))
    assert replace(router, catalog=unpriced).decide(LONG).candidates == priced.candidates


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"min_gain": 2}, "min_gain"),
        ({"min_gain": "much"}, "min_gain"),
        ({"cache_seconds": -1}, "cache_seconds"),
        ({"cache_min_tokens": True}, "cache_min_tokens"),
        ({"explore": 1}, "explore"),
        ({"sticky": True}, "unknown setting 'session.sticky'"),
        ([], "'session' has to be a table"),
    ],
)
def test_settings_that_are_not_possible(table: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Policy.from_json({"session": table})


def test_settings_are_part_of_the_policy() -> None:
    policy = Policy.from_json({"session": {"min_gain": 0.2, "explore": True}})
    assert policy.session == SessionPolicy(min_gain=0.2, explore=True) and policy.version != Policy().version
    assert Policy.from_json(policy.to_json()) == policy


def test_a_cached_price_is_read_and_written(catalog: Catalog) -> None:
    entry = catalog.to_json()["models"][0]
    assert "cached_input_usd_per_mtok" not in entry
    priced = Catalog.from_json({"models": [entry | {"cached_input_usd_per_mtok": 0.5}]})
    assert priced.cache_discount.tolist() == [pytest.approx(4.5e-6)] and Catalog.from_json(priced.to_json()) == priced
    for wrong in (-1, "free", True, 5.1):
        with pytest.raises(InputError, match="cached_input_usd_per_mtok"):
            Catalog.from_json({"models": [entry | {"cached_input_usd_per_mtok": wrong}]})


def test_a_conversation_is_read_from_its_messages() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    request = request_of(
        messages=[{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}], tools=tools
    )
    assert lengths(request) == [request.tools_chars, request.tools_chars + 2, request.tools_chars + 5]
