"""Golden rows: a few fixed requests with the probabilities that the learner gave where it was bundled.

A bundle whose bytes are all in order may still compute other numbers than it was judged by: another encoder library, a
numeric library that errs, parts that do not belong together. Loading asks the learner again and compares. The prompts
are made up, the same for every bundle; no customer's text is among them.
"""

from __future__ import annotations

import json

import numpy as np

from router_ml.errors import BundleError
from router_ml.quality import LearnedEstimator
from router_ml.types import FloatArray, Message, RouteRequest

TOLERANCE = 0.01
"""Largest difference of a probability that two machines may have. Sums in another order differ by some 1e-6, which may
send a row to another leaf of a tree, and one tree weighs less than this; another encoder is off by 0.1 and more."""
CONVERSATIONS: tuple[tuple[tuple[str, str], ...], ...] = (
    (("user", "What is the plural of mouse?"),),
    (("user", "Prove rigorously that every bounded monotone sequence of real numbers converges."),),
    (("user", "def mean(xs): return sum(xs) / len(xs)\n\nWhy does this fail on an empty list? Fix it."),),
    (("system", "You answer customers of a shop."), ("user", "Wo ist mein Paket? Bestellung 4711, seit drei Tagen.")),
    (("user", "Translate to French: good morning"), ("assistant", "Bonjour"), ("user", "and good night?")),
)


def to_bytes(estimator: LearnedEstimator) -> bytes:
    """The bundle's file: the requests, and what the learner says of them for each quality threshold."""
    p_ok = [_p_ok(estimator, _request(messages)).tolist() for messages in CONVERSATIONS]
    return json.dumps({"messages": CONVERSATIONS, "p_ok": p_ok}, indent=1).encode()


def check(estimator: LearnedEstimator, data: bytes, name: str) -> float:
    """Asks the learner for the golden rows again; returns the largest difference.

    Raises BundleError that names `name` and the difference where that is above `TOLERANCE`, or no number.
    """
    try:
        said = json.loads(data)
        requests = [_request(messages) for messages in said["messages"]]
        expected = np.array(said["p_ok"], dtype=np.float64)  # [requests, thresholds, models]
        found = np.stack([_p_ok(estimator, request) for request in requests])
        if not found.size or found.shape != expected.shape:
            raise ValueError(f"probabilities of shape {expected.shape}, not {found.shape}")
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{name} holds no golden rows of this bundle ({error}): train it again") from None
    difference = np.nan_to_num(np.abs(found - expected), nan=np.inf)
    largest = float(difference.max())
    if largest > TOLERANCE:
        row, threshold, model = np.unravel_index(int(difference.argmax()), difference.shape)
        models = getattr(estimator.featurizer, "catalog", None)
        whose = models.ids[model] if models is not None else str(model)
        raise BundleError(
            f"{name} expects p_ok {expected[row, threshold, model]:.4f} of {whose!r} for its request {row + 1}, and it "
            f"is {found[row, threshold, model]:.4f} here (the largest difference, {largest:.4f}; {TOLERANCE} is "
            "allowed): install the versions that the bundle was made with, or train it again"
        )
    return largest


def _request(messages: object) -> RouteRequest:
    turns = [(role, text) for role, text in messages]  # type: ignore[attr-defined]
    if not turns or not all(isinstance(part, str) for turn in turns for part in turn):
        raise ValueError("a request is a list of pairs of role and text")
    return RouteRequest(messages=tuple(Message(role, text) for role, text in turns))


def _p_ok(estimator: LearnedEstimator, request: RouteRequest) -> FloatArray:
    """Probabilities [t, m] for each quality threshold."""
    features = estimator.featurizer.transform(request)
    return np.stack([estimator.score(features, i).p_ok for i in range(len(estimator.thresholds))])
