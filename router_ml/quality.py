"""The learner: a pooled LightGBM classifier over (request, candidate) rows, averaged with linear parts, calibrated."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import lightgbm as lgb
import numpy as np
import numpy.typing as npt

from router_ml.types import CandidateFeatures, Estimate, Featurizer, FloatArray, RouteRequest

BOOSTER_SHARE = 0.5
"""Weight of the booster in the average; the linear parts share the rest (docs/log.md has the trials)."""
_EPS = 1e-3

# The loaded library: its C API is documented, only the Python name for it is private.
_LIB = lgb.basic._LIB  # type: ignore[attr-defined]
# A prototype of our own: LightGBM's Python code goes on using the library's.
_predict = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.c_int,
    ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p,
)(("LGBM_BoosterPredictForMat", _LIB))  # fmt: skip


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


@dataclass(frozen=True)
class Calibration:
    """Platt scaling per model, p_ok = sigmoid(slope * logit(p) + intercept); both float64 [m]."""

    slope: npt.NDArray[np.float64]
    intercept: npt.NDArray[np.float64]

    def apply(self, p: FloatArray) -> FloatArray:
        """Calibrated probabilities, the same shape [..., m] as the scores."""
        odds = np.exp(-self.intercept - self.slope * logit(p))
        return np.reciprocal(odds + 1.0).astype(np.float32)


class RowPredictor:
    """`Booster.predict` for the few rows of one request, without what it spends on every call in Python.

    It calls the same function of LightGBM's C API, `LGBM_BoosterPredictForMat`, and gives the same numbers.
    """

    def __init__(self, booster: lgb.Booster) -> None:
        self._booster = booster  # keeps the handle alive
        self._handle = booster._handle

    def __call__(self, rows: FloatArray) -> FloatArray:
        """Probabilities float32 [m] of C-contiguous float32 rows [m, d]."""
        if rows.dtype != np.float32:
            raise TypeError(f"rows have to be float32, not {rows.dtype}")
        m, d = rows.shape
        out, length = (ctypes.c_double * m)(), ctypes.c_int64()
        at = ctypes.byref(ctypes.c_char.from_buffer(rows.data))
        # float32 (0), row-major (1), normal prediction (0), from the first iteration (0) to the last (-1)
        status = _predict(self._handle, at, 0, m, d, 1, 0, 0, -1, b"num_threads=1", ctypes.byref(length), out)
        if status:
            raise lgb.basic.LightGBMError(_LIB.LGBM_GetLastError().decode())
        return np.array(out, dtype=np.float32)


@dataclass(frozen=True)
class LearnedEstimator:
    """Featurizer, booster and calibration together: `Router`'s learner."""

    featurizer: Featurizer
    booster: lgb.Booster
    calibration: Calibration

    @cached_property
    def _predict_rows(self) -> RowPredictor:
        return RowPredictor(self.booster)

    def estimate(self, request: RouteRequest) -> Estimate:
        """Probabilities and tokens per model for one request."""
        return self.score(self.featurizer.transform(request))

    def score(self, features: CandidateFeatures) -> Estimate:
        """The estimate from a request's features: what `estimate` does after featurising."""
        raw = self._predict_rows(features.rows)
        p_ok = self.calibration.apply(blend(raw, features.parts))
        return Estimate(p_ok, features.output_tokens, features.input_tokens, features=features)

    def estimate_many(self, requests: Sequence[RouteRequest]) -> list[Estimate]:
        """`estimate` for many requests; the same numbers, one call of LightGBM."""
        features = [self.featurizer.transform(request) for request in requests]
        if not features:
            return []
        m = len(features[0].rows)
        rows = np.concatenate([f.rows for f in features])
        threads = 1 if len(rows) < 20_000 else 0
        raw = np.asarray(self.booster.predict(rows, num_threads=threads), dtype=np.float32).reshape(len(features), m)
        p_ok = self.calibration.apply(blend(raw, np.stack([f.parts for f in features], axis=1)))
        return [Estimate(p, f.output_tokens, f.input_tokens) for p, f in zip(p_ok, features, strict=True)]
