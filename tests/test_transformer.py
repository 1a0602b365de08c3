"""The transformer encoder: the vectors of sentence-transformers, rows that are the same live, its own bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.featurizer import CandidateFeaturizer
from features.load import TRANSFORMER, load_estimator, load_router
from features.text import words
from features.transformer import MAX_TOKENS, Bert, TransformerEncoder, one_torch_thread
from router_ml.bundle import read_bundle
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from router_ml.errors import BundleError, InputError
from router_ml.quality import LearnedEstimator
from training.dataset import Dataset, build_dataset
from training.encoders import MINILM_SHA256, find_minilm, make_encoder, transformer_encoder
from training.fit import Fit
from training.train import Training

TEXTS = [
    "Where is my parcel?",
    "Prove that there are infinitely many primes.\n\nThen prove it again, without Euclid; use ζ(s) if you like.",
    "Größe, naïve café, 東京 and 😀: tokens that few vocabularies have. " * 3,
    "word " * 600,
    "x",
]


@pytest.fixture(scope="module")
def encoder() -> TransformerEncoder:
    return transformer_encoder()


@pytest.fixture(scope="module")
def data(tiny_log: pl.DataFrame, catalog: Catalog) -> Dataset:
    return build_dataset(tiny_log.head(4 * 120), catalog)


@pytest.fixture(scope="module")
def fitted(transformer_training: tuple[Training, Path]) -> Fit:
    return transformer_training[0].fit


@pytest.fixture(scope="module")
def bundle(transformer_bundle: Path) -> Path:
    return transformer_bundle


def test_the_vectors_are_those_of_sentence_transformers(encoder: TransformerEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    theirs = SentenceTransformer(str(find_minilm()), device="cpu")
    theirs.max_seq_length = MAX_TOKENS + 2
    with one_torch_thread():
        wanted = theirs.encode(TEXTS, batch_size=1, normalize_embeddings=True)
    last = np.stack([encoder.bert.layers(encoder._marked(encoder.token_ids(words(text))))[-1] for text in TEXTS])
    assert np.abs(last / np.linalg.norm(last, axis=1, keepdims=True) - wanted).max() < 2e-6
    assert encoder.bert.read == (2, 4, 6)


def test_every_layer_counts_the_same_after_it_was_standardised(encoder: TransformerEncoder, data: Dataset) -> None:
    ids = [encoder.token_ids(words(request.messages[0].text)) for request in data.requests]
    adapted = encoder.adapted(ids)
    assert adapted.id != encoder.id == adapted.adapted([]).id.partition("+")[0]
    assert adapted.adapted(ids).id == adapted.id
    vectors = np.stack([adapted.embed(i) for i in ids])
    assert vectors.shape == (len(ids), adapted.dim) == (len(ids), 3 * 384) and vectors.dtype == np.float32
    for layer in np.split(vectors, 3, axis=1):
        assert np.allclose(np.linalg.norm(layer, axis=1), 3**-0.5, atol=1e-5)
    plain = np.stack([encoder.embed(i) for i in ids])
    assert np.linalg.norm(vectors.mean(axis=0)) < 0.6 * np.linalg.norm(plain.mean(axis=0))


def test_a_text_without_words_is_zero_and_a_repeated_one_is_remembered(encoder: TransformerEncoder) -> None:
    assert not encoder.embed(np.empty(0, dtype=np.int64)).any()
    ids = encoder.token_ids(words("Where is my parcel?"))
    marked = encoder._marked(ids)
    assert encoder.bert.layers(marked) is encoder.bert.layers(marked.copy())
    assert encoder.bert.layers(marked) is not encoder.bert.layers(marked[:-1])


def test_a_live_request_gets_its_training_row_bit_for_bit(fitted: Fit, data: Dataset, bundle: Path) -> None:
    fresh = load_estimator(read_bundle(bundle))  # another encoder object, which remembers nothing
    featurizer = fresh.featurizer
    assert isinstance(featurizer, CandidateFeaturizer)
    for i in range(0, len(data), 7):
        own = fitted.fold_featurizers[fitted.fold[i]]
        live = own.rows(featurizer.requests.transform(data.requests[i])).rows
        assert live.tobytes() == fitted.rows[i].tobytes()


def test_the_bundle_routes_by_itself(bundle: Path, fitted: Fit, data: Dataset) -> None:
    router = load_router(bundle)
    assert isinstance(router.estimator, LearnedEstimator)
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["encoder"].pop("id").startswith(f"bert-{MINILM_SHA256[:12]}+")
    assert manifest["encoder"] == {"kind": "transformer", "pieces": True, "dim": 1152}
    for request in data.requests[:5]:
        assert np.array_equal(router.estimator.estimate(request).p_ok, fitted.estimator.estimate(request).p_ok)
    hard, easy = (
        router.decide(request_of(prompt=p, min_probability=0.85))
        for p in ("Prove rigorously that the tensor comet operator is bounded.", "What is the plural of river?")
    )
    assert easy.chosen.expected_cost_usd < hard.chosen.expected_cost_usd


def test_altered_weights_are_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    with (copy / TRANSFORMER).open("r+b") as handle:
        handle.seek(50_000_000)
        byte = handle.read(1)
        handle.seek(50_000_000)
        handle.write(bytes([byte[0] ^ 1]))
    with pytest.raises(BundleError, match=TRANSFORMER):
        load_router(copy)


def test_what_is_not_a_bert_model_is_refused(encoder: TransformerEncoder, tmp_path: Path) -> None:
    bert = encoder.bert
    with pytest.raises(BundleError, match="'t5' model"):
        Bert(b'{"model_type": "t5"}', bert.weights)
    other = json.dumps({**json.loads(bert.config), "num_hidden_layers": 7}).encode()
    with pytest.raises(BundleError, match=r"weights lack encoder\.layer\.6"):
        Bert(other, bert.weights)
    with pytest.raises(BundleError, match="lacks a mark of BERT's"):
        TransformerEncoder.plain("x", ("a", "b"), bert)
    with pytest.raises(BundleError, match="another shape"):
        TransformerEncoder("x", encoder.tokens, bert, encoder.center[:2], encoder.scale)
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="not the folder of a sentence transformer"):
        make_encoder("transformer", [], model=str(tmp_path))


def test_torch_has_its_threads_back_afterwards() -> None:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
