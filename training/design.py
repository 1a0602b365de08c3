"""The unsupervised half of the outcome features: landmarks, vocabulary, and the spaces that heads are fitted in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import sparse

from features.encoder import Encoder
from features.featurizer import RequestFeatures, RequestFeaturizer
from features.lexicon import Lexicon, term_keys
from features.outcomes import KernelMap
from features.text import text_statistics
from features.transformer import TransformerEncoder
from router_ml.types import FloatArray, RouteRequest

Array = npt.NDArray[np.float64]
LEXICAL_DIM = 512
WORDING_DIM = 64
"""Main directions of the wording that the network sees; what it costs to serve grows with them."""
MAX_TERMS = 30_000
STATISTICS_SCALE = 0.03
"""Spread of a standardised text statistic beside the kernel's features, whose squares sum to 1."""
_LEAST_EIGENVALUE = 1e-4
_CHUNK = 4096


@dataclass(frozen=True)
class KernelShape:
    """How finely the kernel sees embeddings: landmark requests, the width `gamma`, and the main directions kept."""

    landmarks: int
    gamma: float
    dim: int


TABLE_SHAPE = KernelShape(384, 4.0, 256)
TRANSFORMER_SHAPE = KernelShape(1500, 2.0, 512)
"""A transformer's embeddings tell more apart, and beside its own time that of more landmarks does not count."""


@dataclass(frozen=True)
class KernelDesign:
    """Kernel vectors [q + s] to the space [r] that the ridge regression works in: whitened, rotated, cut."""

    basis: Array

    def matrix(self, features: Sequence[RequestFeatures]) -> FloatArray:
        """The design [n, r]."""
        basis = self.basis.astype(np.float32)
        chunks = [np.stack([f.kernel for f in features[i : i + _CHUNK]]) for i in range(0, len(features), _CHUNK)]
        return np.concatenate([chunk @ basis for chunk in chunks])

    def fold(self, weights: Array) -> Array:
        """Weights [r, m] of a head as weights [q + s, m] on the kernel vector itself."""
        return self.basis @ weights


@dataclass(frozen=True)
class LexicalDesign:
    """Sets of terms to the space [r] of a truncated SVD (latent semantic analysis; Deerwester et al., JASIS 1990)."""

    idf: Array
    components: Array

    def matrix(self, features: Sequence[RequestFeatures]) -> FloatArray:
        """The design [n, r]: TF-IDF vectors of length 1, projected."""
        projected: FloatArray = np.asarray(
            tf_idf([f.term_ids for f in features], self.idf) @ self.components, np.float32
        )
        return projected

    def fold(self, weights: Array) -> Array:
        """Weights [r, m] of a head as weights [v, m] on the terms themselves."""
        return (self.components @ weights) * self.idf[:, None]

    def directions(self) -> Array:
        """The main directions of the wording as weights [v, c] on the terms."""
        return self.components[:, :WORDING_DIM] * self.idf[:, None]


def fit_kernel(
    requests: Sequence[RouteRequest],
    texts: Sequence[str],
    text_words: Sequence[list[str]],
    encoder: Encoder,
    seed: int,
) -> tuple[KernelMap, KernelDesign]:
    """Draws landmarks among the requests and finds the r main directions of the kernel's feature space."""
    shape = TRANSFORMER_SHAPE if isinstance(encoder, TransformerEncoder) else TABLE_SHAPE
    rng = np.random.default_rng(seed)
    sample = rng.permutation(len(requests))[:_CHUNK]
    statistics = np.stack([text_statistics(requests[i], texts[i], text_words[i]) for i in sample]).astype(np.float64)
    spread = statistics.std(axis=0)
    scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-6)
    embeddings = np.unique(np.stack([encoder.embed(encoder.token_ids(text_words[i])) for i in sample]), axis=0)
    drawn = np.sort(rng.permutation(len(embeddings))[: shape.landmarks])
    landmarks = np.ascontiguousarray(embeddings[drawn].T)
    kernel_map = KernelMap(landmarks, shape.gamma, statistics.mean(axis=0).astype(np.float32), scale.astype(np.float32))
    similarity = np.exp(shape.gamma * (landmarks.T.astype(np.float64) @ landmarks - 1.0))
    values, vectors = np.linalg.eigh(similarity)
    keep = values > _LEAST_EIGENVALUE
    whiten = vectors[:, keep] / np.sqrt(values[keep])
    nystrom = np.exp(shape.gamma * (embeddings.astype(np.float64) @ landmarks - 1.0)) @ whiten
    _, directions = np.linalg.eigh(np.cov(nystrom, rowvar=False).reshape(whiten.shape[1], -1))
    top = whiten @ directions[:, ::-1][:, : shape.dim]
    q, s = len(landmarks.T), statistics.shape[1]
    basis = np.zeros((q + s, top.shape[1] + s))
    basis[:q, : top.shape[1]] = top
    basis[q:, top.shape[1] :] = STATISTICS_SCALE * np.eye(s)
    return kernel_map, KernelDesign(basis)


def fit_lexicon(tokens: Sequence[npt.NDArray[np.int64]], vocabulary: int, seed: int) -> tuple[Lexicon, LexicalDesign]:
    """The terms of at least two requests, the `MAX_TERMS` most frequent of them, and their SVD."""
    from sklearn.decomposition import TruncatedSVD

    n = len(tokens)
    present = [np.unique(term_keys(ids, vocabulary)) for ids in tokens]
    keys, frequency = np.unique(np.concatenate(present), return_counts=True)
    by_frequency = np.lexsort((keys, -frequency))[:MAX_TERMS]
    kept = np.sort(by_frequency[frequency[by_frequency] >= 2])
    keys, frequency = keys[kept], frequency[kept]
    lexicon = Lexicon(vocabulary, keys, (np.log((1.0 + n) / (1.0 + frequency)) + 1.0).astype(np.float32))
    idf = lexicon.idf.astype(np.float64)
    matrix = tf_idf([lexicon.term_ids(ids) for ids in tokens], idf)
    dim = min(LEXICAL_DIM, n - 1, len(keys) - 1)
    if dim < 1:  # no two requests share a term: the lexical head then says each model's mean
        return lexicon, LexicalDesign(idf, np.zeros((len(keys), 1)))
    svd = TruncatedSVD(dim, random_state=seed, n_iter=4).fit(matrix)
    return lexicon, LexicalDesign(idf, svd.components_.T.astype(np.float64))


def tf_idf(term_ids: Sequence[Sequence[int] | npt.NDArray[np.integer]], idf: Array) -> sparse.csr_matrix:
    """Sets of terms as rows of length 1 with weights idf, sparse [n, v]."""
    starts = np.concatenate([[0], np.cumsum([len(ids) for ids in term_ids])])
    columns = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in term_ids])
    values = idf[columns]
    norms = np.sqrt(np.maximum(np.add.reduceat(np.append(values**2, 0.0), starts[:-1]), 1e-12))
    empty = np.diff(starts) == 0
    norms[empty] = 1.0
    values = values / np.repeat(norms, np.diff(starts))
    return sparse.csr_matrix((values, columns, starts), shape=(len(term_ids), len(idf)))


def fit_request_featurizer(
    requests: Sequence[RouteRequest],
    texts: Sequence[str],
    text_words: Sequence[list[str]],
    encoder: Encoder,
    seed: int,
) -> tuple[RequestFeaturizer, KernelDesign, LexicalDesign]:
    """Everything that no outcome enters, from the training requests alone."""
    kernel_map, kernel = fit_kernel(requests, texts, text_words, encoder, seed)
    tokens = [encoder.token_ids(w) for w in text_words]
    lexicon, lexical = fit_lexicon(tokens, len(encoder.tokens), seed)
    return RequestFeaturizer(encoder, kernel_map, lexicon), kernel, lexical
