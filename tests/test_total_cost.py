"""From a log with retries to decisions that pay for them: simulated calls, training, a bundle, the router."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.load import load_router
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from router_ml.logs import LOG_SCHEMA
from router_ml.policy import Policy
from training.train import train

CATALOG = Catalog.from_json(
    {
        "models": [
            {
                "id": name, "provider": "acme", "tier": "mid-closed", "context_window": 100_000,
                "input_usd_per_mtok": price, "output_usd_per_mtok": price,
            }
            for name, price in (("strong", 30.0), ("steady", 2.0), ("flaky", 1.0))
        ]
    }
)  # fmt: skip
P_OK = {"strong": 0.95, "steady": 0.85, "flaky": 0.85}
# Attempts fail independently; a call is tried again up to four times. The flaky model takes 2.3 attempts a call.
FAILS = {"strong": 0.0, "steady": 0.0, "flaky": 0.6}
LIMIT = 5


def simulated(fails: dict[str, float], requests: int = 400) -> pl.DataFrame:
    """Every request sent to every model; all answers are as likely to be good, whatever the text."""
    rng = np.random.default_rng(11)
    words = ["river", "stone", "cloud", "engine", "ledger", "market", "protein", "theorem", "tensor", "violin"]
    rows = []
    for i in range(requests):
        prompt = f"What is the plural of {' '.join(rng.choice(words, 4))}?"
        for model in CATALOG.ids:
            attempts = int(min(rng.geometric(1.0 - fails[model]), LIMIT + 1))
            failed = attempts > LIMIT
            rows.append(
                {
                    "request_id": f"r{i}",
                    "time": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=i),
                    "prompt": prompt,
                    "model": model,
                    "propensity": 1.0,
                    "input_tokens": 12,
                    "output_tokens": None if failed else 100,
                    "status": "error" if failed else "ok",
                    "retries": min(attempts, LIMIT) - 1,
                    "quality": None if failed else float(rng.random() < P_OK[model]),
                }
            )
    return pl.DataFrame(rows, schema=LOG_SCHEMA)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One bundle learnt where the cheap model needs retries, one where it does not."""
    folder = tmp_path_factory.mktemp("bundles")
    for name, fails in (("retries", FAILS), ("none", dict.fromkeys(FAILS, 0.0))):
        train(simulated(fails), CATALOG, out=folder / name, encoder="lexical")
    return {name: folder / name for name in ("retries", "none")}


def test_a_cheap_model_that_needs_retries_loses_to_a_dearer_one_that_does_not(bundles: dict[str, Path]) -> None:
    prompts = [f"What is the plural of {word} stone river engine?" for word in ("cloud", "market", "violin", "tensor")]
    for policy in (Policy(escalation_rate=0.0), Policy()):
        chosen = {
            name: {load_router(path, policy).decide(request_of(prompt=p)).model for p in prompts}
            for name, path in bundles.items()
        }
        if policy.escalation_rate == 0.0:
            assert chosen == {"retries": {"steady"}, "none": {"flaky"}}
        else:  # a hair more P(ok) may be worth the other cheap model's price, never the retries
            assert chosen["retries"] == {"steady"} and chosen["none"] <= {"flaky", "steady"}


def test_what_was_learnt_of_calls_is_near_what_is_true(bundles: dict[str, Path]) -> None:
    stated = read_bundle(bundles["retries"]).manifest["reliability"]
    failure = FAILS["flaky"] ** LIMIT
    attempts = sum(FAILS["flaky"] ** k for k in range(LIMIT))  # E[min(geometric, LIMIT)]
    calls = 320  # the older four fifths
    spread = math.sqrt(FAILS["flaky"]) / (1 - FAILS["flaky"]) / math.sqrt(calls)
    # Shrinking by 20 of 340 calls moves 2.3 attempts towards 1.4 by 0.05.
    assert abs(stated["attempts"][2] - attempts) < 4 * spread + 0.06
    assert abs(stated["failure"][2] - failure) < 4 * math.sqrt(failure / calls) + 0.01
    assert stated["attempts"][0] == stated["attempts"][1] < 1.1 and stated["failure"][0] < 0.01
    assert read_bundle(bundles["none"]).manifest["reliability"] == {"attempts": [1.0] * 3, "failure": [0.0] * 3}


def test_the_limit_on_cost_counts_the_retries(bundles: dict[str, Path]) -> None:
    routers = {name: load_router(path) for name, path in bundles.items()}
    request = request_of(prompt="What is the plural of cloud?")
    costs = {
        name: {c.model: c.expected_cost_usd for c in router.decide(request).candidates}
        for name, router in routers.items()
    }
    learnt = read_bundle(bundles["retries"]).manifest["reliability"]["attempts"][2]
    assert costs["retries"]["flaky"] == pytest.approx(learnt * costs["none"]["flaky"], rel=0.05)
    assert costs["retries"]["flaky"] > costs["retries"]["steady"] > costs["none"]["flaky"]
    limit = (costs["retries"]["flaky"] + costs["retries"]["steady"]) / 2
    limited = replace(request, max_cost_usd=limit)
    assert set(routers["retries"].decide(limited).excluded) == {"strong", "flaky"}
    assert set(routers["none"].decide(limited).excluded) == {"strong"}
