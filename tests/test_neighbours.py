"""The past requests that explanations show: the newest ones, truly the nearest, their texts only where asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from features.load import NEIGHBOURS, load_neighbours, load_router, save_router
from features.neighbours import PROMPT_CHARS, Neighbours, from_bytes, newest, to_bytes
from router_ml.bundle import pack_arrays, read_bundle
from router_ml.catalog import Catalog
from router_ml.conversation import request_of
from router_ml.errors import BundleError
from router_ml.quality import LearnedEstimator
from training.train import train

NAN = float("nan")


def some(n: int = 300, e: int = 24, m: int = 3) -> Neighbours:
    rng = np.random.default_rng(7)
    outcomes = np.where(rng.random((n, m)) < 0.5, rng.random((n, m)), NAN).astype(np.float32)
    outcomes[:, 0] = 1.0
    outcomes[::5] = NAN
    return newest(
        [f"r{i}" for i in range(n)],
        3.0 * rng.standard_normal((n, e), dtype=np.float32),
        outcomes,
        [f"{i} é " * 100 for i in range(n)],
        most=100,
    )


def test_the_newest_with_an_outcome_are_kept_and_come_back() -> None:
    kept = some()
    assert kept.ids == tuple(f"r{i}" for i in range(299, 0, -1) if i % 5)[:100]
    assert np.linalg.norm(kept.embeddings, axis=1) == pytest.approx(1.0, abs=1e-6)
    assert kept.prompts is not None and {len(text) for text in kept.prompts} == {PROMPT_CHARS}
    back = from_bytes(to_bytes(kept), "n.npz")
    assert (back.ids, back.prompts) == (kept.ids, kept.prompts)
    assert np.array_equal(back.outcomes, kept.outcomes, equal_nan=True)
    assert np.abs(back.embeddings - kept.embeddings).max() < 1e-3 and back.embeddings.dtype == np.float32
    assert to_bytes(kept) == to_bytes(some())


def test_the_nearest_are_nearest_and_of_equals_the_newest_comes_first() -> None:
    kept = some()
    asked = np.random.default_rng(8).standard_normal(24, dtype=np.float32)
    cosine = [float(row @ asked / np.linalg.norm(asked)) for row in kept.embeddings]
    expected = sorted(range(100), key=lambda i: -cosine[i])[:7]
    found = kept.nearest(asked, 7)
    assert [i for i, _ in found] == expected
    assert [s for _, s in found] == pytest.approx([cosine[i] for i in expected], abs=1e-5)
    assert len(kept.nearest(asked, 1000)) == 100
    assert kept.nearest(np.zeros(24, dtype=np.float32), 7) == []
    twice = newest(["old", "new"], np.ones((2, 4), np.float32), np.ones((2, 1), np.float32))
    assert [twice.ids[i] for i, _ in twice.nearest(np.ones(4, np.float32), 2)] == ["new", "old"]


def test_a_file_of_something_else_is_refused() -> None:
    kept = some()
    arrays = {"ids": np.frombuffer(b'["a"]', np.uint8), "outcomes": kept.outcomes, "embeddings": kept.embeddings}
    for broken in (
        b"nothing",
        pack_arrays({"ids": arrays["ids"]}),
        pack_arrays(arrays),
        pack_arrays(arrays | {"ids": np.frombuffer(b"[", np.uint8)}),
    ):
        with pytest.raises(BundleError, match=r"n\.npz"):
            from_bytes(broken, "n.npz")


def test_training_keeps_the_requests_it_saw_and_their_texts_only_if_asked(
    tiny_log: pl.DataFrame, catalog: Catalog, tmp_path: Path
) -> None:
    rows = tiny_log.filter(pl.col("request_id").str.slice(1).cast(pl.Int64) < 100)
    plain = train(rows, catalog, out=tmp_path / "plain", encoder="lexical")
    with_text = train(rows, catalog, out=tmp_path / "text", encoder="lexical", keep_prompts=True)
    files = read_bundle(tmp_path / "plain").files
    assert b"Prove rigorously" not in files[NEIGHBOURS] and b"plural of" not in files[NEIGHBOURS]
    kept = load_neighbours(tmp_path / "plain", plain.version)
    text = load_neighbours(tmp_path / "text", with_text.version)
    assert kept is not None and text is not None
    prompts = dict(rows.select("request_id", "prompt").iter_rows())
    held_out = set(plain.held_out.ids)
    assert held_out and set(kept.ids) == set(prompts) - held_out
    assert kept.prompts is None and text.prompts == tuple(prompts[i] for i in text.ids)
    logged = {(r, m): q for r, m, q in rows.select("request_id", "model", "quality").iter_rows()}
    for i, row in zip(kept.ids, kept.outcomes, strict=True):
        assert row.tolist() == [logged[i, model] for model in catalog.ids]
    # What a live request gets as its embedding finds the same request in the log.
    estimator = load_router(tmp_path / "plain").estimator
    assert isinstance(estimator, LearnedEstimator)
    for i in kept.ids[:20]:
        embedding = estimator.featurizer.transform(request_of(prompt=prompts[i])).embedding
        assert embedding is not None
        (_, similarity), *_ = kept.nearest(embedding, 1)
        assert similarity == pytest.approx(1.0, abs=2e-3)
        assert i in {kept.ids[r] for r, s in kept.nearest(embedding, 30) if s > similarity - 1e-3}


def test_a_bundle_without_past_requests_serves_and_says_so(tiny_bundle: Path, tmp_path: Path) -> None:
    estimator = load_router(tiny_bundle).estimator
    assert isinstance(estimator, LearnedEstimator)
    version = save_router(tmp_path / "b", estimator, {"quality_threshold": 0.5, "log_sha256": "", "metrics": {}})
    assert load_neighbours(tmp_path / "b", version) is None
    assert load_router(tmp_path / "b").model_version == version
