"""The learner: a pooled LightGBM classifier over (request, candidate) rows, averaged with linear parts, calibrated."""

from __future__ import annotations

import ctypes
import threading
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
_predict_row = _LIB.LGBM_BoosterPredictForMatSingleRowFast
_predict_row.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]


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
        return (1.0 / (1.0 + np.exp(-(self.slope * logit(p) + self.intercept)))).astype(np.float32)


class RowPredictor:
    """LightGBM's prepared single-row prediction (`LGBM_BoosterPredictForMatSingleRowFast` of its C API).

    The same numbers as `Booster.predict` in about half the time for a dozen rows, which otherwise goes into setting a
    call up. One call at a time: the prepared state is shared, so calls are serialised.
    """

    def __init__(self, booster: lgb.Booster) -> None:
        self._booster = booster  # keeps the handle alive
        self._config = ctypes.c_void_p()
        self._lock = threading.Lock()
        features = ctypes.c_int32(booster.num_feature())
        # data type 0 is float32, prediction 0 is normal, from iteration 0 to the last (-1)
        _check(
            _LIB.LGBM_BoosterPredictForMatSingleRowFastInit(
                booster._handle, 0, 0, -1, 0, features, b"num_threads=1", ctypes.byref(self._config)
            )
        )
        self._length = ctypes.c_int64()
        self._length_at = ctypes.addressof(self._length)

    def __call__(self, rows: FloatArray) -> FloatArray:
        """Probabilities float32 [m] of C-contiguous float32 rows [m, d]."""
        m, stride = len(rows), rows.strides[0]
        out = np.empty(m, dtype=np.float64)
        row_at, out_at = rows.ctypes.data, out.ctypes.data
        with self._lock:
            for i in range(m):
                status = _predict_row(self._config, row_at + i * stride, self._length_at, out_at + 8 * i)
                if status:
                    _check(status)
        return out.astype(np.float32)

    def __del__(self) -> None:
        if self._config:
            _LIB.LGBM_FastConfigFree(self._config)


def _check(status: int) -> None:
    if status:
        raise lgb.basic.LightGBMError(_LIB.LGBM_GetLastError().decode())


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
        return Estimate(p_ok, features.output_tokens, features.input_tokens)

    def estimate_many(self, requests: Sequence[RouteRequest]) -> list[Estimate]:
        """`estimate` for many requests; the same numbers, one call of LightGBM."""
        features = [self.featurizer.transform(request) for request in requests]
        if not features:
            return []
        m = len(features[0].rows)
        rows = np.concatenate([f.rows for f in features])
        raw = np.asarray(self.booster.predict(rows), dtype=np.float32).reshape(len(features), m)
        p_ok = self.calibration.apply(blend(raw, np.stack([f.parts for f in features], axis=1)))
        return [Estimate(p, f.output_tokens, f.input_tokens) for p, f in zip(p_ok, features, strict=True)]
