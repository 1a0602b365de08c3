"""Bundles to routers, and back: the one place that knows which file of a bundle holds what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from features import golden
from features.encoder import Encoder, StaticEncoder
from features.featurizer import CandidateFeaturizer, RequestFeaturizer
from features.lexicon import Lexicon
from features.neighbours import Neighbours, from_bytes, to_bytes
from features.outcomes import from_arrays, to_arrays
from features.transformer import Bert, TransformerEncoder
from router_ml.bundle import MANIFEST, Bundle, pack_arrays, read_bundle, read_later, write_bundle
from router_ml.costs import Reliability
from router_ml.errors import BundleError, InputError
from router_ml.policy import Policy
from router_ml.quality import Calibration, LearnedEstimator
from router_ml.router import Router
from router_ml.trees import Trees

BOOSTER, ENCODER, TOKENS, OUTCOMES = "booster.txt", "encoder.npz", "tokens.json", "outcomes.npz"
NEIGHBOURS, GOLDEN = "neighbours.npz", "golden.json"
TRANSFORMER, TRANSFORMER_CONFIG = "transformer.safetensors", "transformer.json"
TWIN = "twin-"
"""What the names of the twin's files begin with: the learner that answers where the transformer is late."""


@dataclass(frozen=True)
class Learned:
    """A learner as a bundle keeps it; `neighbours` are the past requests that its explanations show."""

    estimator: LearnedEstimator
    neighbours: Neighbours | None = None


def save_router(
    out: str | Path,
    estimator: LearnedEstimator,
    manifest: dict[str, Any],
    neighbours: Neighbours | None = None,
    twin: Learned | None = None,
) -> str:
    """Writes a bundle that `load_router` reads; returns its version.

    `manifest` adds what training knows, `neighbours` are the past requests that explanations show. `twin`, of the same
    catalogue and quality thresholds, stands in for a learner that takes milliseconds.
    """
    files, described = _written(Learned(estimator, neighbours))
    full = {**manifest, "catalog": _path(estimator).catalog.to_json(), **described}
    if twin is not None:
        twin_files, full["twin"] = _written(twin)
        files |= {TWIN + name: data for name, data in twin_files.items()}
    return write_bundle(out, full, files)


def _path(estimator: LearnedEstimator) -> CandidateFeaturizer:
    if not isinstance(estimator.featurizer, CandidateFeaturizer):
        raise TypeError("only a CandidateFeaturizer can be bundled")
    return estimator.featurizer


def _written(learned: Learned) -> tuple[dict[str, bytes], dict[str, Any]]:
    """A learner's files, and what the manifest says of it."""
    estimator, featurizer = learned.estimator, _path(learned.estimator)
    encoder, lexicon = featurizer.requests.encoder, featurizer.requests.lexicon
    outcomes = to_arrays(featurizer.requests.kernel_map, featurizer.heads)
    files = {
        BOOSTER: estimator.trees.text.encode(),
        **_encoder_files(encoder),
        TOKENS: _dump(encoder.tokens),
        OUTCOMES: pack_arrays(
            {
                **outcomes,
                **estimator.calibration.to_arrays(),
                "term_keys": lexicon.keys,
                "idf": lexicon.idf,
                "success": featurizer.success,
            }
        ),
        GOLDEN: golden.to_bytes(estimator),
    }
    if learned.neighbours is not None:
        files[NEIGHBOURS] = to_bytes(learned.neighbours)
    return files, {
        "features": list(featurizer.names),
        "features_sha256": _names_hash(featurizer.names),
        "encoder": {
            "id": encoder.id,
            "kind": "transformer" if isinstance(encoder, TransformerEncoder) else "table",
            "pieces": encoder.pieces,
            "dim": encoder.dim,
        },
        "input_tokens_fit": list(featurizer.input_tokens_fit),
        "trained_models": len(featurizer.catalog) if featurizer.trained is None else featurizer.trained,
    }


def load_estimator(bundle: Bundle, *, to_serve: bool = False) -> LearnedEstimator:
    """The learner of a verified bundle. Raises BundleError when its parts do not fit each other.

    One that is loaded `to_serve` cannot be saved: it keeps a transformer's weights once, not twice.
    """
    return _estimator(bundle, bundle.manifest, "", to_serve)


def load_twin(bundle: Bundle) -> LearnedEstimator | None:
    """The learner that stands in for the bundle's own; None where it has none. Raises as `load_estimator` does."""
    described = bundle.manifest.get("twin")
    return None if described is None else _estimator(bundle, described, TWIN, False)


def _estimator(bundle: Bundle, described: Mapping[str, Any], prefix: str, to_serve: bool) -> LearnedEstimator:
    arrays = bundle.arrays(prefix + OUTCOMES)
    encoder = _encoder(bundle, described["encoder"], prefix, to_serve)
    kernel_map, heads = from_arrays(arrays)
    lexicon = Lexicon(len(encoder.tokens), arrays["term_keys"].astype(np.int64), arrays["idf"].astype(np.float32))
    a, b = described["input_tokens_fit"]
    featurizer = CandidateFeaturizer(
        bundle.learnt,
        RequestFeaturizer(encoder, kernel_map, lexicon),
        heads,
        arrays["success"],
        (a, b),
        described.get("trained_models"),
    )
    if described["features_sha256"] != _names_hash(featurizer.names):
        raise BundleError(
            f"{MANIFEST} was made with other features than this version of router-ml computes: "
            "install the version that made it, or train again"
        )
    trees = Trees(bundle.file(prefix + BOOSTER).decode())
    if trees.names != featurizer.names:
        raise BundleError(
            f"{prefix + BOOSTER} expects {len(trees.names)} other features than the {len(featurizer.names)} there are"
        )
    return LearnedEstimator(featurizer, trees, Calibration.from_arrays(arrays))


def load_router(path: str | Path, policy: Policy | None = None) -> Router:
    """A ready router from a bundle directory, under `policy` or the default one.

    The bundle's golden rows are checked. Raises BundleError that names the file at fault, InputError when the policy
    names a model or a quality threshold that is not in the bundle.
    """
    bundle = read_bundle(path, leave=(NEIGHBOURS, TWIN + NEIGHBOURS))
    estimator, twin = load_estimator(bundle, to_serve=True), load_twin(bundle)
    if twin is not None and twin.thresholds != estimator.thresholds:
        raise BundleError(f"{MANIFEST}: the bundle's twin was trained for other quality thresholds: train again")
    for learner, prefix in ((estimator, ""), (twin, TWIN)):
        if learner is not None and prefix + GOLDEN in bundle.files:  # bundles made before there were any have none
            name = prefix + GOLDEN
            golden.check(learner, bundle.file(name), f"{name} of bundle {bundle.version}")
    router = Router(
        bundle.catalog,
        estimator,
        policy or Policy(),
        bundle.version,
        reliability=_reliability(bundle),
        quality_threshold=bundle.manifest.get("quality_threshold"),
        twin=twin,
    )
    return router.with_policy(router.policy)


def load_neighbours(path: str | Path, version: str, *, twin: bool = False) -> Neighbours | None:
    """The past requests of the bundle at `path` that has this version; None where it was made without them.

    They have the embeddings of its learner, or of its `twin`. Raises BundleError when the file was altered, or when
    another bundle has taken that one's place.
    """
    name = TWIN + NEIGHBOURS if twin else NEIGHBOURS
    data = read_later(path, version, name)
    return None if data is None else from_bytes(data, name)


def _encoder_files(encoder: Encoder) -> dict[str, bytes]:
    if isinstance(encoder, TransformerEncoder):
        if encoder.bert.weights is None:
            raise TypeError("a learner that was loaded to serve has let go of its encoder's weights")
        standard = pack_arrays({"center": encoder.center, "scale": encoder.scale})
        return {ENCODER: standard, TRANSFORMER: encoder.bert.weights, TRANSFORMER_CONFIG: encoder.bert.config}
    assert isinstance(encoder, StaticEncoder)
    return {ENCODER: pack_arrays({"table": encoder.table.astype(np.float16)})}


def _encoder(bundle: Bundle, spec: Mapping[str, Any], prefix: str, to_serve: bool) -> Encoder:
    tokens, arrays = tuple(bundle.json(prefix + TOKENS)), bundle.arrays(prefix + ENCODER)
    if spec["kind"] == "transformer":
        weights = bundle.file(prefix + TRANSFORMER)
        bert = Bert(bundle.file(prefix + TRANSFORMER_CONFIG), weights, to_serve=to_serve)
        return TransformerEncoder(spec["id"], tokens, bert, arrays["center"], arrays["scale"])
    table = np.ascontiguousarray(arrays["table"], dtype=np.float32)
    return StaticEncoder(spec["id"], tokens, table, bool(spec["pieces"]))


def _reliability(bundle: Bundle) -> Reliability | None:
    """How calls went in the log that the bundle was trained on; None where it does not say."""
    stated = bundle.manifest.get("reliability")
    if stated is None:
        return None
    try:
        known = Reliability.from_json(stated)
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise BundleError(f"{MANIFEST}: 'reliability' cannot be used ({error}): train again") from None
    if len(known.attempts) != len(bundle.catalog):
        raise BundleError(
            f"{MANIFEST}: 'reliability' is of {len(known.attempts)} models, not the catalogue's: train again"
        )
    return known


def _dump(values: tuple[str, ...]) -> bytes:
    return json.dumps(list(values), ensure_ascii=False, separators=(",", ":")).encode()


def _names_hash(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()
