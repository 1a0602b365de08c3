"""Outcome features: what past outcomes say of each candidate on a request like this one.

Three heads with an output per model. The kernel head sees the request's similarity to landmark requests (Nyström
approximation of kernel ridge regression; Williams & Seeger 2001) beside the text statistics, the lexical head sees
TF-IDF weights of words and word pairs, and the network, with one hidden layer, sees the embedding, the statistics and
the main directions of the wording. `training.heads` and `training.network` fit them; here they are only applied.
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

_ZERO, _HALF, _ONE = np.float32(0.0), np.float32(0.5), np.float32(1.0)
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
    "network_w1",
    "network_b1",
    "network_w2",
    "network_b2",
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

    `kernel_w` [q + s, m] gives P(ok) per model; `lexical_w` [v, m + c] gives P(ok) and the c main directions of the
    wording. The network's `network_w1` [e + c + s, h] takes embedding, directions and statistics, its `network_w2`
    [h, 2m] gives log odds and ln(output tokens) per model; `tokens_scale` [m] turns exp(ln tokens) into an unbiased
    mean (Duan's smearing, JASA 1983).
    """

    kernel_w: FloatArray
    kernel_b: FloatArray
    lexical_w: FloatArray
    lexical_b: FloatArray
    tokens_scale: FloatArray
    network_w1: FloatArray
    network_b1: FloatArray
    network_w2: FloatArray
    network_b2: FloatArray

    def apply(
        self, kernel: FloatArray, embedding: FloatArray, term_ids: npt.NDArray[np.int64], lexicon: Lexicon
    ) -> tuple[FloatArray, FloatArray]:
        """Parts float32 [3, m] (each head's estimate of P(ok), in [0, 1]) and output tokens float32 [m]."""
        m = len(self.lexical_b)
        wording = project(term_ids, self.lexical_w, lexicon)
        seen = np.concatenate(
            (embedding, wording[m:], kernel[len(embedding) + len(wording) - m - len(self.network_w1) :])
        )
        hidden = seen @ self.network_w1
        hidden += self.network_b1
        np.maximum(hidden, _ZERO, out=hidden)
        parts = np.empty((3, m), dtype=np.float32)
        np.dot(kernel, self.kernel_w, out=parts[0])
        parts[0] += self.kernel_b
        np.add(wording[:m], self.lexical_b, out=parts[1])
        out = hidden @ self.network_w2
        out += self.network_b2
        np.tanh(out[:m] * _HALF, out=parts[2])  # the logistic function of the odds, which cannot overflow
        parts[2] *= _HALF
        parts[2] += _HALF
        np.minimum(np.maximum(parts, _ZERO, out=parts), _ONE, out=parts)
        tokens: FloatArray = np.exp(np.minimum(out[m:], np.float32(14.0))) * self.tokens_scale
        return parts, tokens

    def with_model(self, mix: FloatArray, shift: float, tokens_mix: FloatArray, tokens_factor: float) -> OutcomeHeads:
        """The heads with one more model in last place, whose columns are mixtures of those that are there.

        Its estimates of P(ok) are the existing models', weighted by `mix` [m], plus `shift` (in the network the same of
        their log odds, whose slope at one half is 4); its output tokens are
        their geometric mean, weighted by `tokens_mix` [m] (which sums to 1), times `tokens_factor`. The other models'
        columns stay as they are.
        """
        m = len(self.lexical_b)

        def more(weights: FloatArray, by: FloatArray, add: float = 0.0) -> FloatArray:
            new = weights.astype(np.float64) @ by.astype(np.float64) + add
            return np.concatenate([weights, new[..., None].astype(np.float32)], axis=-1)

        scale = math.exp(float(np.log(self.tokens_scale.astype(np.float64)) @ tokens_mix)) * tokens_factor
        odds_shift = 4.0 * (shift + 0.5 * (float(mix.sum()) - 1.0))
        w2, b2 = self.network_w2, self.network_b2
        return OutcomeHeads(
            kernel_w=more(self.kernel_w, mix),
            kernel_b=more(self.kernel_b, mix, shift),
            lexical_w=np.concatenate([more(self.lexical_w[:, :m], mix), self.lexical_w[:, m:]], axis=1),
            lexical_b=more(self.lexical_b, mix, shift),
            tokens_scale=np.append(self.tokens_scale, np.float32(scale)),
            network_w1=self.network_w1,
            network_b1=self.network_b1,
            network_w2=np.concatenate([more(w2[:, :m], mix), more(w2[:, m:], tokens_mix)], axis=1),
            network_b2=np.concatenate([more(b2[:m], mix, odds_shift), more(b2[m:], tokens_mix)]),
        )


def project(term_ids: npt.NDArray[np.int64], weights: FloatArray, lexicon: Lexicon) -> FloatArray:
    """A set of terms as a TF-IDF vector of length 1 times `weights` [v, r], whose rows hold the idf; float32 [r]."""
    if not len(term_ids):
        return np.zeros(weights.shape[1], dtype=np.float32)
    at = np.array(term_ids, dtype=np.intp)
    idf = lexicon.idf.take(at)
    projected: FloatArray = np.add.reduce(weights.take(at, axis=0), axis=0)
    projected *= np.float32(1.0 / math.sqrt(np.dot(idf, idf)))
    return projected


def to_arrays(kernel_map: KernelMap, heads: OutcomeHeads) -> dict[str, npt.NDArray[np.generic]]:
    """Everything that a bundle keeps of the outcome features, by name."""
    return {
        "landmarks": kernel_map.landmarks,
        "gamma": np.array(kernel_map.gamma),
        "stat_mean": kernel_map.stat_mean,
        "stat_scale": kernel_map.stat_scale,
        **{name: getattr(heads, name) for name in ARRAYS[4:]},
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
