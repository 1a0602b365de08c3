"""Usage and savings: sums over any grouping are the log's to the last digit; a store settles from outcomes."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from router_ml.accounting import GROUPINGS, accounts, cents, spend_frame
from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA
from router_ml.logs import read_log
from router_ml.store import Store
from router_ml.stored import spend_rows
from router_ml.tables import open_database
from router_ml.types import Candidate, Outcome, RouteDecision, RouteRequest
from training.experiment import cost_column
from training.simulate import simulate
from training.world import SIMULATED_CATALOG

START = datetime(2026, 11, 25, 22, tzinfo=UTC)
IDS = SIMULATED_CATALOG.ids


def _log(rows: list[dict[str, Any]]) -> pl.DataFrame:
    full = [
        {"request_id": f"r{i}", "time": START + timedelta(minutes=7 * i), "model": IDS[0]} | row
        for i, row in enumerate(rows)
    ]
    return pl.DataFrame(full, schema=LOG_SCHEMA)


calls = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from(["a", "b", None]),
        "key": st.sampled_from(["k", None]),
        "task": st.sampled_from(["x", "y", None]),
        "model": st.sampled_from(IDS),
        "input_tokens": st.none() | st.integers(0, 100_000),
        "output_tokens": st.none() | st.integers(0, 20_000),
        "cost_usd": st.none() | st.floats(0.0, 10.0),
    }
)


@settings(max_examples=40, deadline=None)
@given(st.lists(calls, min_size=1, max_size=40))
def test_sums_over_any_grouping_are_the_logs_exactly(rows: list[dict[str, Any]]) -> None:
    log = _log(rows)
    whole = accounts(log, SIMULATED_CATALOG, baseline="aurora-4")
    for size in range(1, len(GROUPINGS) + 1):
        for by in itertools.combinations(GROUPINGS, size):
            parts = accounts(log, SIMULATED_CATALOG, by=by, baseline="aurora-4")
            for column in whole.frame.columns:
                assert parts.total(column) == whole.total(column), (by, column)
            exact = parts.to_frame()["cost_usd"].sum()
            assert exact == Decimal(whole.total("cost_nano")) / 1_000_000_000
    assert whole.total("calls") == len(rows) == sum(whole.total(name) for name in ("reported", "priced", "open"))
    # By hand, in fractions of a cent: what was reported, and else tokens at the card's prices.
    by_hand = Decimal(0)
    for row in rows:
        card = SIMULATED_CATALOG[row["model"]]
        if row["cost_usd"] is not None:
            by_hand += Decimal(row["cost_usd"])
        elif row["input_tokens"] is not None and row["output_tokens"] is not None:
            by_hand += row["input_tokens"] * Decimal(str(card.input_usd_per_mtok)) / 1_000_000
            by_hand += row["output_tokens"] * Decimal(str(card.output_usd_per_mtok)) / 1_000_000
    assert abs(by_hand - Decimal(whole.total("cost_nano")) / 10**9) <= len(rows) * Decimal("0.5e-9")
    assert whole.total("savings_nano") == whole.total("baseline_nano") - whole.total("compared_cost_nano")


def test_a_simulated_log_reconciles_to_the_cent(tmp_path: Path) -> None:
    simulate(3000, tmp_path / "log", seed=3)
    log = read_log(tmp_path / "log")
    reported = math.fsum(log["cost_usd"].drop_nulls().to_list())
    found = accounts(log, SIMULATED_CATALOG, by=["tenant", "task", "day"], baseline="aurora-4")
    assert found.total("reported") == log["cost_usd"].count() and found.frame.height > 50
    assert cents(found.total("cost_nano")) == Decimal(reported).quantize(Decimal("0.01"))
    assert found.total("input_tokens") == log["input_tokens"].sum()
    assert 0 < found.total("compared") <= found.total("reported")
    run = ["usage", "--logs", str(tmp_path / "log"), "--by", "model,day", "--baseline", "aurora-4"]
    text = CliRunner().invoke(main, run)
    assert text.exit_code == 0 and "priced by their tokens" in text.output, text.output
    assert f"together: 3000 calls, {cents(found.total('cost_nano'))} USD" in text.output
    table = CliRunner().invoke(main, [*run, "--csv"])
    rows = list(csv.DictReader(io.StringIO(table.output)))
    assert sum(Decimal(row["cost_usd"]) for row in rows) == Decimal(found.total("cost_nano")) / 10**9
    assert {row["model"] for row in rows} == set(log["model"])
    late = CliRunner().invoke(main, [*run, "--since", f"{log['time'].max():%Y-%m-%dT%H:%M:%S}"])
    assert "together: 1 calls" in late.output, late.output


def test_the_baseline_is_its_prices_for_the_same_tokens() -> None:
    log = _log(
        [
            {"tenant": "a", "input_tokens": 1000, "output_tokens": 100, "cost_usd": 0.002, "model": "pocket-8b"},
            {"tenant": "a", "cost_usd": 0.5},  # of no known length: not compared
            {"tenant": "b", "input_tokens": 1000, "output_tokens": 100, "model": "pocket-8b"},
            {"tenant": "b"},
        ]
    )
    found = accounts(log, SIMULATED_CATALOG, by=["tenant"], baseline="aurora-4")
    a, b = found.frame.to_dicts()
    assert (a["cost_nano"], a["compared"], a["compared_cost_nano"]) == (502_000_000, 1, 2_000_000)
    assert a["baseline_nano"] == b["baseline_nano"] == 1000 * 3000 + 100 * 15000
    assert (b["priced"], b["open"], b["cost_nano"]) == (1, 1, 1100 * 50)
    assert b["savings_nano"] == 4_500_000 - 55_000
    none = accounts(log, SIMULATED_CATALOG)
    assert none.total("compared") == 0 and none.plot().axes[0].get_xlabel() == "USD"
    assert len(found.plot().axes[0].containers) == 2


def test_what_a_cache_answered_costs_and_saves_nothing() -> None:
    called = {"input_tokens": 1000, "output_tokens": 100, "model": "pocket-8b"}
    hit = called | {"status": "cached"}
    log = _log([called, hit, hit | {"model": "nobody knows its price"}])
    found = accounts(log, SIMULATED_CATALOG, baseline="aurora-4")
    assert found.total("cost_nano") == accounts(log.head(1), SIMULATED_CATALOG).total("cost_nano") == 1100 * 50
    assert found.total("savings_nano") == 4_500_000 - 55_000 and found.total("compared") == 3
    assert log.select(cost_column(SIMULATED_CATALOG))["cost_usd"].to_list() == [pytest.approx(55e-6), 0.0, 0.0]


def test_an_unknown_price_is_an_error_and_not_zero() -> None:
    log = _log([{"model": "else", "input_tokens": 5, "output_tokens": 5}])
    with pytest.raises(InputError, match="`router-ml catalog import --model else --out "):
        accounts(log, SIMULATED_CATALOG)
    assert accounts(log.with_columns(cost_usd=pl.lit(0.25)), SIMULATED_CATALOG).total("cost_nano") == 250_000_000
    with pytest.raises(InputError, match="choose of tenant, key"):
        accounts(log, SIMULATED_CATALOG, by=["user"])
    with pytest.raises(InputError, match="the baseline 'else' is not"):
        accounts(log, SIMULATED_CATALOG, baseline="else")


def test_days_are_utc() -> None:
    log = _log([{"cost_usd": 1.0}] * 20)  # from 22:00 on, a call every seven minutes
    days = accounts(log, SIMULATED_CATALOG, by=["day"]).frame
    assert [(str(day), count) for day, count in days.select("day", "calls").iter_rows()] == [
        ("2026-11-25", 18),
        ("2026-11-26", 2),
    ]


def _decision(i: int) -> RouteDecision:
    return RouteDecision(
        decision_id=f"d{i}", model="mid", excluded={}, propensity=1.0, explored=False, meets_threshold=True,
        candidates=(Candidate("mid", 0.9, 0.01 * (i + 1)), Candidate("frontier", 0.9, 0.1)), min_probability=0.5,
        reason="", model_version="v", policy_version="p", reserve_usd=0.5,
    )  # fmt: skip


def test_a_store_settles_from_its_outcomes(store_url: str, catalog: Catalog, tmp_path: Path) -> None:
    with_catalog = {"model_version": "v", "models": catalog.to_json()["models"]}
    store = Store(store_url, spool=tmp_path / "spool").start()
    store.note_change("model", "the start", with_catalog)
    for i in range(4):
        store.record(RouteRequest(messages=(), tenant="a" if i else "b", key="k"), _decision(i), provider="acme")
    reports = [
        Outcome(decision_id="d0", cost_usd=0.02, input_tokens=1000, output_tokens=500),
        Outcome(decision_id="d1", input_tokens=1000, output_tokens=500),
        Outcome(decision_id="d2", cost_usd=0.03, served_model="hosted"),
    ]
    for outcome in reports:
        store.add_outcome(outcome, key="k").result(10)
    assert store.flush()
    rows = spend_frame(spend_rows(open_database(store_url), "frontier"))
    store.close()
    found = accounts(rows, catalog, by=["tenant"], baseline="frontier")
    a, b = found.frame.to_dicts()
    token_price = 1000 * 500 + 500 * 2000  # nano-dollars of mid
    assert (b["calls"], b["cost_nano"], b["baseline_nano"]) == (1, 20_000_000, 1000 * 5000 + 500 * 15000)
    assert (a["calls"], a["reported"], a["priced"], a["open"]) == (3, 1, 1, 1)
    assert a["cost_nano"] == 30_000_000 + token_price
    # Without tokens the baseline is what the router expected of it for that request.
    assert a["baseline_nano"] == 1000 * 5000 + 500 * 15000 + 100_000_000 and a["compared"] == 2
    assert (a["open_expected_nano"], a["open_reserve_nano"]) == (40_000_000, 500_000_000)
    ran = CliRunner().invoke(main, ["usage", "--store", store_url, "--by", "model", "--baseline", "frontier"])
    assert ran.exit_code == 0, ran.output
    assert "hosted: 1 calls, 0.03 USD" in ran.output and "open calls are expected to cost 0.04 USD" in ran.output
    (tmp_path / "catalog.json").write_text(json.dumps(catalog.to_json()))
    both = CliRunner().invoke(main, ["usage", "--store", store_url, "--logs", str(tmp_path)])
    assert both.exit_code == 2 and "give one of the two" in both.output
    lost = CliRunner().invoke(main, ["usage", "--store", str(tmp_path / "none.db")])
    assert lost.exit_code == 2 and "there is no store" in lost.output
