"""A tuned dial keeps its promise, on rows nobody has learnt from; where nothing passes it says what is missing."""

from __future__ import annotations

import json
import re
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner, Result

from features.load import load_router
from router_ml import tune_cli
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.cli import main
from router_ml.conversation import request_of_log_row
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, log_sha256, read_log, write_log
from router_ml.policy import Policy
from router_ml.store import Store
from router_ml.types import ModelCard, Outcome
from training.dataset import build_dataset, split_by_time
from training.dials import KINDS, Seen, sequence
from training.held_out import held_out, held_out_ids
from training.judged import Judged, judged_of
from training.onboard import onboard_bundle
from training.outcomes import Logging
from training.simulate import simulate
from training.train import train
from training.tune import tune, tune_judged
from training.world import SIMULATED_CATALOG

COST = np.array([0.001, 0.004, 0.02])


def population(rng: np.random.Generator, n: int, rate: float = 0.0) -> tuple[Judged, np.ndarray]:
    """Requests of three models whose probabilities the router nearly knows; and the true ones [n, m]."""
    hard = rng.normal(size=(n, 1))
    true = 1 / (1 + np.exp(-(np.array([0.8, 1.6, 2.6]) - 1.5 * hard)))
    p = 1 / (1 + np.exp(-(np.log(true / (1 - true)) + 0.5 * rng.normal(size=(n, 3)))))
    quality = (rng.random((n, 3)) < true).astype(float)
    every = np.ones((n, 3), dtype=bool)
    seen = Seen(
        p, p, np.tile(COST, (n, 1)), every, np.full(n, -1), np.full(n, rate), every, np.zeros(3), Policy()
    )  # fmt: skip
    return Judged(seen, quality, np.full(n, -1), np.ones(n), np.ones(n, dtype=bool), np.arange(n)), true


def drawn(judged: Judged, propensity: np.ndarray, rng: np.random.Generator) -> Judged:
    """The same as a log in which one model a request was drawn with these propensities [n, m]."""
    n = len(judged)
    action = (rng.random((n, 1)) > propensity.cumsum(axis=1)).sum(axis=1).clip(0, 2)
    quality = np.full(judged.quality.shape, np.nan)
    quality[np.arange(n), action] = judged.quality[np.arange(n), action]
    of_action = propensity[np.arange(n), action]
    return replace(judged, quality=quality, action=action, propensity=of_action, full=np.zeros(n, dtype=bool))


def logged(judged: Judged, logging: str, rng: np.random.Generator) -> Judged:
    n = len(judged)
    if logging == "full":
        return judged
    propensity = np.full((n, 3), 1 / 3)
    if logging == "uneven":  # mostly the model that the router thinks best
        propensity = np.full((n, 3), 0.1)
        propensity[np.arange(n), judged.seen.p_ok.argmax(axis=1)] = 0.8
    return drawn(judged, propensity, rng)


@pytest.mark.parametrize(
    ("logging", "rows", "rate"), [("full", 600, 0.0), ("uniform", 1500, 0.0), ("uneven", 1500, 0.1)]
)
def test_the_promise_is_kept_over_many_logs(logging: str, rows: int, rate: float) -> None:
    rng = np.random.default_rng(3)
    pool, true = population(rng, 20_000, rate)
    settings = [s for kind in KINDS for s in sequence(kind)]
    total, at = pool.seen.total, np.arange(len(pool))
    chosen = {s: pool.seen.choices(s, total) for s in settings}
    reached = {s: (1 - rate) * true[at, c].mean() + rate * true.mean() for s, c in chosen.items()}
    least, times, wrong, found_some, cost = 0.74, 120, 0, 0, []
    for _ in range(times):
        of = rng.integers(0, len(pool), rows)
        sample = pool.take(of)
        fresh = (rng.random(sample.quality.shape) < true[of]).astype(float)
        sample = logged(replace(sample, quality=fresh, unit=np.arange(rows)), logging, rng)
        found = tune_judged(sample, min_quality=least, choices={s: c[of] for s, c in chosen.items()})
        assert found.method == ("betting" if logging == "uneven" else "binomial")
        if found.chosen is not None:
            found_some += 1
            wrong += reached[found.chosen] < least
            cost.append(COST[chosen[found.chosen]].mean())
    assert wrong <= 0.07 * times
    assert found_some > 0.8 * times
    assert np.mean(cost) < COST[chosen[settings[0]]].mean(), "cheaper than the safest setting"


def test_what_is_missing_is_said_and_would_do() -> None:
    rng = np.random.default_rng(8)
    pool, true = population(rng, 20_000)
    best = true[np.arange(len(pool)), pool.seen.choices(sequence("min_probability")[0])].mean()
    least = float(best) - 0.03
    sample = logged(pool.take(np.arange(900)), "uniform", rng)
    found = tune_judged(sample, min_quality=least, dials=["min_probability"])
    assert found.chosen is None and found.more_rows is not None
    assert f"some {found.more_rows:,} rows more" in found.why and f"{found.lower[0]:.3f}" in found.why
    n, total = 900 + found.more_rows, pool.seen.total
    chosen = {s: pool.seen.choices(s, total) for s in sequence("min_probability")}
    with_more = []
    for _ in range(12):
        of = rng.integers(0, 20_000, n)
        again = logged(replace(pool.take(of), unit=np.arange(n)), "uniform", rng)
        some = {s: c[of] for s, c in chosen.items()}
        with_more.append(tune_judged(again, min_quality=least, dials=["min_probability"], choices=some).chosen)
    assert sum(c is not None for c in with_more) >= 6
    never = tune_judged(sample, min_quality=0.99)
    assert never.more_rows is None and "no number of rows will do" in never.why
    assert never.to_frame()["chosen"].sum() == 0 and never.plot().axes


def test_a_long_session_is_bounded_and_exploration_is_part_of_the_policy() -> None:
    rng = np.random.default_rng(5)
    pool, _ = population(rng, 3000)
    # Each session is one request thirty times over: as much evidence as one of them.
    again = np.repeat(np.arange(100), 30)
    sessions = replace(pool.take(again), unit=again)
    one = tune_judged(pool.take(np.arange(100)), min_quality=0.6, method="betting")
    many = tune_judged(sessions, min_quality=0.6)
    assert many.method == "betting" and "counts as 20 requests" in " ".join(many.assumptions)
    assert many.lower == pytest.approx(one.lower, abs=1e-3)
    explores = replace(pool, seen=replace(pool.seen, rate=np.full(3000, 0.5)))
    calm, wild = (tune_judged(j, min_quality=0.6, method="betting") for j in (pool, explores))
    rows, eligible = np.arange(3000), pool.quality.mean(axis=1)
    greedy = pool.quality[rows, pool.seen.choices(wild.settings[0])]
    assert wild.quality[0] == pytest.approx((0.5 * greedy + 0.5 * eligible).mean())
    assert calm.quality[0] == pytest.approx(greedy.mean())


def test_requests_of_a_session_fail_together() -> None:
    rng = np.random.default_rng(7)
    pool, true = population(rng, 5000)
    length = rng.integers(1, 9, 5000)  # of the session that begins with each request, which then only repeats it
    first = sequence("min_probability")[0]
    chosen = pool.seen.choices(first)
    least = float(np.average(true[np.arange(5000), chosen], weights=length))
    passed, times = 0, 250
    for _ in range(times):
        of = rng.integers(0, 5000, 150)
        rows = np.repeat(np.arange(150), length[of])
        fresh = (rng.random((150, 3)) < true[of]).astype(float)
        sample = replace(pool.take(of[rows]), quality=fresh[rows], unit=rows)
        choices = dict.fromkeys(sequence("min_probability"), chosen[of[rows]])
        found = tune_judged(sample, min_quality=least, dials=["min_probability"], choices=choices)
        assert found.quality[0] == pytest.approx(fresh[rows, chosen[of[rows]]].mean()), "each request counts the same"
        passed += found.p_value[0] <= 0.05
    assert passed <= times * 0.05 + 2.6 * np.sqrt(times * 0.05 * 0.95)


def test_only_what_was_drawn_counts() -> None:
    rng = np.random.default_rng(6)
    pool, _ = population(rng, 2000)
    half = logged(pool, "uniform", rng)
    fixed = np.arange(2000) < 1000
    mixed = replace(half, propensity=np.where(fixed, 1.0, half.propensity))
    found = tune_judged(mixed, min_quality=0.6)
    assert (found.rows, found.considered) == (1000, 2000)
    assert any("not covered" in line for line in found.assumptions)
    same = tune_judged(half.take(~fixed), min_quality=0.6)
    assert found.p_value.tolist() == same.p_value.tolist()
    assert not any("IN DOUBT" in line for line in found.assumptions)
    wrong = tune_judged(replace(half, propensity=np.full(2000, 0.5)), min_quality=0.6)
    assert "weights average 0.6" in wrong.assumptions[0]
    with pytest.raises(InputError, match="no request of the log was randomised"):
        tune_judged(mixed.take(fixed), min_quality=0.6)
    with pytest.raises(InputError, match="has no propensities"):
        tune_judged(replace(half, propensity=np.full(2000, np.nan)), min_quality=0.6)
    with pytest.raises(InputError, match="weigh the same"):
        tune_judged(logged(pool, "uneven", rng), min_quality=0.6, method="binomial")
    for asked in ({"min_quality": 1.0}, {"min_quality": 0.6, "confidence": 1.0}, {"min_quality": 0.6, "dials": []}):
        with pytest.raises(InputError):
            tune_judged(half, **asked)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tiny_log: pl.DataFrame, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, of which half was held out, and the bundle that was trained on the other half."""
    folder = tmp_path_factory.mktemp("tune")
    write_log([tiny_log], folder / "logs", catalog=catalog)
    train(folder / "logs", catalog, out=folder / "bundle", encoder="lexical", holdout=0.5)
    return folder


def test_what_a_bundle_has_learnt_from_is_left_out(trained: Path, tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    manifest = read_bundle(trained / "bundle").manifest
    data = build_dataset(tiny_log, catalog)
    newest = [data.ids[i] for i in split_by_time(data, 0.5)[1]]
    rows, others, how = held_out(tiny_log, manifest)
    assert sorted(set(rows["request_id"])) == sorted(newest) and "held out" in how
    assert len(rows) + len(others) == len(tiny_log)
    # Another log: later rows alone, no session that began before, no prompt that was there before.
    until = datetime.fromisoformat(manifest["trained_until"])
    assert until < rows["time"].min()
    session = pl.when(pl.col("request_id").is_in(["r0", newest[0]])).then(pl.lit("long"))
    first_prompt = tiny_log["prompt"][0]
    longer = tiny_log.with_columns(
        session=session,
        prompt=pl.when(pl.col("request_id") == newest[1]).then(pl.lit(first_prompt)).otherwise("prompt"),
    )
    again, _, how = held_out(longer, manifest)
    assert sorted(set(again["request_id"])) == sorted(set(newest[2:])) and "training ended" in how
    since = until + timedelta(minutes=30, seconds=1)
    later, _, _ = held_out(longer, manifest, since=since.replace(tzinfo=None))
    assert later["time"].min() > since
    unknown = {name: value for name, value in manifest.items() if name != "trained_until"}
    with pytest.raises(InputError, match="--since"):
        held_out(longer, unknown)
    assert len(held_out(longer, unknown, since=until)[0]) == len(again)
    with pytest.raises(InputError, match="no row"):
        held_out(longer, manifest, since=until + timedelta(days=900))
    with pytest.raises(InputError, match="holdout 0"):
        held_out(tiny_log, {**manifest, "holdout": 0.0})


def test_what_a_bundle_was_onboarded_with_is_left_out(trained: Path, tiny_log: pl.DataFrame, tmp_path: Path) -> None:
    later = tiny_log.with_columns(
        pl.col("time") + timedelta(days=900),
        pl.col("request_id").str.replace("^", "later "),
        prompt=pl.format("{} {}", "prompt", "request_id"),
        model=pl.when(pl.col("model") == "local").then(pl.lit("newcomer")).otherwise("model"),
    )
    # Of the log's first half the newcomer's rows are learnt from; of the second half there is none.
    half = later["time"].sort()[len(later) // 2]
    rows = later.filter((pl.col("model") != "newcomer") | (pl.col("time") <= half))
    card = ModelCard(
        id="newcomer", provider="acme", tier="mid-closed", input_usd_per_mtok=0.4, output_usd_per_mtok=1.6,
        context_window=64_000,
    )  # fmt: skip
    onboard_bundle(trained / "bundle", card, out=tmp_path / "wider", logs=rows)
    manifest = read_bundle(tmp_path / "wider").manifest
    newest = rows.filter(pl.col("model") == "newcomer")["time"].max()
    assert isinstance(newest, datetime) and manifest["trained_until"] == newest.isoformat()
    assert manifest["onboarded"][0]["until"] == newest.isoformat()
    fresh, others, _ = held_out(rows, manifest)
    assert fresh["time"].min() > newest and len(fresh) + len(others) == len(rows)
    with pytest.raises(InputError, match="no row"):
        held_out(rows.filter(pl.col("time") <= newest), manifest)
    # The training log's held-out requests are as new as ever: these rows are not among what was onboarded with.
    was = held_out(tiny_log, read_bundle(trained / "bundle").manifest)[0]
    assert held_out(tiny_log, manifest)[0].equals(was)

    # A bundle of before, whose entry has no time: its own log tells, of another one it cannot be known.
    old = read_bundle(trained / "bundle").manifest | {"onboarded": [dict(manifest["onboarded"][0])]}
    del old["onboarded"][0]["until"]
    assert held_out(rows, old)[0].equals(fresh)
    other = rows.with_columns(latency_ms=pl.lit(1.0))
    with pytest.raises(InputError, match=r"until when newcomer was onboarded.*--since"):
        held_out(other, old)
    assert held_out(other, old, since=newest)[0]["request_id"].equals(fresh["request_id"])
    unasked = old | {"onboarded": [{**old["onboarded"][0], "log_sha256": None}]}
    assert held_out(other, unasked)[0]["time"].min() < newest, "from a sibling alone no row was learnt from"


def test_onboarded_onto_its_own_training_log(trained: Path, tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    """Rows of a model that training did not list: they do not move the cut, and what was onboarded with is old."""
    listed = catalog.subset([model for model in catalog.ids if model != "local"])
    began = tiny_log["time"].min()
    alone = [f"r{i}" for i in range(100, 160)]  # requests that only the unlisted model answered
    log = tiny_log.filter(~pl.col("request_id").is_in(alone) | (pl.col("model") == "local"))
    manifest = {"log_sha256": log_sha256(log), "holdout": 0.5, "catalog": catalog.to_json()}
    data = build_dataset(log, listed)
    ids = [data.ids[i] for i in split_by_time(data, 0.5)[1]]
    middle = log.filter(pl.col("request_id").is_in(ids))["time"].sort()
    end = middle[len(middle) // 2]
    entry = {"model": "local", "log_sha256": "ab" * 32, "until": end.isoformat()}
    rows = held_out(log, manifest | {"onboarded": [entry]})[0]
    newer = log.filter(pl.col("request_id").is_in(ids) & (pl.col("time") > end))
    assert set(rows["request_id"]) == set(newer["request_id"])
    before = entry | {"until": began.isoformat()}  # type: ignore[union-attr]
    assert set(held_out(log, manifest | {"onboarded": [before]})[0]["request_id"]) == set(ids)


@pytest.mark.parametrize("logging", ["full", "uniform"])
@pytest.mark.parametrize("holdout", [0.05, 0.2, 0.5])
def test_the_held_out_ids_are_those_of_training(logging: Logging, holdout: float, tmp_path: Path) -> None:
    simulate(900, tmp_path / "logs", seed=3, logging=logging)
    rng = np.random.default_rng(5)
    log = read_log(tmp_path / "logs")
    which = pl.Series(rng.integers(0, 10, len(log)))
    gone = which == 0  # no text; others without a session, with another's text, or as messages
    log = log.with_columns(
        prompt=pl.when(gone).then(None).when(which == 1).then(pl.col("prompt").shift(40)).otherwise("prompt"),
        messages=pl.when(which == 2)
        .then(pl.lit('[{"role": "user", "content": "Hello"}]'))
        .otherwise(pl.when(gone).then(None).otherwise("messages")),
        session=pl.when(which == 3).then(None).when(which == 4).then(pl.lit("long")).otherwise("session"),
    )
    cards = SIMULATED_CATALOG.subset(SIMULATED_CATALOG.ids[1:])  # rows of the first cannot be learnt from
    data = build_dataset(log, cards)
    expected = [data.ids[i] for i in split_by_time(data, holdout)[1]]
    assert held_out_ids(log, cards.ids, holdout).to_list() == expected and expected
    assert log["session"].n_unique() < len(log)


def test_a_log_says_what_became_of_requests(trained: Path, tiny_log: pl.DataFrame, catalog: Catalog) -> None:
    router = load_router(trained / "bundle")
    rows = tiny_log.head(5 * 4).with_columns(at=pl.int_range(pl.len()))
    # r0 full; r1 one drawn; r2 fell back from hosted; r3 failed for good; r4 sent to two of four models.
    keep = pl.col("at").is_in([0, 1, 2, 3, 5, 10, 13, 16, 17])
    at = pl.col("at")
    rows = rows.filter(keep).with_columns(
        propensity=pl.when(at.is_in([5, 10, 13])).then(0.25).otherwise(1.0),
        fallback_from=pl.when(at == 10).then(pl.lit("local")),
        status=pl.when(at == 13).then(pl.lit("timeout")).otherwise("status"),
        quality=pl.when(at == 13).then(None).otherwise("quality"),
    )
    judged = judged_of(router, rows.drop("at"))
    index = router.catalog.index
    assert judged.full.tolist() == [True, False, False, False, False]
    assert judged.randomised.tolist() == [True, True, True, True, False]
    assert judged.action[1:4].tolist() == [index["mid"], index["local"], index["mid"]]
    assert judged.quality[3, index["mid"]] == 0.0, "a call that failed is no good answer"
    assert not np.isnan(judged.quality[0]).any() and judged.told.all()


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_the_command_tunes_on_the_held_out_rows(trained: Path, tmp_path: Path) -> None:
    out, plot = tmp_path / "new" / "tuned.json", tmp_path / "new" / "tuned.png"
    base = ("tune", "--bundle", trained / "bundle", "--logs", trained / "logs")
    done = run(*base, "--min-quality", "0.75", "--json", out, "--plot", plot)
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    dial = found["chosen"]
    assert done.stdout.startswith(
        f"{dial['kind']} = {dial['value']:g}: mean quality of at least 0.75 with 95% confidence"
    )
    assert found["rows"] == found["considered"] == 120 and found["method"] == "binomial"
    (chosen,) = (s for s in found["settings"] if s["chosen"])
    assert chosen["lower"] >= 0.75 and chosen["certified"] and chosen["cost_usd"] < found["settings"][0]["cost_usd"]
    for words in ("held out", "sent to every model", "later traffic", "fixed before", "weighs more than 1"):
        assert words in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG") and sorted(p.name for p in out.parent.iterdir()) == [
        "tuned.json",
        "tuned.png",
    ]
    alone = run(*base, "--min-quality", "0.75", "--dial", "min-probability", "--json", out)
    assert alone.exit_code == 0 and {s["dial"] for s in json.loads(out.read_text())["settings"]} == {"min_probability"}
    none = run(*base, "--min-quality", "0.995")
    assert none.exit_code == 1 and "no setting is shown to reach 0.995" in none.stdout
    for wrong in (
        (*base[:3], "--min-quality", "0.8"),
        (*base, "--store", "x.db", "--min-quality", "0.8"),
        (*base, "--min-quality", "2"),
    ):
        refused = run(*wrong)
        assert refused.exit_code == 2 and refused.stderr.startswith("router-ml: "), refused.output


def test_a_store_without_prompts_tunes_the_bundle_that_served(
    trained: Path, tiny_log: pl.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = load_router(trained / "bundle", Policy(exploration_rate=1.0))
    qualities = {(r, m): q for r, m, q in tiny_log.select("request_id", "model", "quality").iter_rows()}
    prompts = tiny_log.unique("request_id", maintain_order=True)
    with closing(Store(f"{tmp_path}/store.db").start()) as store:
        for _ in range(3):
            for name, prompt in prompts.select("request_id", "prompt").iter_rows():
                request = request_of_log_row(prompt, None)
                decision = router.decide(request)
                assert store.record(request, decision, provider="p")
                store.add_outcome(
                    Outcome(decision_id=decision.decision_id, quality=qualities[name, decision.model])
                ).result(10)
        assert store.flush()
    done = run(
        "tune",
        "--bundle",
        trained / "bundle",
        "--store",
        tmp_path / "store.db",
        "--min-quality",
        "0.7",
        "--json",
        tmp_path / "t.json",
    )
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "t.json").read_text())
    assert found["rows"] == 720 and found["max_weight"] == pytest.approx(4.0) and "by chance" in done.stdout
    log = pl.DataFrame(list(Store(f"{tmp_path}/store.db").iter_log_rows()), schema=LOG_SCHEMA)
    monkeypatch.setattr(tune_cli, "_CHUNK", 100)
    newest = log["time"].max()
    assert isinstance(newest, datetime)
    assert tune_cli.log_rows(None, f"{tmp_path}/store.db").equals(log), "the earlier rows tell what is old"
    assert log["prompt"].null_count() == len(log)
    with pytest.raises(InputError, match="prompt"):
        tune(router, log, {"trained_until": "2020-01-01T00:00:00+00:00"}, min_quality=0.7)
    other = run("tune", "--bundle", trained / "bundle", "--store", tmp_path / "none.db", "--min-quality", "0.7")
    assert other.exit_code == 2 and re.search("no store at", other.stderr)
