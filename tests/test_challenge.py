"""Champion against challenger: what the log says agrees with the truth, and says nothing where it cannot."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import Contest

from router_ml import registry
from router_ml.errors import InputError, RegistryError
from router_ml.policy import Policy, Rule
from training.challenge import BEST_SINGLE, CHALLENGER, CHAMPION, CHEAPEST, SHUFFLED, Challenge, Contender, challenge
from training.challenge_plots import calibration_plot
from training.challenge_report import as_html, as_json, as_text, log_report, write_report
from training.changes import changed_for, changed_models
from training.held_out import held_out
from training.logged import Decided, decided, logged_of
from training.promises import calibration_by_model, own_answers, promise_of, residuals
from training.rivals import always_cheapest, always_one, ranked_models, shuffled
from training.simulate import true_quality
from training.tracking import register_bundle


@pytest.fixture(scope="module")
def both(contest: Contest) -> tuple[Contender, Contender]:
    return Contender.load(contest.champion), Contender.load(contest.challenger)


@pytest.fixture(scope="module")
def found(contest: Contest, both: tuple[Contender, Contender]) -> Challenge:
    return challenge(*both, contest.log)


@pytest.fixture(scope="module")
def judged(contest: Contest, both: tuple[Contender, Contender]) -> tuple[pl.DataFrame, Decided, Decided]:
    """The rows that are judged on, and what both would do with them."""
    rows, _, _ = held_out(contest.log, both[1].manifest)
    catalog = both[1].router.catalog
    return rows, decided(both[0].router, rows, catalog), decided(both[1].router, rows, catalog)


def test_the_estimates_agree_with_the_truth(
    contest: Contest, found: Challenge, judged: tuple[pl.DataFrame, Decided, Decided]
) -> None:
    rows, old, new = judged
    true = true_quality(contest.folder / "logs", rows["request_id"])
    p = true.select(f"p/{model}" for model in new.catalog.ids).to_numpy()
    truth = {CHAMPION: old.target, CHALLENGER: new.target, CHEAPEST: always_cheapest(new), SHUFFLED: shuffled(new)}
    values = {name: float((target * p).sum(axis=1).mean()) for name, target in truth.items()}
    for name, value in values.items():
        estimate = found.policies["quality"][name].headline
        # A call that fails for good earns nothing, which the truth of an answer leaves out; 3 % of the calls do.
        assert estimate is not None and estimate.low - 0.03 <= value <= estimate.high + 0.03, name
        assert abs(estimate.value - value) < 5 * estimate.se, name
    change = found.quality.headline
    assert change is not None and change.low <= values[CHALLENGER] - values[CHAMPION] <= change.high
    assert values[CHALLENGER] > values[SHUFFLED] + 0.02, "it knows something of the single request"
    assert values[CHEAPEST] < values[CHAMPION] - 0.05


def test_what_is_judged_is_new_to_both(contest: Contest, found: Challenge, both: tuple[Contender, Contender]) -> None:
    rows, _, _ = held_out(contest.log, both[1].manifest)
    assert found.n == found.considered == len(rows) and 2300 < len(rows) <= 2400
    assert (found.oldest, found.newest) == (rows["time"].min(), rows["time"].max())
    assert "newest 60%" in found.notes[0] and "where training ended" in found.notes[0]
    assert found.champion == both[0].version != found.challenger == both[1].version
    with pytest.raises(InputError, match="holdout 0"):
        challenge(both[1], both[0], contest.log.head(1200))
    later = challenge(*both, contest.log, since=contest.log["time"][3399], most_rows=500)
    assert 590 < later.considered <= 600 and later.n == 500 and later.oldest > contest.log["time"][3399]
    assert later.newest == found.newest and "newest 500 were taken" in later.notes[-1]


def test_a_bundle_against_itself_changes_nothing(contest: Contest, both: tuple[Contender, Contender]) -> None:
    same = challenge(both[1], both[1], contest.log, most_rows=600)
    for value in (same.quality, same.cost_usd):
        assert value.headline is not None and value.headline[:3] == (0.0, 0.0, 0.0)
    assert same.changed == 0.0 and same.changes.is_empty()
    assert (same.who["changed"] == 0.0).all()
    assert all(value.headline is None or value.headline.value == 0.0 for value in same.slices.values.values())


def test_a_cheap_challenger_is_found_out(contest: Contest, both: tuple[Contender, Contender]) -> None:
    cheap = Contender(both[1].router.with_policy(Policy(tiers={"low": 0.0}, default_tier="low")), both[1].manifest)
    worse = challenge(both[0], cheap, contest.log)
    assert worse.quality.headline is not None and worse.quality.headline.high < 0
    assert worse.cost_usd.headline is not None and worse.cost_usd.headline.high < 0
    moved = worse.changes.row(0, named=True)
    assert moved["cost_usd_after"] < moved["cost_usd_before"] and moved["n"] >= 50


def test_rivals(judged: tuple[pl.DataFrame, Decided, Decided], contest: Contest) -> None:
    rows, _, new = judged
    at = np.arange(len(rows))
    cheapest = always_cheapest(new)
    assert (cheapest.sum(axis=1) == 1).all() and not cheapest[~new.eligible].any()
    assert (new.cost_usd[at, cheapest.argmax(axis=1)] == np.where(new.eligible, new.cost_usd, np.inf).min(axis=1)).all()
    dealt = shuffled(new)
    assert dealt.sum(axis=1) == pytest.approx(1.0) and not dealt[~new.eligible].any()
    every = new.eligible.all(axis=1)
    assert dealt[every] == pytest.approx(np.broadcast_to(new.target.mean(axis=0), dealt[every].shape))
    ranking = ranked_models(contest.log.head(1600), new.catalog)
    assert sorted(ranking) == sorted(new.catalog.ids)
    single = always_one(new, ranking)
    first = new.catalog.index[ranking[0]]
    assert (single[new.eligible[:, first], first] == 1).all() and (single.sum(axis=1) == 1).all()
    last = always_one(new, [ranking[-1], *ranking])  # one that is named twice has its first place
    assert (last[:, new.catalog.index[ranking[-1]]] == new.eligible[:, new.catalog.index[ranking[-1]]]).all()


def test_the_ranking_corrects_for_who_got_the_hard_requests(catalog: object) -> None:
    """ "mid" is better on either kind, but got mostly the hard requests."""
    rng, rows = np.random.default_rng(0), []
    for i in range(4000):
        hard = i % 2 == 0
        share = 0.9 if hard else 0.1  # of "mid"
        mid = rng.random() < share
        ok = {True: 0.6, False: 0.95}[hard] if mid else {True: 0.4, False: 0.85}[hard]
        rows.append(("mid" if mid else "local", share if mid else 1 - share, float(rng.random() < ok)))
    log = pl.DataFrame(rows, schema=["model", "propensity", "quality"], orient="row").with_columns(
        fallback_from=pl.lit(None, pl.String), status=pl.lit("ok")
    )
    plain = log.group_by("model").agg(pl.col("quality").mean())
    assert dict(plain.iter_rows())["mid"] < dict(plain.iter_rows())["local"]
    assert ranked_models(log, catalog)[:2] == ["mid", "local"]  # type: ignore[arg-type]


def test_what_changes_for_whom(judged: tuple[pl.DataFrame, Decided, Decided], found: Challenge) -> None:
    rows, old, new = judged
    moved = old.choice != new.choice
    assert found.changed == moved.mean() and found.changes["n"].sum() == moved.sum()
    assert found.changes["share"].sum() == pytest.approx(moved.mean())
    names = np.array(new.catalog.ids)
    first = found.changes.row(0, named=True)
    of = moved & (names[old.choice] == first["from"]) & (names[new.choice] == first["to"])
    assert first["n"] == of.sum() == found.changes["n"].max()
    assert first["cost_usd_before"] == pytest.approx(new.cost_usd[of, old.choice[of]].mean())
    assert first["p_ok_after"] == pytest.approx(new.p_ok[of, new.choice[of]].mean(), rel=1e-6)
    assert found.changes.filter(pl.col("n") < 50)["quality"].null_count() == (found.changes["n"] < 50).sum()
    tenants = found.who.filter(pl.col("by") == "tenant")
    assert tenants["n"].sum() == len(rows)
    assert (tenants["n"] * tenants["changed"]).sum() == pytest.approx(moved.sum())


def test_a_model_that_only_one_knows(judged: tuple[pl.DataFrame, Decided, Decided]) -> None:
    rows, old, new = judged
    logged = logged_of(rows, new.catalog)
    blind = replace(new, cost_usd=np.where(np.arange(len(new.catalog)) == 0, np.nan, new.cost_usd))
    none = replace(new, choice=np.where(np.arange(len(rows)) < 60, -1, new.choice))
    made = changed_models(logged, replace(old, choice=np.zeros_like(old.choice)), blind, {"seed": 0})
    assert made["cost_usd_before"].is_not_null().all(), "what the old router expects stands in"
    assert set(changed_models(logged, new, none, {"seed": 0})["to"]) == {"(no model)"}
    assert changed_for(logged, new, none)["n"].sum() == 2 * len(rows)


def test_promises(judged: tuple[pl.DataFrame, Decided, Decided], found: Challenge) -> None:
    rows, _, new = judged
    logged, own = logged_of(rows, new.catalog), own_answers(rows)
    assert own.sum() == rows.filter(pl.col("quality").is_not_null(), pl.col("fallback_from").is_null()).height
    table = calibration_by_model(logged, new, 0.5, own)
    assert (table["observed"] - table["promised"] - table["residual"]).abs().max() < 1e-9  # type: ignore[operator]
    assert table["n"].sum() == own.sum() < (~np.isnan(logged.metrics["quality"])).sum()
    assert (table["low"] <= table["residual"]).all() and (table["residual"] <= table["high"]).all()
    bold = replace(new, p_ok=np.minimum(new.p_ok + 0.2, 1.0))
    shifted = promise_of(logged, bold, 0.5, own).headline
    honest = promise_of(logged, new, 0.5, own).headline
    assert shifted is not None and honest is not None
    assert shifted.high < -0.05 and honest.low < 0.05 and shifted.value < honest.value - 0.1
    assert found.calibration["contender"].unique().sort().to_list() == [CHALLENGER, CHAMPION]


def test_failures_and_other_models_answers_are_no_part_of_a_promise(
    judged: tuple[pl.DataFrame, Decided, Decided],
) -> None:
    rows, _, new = judged
    nth = pl.int_range(pl.len())
    failing = rows.with_columns(
        quality=pl.when(nth % 4 == 0).then(None).otherwise("quality"),
        status=pl.when(nth % 4 == 0).then(pl.lit("error")).otherwise("status"),
    )
    silent = failing.with_columns(status=pl.col("status").replace("error", "cancelled"))
    promises = [promise_of(logged_of(of, new.catalog), new, 0.5, own_answers(of)).headline for of in (failing, silent)]
    assert promises[0] == promises[1]
    fell = rows.with_columns(fallback_from=pl.when(nth % 4 == 0).then("model").otherwise("fallback_from"))
    off = residuals(logged_of(fell, new.catalog), new, 0.5, own_answers(fell))
    assert np.isnan(off[::4]).all() and (~np.isnan(off)).sum() > 500


def test_the_frontier(found: Challenge) -> None:
    frontier = found.frontier
    of = frontier.filter(pl.col("policy") == CHALLENGER)
    assert of["min_probability"].is_sorted(descending=True) and len(of) == 12
    assert of["cost_usd"][0] > of["cost_usd"][-1] and of["quality"][0] > of["quality"][-1]
    for row in frontier.drop_nulls("quality").iter_rows(named=True):
        assert row["quality_low"] <= row["quality"] <= row["quality_high"]
        assert row["cost_usd_low"] <= row["cost_usd"] <= row["cost_usd_high"]
    assert sorted(frontier["model"].drop_nulls()) == sorted(found.quality.overlap["model"])
    assert found.plot().axes and calibration_plot(found.calibration).axes


def test_a_log_that_never_explored_says_nothing(contest: Contest, both: tuple[Contender, Contender]) -> None:
    mute = challenge(
        *both, contest.log.filter(pl.col("model") == "aurora-4").with_columns(propensity=pl.lit(1.0)),
        since=contest.log["time"][1600], most_rows=300,
    )  # fmt: skip
    assert not mute.quality.identifiable and mute.quality.headline is None
    assert mute.policies["quality"][CHALLENGER].headline is None
    text = as_text(mute)
    assert "not identifiable" in text
    assert "not identifiable" in as_html(mute) and as_json(mute)["quality"]["estimate"] is None
    assert mute.plot().axes


def test_rows_that_cannot_be_judged_are_counted(contest: Contest, both: tuple[Contender, Contender]) -> None:
    nth = pl.int_range(pl.len())
    log = contest.log.with_columns(
        prompt=pl.when(nth % 5 == 0).then(None).otherwise("prompt"),
        messages=pl.when(nth % 5 == 0).then(None).otherwise("messages"),
        propensity=pl.when(nth % 7 == 1).then(1.0).otherwise("propensity"),
    )
    some = challenge(*both, log, since=contest.log["time"][3000])
    notes = " ".join(some.notes)
    assert "no text in the log" in notes and "14% of the requests had no model drawn" in notes
    assert some.n < 0.75 * some.considered and some.quality.identifiable
    with pytest.raises(InputError, match="lack prompts"):
        challenge(
            *both, log.with_columns(prompt=pl.lit(None, pl.String), messages=pl.lit(None, pl.String)),
            since=contest.log["time"][1600],
        )  # fmt: skip


def test_a_model_that_the_log_does_not_know_is_out_of_reach(
    contest: Contest, both: tuple[Contender, Contender]
) -> None:
    """The log's candidates are those of a policy that had no pocket-8b; the challenger sends everything there."""
    gone = "pocket-8b"
    log = contest.log.filter(pl.col("model") != gone, pl.col("fallback_from").fill_null("") != gone).with_columns(
        candidates=pl.col("candidates").list.set_difference([gone])
    )
    rule = Policy(rules=(Rule(model=gone),))
    sends = Contender(both[1].router.with_policy(rule), both[1].manifest)
    found = challenge(both[0], sends, log, since=contest.log["time"][1600], most_rows=300)
    assert not found.quality.identifiable and "could not have made" in found.quality.why
    assert gone in found.changes["to"].to_list()
    # Where the log's policy knew it, its candidates say what excludes it.
    knew = contest.log.with_columns(candidates=pl.col("candidates").list.set_difference([gone]))
    assert gone not in challenge(both[0], sends, knew, since=contest.log["time"][1600], most_rows=300).changes["to"]


def test_a_retired_model_keeps_its_share_of_the_draw(contest: Contest, both: tuple[Contender, Contender]) -> None:
    """Rows that went to a model which neither bundle has stay, so that weights average 1."""
    log = contest.log.with_columns(
        model=pl.col("model").replace("quill-8x7b", "retired"),
        candidates=pl.col("candidates").list.eval(pl.element().replace("quill-8x7b", "retired")),
        fallback_from=pl.col("fallback_from").replace("quill-8x7b", "retired"),
    )
    pinned = [
        Contender(one.router.with_policy(Policy(rules=(Rule(model=model),))), one.manifest)
        for one, model in zip(both, ("summit-pro", "aurora-4"), strict=True)
    ]
    found = challenge(*pinned, log, since=contest.log["time"][1600], most_rows=1500)
    assert found.n == 1500 and "retired" in found.quality.overlap["model"].to_list()
    value = found.policies["quality"][CHALLENGER]
    assert value.identifiable and value.support.mean_weight == pytest.approx(1.0, abs=0.12)


def test_a_canary_by_tenant_is_one_draw_a_tenant(contest: Contest) -> None:
    log = contest.log.head(600).with_columns(cluster=pl.col("tenant"))
    catalog = Contender.load(contest.challenger).router.catalog
    assert len(np.unique(logged_of(log, catalog).cluster)) == log["tenant"].n_unique()
    half = log.with_columns(cluster=pl.when(pl.int_range(pl.len()) < 300).then("cluster"))
    sessions = log["session"].n_unique() + log["session"].null_count()
    groups = len(np.unique(logged_of(half, catalog).cluster))
    assert log["tenant"].n_unique() < groups < sessions
    for _, rows in half.with_columns(group=logged_of(half, catalog).cluster).drop_nulls("session").group_by("session"):
        assert rows["group"].n_unique() == 1


def test_no_other_row_no_best_single(contest: Contest, both: tuple[Contender, Contender]) -> None:
    rows, _, _ = held_out(contest.log, both[1].manifest)
    manifest = dict(both[1].manifest) | {"log_sha256": ""}
    only = challenge(both[0], Contender(both[1].router, manifest), rows.tail(400))
    assert only.best_single is None and BEST_SINGLE not in only.policies["quality"]
    assert "which single model is the best" in only.notes[-1]


def test_names_with_dollars_can_be_drawn(contest: Contest, both: tuple[Contender, Contender]) -> None:
    log = contest.log.with_columns(task=pl.lit("cut$cost_$team"))
    page = as_html(challenge(*both, log, since=contest.log["time"][1600], most_rows=300))
    assert "cut$cost_$team" in page


def test_the_reports(found: Challenge, tmp_path: Path) -> None:
    files = write_report(found, tmp_path / "deep" / "report")
    assert {file.name for file in files} >= {"report.html", "report.json", "frontier.csv", "changes.csv", "slices.csv"}
    assert not list((tmp_path / "deep" / "report").glob(".*"))
    kept = json.loads((tmp_path / "deep" / "report" / "report.json").read_text(), parse_constant=pytest.fail)
    assert kept["quality"]["estimate"]["value"] == found.quality.headline.value  # type: ignore[union-attr]
    assert len(kept["frontier"]) == len(found.frontier)
    page = (tmp_path / "deep" / "report" / "report.html").read_text()
    outside = set(re.findall(r"""(?:href|src)\s*=\s*["']?(?!#)([^"'\s>]+)""", page))
    assert not outside and "<script" not in page and "@import" not in page
    assert page.count("<svg") == 3 and "default-src 'none'" in page
    assert pl.read_csv(tmp_path / "deep" / "report" / "policies.csv").shape == found.to_frame().shape
    text = as_text(found)
    assert f"best single ({found.best_single})" in text and BEST_SINGLE in found.policies["quality"]
    assert f"{found.changed:.1%} of the requests" in text


def test_names_in_the_page_are_escaped(contest: Contest, both: tuple[Contender, Contender]) -> None:
    evil = "<script>alert(1)</script>"
    log = contest.log.with_columns(task=pl.lit(evil))
    page = as_html(challenge(*both, log, since=contest.log["time"][1600], most_rows=300))
    assert evil not in page and "&lt;script&gt;" in page


def test_a_report_is_kept_with_its_version(contest: Contest, found: Challenge, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    version = register_bundle(contest.challenger, tracking_uri=uri, name="router", params={}, metrics={})
    log_report(uri, version, found)
    client = registry.connect(uri)
    assert version.run_id is not None
    kept = {artifact.path for artifact in client.list_artifacts(version.run_id, "evaluation")}
    assert {"evaluation/report.html", "evaluation/report.json"} <= kept
    metrics = client.get_run(version.run_id).data.metrics
    assert metrics["evaluation/quality_change/low"] == found.quality.headline.low  # type: ignore[union-attr]
    assert metrics["evaluation/n"] == found.n
    with pytest.raises(RegistryError, match="no run"):
        log_report(uri, replace(version, run_id=None), found)


def test_an_old_log_has_nothing_new(contest: Contest, both: tuple[Contender, Contender]) -> None:
    with pytest.raises(InputError, match="newer"):
        challenge(*both, contest.log, since=contest.log["time"].max() + timedelta(days=1))  # type: ignore[operator]
