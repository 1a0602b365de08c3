"""A learner in steps, for whoever must not wait for the embedding: what comes before it, the embedding, the rest.

All steps together are what `LearnedEstimator.estimate` does, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from features.featurizer import CandidateFeaturizer, ReadRequest
from features.transformer import TransformerEncoder
from router_ml.quality import LearnedEstimator
from router_ml.router import Estimator
from router_ml.types import Estimate, FloatArray, RouteRequest


@dataclass(frozen=True)
class Staged:
    """`estimator` in steps; `path` is its featurizer, `encoder` its encoder."""

    estimator: LearnedEstimator
    path: CandidateFeaturizer
    encoder: TransformerEncoder

    @classmethod
    def of(cls, estimator: Estimator) -> Staged | None:
        """The steps of a learner whose encoder is a transformer; None for others, which need none."""
        if isinstance(estimator, LearnedEstimator) and isinstance(path := estimator.featurizer, CandidateFeaturizer):
            encoder = path.requests.encoder
            if isinstance(encoder, TransformerEncoder):
                return cls(estimator, path, encoder)
        return None

    def read(self, request: RouteRequest) -> ReadRequest:
        """The first step: some 100 microseconds. Then comes `encoder.embed` of its tokens, milliseconds."""
        return self.path.requests.read(request)

    def rest(self, seen: ReadRequest, embedding: FloatArray) -> Embedded:
        """An estimator for that one request, which takes the last step when it is asked."""
        return Embedded(self, seen, embedding)


@dataclass(frozen=True, slots=True)
class Embedded:
    """What is left to do for one request after its embedding; `Router.decide_with_estimate` takes it."""

    staged: Staged
    seen: ReadRequest
    embedding: FloatArray

    def estimate(self, request: RouteRequest) -> Estimate:
        """The estimate of the request that was read: of `request` only its quality threshold is looked at."""
        path, estimator = self.staged.path, self.staged.estimator
        features = path.rows(path.requests.finish(self.seen, self.embedding))
        return estimator.score(features, estimator.calibration.index(request.quality_threshold))
