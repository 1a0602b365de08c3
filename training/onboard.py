"""A new model without retraining: its columns of the heads are a mixture of the existing models' columns.

The new model's probability, as a function of the request, is taken to be drawn from the population that the m existing
models are a sample of: its mean is a prior mixture of theirs, its covariance their sample covariance. In coefficients
on their columns that is a normal prior of variance 1 / (m - 1) around the prior mixture, and outcomes make of it the
posterior mean, a ridge regression whose penalty is known and need not be chosen (Rasmussen & Williams, Gaussian
Processes for Machine Learning, 2006, section 2.1; the trials behind it are in docs/log.md). Encoder, booster and the
other models' columns stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
from threadpoolctl import threadpool_limits

from features.featurizer import CandidateFeaturizer, RequestFeatures
from features.load import NEIGHBOURS, TWIN, Learned, load_estimator, load_twin, save_router
from features.neighbours import Neighbours, from_bytes
from router_ml.bundle import Bundle, check_replaceable, read_bundle
from router_ml.catalog import Catalog
from router_ml.costs import Reliability
from router_ml.errors import InputError
from router_ml.logs import log_sha256, read_log
from router_ml.quality import LearnedEstimator, blend
from router_ml.types import FloatArray, ModelCard
from training.calibrate import scale_one, uncertainty_of
from training.dataset import PRIOR_CALLS, Dataset, build_dataset, folds_of, reliability

Array = npt.NDArray[np.float64]
SIBLING_SHARE = 0.75
"""Weight of a named sibling before any outcome; the rest is what a model of that tier is like."""
SHIFT_VARIANCE = 0.02
"""Prior variance of what a model succeeds more or less often than its mixture, on every request alike."""
MEAN_ROWS = 10.0
"""Outcomes at which a model's own rate, and its own length of answers, count as much as what was expected of it."""
FOLDS = 5


@dataclass(frozen=True)
class Onboarding:
    """What `onboard_bundle` wrote: the new bundle's version, and what it went by.

    `mix` gives each existing model's weight in the new one's columns, `shift` what is added to that; `outcomes` counts
    the qualities that were known.
    """

    version: str
    outcomes: int
    sibling: str | None
    mix: dict[str, float]
    shift: float


def onboard_bundle(
    bundle: str | Path,
    card: ModelCard,
    *,
    out: str | Path,
    logs: str | Path | pl.DataFrame | None = None,
    sibling: str | None = None,
) -> Onboarding:
    """Writes to `out` the bundle with one more model, in last place; seconds, whatever the bundle was trained on.

    `logs` is a request log with outcomes of the new model, other models' rows are ignored; the bundle counts as trained
    until the newest of its rows (`held_out.held_out`). `sibling` comes before the card's own. Raises InputError when
    the model is in the bundle already, when the sibling is not, and when the log has no outcome of the model.
    """
    check_replaceable(Path(out))
    made = read_bundle(bundle)
    catalog = made.catalog
    card = _named(card, sibling, catalog)
    frame = None if logs is None else logs if isinstance(logs, pl.DataFrame) else read_log(logs)
    outcomes = None if frame is None else outcomes_of(frame, card)
    estimator, mix, shift = _onboard(load_estimator(made), card, outcomes)
    prior = prior_mix(catalog, card)
    calls = _calls(made.manifest.get("reliability"), frame, card, prior)
    known = 0 if outcomes is None else int(outcomes.observed.sum())
    until = None if frame is None else frame.filter(pl.col("model") == card.id)["time"].max()
    entry = {
        "model": card.id,
        "sibling": card.sibling,
        "outcomes": known,
        "onto": made.version,
        "log_sha256": None if frame is None else log_sha256(frame),
        "until": until.isoformat() if isinstance(until, datetime) else None,
    }
    manifest = {name: value for name, value in made.manifest.items() if name not in ("files", "format")}
    manifest |= {"onboarded": [*manifest.get("onboarded", []), entry]}
    if isinstance(until, datetime) and "trained_until" in manifest:  # what `held_out` goes by
        manifest["trained_until"] = max(datetime.fromisoformat(manifest["trained_until"]), until).isoformat()
    if "prices" in manifest:
        manifest["prices"] = {**manifest["prices"], "catalog": catalog.with_card(card).to_json()}
    if calls is not None:
        manifest["reliability"] = calls.to_json()
    twin = load_twin(made)
    if twin is not None:
        twin = _onboard(twin, card, outcomes)[0]
    stand_in = None if twin is None else Learned(twin, _past(made, TWIN + NEIGHBOURS))
    version = save_router(out, estimator, manifest, _past(made, NEIGHBOURS), stand_in)
    return Onboarding(version, known, card.sibling, dict(zip(catalog.ids, mix.tolist(), strict=True)), shift)


def _past(bundle: Bundle, name: str) -> Neighbours | None:
    """The bundle's past requests, none of which went to the new model."""
    if name not in bundle.files:
        return None
    past = from_bytes(bundle.file(name), name)
    unknown = np.full((len(past.ids), 1), np.nan, dtype=np.float32)
    return replace(past, outcomes=np.concatenate([past.outcomes, unknown], axis=1))


def outcomes_of(log: pl.DataFrame, card: ModelCard) -> Dataset:
    """What a log knows of one model: a data set whose only model it is. Raises InputError when it knows no quality."""
    own = log.filter(pl.col("model") == card.id)
    if own["quality"].count() == 0:
        others = ", ".join(sorted(log["model"].drop_nulls().unique())[:5])
        raise InputError(
            f"the log has {len(own)} rows of model {card.id!r}, none with a quality (it has rows of "
            f"{others or 'none'}): check the card's id, log quality feedback, or leave the log out and name a sibling"
        )
    return build_dataset(own, Catalog((replace(card, sibling=None),)))


def onboard(
    estimator: LearnedEstimator,
    card: ModelCard,
    outcomes: Dataset | None = None,
    sibling: str | None = None,
) -> LearnedEstimator:
    """The learner with one more model, in last place; what it says of the others does not change.

    `outcomes` is a data set with the new model as its only column ([n, 1]). Without outcomes the model is expected to
    be like its sibling (`sibling`, else the card's own), and without a sibling like the models of its tier. Raises
    InputError for a model that is there already and for a sibling that is not.
    """
    assert isinstance(estimator.featurizer, CandidateFeaturizer)
    return _onboard(estimator, _named(card, sibling, estimator.featurizer.catalog), outcomes)[0]


def prior_mix(catalog: Catalog, card: ModelCard) -> Array:
    """Each existing model's weight [m] in what is expected of a new one before any outcome; they sum to 1.

    Half the mean of all models, half that of its tier (of all, where it is the first of its tier); where the card names
    a sibling, this has `SIBLING_SHARE`.
    """
    m = len(catalog)
    every = np.full(m, 1.0 / m)
    peers = np.array([c.tier == card.tier for c in catalog], dtype=np.float64)
    mix: Array = (every + peers / peers.sum()) / 2.0 if peers.any() else every
    if card.sibling is not None:
        mix = (1.0 - SIBLING_SHARE) * mix
        mix[catalog.index[card.sibling]] += SIBLING_SHARE
    return mix


def fit_mix(parts: Array, label: Array, prior: Array) -> tuple[Array, float]:
    """Posterior mean of a model's weights [m] and shift from its outcomes.

    `parts` [n, m] is what the existing models' linear parts say of the requests, `label` [n] the new model's outcomes
    in [0, 1], `prior` [m] the weights before them.
    """
    n, m = parts.shape
    design = np.concatenate([parts, np.ones((n, 1))], axis=1)
    left = label - parts @ prior
    rate = (label.sum() + MEAN_ROWS * 0.5) / (n + MEAN_ROWS)
    precision = rate * (1.0 - rate) * np.append(np.full(m, max(m - 1.0, 1.0)), 1.0 / SHIFT_VARIANCE)
    step = np.linalg.solve(design.T @ design + np.diag(precision), design.T @ left)
    return prior + step[:-1], float(step[-1])


def _named(card: ModelCard, sibling: str | None, catalog: Catalog) -> ModelCard:
    """The card with its sibling, both checked."""
    if card.id in catalog:
        raise InputError(
            f"model {card.id!r} is in the bundle already: train again to take up its newer outcomes, or correct the id"
        )
    card = replace(card, sibling=sibling or card.sibling)
    if card.sibling is not None and card.sibling not in catalog:
        raise InputError(f"the sibling {card.sibling!r} is not in the bundle: choose one of {', '.join(catalog.ids)}")
    return card


def _onboard(
    estimator: LearnedEstimator, card: ModelCard, outcomes: Dataset | None
) -> tuple[LearnedEstimator, Array, float]:
    with threadpool_limits(limits=1, user_api="blas"):
        path = estimator.featurizer
        assert isinstance(path, CandidateFeaturizer)
        prior = prior_mix(path.catalog, card)
        thresholds = estimator.thresholds
        rows = [] if outcomes is None else list(np.flatnonzero(outcomes.observed[:, 0]))
        if outcomes is None or not rows:
            wider = _with_mix(path, card, prior, 0.0, prior, 1.0, float(path.success @ prior))
            none = np.empty(0)
            return _calibrated(estimator, wider, prior, none, np.empty((len(thresholds), 0)), none), prior, 0.0
        outcomes = outcomes.take(np.array(rows))
        requests = [path.requests.transform(r) for r in outcomes.requests]
        seen = [path.rows(x) for x in requests]
        parts = np.stack([x.parts for x in seen]).mean(axis=1, dtype=np.float64)
        labels = np.stack([outcomes.labels(at)[:, 0] for at in thresholds]).astype(np.float64)
        label: Array = labels.mean(axis=0)  # of several thresholds the heads have learnt the mean
        expected = np.log(np.stack([x.output_tokens for x in seen])) @ prior
        factor = _length_factor(expected, outcomes.output_tokens[:, 0])

        def wider_by(at: npt.NDArray[np.bool_]) -> tuple[CandidateFeaturizer, Array, float]:
            mix, shift = fit_mix(parts[at], label[at], prior)
            rate = (label[at].sum() + MEAN_ROWS * float(path.success @ prior)) / (at.sum() + MEAN_ROWS)
            return _with_mix(path, card, mix, shift, prior, factor, float(rate)), mix, shift

        fold = folds_of(outcomes, FOLDS, 0)
        score = np.empty(len(label))
        for f in np.unique(fold):
            held = fold == f
            score[held] = _scores(estimator, wider_by(~held)[0], [requests[i] for i in np.flatnonzero(held)])
        wider, mix, shift = wider_by(np.ones(len(label), dtype=bool))
        weight = 1.0 / outcomes.propensity[:, 0].astype(np.float64)
        return _calibrated(estimator, wider, prior, score, labels, weight), mix, shift


def _with_mix(
    path: CandidateFeaturizer, card: ModelCard, mix: Array, shift: float, lengths: Array, factor: float, rate: float
) -> CandidateFeaturizer:
    heads = path.heads.with_model(mix.astype(np.float32), shift, lengths.astype(np.float32), factor)
    return path.with_model(card, heads, rate)


def _scores(estimator: LearnedEstimator, path: CandidateFeaturizer, requests: list[RequestFeatures]) -> FloatArray:
    """What booster and parts together say of the last model, before calibration, [n]."""
    seen = [path.rows(x) for x in requests]
    raw = estimator.trees.predict(np.stack([x.rows[-1] for x in seen]))
    return blend(raw, np.stack([x.parts[:, -1] for x in seen], axis=1))


def _calibrated(
    estimator: LearnedEstimator, path: CandidateFeaturizer, prior: Array, score: Array, labels: Array, weight: Array
) -> LearnedEstimator:
    """The wider learner, from scores [n] that have not seen their labels [t, n], a row per quality threshold.

    The new model's scaling starts from the prior mixture of the others'; its interval is as wide as its rows are few.
    """
    old, columns = estimator.calibration, []
    for i, label in enumerate(labels):
        slope, intercept = float(old.slope[i] @ prior), float(old.intercept[i] @ prior)
        if len(label):
            slope, intercept = scale_one(score, label, weight, (slope, intercept))
        if slope < 0.0 or (len(label) and slope == 0.0):  # scores that order its requests the wrong way are not used
            rate = (label.sum() + MEAN_ROWS * float(path.success[-1])) / (len(label) + MEAN_ROWS)
            slope, intercept = 0.0, float(np.log(rate / (1.0 - rate)))
        columns.append((slope, intercept, *uncertainty_of(score, slope, intercept)))
    names = ("slope", "intercept", "center", "level_var", "slope_var")
    calibration = old.with_model(**dict(zip(names, np.array(columns).T, strict=True)))
    return LearnedEstimator(path, estimator.trees, calibration)


def _length_factor(expected: Array, tokens: npt.NDArray[np.float32]) -> float:
    """Mean observed over mean expected output tokens, of which ln is given, shrunk to 1 on the log scale."""
    known = ~np.isnan(tokens)
    n = float(known.sum())
    if n == 0 or tokens[known].sum() <= 0:
        return 1.0
    ratio = float(tokens[known].sum(dtype=np.float64) / np.exp(expected[known]).sum())
    return float(np.clip(ratio, 0.01, 100.0) ** (n / (n + MEAN_ROWS)))


def _calls(
    known: dict[str, list[float]] | None, log: pl.DataFrame | None, card: ModelCard, prior: Array
) -> Reliability | None:
    """The bundle's reliability with the new model's, which is shrunk to the prior mixture's; None where it has none."""
    if known is None:
        return None
    old = Reliability.from_json(known)
    expected = float(np.dot(old.attempts, prior)), float(np.dot(old.failure, prior))
    own, n = expected, 0
    if log is not None:
        rows = log.filter(pl.col("model") == card.id)
        alone, n = reliability(rows, Catalog((replace(card, sibling=None),))), len(rows)
        own = alone.attempts[0], alone.failure[0]
    attempts, failure = ((n * x + PRIOR_CALLS * e) / (n + PRIOR_CALLS) for x, e in zip(own, expected, strict=True))
    return Reliability((*old.attempts, max(attempts, 1.0)), (*old.failure, failure))
