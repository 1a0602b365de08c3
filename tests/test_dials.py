"""Many settings at once choose what the policy does one by one, from a log's prompts and from a store's decisions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from features.load import load_router
from router_ml.choice import choose
from router_ml.conversation import request_of
from router_ml.errors import InputError
from router_ml.policy import Policy, Rule
from router_ml.router import Router
from router_ml.store import Store
from training.dials import KINDS, Seen, Setting, seen_of_decisions, seen_of_log, sequence


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000), st.floats(0, 1), st.floats(0, 5), st.booleans(), st.booleans())
@example(98, 0.0, 0.0, False, False)  # all that may serve has no estimate and no cost
def test_choices_are_the_policys(seed: int, least: float, worth: float, default: bool, plain: bool) -> None:
    rng = np.random.default_rng(seed)
    n, m = 25, 5
    p = rng.random((n, m)).astype(np.float32).round(1 if plain else 6)  # equals, too
    cost = rng.random((n, m)).astype(np.float32).round(1 if plain else 6)
    p[rng.random((n, m)) < 0.1] = np.nan
    cost[rng.random((n, m)) < 0.05] = np.nan
    claim = (p * np.float32(0.9)).astype(np.float32)
    eligible = rng.random((n, m)) < 0.7
    eligible[np.arange(n), rng.integers(0, m, n)] = True
    pinned = np.where(rng.random(n) < 0.1, eligible.argmax(axis=1), -1)
    failure = rng.random(m) * 0.3
    policy = Policy(
        escalation_rate=float(rng.random()),
        unmet="default" if default else "most-probable",
        default_model="x" if default else None,
    )
    at = 2 if default else -1
    numbers = (a.astype(np.float64) for a in (p, claim, cost))
    seen = Seen(*numbers, eligible, pinned, np.zeros(n), eligible, failure, policy, at)
    for setting in (Setting("min_probability", least), Setting("willingness_to_pay_usd", worth)):
        by_value = setting.kind == "willingness_to_pay_usd"
        expected = [
            choose(
                p[i], cost[i], eligible[i], 0.0 if by_value else least, p_claim=claim[i], failure=failure.tolist(),
                escalation_rate=policy.escalation_rate, willingness_to_pay_usd=worth if by_value else None,
                pinned=None if pinned[i] < 0 else int(pinned[i]), default=at if default else None, unmet=policy.unmet,
            ).order[0]
            for i in range(n)
        ]  # fmt: skip
        assert seen.choices(setting).tolist() == expected


def test_sequences_go_from_the_safest_to_the_cheapest() -> None:
    for kind in KINDS:
        values = [setting.value for setting in sequence(kind)]
        assert values == sorted(set(values), reverse=True)
    assert sequence("min_probability")[-1].value == 0.0


@pytest.fixture(scope="module")
def router(tiny_bundle: Path) -> Router:
    policy = Policy(rules=(Rule("mid", task="pinned"),), keys={"intern": frozenset({"local", "hosted"})})
    return load_router(tiny_bundle, policy)


def test_a_log_and_a_store_are_seen_as_the_router_sees_requests(
    router: Router, tiny_log: pl.DataFrame, tmp_path: Path
) -> None:
    rows = tiny_log.unique("request_id", maintain_order=True).head(40)
    named = [list(router.catalog.ids), *[["local", "frontier"]] * 4, ["nobody"], *[None] * 34]
    asked = ["plain"] * 20 + ["pinned"] * 10 + ["plain"] * 10
    rows = rows.with_columns(
        task=pl.Series(asked),
        key=pl.Series([None] * 30 + ["intern"] * 10, dtype=pl.String),
        candidates=pl.Series(named, dtype=pl.List(pl.String)),
    )
    seen, served = seen_of_log(router, rows)
    assert served.tolist() == [i != 5 for i in range(40)], "no model may serve the sixth"
    store = Store(f"{tmp_path}/store.db").start()
    decided = []
    for i, row in enumerate(rows.iter_rows(named=True)):
        if i == 5:
            continue
        may = None if row["candidates"] is None else tuple(row["candidates"])
        request = request_of(prompt=row["prompt"], task=row["task"], key=row["key"], candidates=may)
        decided.append(request)
        assert store.record(request, router.decide(request), provider="p")
    other = replace(router, model_version="another")
    store.record(decided[0], other.decide(decided[0]), provider="p")
    assert store.flush()
    kept, from_store = seen_of_decisions(router, list(store.decisions()))
    store.close()
    assert from_store.sum() == 39 and len(from_store) == 40
    for kind, field in (("min_probability", 0.6), ("willingness_to_pay_usd", 0.002)):
        setting = Setting(kind, field)  # type: ignore[arg-type]
        expected = [router.catalog.index[router.decide(replace(r, **{kind: field})).model] for r in decided]
        assert seen.choices(setting).tolist() == expected
        assert kept.choices(setting).tolist() == expected


def test_rows_without_a_text_are_not_seen(router: Router, tiny_log: pl.DataFrame) -> None:
    bare = tiny_log.head(8).with_columns(prompt=pl.lit(None, pl.String))
    with pytest.raises(InputError, match="prompt or messages"):
        seen_of_log(router, bare)
    seen, served = seen_of_log(router, pl.concat([bare, tiny_log.head(4)]))
    assert (len(seen), served.tolist()) == (4, [False] * 8 + [True] * 4)
