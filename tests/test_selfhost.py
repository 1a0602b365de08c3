"""The economics of GPUs of one's own: sizing, effective prices, break-even; the worked case and its bursty twin."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.errors import InputError
from router_ml.prices import Usage, price_call
from router_ml.selfhost import Deployment, against, by_volume, host
from router_ml.traffic_shape import MONTH_HOURS, Traffic, busy_week
from router_ml.types import LongContext, ModelCard, Tier

# The case of docs/architecture.md, "Self-hosting": 30 million documents a month of 1,000 tokens in and 140 out.
DOCUMENTS = (30e6, 1000.0, 140.0)
CLUSTER = Deployment(
    gpus_per_replica=2,
    usd_per_gpu_hour=2.5,
    input_tokens_per_second=12_000,
    output_tokens_per_second=3_000,
    min_replicas=2,
    ops_usd_per_month=1_400,
    existing_replicas=2,
    usd_per_existing_gpu_hour=1.2,
)


def card(model: str, tier: Tier, into: float, out: float) -> ModelCard:
    prices = {"input_usd_per_mtok": into, "output_usd_per_mtok": out}
    return ModelCard(id=model, provider="acme", tier=tier, context_window=8192, **prices)


CLOSED, HOSTED = card("closed", "frontier-closed", 1.25, 10.0), card("hosted", "hosted-open", 0.2, 0.7)


def test_the_case_of_the_trade_press() -> None:
    hosting = host(CLUSTER, Traffic.of_week(*DOCUMENTS))
    closed, hosted = against(hosting, CLOSED), against(hosting, HOSTED)
    assert closed.usd_per_month == pytest.approx(80_000, rel=0.01)
    assert hosted.usd_per_month == pytest.approx(9_000, rel=0.01)
    assert hosting.usd_per_month == pytest.approx(4_000, rel=0.01)
    assert closed.pays and hosted.pays
    assert hosting.replicas.max() == 2 and hosting.busy.max() == pytest.approx(1.484, abs=1e-3)
    volume = hosting.traffic.mtok_per_month
    assert closed.break_even_mtok is not None and hosted.break_even_mtok is not None
    assert closed.break_even_mtok < hosted.break_even_mtok < volume == pytest.approx(34_200)


def test_the_same_in_bursts_speaks_against_it() -> None:
    """All documents in ten hours a week: 24.93 replicas' work at the peak, 32 replicas; the cluster has two."""
    hosting = host(CLUSTER, Traffic.of_week(*DOCUMENTS, busy_week(10)))
    assert hosting.replicas.max() == 32 and hosting.utilisation < 0.1
    closed, hosted = against(hosting, CLOSED), against(hosting, HOSTED)
    assert closed.usd_per_month == pytest.approx(80_000, rel=0.01)
    assert hosting.usd_per_month > closed.usd_per_month > hosted.usd_per_month
    assert not closed.pays and not hosted.pays and hosted.break_even_mtok is None
    assert closed.until_mtok is not None and closed.until_mtok < hosting.traffic.mtok_per_month
    # Only GPUs that can be had for the hour, a quarter of an hour before it, would help, if documents may queue.
    hourly = replace(CLUSTER, autoscaling=True)
    assert host(hourly, hosting.traffic).usd_per_month == pytest.approx(hosted.usd_per_month, rel=1e-3)
    assert host(replace(hourly, max_utilisation=1.0), hosting.traffic).usd_per_month < 0.82 * hosted.usd_per_month


def test_a_cluster_that_has_no_room_for_the_peak_passes_the_rest_on() -> None:
    full = replace(CLUSTER, max_replicas=2)
    hosting = host(full, Traffic.of_week(*DOCUMENTS, busy_week(10)))
    assert hosting.overflow == pytest.approx(1 - 2 * 0.8 / 24.93, abs=1e-3)
    hosted = against(hosting, HOSTED)
    assert hosted.self_usd_per_month == pytest.approx(hosting.usd_per_month + hosting.overflow * hosted.usd_per_month)


traffics = st.builds(
    lambda into, out, peak: Traffic(np.array(into), np.array([*out, *[1.0] * len(into)][: len(into)]), peak),
    st.lists(st.floats(1.0, 1e9), min_size=1, max_size=50),
    st.lists(st.floats(0.0, 1e8), max_size=50),
    st.floats(1.0, 5.0),
)
deployments = st.builds(
    lambda usd, least, ops, scaling, existing: Deployment(
        gpus_per_replica=1.5, usd_per_gpu_hour=usd, input_tokens_per_second=9e3, output_tokens_per_second=2e3,
        min_replicas=least, ops_usd_per_month=ops, autoscaling=scaling, existing_replicas=existing,
        usd_per_existing_gpu_hour=usd / 2,
    ),
    st.floats(0.1, 10.0), st.integers(0, 4), st.floats(0.0, 1e4), st.booleans(), st.integers(0, 3),
)  # fmt: skip


@given(deployments, traffics)
def test_the_effective_prices_cost_exactly_what_the_deployment_does(of: Deployment, traffic: Traffic) -> None:
    hosting = host(of, traffic)
    by_token = traffic.usd_per_month(hosting.input_usd_per_mtok, hosting.output_usd_per_mtok)
    assert by_token == pytest.approx(hosting.usd_per_month, rel=1e-9)
    assert hosting.overflow == pytest.approx(0.0, abs=1e-9) and 0.0 < hosting.utilisation <= 1.0 + 1e-9
    work = traffic.input_tokens / (3600 * 9e3) + traffic.output_tokens / (3600 * 2e3)
    assert (hosting.replicas >= work * traffic.peak_to_mean - 1e-6).all() and hosting.replicas.min() >= of.min_replicas
    if of.existing_replicas == 0:
        rented = hosting.replicas.sum() * 1.5 * of.usd_per_gpu_hour * MONTH_HOURS / len(work)
        assert hosting.gpu_usd >= rented * (1 - 1e-9)
        if not of.autoscaling:
            assert hosting.gpu_usd == pytest.approx(rented) and len(set(hosting.replicas)) == 1


@given(traffics)
def test_the_flatter_traffic_is_never_dearer(traffic: Traffic) -> None:
    of = replace(CLUSTER, existing_replicas=0)
    flat = Traffic(*(np.full(len(t), t.mean()) for t in (traffic.input_tokens, traffic.output_tokens)))
    assert host(of, flat).usd_per_month <= host(of, traffic).usd_per_month * (1 + 1e-9)


def test_the_break_even_is_where_the_costs_meet() -> None:
    of = replace(CLUSTER, existing_replicas=0, autoscaling=True)
    traffic = Traffic.of_week(*DOCUMENTS)
    found = against(host(of, traffic), CLOSED).break_even_mtok
    assert found is not None
    for factor, pays in ((1.02, True), (0.97, False)):
        scale = found * factor / traffic.mtok_per_month
        there = host(of, Traffic(traffic.input_tokens * scale, traffic.output_tokens * scale))
        assert against(there, CLOSED).pays == pays


def test_costs_by_volume_are_those_of_the_traffic_at_that_volume() -> None:
    of = replace(CLUSTER, existing_replicas=0, autoscaling=True)
    traffic = Traffic.of_week(*DOCUMENTS)
    hosting = host(of, traffic)
    found = by_volume(hosting, [CLOSED], scales=[0.1, 1.0, 7.0])
    for row, scale in zip(found.to_frame().iter_rows(named=True), (0.1, 1.0, 7.0), strict=True):
        there = host(of, Traffic(traffic.input_tokens * scale, traffic.output_tokens * scale))
        assert row["self_hosted"] == pytest.approx(there.usd_per_month)
        assert row["mtok_per_month"] == pytest.approx(traffic.mtok_per_month * scale)
        assert row[CLOSED.id] == pytest.approx(against(there, CLOSED).usd_per_month)
    (row,) = found.against_frame().iter_rows(named=True)
    assert row["break_even_mtok"] == against(hosting, CLOSED).break_even_mtok and row["pays"] is True
    lines = by_volume(hosting, [CLOSED]).plot().axes[0].lines
    own, other = lines[0].get_ydata(), lines[1].get_ydata()
    assert own[0] > other[0] and own[-1] < other[-1], "the lines cross"


def test_redundancy_and_idle_hours_are_paid_for() -> None:
    tiny, of = Traffic.of_week(1e5, 500, 100), replace(CLUSTER, existing_replicas=0, min_replicas=2)
    hosting = host(of, tiny)
    assert hosting.gpu_usd == pytest.approx(2 * 2 * 2.5 * MONTH_HOURS)
    assert host(replace(of, min_replicas=1), tiny).gpu_usd == pytest.approx(hosting.gpu_usd / 2)
    assert hosting.utilisation < 0.01


def test_a_logs_own_hours(tmp_path: Path) -> None:
    start = datetime(2026, 1, 5, tzinfo=UTC)
    rows = [
        {"request_id": f"{day}-{i}", "time": start + timedelta(days=day, hours=10, minutes=i), "input_tokens": 100,
         "output_tokens": 10 if i else None, "model": "m"}
        for day in range(3) for i in range(6)
    ]  # fmt: skip
    rows.append(rows[0] | {"request_id": "hit", "status": "cached"})  # no model was called
    rows.append(rows[0] | {"model": "other"})  # sent to a second model: the same request
    log = pl.DataFrame(rows, schema_overrides={"output_tokens": pl.Int64, "status": pl.String})
    traffic = Traffic.of_log(log)
    assert len(traffic.input_tokens) == 49  # from Monday ten o'clock to Wednesday, the hours between them empty
    assert traffic.input_tokens[[0, 24, 48]].tolist() == [600.0] * 3 and traffic.input_tokens.sum() == 1800.0
    assert traffic.output_tokens.sum() == 18 * 10.0 and "tokens known of 83%" in traffic.note
    half = Traffic.of_log(log, scale=2.0)
    assert half.input_tokens[[0, 24, 48]] == pytest.approx(1200.0, rel=0.05)
    assert half.input_tokens.sum() == pytest.approx(3600.0)
    with pytest.raises(InputError, match="1 hours"):
        Traffic.of_log(log.head(6))
    with pytest.raises(InputError, match="no input_tokens"):
        Traffic.of_log(log.with_columns(pl.lit(None, pl.Int64).alias("input_tokens")))


HOURS, FIRST = 24 * 28, 490_000
ONE = Deployment(
    gpus_per_replica=1, usd_per_gpu_hour=2.0, input_tokens_per_second=2000, output_tokens_per_second=500, min_replicas=1
)


def drawn(shape: np.ndarray, an_hour: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, tokens) of independent requests, so many in a mean hour of a shape of the mean 1."""
    rng = np.random.default_rng(seed)
    hour = np.repeat(np.arange(HOURS), rng.poisson(an_hour * shape))
    seconds = (FIRST + hour) * 3600.0 + rng.random(len(hour)) * 3600.0
    return seconds, np.stack([rng.gamma(2.0, 500.0, len(hour)), rng.gamma(2.0, 100.0, len(hour))], axis=1)


@pytest.mark.parametrize("shape", ["flat", "day", "burst"])
def test_a_samples_chance_peaks_are_not_paid_for_and_true_ones_are(shape: str) -> None:
    """Ten requests an hour are logged of ten thousand; their hours alone have peaks of twice the mean and more."""
    at = np.arange(HOURS)
    day, burst = 1 + 0.8 * np.sin(at / 24 * 2 * np.pi), 168.0 * (at % 168 == 3)
    true = {"flat": np.ones(HOURS), "day": day, "burst": burst}[shape]
    whole = host(ONE, Traffic(10_000 * 1000 * true, 10_000 * 200 * true))
    for seed in range(3):
        seconds, tokens = drawn(true, 10, seed)
        found = host(ONE, Traffic.of_requests(seconds, tokens, FIRST, HOURS, scale=1000.0))
        assert found.replicas.max() == pytest.approx(whole.replicas.max(), rel=0.26)
        raw = np.bincount((seconds // 3600).astype(int) - FIRST, tokens[:, 1], HOURS)
        assert found.traffic.output_tokens.sum() == pytest.approx(raw.sum() * 1000)
        if shape == "flat":
            assert raw.max() > 2 * raw.mean() and found.replicas.max() <= 5
    note = found.traffic.note
    assert "chance peaks of such a sample taken off" in note and "behind an hour" in note and "--peak-to-mean" in note


def test_bursts_within_the_hour_are_measured_where_the_log_is_whole_and_chance_is_no_burst() -> None:
    rng = np.random.default_rng(4)
    flat, tokens = drawn(np.ones(HOURS), 100, 4)
    assert Traffic.of_requests(flat, tokens, FIRST, HOURS).peak_to_mean == pytest.approx(1.0, abs=0.2)
    bursts = flat // 3600 * 3600 + rng.random(len(flat))  # all of an hour's in its first second
    found = Traffic.of_requests(bursts, tokens, FIRST, HOURS)
    assert found.peak_to_mean == pytest.approx(60.0, rel=0.05) and "59" in found.note
    even, at_once = (host(ONE, replace(found, peak_to_mean=peak)) for peak in (1.0, found.peak_to_mean))
    assert at_once.replicas.max() > 20 * even.busy.max()
    assert Traffic.of_requests(bursts, tokens, FIRST, HOURS, scale=2.0).peak_to_mean == 1.0
    assert Traffic.of_requests(bursts, tokens, FIRST, HOURS, scale=2.0, peak_to_mean=7.0).peak_to_mean == 7.0
    unknown = Traffic.of_requests(bursts // 3600 * 3600, tokens, FIRST, HOURS)
    assert unknown.peak_to_mean == 1.0 and "is assumed" in unknown.note, "whole hours show no minutes"


def test_the_busiest_hour_keeps_room_for_queueing() -> None:
    traffic = Traffic(np.full(24, 0.9 * 3600 * 2000.0), np.zeros(24))
    assert host(ONE, traffic).replicas.max() == 2
    assert host(replace(ONE, max_utilisation=1.0), traffic).replicas.max() == 1
    full = host(replace(ONE, max_replicas=1), traffic)
    assert full.overflow == pytest.approx(1 - 0.8 / 0.9)
    for wrong in (0.0, 1.2):
        with pytest.raises(InputError, match="max_utilisation"):
            replace(ONE, max_utilisation=wrong)


def test_long_calls_are_compared_at_their_own_prices() -> None:
    step = LongContext(above_tokens=1000, input_usd_per_mtok=10.0, output_usd_per_mtok=20.0)
    stepped = replace(CLOSED, long_context=(step,))
    calls = np.array([[1000.0, 100.0], [3000.0, 100.0]])
    traffic = Traffic(np.full(24, 4000.0), np.full(24, 200.0), calls=calls)
    usd = sum(float(price_call(stepped, Usage(input_tokens=int(i), output_tokens=int(o)))) for i, o in calls)
    assert against(host(ONE, traffic), stepped).usd_per_month == pytest.approx(usd * MONTH_HOURS)
    assert against(host(ONE, traffic), CLOSED).usd_per_month < usd * MONTH_HOURS / 2
    for tokens, prices in ((1001, (10.0, 20.0)), (1000, (1.25, 10.0))):
        assert Traffic.of_week(1e6, tokens, 100).prices_of(stepped) == pytest.approx(prices)


def test_the_card_carries_the_effective_price_and_the_capacity() -> None:
    hosting = host(CLUSTER, Traffic.of_week(*DOCUMENTS))
    made = hosting.card(replace(HOSTED, cached_input_usd_per_mtok=0.1))
    assert made.input_usd_per_mtok == pytest.approx(hosting.input_usd_per_mtok, rel=1e-5)
    assert made.cached_input_usd_per_mtok is None and "4,000 USD a month" in str(made.price_source)
    # 2 replicas of 1.484 busy ones at 34,200 million tokens a month
    assert made.max_tokens_per_second == pytest.approx(34_200e6 / (730 * 3600) * 2 / 1.4840, rel=1e-3)
    assert Catalog.from_json(Catalog((made,)).to_json()).cards == (made,)


TOML = """
[deployment]
gpus_per_replica = 2
usd_per_gpu_hour = 2.5
input_tokens_per_second = 12_000
output_tokens_per_second = 3_000
ops_usd_per_month = 1_400
existing_replicas = 2
usd_per_existing_gpu_hour = 1.2

[traffic]
requests_per_month = 30_000_000
input_tokens = 1000
output_tokens = 140
"""


def test_the_command(tmp_path: Path) -> None:
    local = card("local", "self-hosted-open", 9.0, 9.0)
    (tmp_path / "catalog.json").write_text(json.dumps(Catalog((CLOSED, HOSTED, local)).to_json()))
    run = ["selfhost", str(tmp_path / "hosting.toml"), "--catalog", str(tmp_path / "catalog.json")]
    run += ["--against", "closed", "--against", "hosted"]
    (tmp_path / "hosting.toml").write_text(TOML)
    more = ["--model", "local", "--out", str(tmp_path / "new.json"), "--plot", str(tmp_path / "hours.png")]
    ran = CliRunner().invoke(main, [*run, *more])
    assert ran.exit_code == 0, ran.output
    assert "hosting: 4,000 USD a month (2,600 for GPUs), up to 2 replicas" in ran.output
    assert "hosted: 8,940 USD a month against 4,000: hosting pays" in ran.output
    made = Catalog.load(tmp_path / "new.json")
    assert made["local"].output_usd_per_mtok == pytest.approx(0.34188) and made["hosted"] == HOSTED
    assert (tmp_path / "hours.png").stat().st_size > 1000

    (tmp_path / "hosting.toml").write_text(TOML + "busy_hours_per_week = 10\n")
    ran = CliRunner().invoke(main, run)
    assert "hosted: 8,940 USD a month against 111,109: hosting does not pay; it does at no volume" in ran.output
    assert "no burst within an hour is assumed" in ran.output and "may take 80% of a replica" in ran.output
    told = json.loads(CliRunner().invoke(main, [*run, "--json"]).output)
    assert told["peak_to_mean"] == 1.0
    assert "write peak_to_mean into" in CliRunner().invoke(main, [*run, "--peak-to-mean", "2"]).output
    assert [one["pays"] for one in told["against"]] == [False, False] and told["replicas"] == 32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("gpus_per_replica = 2", "gpus = 2"), "unknown setting 'gpus'"),
        (("usd_per_gpu_hour = 2.5\n", ""), "'usd_per_gpu_hour' is missing"),
        (("gpus_per_replica = 2", "gpus_per_replica = -2"), "gpus_per_replica has to be a number above 0"),
        (("existing_replicas = 2", "existing_replicas = 1.5"), "'existing_replicas' has to be of the kind int"),
        (("input_tokens = 1000", "input_tokens = -1"), "have to be numbers of 0 or more"),
        (("output_tokens = 140", "output_tokens = 140\nbusy_hours_per_week = 121"), "has to be 1 to 120"),
        (("output_tokens = 140", "output_tokens = 140\nweights = [1]"), "168 numbers"),
        (("output_tokens = 140", "output_tokens = 140\npeak_to_mean = 0.5"), "peak_to_mean has to be 1 or more"),
        (("requests_per_month = 30_000_000", "requests_per_month = 0"), "without any tokens"),
        (("[traffic]", "[elsewhere]"), "unknown table 'elsewhere'"),
        (("--against", "--against"), ""),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    (tmp_path / "catalog.json").write_text(json.dumps(Catalog((CLOSED,)).to_json()))
    (tmp_path / "hosting.toml").write_text(TOML.replace(*change))
    of: Any = "closed" if says else "nobody"
    run = ["selfhost", str(tmp_path / "hosting.toml"), "--catalog", str(tmp_path / "catalog.json"), "--against", of]
    ran = CliRunner().invoke(main, run)
    assert ran.exit_code == 2 and (says or "has no model 'nobody'") in ran.output
