"""The trade-off of the dial: its values are the log's, its shares the router's, and it says nothing where it cannot."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from conftest import Contest

from features.load import load_router
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.policy import Dial, Policy
from router_ml.router import Router
from training.candidates import first_named
from training.held_out import held_out
from training.logged import decided, one_row_a_request
from training.simulate import true_quality
from training.tradeoff import TradeOff, tradeoff
from training.tradeoff_levels import oracle_of

POLICY = Policy(
    tiers={"low": 0.4, "standard": 0.7, "best": Dial(0.5, objective="quality", max_cost_usd=0.01)},
    exploration_rate=0.03,
)
MADE = datetime(2026, 11, 26, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def router(contest: Contest) -> Router:
    return load_router(contest.challenger, POLICY)


@pytest.fixture(scope="module")
def found(contest: Contest, router: Router) -> TradeOff:
    manifest = read_bundle(contest.challenger).manifest
    return tradeoff(router, contest.log, manifest, settings=(0.0, 0.9), keep_prompts=True, made=MADE)


def test_settings_are_those_asked_for_and_the_tiers(found: TradeOff) -> None:
    assert found.settings == (0.0, 0.4, 0.5, 0.7, 0.9)
    low, standard, best = found.tiers
    assert (low.today, standard.today, best.today) == (1, 3, None)
    assert best.changes == () and best.why is not None and "most probable" in best.why
    assert [s.by for s in found.scopes][:2] == ["all", "task"] and "does not tell" in low.rows


def test_values_agree_with_the_truth_and_shares_with_the_router(
    contest: Contest, router: Router, found: TradeOff
) -> None:
    rows = one_row_a_request(held_out(contest.log, read_bundle(contest.challenger).manifest)[0])
    assert found.scopes[0].n == len(rows) == found.source["judged"]
    first = first_named(contest.log)
    true = true_quality(contest.folder / "logs", rows["request_id"])
    p = true.select(f"p/{model}" for model in found.models).to_numpy()
    for at, setting in enumerate(found.settings):
        target = decided(router, rows, router.catalog, first, min_probability=setting).target
        level = found.scopes[0].settings[at]
        assert list(level.shares) == pytest.approx(list(target.mean(axis=0)))
        value = level.values["quality"]
        truth = float((target * p).sum(axis=1).mean())
        # A call that fails for good earns nothing, which the truth of an answer leaves out; 3 % of the calls do.
        assert value is not None and value[1] - 0.03 <= truth <= value[2] + 0.03, setting
    costs = [level.values["cost_usd"] for level in found.scopes[0].settings]
    assert costs[0] is not None and costs[-1] is not None and costs[0][2] < costs[-1][1]
    latency = found.scopes[0].settings[0].values["latency_ms"]
    assert latency is not None and 0 < latency[1] < latency[0] < latency[2]


def test_today_changes_nothing_and_the_cheapest_setting_asks(found: TradeOff) -> None:
    standard = found.tiers[1]
    same = standard.changes[3]
    assert same.quality == (0.0, 0.0, 0.0) and same.changed == 0.0 and not same.moves and not same.weaker
    cheap = standard.changes[0]
    assert cheap.quality is not None and cheap.quality[2] < 0.0
    assert any(line.startswith("quality changes by -") for line in cheap.weaker)
    assert cheap.cost_usd is not None and cheap.cost_usd[2] < 0.0
    moved = sum(move["n"] for move in cheap.moves)
    assert 0 < moved <= round(cheap.changed * found.scopes[0].n)
    assert {"task", "tenant", "language", "length"} <= {row["by"] for row in cheap.slices}
    assert all(row["n"] >= 50 for row in cheap.slices)
    for example in cheap.examples:
        assert example["from"] != example["to"] and found.examples[example["example"]]["text"]
    assert cheap.examples


def test_how_sure_the_difference_of_two_settings_is(found: TradeOff) -> None:
    """As the interval of the change itself says it, where the one of the two is today's."""
    standard = found.tiers[1]
    pairs = list(combinations(range(len(found.settings)), 2))
    errors = dict(zip(pairs, standard.apart["quality"], strict=True))
    for at in (0, 4):
        change = standard.changes[at].quality
        assert change is not None
        wide = (change[2] - change[1]) / 2
        assert errors[tuple(sorted((at, 3)))] == pytest.approx(wide / 1.96, rel=0.2)
    assert errors[0, 4] > 0.8 * errors[0, 3], "further apart, less sure"
    slices = {(s["by"], s["name"]) for s in standard.changes[0].slices}
    assert {(by, name) for by, of in standard.apart["slices"].items() for name in of} == slices
    assert all(len(of) == len(pairs) for names in standard.apart["slices"].values() for of in names.values())
    assert found.to_json()["gate"] == {"quality": 0.02, "slice": 0.1, "slice_rows": 500}
    assert found.tiers[2].apart == {}


def test_a_log_that_knows_tiers_judges_each_on_its_own(contest: Contest, router: Router) -> None:
    names = np.resize(["low", "standard", "standard"], len(contest.log))
    log = contest.log.with_columns(pl.Series("tier", names))
    manifest = {**read_bundle(contest.challenger).manifest, "log_sha256": None}
    with pytest.raises(InputError):
        tradeoff(router, log, manifest | {"trained_until": None}, settings=(0.5,))
    since = contest.log["time"][3000]
    told = tradeoff(router, log, manifest | {"trained_until": None}, settings=(0.5,), since=since)
    scopes = {(s.by, s.name): s for s in told.scopes}
    low = told.tiers[0]
    assert told.scopes[low.scope].name == "low" and "of this tier" in low.rows
    assert scopes["tier", "low"].n + scopes["tier", "standard"].n == scopes["all", ""].n
    assert scopes["tier", "standard"].n > 1.5 * scopes["tier", "low"].n
    assert not told.examples


def test_what_was_never_drawn_is_not_identifiable(contest: Contest, router: Router) -> None:
    one = contest.log.tail(2000).filter(pl.col("model") == contest.log["model"][-1]).with_columns(propensity=1.0)
    manifest = {**read_bundle(contest.challenger).manifest, "log_sha256": None, "trained_until": None}
    told = tradeoff(router, one, manifest, settings=(0.95,), since=one["time"][0])
    cheap = told.scopes[0].settings[0]
    assert cheap.values["quality"] is None and "not identifiable" in cheap.why["quality"]
    assert told.tiers[1].changes[0].quality is None
    assert told.tiers[1].changes[0].weaker[0].startswith("quality: not identifiable")
    assert told.to_frame().filter(policy="dial")["quality"].null_count() > 0
    json.dumps(told.to_json(), allow_nan=False)


def test_the_oracle_is_known_where_all_outcomes_are(tiny_log: pl.DataFrame, catalog: Catalog, contest: Contest) -> None:
    log = tiny_log.with_columns(cost_usd=pl.col("output_tokens") / 1e4)
    ids = log["request_id"].unique()
    value, why = oracle_of(log, catalog.ids)(ids)
    by = log.group_by("request_id").agg(
        best=pl.col("quality").max(),
        cost=pl.col("cost_usd").filter(pl.col("quality") == pl.col("quality").max()).min(),
    )
    assert why is None and value == (pytest.approx(by["best"].mean()), pytest.approx(by["cost"].mean()))
    nothing, said = oracle_of(contest.log, contest.log["model"].unique().to_list())(contest.log["request_id"])
    assert nothing is None and said is not None and "not identifiable" in said


def test_frame_plot_and_file(found: TradeOff, tmp_path: Path) -> None:
    frame = found.to_frame().filter(by="all")
    assert frame.filter(policy="dial")["min_probability"].to_list() == list(found.settings)
    assert set(frame.filter(policy="always")["model"]) == set(found.models)
    tiers = {row["tier"]: row for row in found.tiers_frame().iter_rows(named=True)}
    standard = found.to_frame().filter(by="all", policy="dial", min_probability=0.7).row(0, named=True)
    for name in ("min_probability", "quality", "quality_low", "quality_high", "cost_usd", "cost_usd_high"):
        assert tiers["standard"][name] == standard[name]
    assert tiers["best"]["quality"] is None and "most probable" in tiers["best"]["why"]
    found.plot().savefig(tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    found.write(tmp_path / "new" / "tradeoff.json")
    read = json.loads((tmp_path / "new" / "tradeoff.json").read_text())
    assert (read["format"], read["made"], read["settings"]) == (1, "2026-11-26T12:00:00+00:00", list(found.settings))
    assert read["requests_a_month"] == pytest.approx(found.requests_a_month, rel=1e-5)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tradeoff.json"]


def test_the_command_writes_the_file(contest: Contest, tmp_path: Path) -> None:
    out = tmp_path / "tradeoff.json"
    options = ["--bundle", str(contest.challenger), "--logs", str(contest.folder / "logs"), "--out", str(out)]
    done = CliRunner().invoke(main, ["tradeoff", *options, "--setting", "0.6", "--most-rows", "500"])
    assert done.exit_code == 0, done.output
    assert "4 settings for bundle" in done.output and "newest 500 were taken" in done.output
    read = json.loads(out.read_text())
    assert read["source"]["judged"] == 500 and read["examples"] == []
