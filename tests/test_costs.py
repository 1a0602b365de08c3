"""What is learnt of retries and failures, and what follows from it."""

from __future__ import annotations

import json
import math

import pytest

from router_ml.costs import LEAST_SUCCESS, Reliability, last_resort_usd, total_costs
from router_ml.errors import InputError


def test_reliability_comes_back_from_json() -> None:
    known = Reliability((1.0, 1.37), (0.0, 0.04))
    assert Reliability.from_json(json.loads(json.dumps(known.to_json()))) == known
    assert Reliability.perfect(2) == Reliability((1.0, 1.0), (0.0, 0.0))


@pytest.mark.parametrize(
    ("attempts", "failure"),
    [((0.5,), (0.0,)), ((math.nan,), (0.0,)), ((math.inf,), (0.0,)), ((1.0,), (1.1,)), ((1.0,), (-0.1,)), ((1.0,), ())],
)
def test_what_cannot_be_is_refused(attempts: tuple[float, ...], failure: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="reliability"):
        Reliability(attempts, failure)


def test_asking_until_it_succeeds_is_what_a_simulation_of_it_costs() -> None:
    """The first model once, then the strongest again and again, drawn a hundred thousand times."""
    import numpy as np

    p, cost, failure, rate = [0.6, 0.8], [1.0, 7.0], [0.1, 0.05], 0.7
    rng, n = np.random.default_rng(4), 100_000
    failed, good, asks = rng.random(n) < failure[0], rng.random(n) < p[0], rng.random(n) < rate
    goes_on = failed | (~good & asks)
    calls = np.where(goes_on, rng.geometric((1 - failure[1]) * p[1], n), 0)
    spent = cost[0] + calls * cost[1]
    expected = total_costs(p, cost, failure, rate)[0]
    assert abs(spent.mean() - expected) < 4 * spent.std() / math.sqrt(n)


def test_nobody_asks_for_ever() -> None:
    assert last_resort_usd([0.0], [2.0], [0.0]) == 2.0 / LEAST_SUCCESS
    assert last_resort_usd([0.9], [2.0], [1.0]) == 2.0 / LEAST_SUCCESS
    assert last_resort_usd([math.nan, 0.5], [1.0, math.inf], [0.0, 0.0]) == 0.0
