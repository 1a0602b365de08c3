"""The learner: a pooled LightGBM classifier over (request, candidate) rows, averaged with linear parts, calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from router_ml.trees import Trees
from router_ml.types import CandidateFeatures, Estimate, Featurizer, FloatArray, RouteRequest

Array = npt.NDArray[np.float64]
BOOSTER_SHARE = 0.5
"""Weight of the booster in the average; the linear parts share the rest (docs/log.md has the trials)."""
_EPS = 1e-3


def blend(booster: FloatArray, parts: FloatArray) -> FloatArray:
    """Averages the booster's probabilities [..., m] with those of the parts [k, ..., m]."""
    share = np.float32((1.0 - BOOSTER_SHARE) / len(parts))
    mixed: FloatArray = np.float32(BOOSTER_SHARE) * booster + share * np.add.reduce(parts, axis=0)
    return mixed


def logit(p: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Log odds, with probabilities kept 0.001 away from 0 and 1."""
    p = np.minimum(np.maximum(p.astype(np.float64), _EPS), 1.0 - _EPS)
    odds: npt.NDArray[np.float64] = np.log(p / (1.0 - p))
    return odds


class Calibrated(NamedTuple):
    """What a calibration makes of scores: float32 arrays of the scores' shape [..., m].

    `p_ok` is the probability, `p_low` and `p_high` the bounds of its 90 % interval: what is not known of the model's
    scaling, not what is left to chance in one answer. `p_claim` is what the policy's dial is held against.
    """

    p_ok: FloatArray
    p_low: FloatArray
    p_high: FloatArray
    p_claim: FloatArray


CLAIM_SD = 1.0
"""Standard deviations that a claim stays below the probability: the cheapest that passes is too often a lucky one."""
_Z = np.array([[0.0], [-1.6449], [1.6449], [-CLAIM_SD]])
_FIELDS = ("slope", "intercept", "center", "level_var", "slope_var")


def _unknown() -> Array:
    return np.zeros(0)


@dataclass(frozen=True)
class Calibration:
    """Platt scaling per quality threshold and model, and its uncertainty; float64 [t, m], or [m] for one threshold.

    p_ok = sigmoid(slope * logit(p) + intercept). The variance of its log odds is level_var + slope_var * (logit(p) -
    center)^2: wide for a model of ten rows, narrow for one of thousands. A claim is a standard deviation below p_ok
    and at most `ceiling` [t], the highest that enough requests of the log have reached. Without the variances (bundles
    made before they were kept) interval and claim are p_ok itself. `thresholds` [t] ascend.
    """

    slope: Array
    intercept: Array
    center: Array = field(default_factory=_unknown)
    level_var: Array = field(default_factory=_unknown)
    slope_var: Array = field(default_factory=_unknown)
    ceiling: Array = field(default_factory=_unknown)
    thresholds: Array = field(default_factory=_unknown)

    def __post_init__(self) -> None:
        for name in _FIELDS:
            value = getattr(self, name)
            object.__setattr__(self, name, np.atleast_2d(value) if value.size else np.zeros_like(self.slope))
        for name, default in (("ceiling", 1.0), ("thresholds", 0.5)):
            if not getattr(self, name).size:
                object.__setattr__(self, name, np.full(len(self.slope), default))

    def apply(self, p: FloatArray, threshold_index: int = 0) -> FloatArray:
        """Calibrated probabilities, the same shape [..., m] as the scores; at a higher threshold never higher."""
        i = threshold_index
        intercept, slope, *_ = self._terms[i]
        odds = np.exp(slope * logit(p) + intercept)
        p_ok: FloatArray = np.reciprocal(odds + 1.0).astype(np.float32)
        return np.minimum(p_ok, self.apply(p, i - 1)) if i else p_ok

    def estimate(self, p: FloatArray, threshold_index: int = 0) -> Calibrated:
        """`apply`, with the interval and the claim."""
        return Calibrated(*self._rows(p, threshold_index))

    @cached_property
    def _terms(self) -> list[tuple[Array, Array, Array, Array, Array, np.float32]]:
        """Per threshold: intercept and slope, both negated, the variance as a polynomial of the score, the ceiling."""
        terms = zip(
            -self.intercept, -self.slope, self.center, self.level_var, self.slope_var, self.ceiling, strict=True
        )
        return [(a, b, v + s * c * c, -2.0 * s * c, s, np.float32(top)) for a, b, c, v, s, top in terms]

    def _rows(self, p: FloatArray, i: int) -> FloatArray:
        intercept, slope, constant, linear, square, ceiling = self._terms[i]
        x = logit(p)
        sd = np.sqrt(constant + x * (linear + square * x))
        odds = np.exp(slope * x + intercept - (_Z if p.ndim == 1 else _Z.reshape(4, *[1] * p.ndim)) * sd)
        odds += 1.0
        rows: FloatArray = np.reciprocal(odds).astype(np.float32)
        claim = rows[3]
        np.minimum(claim, ceiling, out=claim)
        return np.minimum(rows, self._rows(p, i - 1)) if i else rows

    def index(self, threshold: float | None) -> int:
        """Position of a quality threshold; None is the first. Raises ValueError for one that was not fitted."""
        return 0 if threshold is None else self.thresholds.tolist().index(threshold)

    def with_ceiling(self, ceiling: float) -> Calibration:
        """The same with no claim above `ceiling`."""
        return replace(self, ceiling=np.full(len(self.slope), ceiling))

    def with_model(self, **last: float | Array) -> Calibration:
        """The same with one more model, in last place: a number, or [t], for each of the five arrays by its name."""
        t = len(self.slope)
        column = {name: np.broadcast_to(np.asarray(last[name], dtype=np.float64), t)[:, None] for name in _FIELDS}
        wider = {name: np.concatenate([getattr(self, name), column[name]], axis=1) for name in _FIELDS}
        return replace(self, **wider)

    @classmethod
    def stack(cls, parts: Sequence[Calibration]) -> Calibration:
        """One calibration of several, fitted on the same scores for ascending quality thresholds."""
        names = cls.__dataclass_fields__
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def to_arrays(self) -> dict[str, Array]:
        """Everything under its name, for the bundle."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Calibration:
        """The inverse of `to_arrays`; other names are ignored."""
        return cls(**{name: arrays[name] for name in cls.__dataclass_fields__ if name in arrays})


@dataclass(frozen=True)
class LearnedEstimator:
    """Featurizer, the booster's trees and calibration together: `Router`'s learner."""

    featurizer: Featurizer
    trees: Trees
    calibration: Calibration

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The quality thresholds that a request may ask for, ascending; the first is the default."""
        return tuple(self.calibration.thresholds.tolist())

    def estimate(self, request: RouteRequest) -> Estimate:
        """Probabilities and tokens per model for one request."""
        return self.score(self.featurizer.transform(request), self.calibration.index(request.quality_threshold))

    def score(self, features: CandidateFeatures, threshold_index: int = 0) -> Estimate:
        """The estimate from a request's features: what `estimate` does after featurising."""
        raw = self.trees.predict(features.rows)
        known = self.calibration.estimate(blend(raw, features.parts), threshold_index)
        return Estimate(known.p_ok, features.output_tokens, features.input_tokens, features, *known[1:])

    def estimate_many(self, requests: Sequence[RouteRequest]) -> list[Estimate]:
        """`estimate` for many requests; the same numbers."""
        features = [self.featurizer.transform(request) for request in requests]
        if not features:
            return []
        m = len(features[0].rows)
        raw = self.trees.predict(np.concatenate([f.rows for f in features])).reshape(len(features), m)
        mixed = blend(raw, np.stack([f.parts for f in features], axis=1))
        made = []
        for p, f, request in zip(mixed, features, requests, strict=True):
            known = self.calibration.estimate(p, self.calibration.index(request.quality_threshold))
            made.append(Estimate(known.p_ok, f.output_tokens, f.input_tokens, None, *known[1:]))
        return made
