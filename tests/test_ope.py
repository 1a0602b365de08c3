"""Off-policy estimates: exact where that can be worked out, near a known truth, and silent where nobody can tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.logs import LOG_SCHEMA, read_log
from training.estimators import Parts, row_values, switch_threshold
from training.ope import (
    ESTIMATORS,
    Logged,
    evaluate_policy,
    evaluate_slices,
    identifiable_rows,
    logged_of,
)
from training.outcomes import draw_models
from training.simulate import SIMULATED_CATALOG, simulate, true_quality

M = len(SIMULATED_CATALOG)


@dataclass(frozen=True)
class Traffic:
    """A simulated log, what is logged of it, and what its models would really have earned, [n, m]."""

    log: pl.DataFrame
    logged: Logged
    true: np.ndarray
    target: np.ndarray
    baseline: np.ndarray


def prefer(order: list[str], logged: Logged) -> np.ndarray:
    """The policy that takes the first eligible model of an order."""
    rank = np.array([-order.index(model) if model in order else -99 for model in SIMULATED_CATALOG.ids])
    return np.eye(M)[np.where(logged.eligible, rank, -1000).argmax(axis=1)]


@pytest.fixture(scope="module")
def traffic(tmp_path_factory: pytest.TempPathFactory) -> Traffic:
    folder = tmp_path_factory.mktemp("ope") / "log"
    simulate(6000, folder, logging="uniform", seed=3)
    log = read_log(folder)
    logged = logged_of(log, SIMULATED_CATALOG)
    truth = true_quality(folder, log["request_id"])
    true = truth.select(f"p/{model}" for model in SIMULATED_CATALOG.ids).to_numpy()
    return Traffic(
        log, logged, true, prefer(["aurora-4-mini", "delta-70b"], logged), prefer(["pocket-8b", "quill-8x7b"], logged)
    )


def test_weighted_estimates_are_exactly_unbiased_whatever_the_models_say() -> None:
    """The mean of each row's value over all that could have been logged and told is the row's true value."""
    rng = np.random.default_rng(0)
    n, m = 7, 3
    propensity, target = rng.dirichlet(np.ones(m), n), rng.dirichlet(np.ones(m), n)
    outcome, told, model = rng.random((n, m)), rng.uniform(0.2, 0.9, (n, m)), rng.normal(size=(n, m))
    expected = {name: np.zeros(n) for name in ("ips", "dr", "dm")}
    for action in range(m):
        for seen in (0.0, 1.0):
            a = np.full(n, action)
            chance = propensity[:, action] * np.where(seen, told[:, action], 1 - told[:, action])
            parts = Parts(
                target, a, target[:, action] / propensity[:, action], seen * outcome[:, action],
                seen / told[:, action], model,
            )  # fmt: skip
            for name, total in expected.items():
                total += chance * row_values(name, parts, np.inf)  # type: ignore[arg-type]
    truth = (target * outcome).sum(axis=1)
    np.testing.assert_allclose(expected["ips"], truth, rtol=1e-12)
    np.testing.assert_allclose(expected["dr"], truth, rtol=1e-12)
    assert np.abs(expected["dm"] - truth).max() > 0.1, "the control: a wrong model alone is wrong"


def test_each_estimator_by_hand() -> None:
    target = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]])
    action, propensity, outcome = np.array([0, 1, 0]), np.array([0.5, 0.5, 0.25]), np.array([1.0, 0.0, 0.0])
    model = np.array([[0.8, 0.1], [0.6, 0.2], [0.4, 0.3]])
    parts = Parts(target, action, target[np.arange(3), action] / propensity, outcome, np.ones(3), model)

    def value(name: str, threshold: float = np.inf) -> list[float]:
        return row_values(name, parts, threshold).round(9).tolist()  # type: ignore[arg-type]

    assert value("ips") == [2.0, 0.0, 0.0]
    assert value("dm") == [0.8, 0.6, 0.35]
    assert value("dr") == [1.2, 0.6, round(0.35 - 2 * 0.4, 9)]
    assert np.isclose(np.mean(value("switch-dr", 1.9)), np.mean([0.8, 0.6, 0.35])), "above the threshold the model"
    assert np.isclose(np.std(value("switch-dr", 1.9)), np.std(value("dr"))), "and as unsure as dr"
    weights = np.array([2.0, 0.0, 2.0])
    plain = 2 / 4
    unbiased = plain + np.sum((weights - 4 / 3) * weights * (outcome - plain)) / 3 / (3 * (4 / 3) ** 2)
    assert np.isclose(np.mean(value("snips")), unbiased)


def test_switching_drops_corrections_that_are_mere_noise_and_keeps_those_that_matter() -> None:
    rng = np.random.default_rng(1)
    n, heavy = 2000, np.arange(2000) < 40
    target, action, weight = np.tile([0.5, 0.5], (n, 1)), np.zeros(n, dtype=np.int64), np.where(heavy, 50.0, 1.0)
    model = np.full((n, 2), 0.5)
    noise = np.where(heavy, rng.permutation(np.where(np.arange(n) < 20, 1.0, 0.0)), 0.5 + 0.1 * rng.normal(size=n))
    noise[:40] = np.tile([0.0, 1.0], 20)
    right = Parts(target, action, weight, noise, np.ones(n), model)
    assert switch_threshold(right) == 1.0
    kept = np.where(heavy, 0.5, noise).mean()
    assert np.isclose(row_values("switch-dr", right, 1.0).mean(), kept), "dr without the corrections of the heavy rows"
    wrong = replace(right, outcome=np.where(heavy, 1.0, noise))
    assert switch_threshold(wrong) == np.inf, "there the model is wrong: dropping would bias"


def test_estimates_lie_near_the_truth_and_the_paired_ones_are_closer(traffic: Traffic) -> None:
    logged = replace(traffic.logged, metrics={"quality": told_of(traffic, 1.0)})
    truth = (traffic.true * traffic.target).sum(axis=1).mean()
    found = evaluate_policy(logged, traffic.target)
    assert found.identifiable and found.why == "" and found.feedback is None and found.warnings == ()
    assert list(found.estimates) == list(ESTIMATORS) and found.headline == found.estimates["dr"]
    for name in ("ips", "snips", "dr", "switch-dr"):
        e = found.estimates[name]
        assert abs(e.value - truth) < 4 * e.se and e.low < e.value < e.high
    assert found.estimates["dr"].se < 0.6 * found.estimates["ips"].se
    gain = evaluate_policy(logged, traffic.target, baseline=traffic.baseline)
    really = (traffic.true * (traffic.target - traffic.baseline)).sum(axis=1).mean()
    assert gain.paired and abs(gain.estimates["dr"].value - really) < 4 * gain.estimates["dr"].se
    frame = found.to_frame()
    assert frame["estimator"].to_list() == list(ESTIMATORS) and frame.columns == [
        "metric",
        "estimator",
        "value",
        "low",
        "high",
        "se",
    ]
    assert found.plot().axes and found.support_frame()["ess"][0] > 1000
    assert np.isclose(found.overlap["target"].sum(), 1) and found.overlap["model"].to_list() == list(
        SIMULATED_CATALOG.ids
    )


def told_of(traffic: Traffic, rate: float, ratio: float = 1.0, seed: int = 0) -> np.ndarray:
    """Outcomes of the log's decisions by the truth, NaN where nobody said anything; bad ones `ratio` times as often."""
    rng = np.random.default_rng(seed)
    n = len(traffic.logged)
    good = (rng.random(n) < traffic.true[np.arange(n), traffic.logged.action]).astype(float)
    return np.where(rng.random(n) < rate * np.where(good == 0, ratio, 1.0), good, np.nan)


def test_what_agrees_with_the_baseline_needs_no_evidence(traffic: Traffic) -> None:
    same = evaluate_policy(traffic.logged, traffic.target, baseline=traffic.target)
    assert same.identifiable and same.estimates["dr"] == (0.0, 0.0, 0.0, 0.0) == same.estimates["snips"]
    never = replace(traffic.logged, propensity=np.ones(len(traffic.logged)))
    own = np.eye(M)[traffic.logged.action]
    assert evaluate_policy(never, traffic.target, baseline=traffic.target).identifiable
    assert not evaluate_policy(never, traffic.target, baseline=own).identifiable


def test_a_deterministic_log_gives_no_number(traffic: Traffic) -> None:
    always = replace(traffic.logged, propensity=np.ones(len(traffic.logged)))
    found = evaluate_policy(always, traffic.target)
    agree = float(np.mean(traffic.target[np.arange(len(always)), always.action]))
    assert not found.identifiable and found.estimates == {} and found.headline is None
    assert np.isclose(found.identifiable_share, agree)
    assert found.why.startswith("not identifiable") and f"{agree:.1%}" in found.why
    assert found.to_frame().is_empty() and found.plot().axes
    on = evaluate_policy(always, np.eye(M)[always.action], metric="cost_usd")
    assert np.isclose(on.estimates["ips"].value, always.metrics["cost_usd"].mean()), "but of its own policy it does"
    rows = identifiable_rows(always, traffic.target)
    assert np.isclose(rows.mean(), agree) and evaluate_policy(always.take(rows), traffic.target[rows]).identifiable


def test_propensities_that_the_log_belies_give_no_number(traffic: Traffic) -> None:
    only = traffic.logged.action == SIMULATED_CATALOG.index["aurora-4"]
    some = np.flatnonzero(only)
    more = np.flatnonzero(traffic.logged.action == SIMULATED_CATALOG.index["delta-70b"])[:5]
    claimed = traffic.logged.take(np.concatenate([some, more]))
    target = prefer(["delta-70b"], claimed)
    found = evaluate_policy(replace(claimed, propensity=np.full(len(claimed), 0.5)), target)
    assert not found.identifiable and "propensities promise" in found.why


def test_too_few_rows_give_no_number(traffic: Traffic) -> None:
    few = traffic.logged.take(np.arange(25))
    found = evaluate_policy(
        few, few.eligible / few.eligible.sum(axis=1, keepdims=True) * 0 + prefer(["delta-70b"], few)
    )
    assert not found.identifiable and "effective rows" in found.why
    silent = replace(traffic.logged, metrics={"quality": np.full(len(traffic.logged), np.nan)})
    assert "no row has an outcome" in evaluate_policy(silent, traffic.target).why


def test_missing_propensities_are_estimated_and_said(traffic: Traffic) -> None:
    logged = replace(traffic.logged, metrics={"quality": told_of(traffic, 1.0)})
    unknown = replace(logged, propensity=np.full(len(logged), np.nan))
    found, known = evaluate_policy(unknown, traffic.target), evaluate_policy(logged, traffic.target)
    assert any("100.0% of the rows have no propensity" in w for w in found.warnings)
    assert abs(found.estimates["dr"].value - known.estimates["dr"].value) < known.estimates["dr"].se
    assert found.overlap["least_propensity"].min() > 0
    one = logged.take(logged.action == 0)
    always = evaluate_policy(replace(one, propensity=np.full(len(one), np.nan)), prefer(["delta-70b"], one))
    assert not always.identifiable, "always the same model: nothing to be estimated from"


def test_who_gives_feedback_is_a_second_selection(traffic: Traffic) -> None:
    n = len(traffic.logged)
    truth = (traffic.true * traffic.target).sum(axis=1).mean()
    # Tenants differ in how often they say something, and in how often they are content.
    hard = np.isin(traffic.log["tenant"].to_numpy(), ["devtools", "tutorly"])
    good = told_of(traffic, 1.0)
    by_tenant = np.where(np.random.default_rng(5).random(n) < np.where(hard, 0.9, 0.25), good, np.nan)
    found = evaluate_policy(replace(traffic.logged, metrics={"quality": by_tenant}), traffic.target)
    assert found.feedback is not None and np.isclose(found.feedback.observed, np.mean(~np.isnan(by_tenant)))
    assert found.feedback.after == found.estimates["dr"]
    assert found.feedback.support.ess < found.support.ess and 0.08 < found.feedback.least_probability < 0.4
    assert abs(found.feedback.after.value - truth) < 4 * found.feedback.after.se
    # Bad answers bring feedback twice as often: the log cannot show it, but whoever knows it can say so.
    selected = replace(traffic.logged, metrics={"quality": told_of(traffic, 0.4, ratio=2.0)})
    naive, told = (
        evaluate_policy(selected, traffic.target),
        evaluate_policy(selected, traffic.target, feedback_ratio=2.0),
    )
    assert naive.estimates["dr"].high < truth and abs(told.estimates["dr"].value - truth) < 4 * told.estimates["dr"].se


def test_a_confidence_sequence_is_wider_and_clipping_is_reported(traffic: Traffic) -> None:
    once = evaluate_policy(traffic.logged, traffic.target, metric="cost_usd")
    often = evaluate_policy(traffic.logged, traffic.target, metric="cost_usd", interval="sequence")
    for name in ("ips", "dr"):
        width = [x.estimates[name].high - x.estimates[name].low for x in (once, often)]
        assert 1.2 * width[0] < width[1] < 3 * width[0]
    cut = evaluate_policy(traffic.logged, traffic.target, metric="cost_usd", max_weight=2.0)
    assert cut.support.max_weight == 2.0 and 0.3 < cut.support.clipped_mass < 0.7
    assert np.isclose(cut.support.clipped_mass + cut.support.mean_weight, once.support.mean_weight)


def test_what_a_learner_expects_sharpens_dr(traffic: Traffic) -> None:
    logged = replace(traffic.logged, metrics={"quality": told_of(traffic, 1.0)})
    knows = evaluate_policy(logged, traffic.target, predictions={"quality": traffic.true})
    assert knows.estimates["dr"].se < 0.97 * evaluate_policy(logged, traffic.target).estimates["dr"].se


def test_slices_hold_together(traffic: Traffic) -> None:
    found = evaluate_slices(traffic.logged, traffic.target, by=("task", "tenant", "length"), metric="cost_usd")
    whole = evaluate_policy(traffic.logged, traffic.target, metric="cost_usd", estimators=["dr"])
    k = len(found.values)
    assert k > 8 and all(np.isclose(1 - v.confidence, 0.05 / k) for v in found.values.values())
    by_tenant = [v for (by, _), v in found.values.items() if by == "tenant"]
    mean = sum(v.n * v.estimates["dr"].value for v in by_tenant) / sum(v.n for v in by_tenant)
    assert np.isclose(mean, whole.estimates["dr"].value), "one fit: the slices add up to the whole"
    frame = found.to_frame()
    assert len(frame) == k and frame["identifiable"].all() and (frame["low"] < frame["high"]).all()
    z = [(v.estimates["dr"].high - v.estimates["dr"].low) / v.estimates["dr"].se for v in by_tenant]
    assert min(z) > 2 * 2.5, "wider than for one look"
    assert found.plot().axes
    always = replace(
        traffic.logged,
        propensity=np.where(traffic.logged.slices["tenant"] == "northbank", 1.0, traffic.logged.propensity),
    )
    partly = evaluate_slices(always, traffic.target, by=["tenant"], metric="cost_usd").to_frame()
    assert partly.filter(~pl.col("identifiable"))["slice"].to_list() == ["northbank"]
    assert partly.filter(~pl.col("identifiable"))["value"].null_count() == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metric": "latency_ms"}, "no metric 'latency_ms'"),
        ({"estimators": ["magic"]}, "unknown estimator 'magic'"),
        ({"confidence": 0.2}, r"not in \[0.5, 1\)"),
        ({"folds": 1}, "at least 2 folds"),
        ({"feedback_ratio": 0.0}, "a number above 0"),
        ({"metric": "cost_usd", "feedback_ratio": 2.0, "cost": 5.0}, "does not lie in"),
        ({"baseline": np.ones((3, 2))}, "the baseline has the shape"),
        ({"target": 2.0}, "have to be probabilities"),
    ],
)
def test_what_does_not_fit_is_refused(traffic: Traffic, change: dict[str, object], said: str) -> None:
    change = dict(change)
    logged, target = traffic.logged, traffic.target * change.pop("target", 1.0)
    if cost := change.pop("cost", None):
        logged = replace(logged, metrics={"cost_usd": np.full(len(logged), cost)})
    with pytest.raises(InputError, match=said):
        evaluate_policy(logged, target, **change)  # type: ignore[arg-type]


def test_it_agrees_with_coba_on_the_same_data(traffic: Traffic) -> None:
    """coba's rewards, of its IPS and of the models that Vowpal Wabbit fits for its DM and DR, row by row."""
    from coba.environments.filters import OpeRewards

    n = 1500
    logged = replace(traffic.logged, metrics={"quality": told_of(traffic, 1.0)}).take(np.arange(n))
    target, r = (
        traffic.target[:n] * 0.9 + 0.1 * logged.eligible / logged.eligible.sum(axis=1, keepdims=True),
        logged.metrics["quality"],
    )
    ids = list(SIMULATED_CATALOG.ids)
    interactions = [
        {
            "context": {f"x{k}": float(v) for k, v in enumerate(x)}, "actions": ids, "action": ids[a],
            "reward": float(y), "probability": float(p),
        }
        for x, a, y, p in zip(logged.context, logged.action, r, logged.propensity, strict=True)
    ]  # fmt: skip

    def rewards(kind: str) -> np.ndarray:
        return np.array([[one["rewards"](model) for model in ids] for one in OpeRewards(kind).filter(interactions)])

    by = {kind: rewards(kind) for kind in ("IPS", "DM", "DR")}
    weight = target[np.arange(n), logged.action] / logged.propensity
    parts = Parts(target, logged.action, weight, r, np.ones(n), by["DM"])
    for kind, name in (("IPS", "ips"), ("DM", "dm"), ("DR", "dr")):
        np.testing.assert_allclose(
            row_values(name, parts, np.inf), (target * by[kind]).sum(axis=1), rtol=1e-5, atol=1e-6
        )  # type: ignore[arg-type]
    found = evaluate_policy(logged, target).estimates
    assert np.isclose(found["ips"].value, (target * by["IPS"]).sum(axis=1).mean())
    assert abs(found["dr"].value - (target * by["DR"]).sum(axis=1).mean()) < found["dr"].se


def test_draws_follow_the_policy_that_is_evaluated(traffic: Traffic) -> None:
    """A log drawn by the target itself has the mean that was estimated from another one's log."""
    drawn = draw_models(traffic.target, np.random.default_rng(0))
    assert (traffic.target[np.arange(len(drawn)), drawn] == 1).all()
    logged = replace(traffic.logged, metrics={"quality": told_of(traffic, 1.0)})
    good = np.random.default_rng(1).random(len(drawn)) < traffic.true[np.arange(len(drawn)), drawn]
    e = evaluate_policy(logged, traffic.target).estimates["dr"]
    assert abs(e.value - good.mean()) < 4 * np.hypot(e.se, good.std() / np.sqrt(len(good)))


def test_failures_are_known_of_without_feedback(catalog: Catalog) -> None:
    """One call in ten fails, which is always known; one answer in four is told of: failures must not stand for more."""
    rng, rows = np.random.default_rng(11), []
    skill = {"mid": 0.8, "local": 0.5}
    for i in range(12_000):
        model = ("mid", "local")[int(rng.random() < 0.5)]
        failed = rng.random() < 0.1
        ok = float(rng.random() < skill[model])
        rows.append(
            {
                "request_id": f"r{i}", "time": datetime(2026, 1, 1, tzinfo=UTC),
                "prompt": "x" * int(rng.integers(20, 90)),
                "candidates": ["mid", "local"], "model": model, "propensity": 0.5, "cost_usd": 0.1,
                "status": "timeout" if failed else "ok",
                "quality": None if failed or rng.random() > 0.25 else ok,
            }
        )  # fmt: skip
    logged = logged_of(pl.DataFrame(rows, schema=LOG_SCHEMA), catalog)
    target = np.zeros((len(rows), len(catalog)))
    target[:, catalog.index["mid"]] = 1.0
    value = evaluate_policy(logged, target, estimators=["dr"]).headline
    assert value is not None and value.low <= 0.9 * 0.8 <= value.high and value.se < 0.02
    forgetful = evaluate_policy(replace(logged, certain={}), target, estimators=["dr"]).headline
    assert forgetful is not None and forgetful.high < 0.68, "which the log would say if nothing were certain"
