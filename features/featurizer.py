"""One request to the rows that the learner sees: the same path in training and in serving."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from features.encoder import Encoder
from features.lexicon import Lexicon
from features.outcomes import KernelMap, OutcomeHeads
from features.text import STATISTICS, conversation_chars, request_text, text_statistics, words
from router_ml.catalog import Catalog
from router_ml.types import CandidateFeatures, FloatArray, ModelCard, RouteRequest

DESCRIPTORS = ("model_success", "model_log_input_price", "model_log_output_price")
PARTS = ("kernel", "lexical", "network")


@dataclass(frozen=True, slots=True)
class RequestFeatures:
    """What is known of a request before any outcome is looked at."""

    kernel: FloatArray
    statistics: FloatArray
    term_ids: npt.NDArray[np.int64]
    chars: int
    embedding: FloatArray


class ReadRequest(NamedTuple):
    """A request before its embedding: text statistics float32, the encoder's token ids, the conversation's length."""

    statistics: FloatArray
    tokens: npt.NDArray[np.int64]
    chars: int


@dataclass(frozen=True)
class RequestFeaturizer:
    """The part that no label enters: encoder, kernel map and lexicon. It is fitted once and shared by all folds."""

    encoder: Encoder
    kernel_map: KernelMap
    lexicon: Lexicon

    def transform(self, request: RouteRequest) -> RequestFeatures:
        """Features of one request."""
        seen = self.read(request)
        return self.finish(seen, self.encoder.embed(seen.tokens))

    def read(self, request: RouteRequest) -> ReadRequest:
        """What comes before the embedding, which a transformer takes long for."""
        text = request_text(request)
        text_words = words(text)
        statistics = text_statistics(request, text, text_words)
        return ReadRequest(statistics, self.encoder.token_ids(text_words), conversation_chars(request))

    def finish(self, seen: ReadRequest, embedding: FloatArray) -> RequestFeatures:
        """What comes after it."""
        kernel = self.kernel_map.apply(embedding, seen.statistics)
        return RequestFeatures(kernel, seen.statistics, self.lexicon.term_ids(seen.tokens), seen.chars, embedding)


@dataclass(frozen=True)
class CandidateFeaturizer:
    """Requests to one row per candidate: outcome features, model descriptors, text statistics.

    `success` float32 [m] is each model's mean rate of acceptable answers, shrunk to the mean of all; `input_tokens_fit`
    holds (a, b) of input tokens = a + b * characters. In training every fold has its own `heads`, fitted on the others.
    The first `trained` models (None: all) are those of the training; a row's means run over these, so that a model
    which joins later changes nothing for them.
    """

    catalog: Catalog
    requests: RequestFeaturizer
    heads: OutcomeHeads
    success: FloatArray
    input_tokens_fit: tuple[float, float]
    trained: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of a row."""
        return (*PARTS, *(f"{p}_mean" for p in PARTS), *DESCRIPTORS, *STATISTICS)

    @cached_property
    def _template(self) -> FloatArray:
        """A row per model with its descriptors filled in, [m, d]."""
        rows = np.zeros((len(self.catalog), len(self.names)), dtype=np.float32)
        rows[:, 2 * len(PARTS)] = self.success
        rows[:, 2 * len(PARTS) + 1] = np.log1p(self.catalog.input_price * 1e6)
        rows[:, 2 * len(PARTS) + 2] = np.log1p(self.catalog.output_price * 1e6)
        return rows

    def with_heads(self, heads: OutcomeHeads, success: FloatArray) -> CandidateFeaturizer:
        """The same path with other heads: what a fold of training uses."""
        return replace(self, heads=heads, success=success)

    def with_model(self, card: ModelCard, heads: OutcomeHeads, success: float) -> CandidateFeaturizer:
        """The same path for one more model, in last place, with heads that have it. The others' rows stay as they are.

        Raises InputError when the model is there already, or its sibling is not.
        """
        return replace(
            self,
            catalog=self.catalog.with_card(card),
            heads=heads,
            success=np.append(self.success, np.float32(success)),
            trained=len(self.catalog) if self.trained is None else self.trained,
        )

    def transform(self, request: RouteRequest) -> CandidateFeatures:
        """The features of one live request."""
        return self.rows(self.requests.transform(request))

    def rows(self, features: RequestFeatures) -> CandidateFeatures:
        """Rows [m, d] from a request's own features."""
        parts, tokens = self.heads.apply(features.kernel, features.embedding, features.term_ids, self.requests.lexicon)
        k, m = parts.shape
        rows = self._template.copy()
        rows[:, :k] = parts.T
        known = m if self.trained is None else self.trained
        rows[:, k : 2 * k] = np.add.reduce(parts[:, :known], axis=1) * np.float32(1.0 / known)
        rows[:, -len(STATISTICS) :] = features.statistics
        a, b = self.input_tokens_fit
        return CandidateFeatures(rows, parts, tokens, a + b * features.chars, features.embedding)
