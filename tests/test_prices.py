"""What calls cost by their card, exactly, and the router's expected cost of long ones."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router_ml.catalog import Catalog, card_from_json, card_to_json
from router_ml.errors import InputError
from router_ml.policy import Policy
from router_ml.prices import Usage, price_call
from router_ml.router import Router
from router_ml.types import Estimate, Message, ModelCard, RouteRequest

CARD: dict[str, Any] = {
    "id": "long",
    "provider": "acme",
    "tier": "frontier-closed",
    "input_usd_per_mtok": 1.25,
    "output_usd_per_mtok": 10.0,
    "cached_input_usd_per_mtok": 0.31,
    "batch_input_usd_per_mtok": 0.625,
    "batch_output_usd_per_mtok": 5.0,
    "reasoning_usd_per_mtok": 3.5,
    "context_window": 1_000_000,
    "max_output_tokens": 65_536,
    "long_context": [
        {"above_tokens": 200_000, "input_usd_per_mtok": 2.5, "output_usd_per_mtok": 15.0},
        {
            "above_tokens": 400_000,
            "input_usd_per_mtok": 4.0,
            "output_usd_per_mtok": 20.0,
            "cached_input_usd_per_mtok": 1.0,
            "batch_input_usd_per_mtok": 2.0,
            "batch_output_usd_per_mtok": 10.0,
            "batch_cached_input_usd_per_mtok": 0.5,
        },
    ],
}
LONG = card_from_json(CARD, "card")


@pytest.mark.parametrize(
    ("usage", "usd"),
    [
        ({"input_tokens": 1000, "output_tokens": 100}, "0.00225"),
        ({"input_tokens": 1000, "output_tokens": 100, "cached_tokens": 900}, "0.001404"),
        ({"input_tokens": 1000, "output_tokens": 100, "reasoning_tokens": 60}, "0.00186"),
        ({"input_tokens": 1000, "output_tokens": 100, "batch": True}, "0.001125"),
        ({"input_tokens": 200_000, "output_tokens": 0}, "0.25"),
        ({"input_tokens": 200_001, "output_tokens": 1}, "0.5000175"),
        ({"input_tokens": 400_001, "output_tokens": 1, "cached_tokens": 400_000}, "0.400024"),
        ({"input_tokens": 400_001, "output_tokens": 1, "cached_tokens": 400_000, "batch": True}, "0.200012"),
        ({"input_tokens": 0, "output_tokens": 0}, "0"),
    ],
)
def test_a_call_is_priced_exactly(usage: dict[str, Any], usd: str) -> None:
    assert price_call(LONG, Usage(**usage)) == Decimal(usd)


@pytest.mark.parametrize(
    ("usage", "says"),
    [
        ({"cached_tokens": 1, "batch": True}, "no price of cached input in a batch: add it to its card"),
        ({"input_tokens": 200_001, "cached_tokens": 1}, "no price of cached input above 200,000 tokens"),
        ({"input_tokens": 200_001, "batch": True}, "no price of input in a batch above 200,000 tokens"),
        ({"reasoning_tokens": 1, "batch": True}, "no price of reasoning in a batch"),
    ],
)
def test_an_unknown_price_is_an_error_that_says_what_to_do(usage: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match="model 'long' has ") as error:
        price_call(LONG, Usage(**{"input_tokens": 10, "output_tokens": 10} | usage))
    assert says in str(error.value)


def test_the_error_names_the_command_that_mends_it() -> None:
    bare = replace(LONG, cached_input_usd_per_mtok=None)
    with pytest.raises(InputError, match="`router-ml catalog import --model long --out "):
        price_call(bare, Usage(input_tokens=10, output_tokens=1, cached_tokens=5))


def test_without_a_price_of_its_own_reasoning_is_output() -> None:
    card = replace(LONG, reasoning_usd_per_mtok=None)
    plain = price_call(card, Usage(input_tokens=5, output_tokens=70))
    assert price_call(card, Usage(input_tokens=5, output_tokens=70, reasoning_tokens=50)) == plain


@pytest.mark.parametrize(
    "usage",
    [
        {"input_tokens": -1},
        {"cached_tokens": 11},
        {"reasoning_tokens": 11},
    ],
)
def test_counts_that_cannot_be_are_refused(usage: dict[str, int]) -> None:
    with pytest.raises(InputError):
        Usage(**{"input_tokens": 10, "output_tokens": 10} | usage)


@given(st.lists(st.tuples(st.integers(0, 150_000), st.integers(0, 60_000)), min_size=2, max_size=20))
def test_parts_add_up_to_the_whole_to_the_last_digit(calls: list[tuple[int, int]]) -> None:
    one = sum(price_call(LONG, Usage(input_tokens=i, output_tokens=o)) for i, o in calls)
    tokens_in, tokens_out = (sum(tokens) for tokens in zip(*calls, strict=True))
    assert one == (tokens_in * Decimal("1.25") + tokens_out * 10) / 1_000_000


def test_the_prices_go_to_json_and_back() -> None:
    assert card_from_json(card_to_json(LONG), "card") == LONG
    assert Catalog.from_json(Catalog((LONG,)).to_json()).cards == (LONG,)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batch_input_usd_per_mtok": -1}, "'batch_input_usd_per_mtok' has to be a price"),
        ({"reasoning_usd_per_mtok": "3"}, "'reasoning_usd_per_mtok' has to be a price"),
        ({"max_output_tokens": 0}, "'max_output_tokens' has to be a positive"),
        ({"max_output_tokens": 1.5}, "'max_output_tokens' has to be a positive"),
        ({"long_context": {}}, "'long_context' has to be an array"),
        ({"long_context": [{"above_tokens": 5}]}, "long_context 1: needs above_tokens"),
        ({"long_context": [CARD["long_context"][1], CARD["long_context"][0]]}, "have to rise"),
        ({"long_context": [CARD["long_context"][0] | {"input": 1}]}, "nothing else"),
        ({"price_source": 3}, "'price_source' has to be a string"),
        ({"guessed": "tier"}, "'guessed' has to be an array of strings"),
    ],
)
def test_prices_that_cannot_be_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match="model 'long'") as error:
        card_from_json(CARD | change, "card")
    assert says in str(error.value)


class _Fixed:
    def __init__(self, tokens: float) -> None:
        self.tokens = tokens

    def estimate(self, request: RouteRequest) -> Estimate:
        p = np.full(2, 0.9, dtype=np.float32)
        return Estimate(p, np.full(2, 1000.0, dtype=np.float32), self.tokens)


def _routed(tokens: float, other: ModelCard) -> str:
    router = Router(Catalog((LONG, other)), _Fixed(tokens), Policy(escalation_rate=0.0), "v")
    decision = router.decide(RouteRequest(messages=(Message("user", "hello"),)))
    costs = {c.model: c.expected_cost_usd for c in decision.candidates}
    paid = price_call(LONG, Usage(input_tokens=int(tokens), output_tokens=1000))
    assert costs["long"] == pytest.approx(float(paid), rel=1e-5)
    return decision.model


def test_the_router_minimises_the_price_of_the_length_that_a_call_has() -> None:
    flat = replace(LONG, id="flat", long_context=(), input_usd_per_mtok=2.0)
    assert [_routed(tokens, flat) for tokens in (1_000, 200_000, 200_001, 500_000)] == ["long", "long", "flat", "flat"]
