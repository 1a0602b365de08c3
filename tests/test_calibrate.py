"""Calibration, and the refusal to use scores that say nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from features.load import load_router
from router_ml.conversation import request_of
from router_ml.policy import Policy
from router_ml.quality import Calibrated, Calibration, logit
from training.calibrate import LEAST_REQUESTS, calibrate
from training.evaluate import calibration_error


def _scores(n: int, m: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """True probabilities and labels."""
    rng = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-rng.normal(size=(n, m))))
    return p, (rng.random((n, m)) < p).astype(np.float32)


def test_distorted_scores_are_put_right() -> None:
    p, y = _scores(6000, 2, 0)
    distorted = 1 / (1 + np.exp(-(0.4 * logit(p) + 1.0)))
    fixed = calibrate(distorted[:3000], y[:3000]).apply(distorted[3000:].astype(np.float32))
    for j in range(2):
        assert calibration_error(fixed[:, j], y[3000:, j]) < 0.04
        assert calibration_error(distorted[3000:, j], y[3000:, j]) > 0.1


def test_scores_that_order_nothing_are_not_used() -> None:
    p, y = _scores(4000, 3, 1)
    y[:, 0] = np.random.default_rng(2).random(4000) < 0.9
    shuffled = y[np.random.default_rng(3).permutation(4000)]
    flat = calibrate(p, shuffled).apply(p.astype(np.float32))
    assert np.ptp(flat, axis=0).max() == 0.0
    assert flat[0] == pytest.approx(shuffled.mean(axis=0), abs=0.01)


def test_models_with_few_rows_stay_near_the_others() -> None:
    p, y = _scores(3000, 2, 4)
    y[5:, 1] = np.nan
    y[:5, 1] = 1.0
    made = calibrate(p, y)
    assert made.slope[0, 1] == pytest.approx(made.slope[0, 0], abs=0.15)
    assert abs(made.intercept[0, 1] - made.intercept[0, 0]) < 0.6
    y[:, 1] = np.nan
    none = calibrate(p, y)
    assert none.slope[0, 1] == pytest.approx(none.slope[0, 0], abs=0.2)


def test_one_class_models_do_not_promise_certainty() -> None:
    p, y = _scores(500, 2, 5)
    y[:, 1] = 1.0
    promised = calibrate(p, y).apply(p.astype(np.float32))[:, 1]
    assert 0.5 < promised.mean() < 0.999


def test_weights_undo_the_logging_policys_preference() -> None:
    """The log sends a model mostly requests that are easier than their scores say; 1 / propensity undoes it."""
    rng = np.random.default_rng(6)
    n = 40_000
    easy = rng.random(n) < 0.5
    p_true = np.where(easy, 0.8, 0.4)
    score = np.clip(0.6 + 0.1 * rng.normal(size=n) + 0.05 * easy, 0.05, 0.95)
    propensity = np.where(easy, 0.9, 0.1)
    y = np.where(rng.random(n) < propensity, (rng.random(n) < p_true).astype(float), np.nan)
    weighted = calibrate(score[:, None], y[:, None], (1 / propensity)[:, None]).apply(score[:, None].astype(np.float32))
    plain = calibrate(score[:, None], y[:, None]).apply(score[:, None].astype(np.float32))
    assert abs(weighted.mean() - p_true.mean()) < 0.02
    assert abs(plain.mean() - p_true.mean()) > 0.08


def test_a_model_whose_scores_are_upside_down_has_its_mean() -> None:
    p, y = _scores(3000, 3, 7)
    y[:, 2] = np.random.default_rng(8).random(3000) < 0.6 * (1 - p[:, 2])
    promised = calibrate(p, y).apply(p.astype(np.float32))
    assert np.ptp(promised[:, 2]) == 0.0
    assert promised[0, 2] == pytest.approx(y[:, 2].mean(), abs=0.01)
    assert np.ptp(promised[:, 0]) > 0.5


def _outside(known: Calibrated, p: np.ndarray) -> float:
    return float(((p < known.p_low) | (p > known.p_high)).mean())


def test_intervals_hold_what_they_say() -> None:
    """Sixty models of 10 to 600 rows whose scores know the shrunk mean of those rows, as a router's do."""
    rng = np.random.default_rng(9)
    m, n = 60, 4000
    z, level = rng.normal(size=(n, 1)), rng.normal(0.0, 0.6, m)
    p = 1 / (1 + np.exp(-(z + level)))
    y = (rng.random((n, m)) < p).astype(np.float32)
    rows = np.repeat([10, 30, 100, 600], 15)
    for j in range(m):
        y[rng.permutation(n)[rows[j] :], j] = np.nan
    mean = (np.nansum(y, axis=0) + 10 * 0.5) / (rows + 10)
    score = 1 / (1 + np.exp(-(z + logit(mean))))
    known = calibrate(score, y).estimate(score.astype(np.float32))
    assert 0.02 < _outside(known, p) < 0.2
    width = np.array([(known.p_high - known.p_low)[:, rows == r].mean() for r in (10, 30, 100, 600)])
    assert (np.diff(width) < 0).all() and width[0] > 0.25 and width[3] < 0.1
    assert (known.p_low < known.p_ok).all() and (known.p_ok < known.p_high).all()
    assert (known.p_claim < known.p_ok).all()


def test_one_class_and_unseen_models_are_wide() -> None:
    p, y = _scores(3000, 4, 10)
    y[10:, 1], y[:10, 1] = np.nan, 1.0
    y[10:, 2], y[:10, 2] = np.nan, 0.0
    y[:, 3] = np.nan
    known = calibrate(p, y).estimate(np.full(4, 0.5, dtype=np.float32))
    width = known.p_high - known.p_low
    assert width[0] < 0.1 and (width[1:] > 0.25).all()
    assert width[3] == width.max() and known.p_low[3] < 0.35 and known.p_high[3] > 0.65
    assert known.p_high[1] < 0.99 and known.p_low[2] > 0.01


def test_the_cheapest_that_claims_to_be_good_enough_is_good_enough() -> None:
    """Twenty models of 60 rows: of those that look good enough the cheapest are too often the lucky ones."""
    rng = np.random.default_rng(11)
    m, n, dial = 20, 3000, 0.75
    routed: dict[str, list[np.ndarray]] = {"p_ok": [], "p_claim": []}
    for _ in range(8):
        level = rng.normal(0.5, 0.3, m)
        p = 1 / (1 + np.exp(-(rng.normal(0, 0.4, (n, 1)) + level)))
        y = (rng.random((n, m)) < p).astype(np.float32)
        for j in range(m):
            y[rng.permutation(n)[60:], j] = np.nan
        mean = (np.nansum(y, axis=0) + 10 * np.nanmean(y)) / 70
        score = 1 / (1 + np.exp(-(logit(p) - level + logit(mean))))
        known = calibrate(score, y).estimate(score.astype(np.float32))
        for name, found in routed.items():
            meets = getattr(known, name) >= dial
            at = np.flatnonzero(meets.any(axis=1))
            first = meets[at].argmax(axis=1)  # the models stand in the order of their price
            near = getattr(known, name)[at, first] < dial + 0.03  # where the dial decides
            found.append(p[at, first][near])
    rate = {name: float(np.concatenate(found).mean()) for name, found in routed.items()}
    assert rate["p_ok"] < dial - 0.01 and rate["p_claim"] > dial


def test_nothing_is_claimed_that_the_log_has_not_reached() -> None:
    p, y = _scores(5000, 2, 12)
    y[np.arange(5000), np.random.default_rng(13).integers(0, 2, 5000)] = np.nan
    score = p.astype(np.float32)
    made = calibrate(score, y)
    claim = made.estimate(score).p_claim
    assert made.ceiling[0] < 0.999
    assert claim.max() == np.float32(made.ceiling[0])
    assert (np.where(np.isnan(y), 0.0, claim).max(axis=1) >= np.float32(made.ceiling[0])).sum() == LEAST_REQUESTS


def test_a_higher_quality_threshold_is_never_more_probable() -> None:
    rng = np.random.default_rng(14)
    p, _ = _scores(400, 3, 15)
    quality = np.clip(p + rng.normal(0, 0.3, p.shape), 0, 1)
    parts = [calibrate(p, (quality >= t).astype(float), threshold=t) for t in (0.5, 0.55, 0.8)]
    both = Calibration.stack(parts)
    assert both.thresholds.tolist() == [0.5, 0.55, 0.8] and both.slope.shape == (3, 3)
    score = rng.random((200, 3)).astype(np.float32)
    rows = [np.stack(both.estimate(score, both.index(t))) for t in (None, 0.55, 0.8)]
    assert (rows[0] >= rows[1]).all() and (rows[1] >= rows[2]).all() and (rows[0][0] > rows[2][0]).all()
    assert (rows[0] == np.stack(parts[0].estimate(score))).all()
    for i, row in enumerate(rows):
        assert (both.apply(score, i) == row[0]).all()
        assert (np.stack(both.estimate(score[0], i)) == row[:, 0]).all(), "one request alone gets the same numbers"
    with pytest.raises(ValueError, match="not in list"):
        both.index(0.6)
    back = Calibration.from_arrays({**both.to_arrays(), "other": np.zeros(3)})
    assert (np.stack(back.estimate(score, 2)) == rows[2]).all()


def test_without_variances_interval_and_claim_are_the_probability() -> None:
    old = Calibration(np.array([1.0, 0.8]), np.array([0.1, -0.2]))
    known = old.estimate(np.array([0.3, 0.9], dtype=np.float32))
    assert all((value == known.p_ok).all() for value in known)


def test_a_decision_knows_what_it_does_not_know(sparse_bundle: Path) -> None:
    """Log, fit, bundle, decision: ten rows, ten successes and no rows at all come out as wide, never as 0 or 1."""
    router = load_router(sparse_bundle)
    for prompt in ("What is the plural of river stone?", "Prove rigorously that the violin operator is bounded."):
        decision = router.decide(request_of(prompt=prompt, min_probability=0.0))
        by_model = {c.model: c for c in decision.candidates}
        width = {model: np.ptp(logit(np.array([c.p_low, c.p_high]))) for model, c in by_model.items()}
        assert all(0.01 < c.p_low < c.p_ok < c.p_high < 0.995 for c in decision.candidates)
        assert all(c.p_claim < c.p_ok for c in decision.candidates)
        assert width["local"] < 0.6 * min(width["mid"], width["hosted"], width["frontier"])


def test_the_dial_is_held_against_the_claim(sparse_bundle: Path) -> None:
    router = load_router(sparse_bundle, Policy(unmet="default", default_model="mid"))
    prompt = "Prove rigorously that the violin operator is bounded."
    best = max(router.decide(request_of(prompt=prompt)).candidates, key=lambda c: c.p_claim)
    met = router.decide(request_of(prompt=prompt, min_probability=best.p_claim))
    assert met.meets_threshold and met.model == best.model
    between = (best.p_claim + best.p_ok) / 2
    assert best.p_ok > between, "its probability would do"
    unmet = router.decide(request_of(prompt=prompt, min_probability=between))
    assert not unmet.meets_threshold and unmet.model == "mid"
    assert unmet.reason == f"no candidate's claim reaches {between:g}: the configured default"
