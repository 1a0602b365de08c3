"""Outcome features: what past outcomes say of each candidate on a request like this one.

Two linear heads with an output per model. The kernel head sees the request's similarity to landmark requests (Nyström
approximation of kernel ridge regression; Williams & Seeger 2001) beside the text statistics, the lexical head sees
TF-IDF weights of words and word pairs. `training.heads` fits them; here they are only applied, in some 100 µs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from features.lexicon import Lexicon
from router_ml.errors import BundleError
from router_ml.types import FloatArray

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
ARRAYS = (
    "landmarks",
    "gamma",
    "stat_mean",
    "stat_scale",
    "kernel_w",
    "kernel_b",
    "lexical_w",
    "lexical_b",
    "tokens_scale",
)


@dataclass(frozen=True)
class KernelMap:
    """Similarities exp(gamma * (cosine - 1)) to q landmark embeddings, and standardised text statistics.

    `landmarks` is float32 [d, q], `stat_mean` and `stat_scale` are float32 [s].
    """

    landmarks: FloatArray
    gamma: float
    stat_mean: FloatArray
    stat_scale: FloatArray

    def apply(self, embedding: FloatArray, statistics: FloatArray) -> FloatArray:
        """The vector [q + s] that the kernel head multiplies; float32."""
        q = self.landmarks.shape[1]
        out = np.empty(q + len(statistics), dtype=np.float32)
        similarity = out[:q]
        np.dot(embedding, self.landmarks, out=similarity)
        similarity -= np.float32(1.0)
        similarity *= np.float32(self.gamma)
        np.exp(similarity, out=similarity)
        standard = (statistics - self.stat_mean) * self.stat_scale
        np.minimum(np.maximum(standard, np.float32(-8.0)), np.float32(8.0), out=out[q:])
        return out


@dataclass(frozen=True)
class OutcomeHeads:
    """The fitted heads, all float32.

    `kernel_w` [q + s, 2m] gives P(ok) and ln(output tokens) per model, `lexical_w` [v, m] gives P(ok); `tokens_scale`
    [m] turns exp(ln tokens) into an unbiased mean (Duan's smearing, JASA 1983).
    """

    kernel_w: FloatArray
    kernel_b: FloatArray
    lexical_w: FloatArray
    lexical_b: FloatArray
    tokens_scale: FloatArray

    def apply(
        self, kernel: FloatArray, term_ids: npt.NDArray[np.int64], lexicon: Lexicon
    ) -> tuple[FloatArray, FloatArray]:
        """Parts float32 [2, m] (kernel and lexical estimate of P(ok), in [0, 1]) and output tokens float32 [m]."""
        m = len(self.lexical_b)
        from_kernel = kernel @ self.kernel_w + self.kernel_b
        parts = np.empty((2, m), dtype=np.float32)
        parts[0] = from_kernel[:m]
        if len(term_ids):
            at = np.array(term_ids, dtype=np.intp)
            idf = lexicon.idf.take(at)
            parts[1] = (
                np.add.reduce(self.lexical_w.take(at, axis=0), axis=0) / math.sqrt(np.dot(idf, idf)) + self.lexical_b
            )
        else:
            parts[1] = self.lexical_b
        np.minimum(np.maximum(parts, _ZERO, out=parts), _ONE, out=parts)
        tokens: FloatArray = np.exp(np.minimum(from_kernel[m:], np.float32(14.0))) * self.tokens_scale
        return parts, tokens

    def with_model(self, mix: FloatArray, shift: float, tokens_mix: FloatArray, tokens_factor: float) -> OutcomeHeads:
        """The heads with one more model in last place, whose columns are mixtures of those that are there.

        Its estimates of P(ok) are the existing models', weighted by `mix` [m], plus `shift`; its output tokens are
        their geometric mean, weighted by `tokens_mix` [m] (which sums to 1), times `tokens_factor`. The other models'
        columns stay as they are.
        """
        m = len(self.lexical_b)

        def more(weights: FloatArray, by: FloatArray, add: float = 0.0) -> FloatArray:
            new = weights.astype(np.float64) @ by.astype(np.float64) + add
            return np.concatenate([weights, new[..., None].astype(np.float32)], axis=-1)

        scale = math.exp(float(np.log(self.tokens_scale.astype(np.float64)) @ tokens_mix)) * tokens_factor
        return OutcomeHeads(
            kernel_w=np.concatenate([more(self.kernel_w[:, :m], mix), more(self.kernel_w[:, m:], tokens_mix)], axis=1),
            kernel_b=np.concatenate([more(self.kernel_b[:m], mix, shift), more(self.kernel_b[m:], tokens_mix)]),
            lexical_w=more(self.lexical_w, mix),
            lexical_b=more(self.lexical_b, mix, shift),
            tokens_scale=np.append(self.tokens_scale, np.float32(scale)),
        )


def to_arrays(kernel_map: KernelMap, heads: OutcomeHeads) -> dict[str, npt.NDArray[np.generic]]:
    """Everything that a bundle keeps of the outcome features, by name."""
    return {
        "landmarks": kernel_map.landmarks,
        "gamma": np.array(kernel_map.gamma),
        "stat_mean": kernel_map.stat_mean,
        "stat_scale": kernel_map.stat_scale,
        "kernel_w": heads.kernel_w,
        "kernel_b": heads.kernel_b,
        "lexical_w": heads.lexical_w,
        "lexical_b": heads.lexical_b,
        "tokens_scale": heads.tokens_scale,
    }


def from_arrays(arrays: Mapping[str, npt.NDArray[np.generic]]) -> tuple[KernelMap, OutcomeHeads]:
    """The inverse of `to_arrays`. Raises BundleError when an array is missing."""
    missing = [name for name in ARRAYS if name not in arrays]
    if missing:
        raise BundleError(f"the bundle's outcome features lack {', '.join(missing)}: train it again")
    a = {name: np.asarray(arrays[name]) for name in ARRAYS}
    kernel_map = KernelMap(
        np.ascontiguousarray(a["landmarks"], dtype=np.float32),
        float(a["gamma"]),
        a["stat_mean"].astype(np.float32),
        a["stat_scale"].astype(np.float32),
    )
    heads = OutcomeHeads(*(np.ascontiguousarray(a[name], dtype=np.float32) for name in ARRAYS[4:]))
    return kernel_map, heads
