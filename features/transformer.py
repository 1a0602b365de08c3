"""The transformer encoder: a sentence transformer of the BERT family, run by torch. Better than the table, and slow.

An embedding takes milliseconds where the static table takes microseconds, so it is a choice (docs/benchmarks.md says
what it buys). Three layers are read, not the last alone: it was trained to tell meanings apart, and how hard a request
is stands in those before it, too (Tenney et al. 2019, arXiv 1905.05950, on what the layers of BERT hold). One text at a
time: in a batch the last bits would depend on the company, and a live request would not get the row that training gave
it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from features.encoder import WordIds
from router_ml.errors import BundleError
from router_ml.types import FloatArray

MAX_TOKENS = 254
"""Tokens that are read, as many as all-MiniLM-L6-v2 was trained with, less its two marks at the ends."""
_REMEMBERED, _REMEMBERED_SERVING = 1 << 14, 1 << 11  # texts of some 6 kB each


class Bert:
    """A BERT model by its own files, `config` (config.json) and `weights` (safetensors), and what it said of late.

    One that is made `to_serve` lets go of the bytes of `weights`, which only saving needs: they are as large as the
    model. Raises BundleError when torch or transformers is not installed, or when the files are not a BERT model's.
    """

    def __init__(self, config: bytes, weights: bytes, *, to_serve: bool = False) -> None:
        self.config = config
        self.weights = None if to_serve else weights
        self._room = _REMEMBERED_SERVING if to_serve else _REMEMBERED
        self._model = _model(config, weights)
        depth = int(self._model.config.num_hidden_layers)
        self.read = tuple(sorted({max(depth * i // 3, 1) for i in (1, 2, 3)}))
        """Numbers of the layers that are read, from 1: a third of the way up, two thirds, and the last."""
        self._said: dict[bytes, FloatArray] = {}
        self._lock = threading.Lock()

    @property
    def shape(self) -> tuple[int, int]:
        """Layers that are read, and the length of their vectors."""
        return len(self.read), int(self._model.config.hidden_size)

    def layers(self, tokens: npt.NDArray[np.int64]) -> FloatArray:
        """The mean vector of each layer that is read, float32 [k, d]; tokens with the marks at both ends."""
        said = self.remembered(tokens)
        if said is None:
            said = self._run(tokens)
            with self._lock:
                while len(self._said) >= self._room:
                    del self._said[next(iter(self._said))]
                self._said[tokens.tobytes()] = said
        return said

    def remembered(self, tokens: npt.NDArray[np.int64]) -> FloatArray | None:
        """`layers` of a text seen of late, in microseconds; else None. The longest unasked for is forgotten first."""
        key = tokens.tobytes()
        with self._lock:
            said = self._said.pop(key, None)
            if said is not None:
                self._said[key] = said
        return said

    def _run(self, tokens: npt.NDArray[np.int64]) -> FloatArray:
        import torch

        ids = torch.from_numpy(tokens)[None]
        with one_torch_thread(), torch.inference_mode():
            states = self._model(
                input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True
            ).hidden_states
            means: FloatArray = torch.stack([states[i][0].mean(dim=0) for i in self.read]).numpy()
        return means


@dataclass(frozen=True, eq=False)
class TransformerEncoder:
    """Words to the layers of `bert`, each standardised and scaled to length 1; `tokens` is its vocabulary in order.

    `center` and `scale` [k, d] standardise (`adapted` takes them from a log's own texts): in most layers all texts
    point the same way, and what tells them apart is small beside it. `id` names the weights and the standardisation:
    two encoders with the same id give the same vectors. Raises BundleError for a vocabulary that is not BERT's.
    """

    id: str
    tokens: tuple[str, ...]
    bert: Bert
    center: FloatArray
    scale: FloatArray
    pieces: bool = field(default=True, init=False)
    _ids: WordIds = field(init=False, repr=False)
    _ends: tuple[int, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        try:
            ends, unknown = (self.tokens.index("[CLS]"), self.tokens.index("[SEP]")), self.tokens.index("[UNK]")
        except ValueError as error:
            raise BundleError(f"encoder {self.id!r}: its vocabulary lacks a mark of BERT's ({error})") from None
        if self.center.shape != self.bert.shape or self.scale.shape != self.bert.shape:
            raise BundleError(
                f"encoder {self.id!r}: its standardisation has another shape than its layers: train again"
            )
        object.__setattr__(self, "_ends", ends)
        object.__setattr__(self, "_ids", WordIds(self.tokens, True, (unknown,)))

    @classmethod
    def plain(cls, name: str, tokens: tuple[str, ...], bert: Bert) -> TransformerEncoder:
        """The encoder before it has seen a log."""
        return cls(name, tokens, bert, np.zeros(bert.shape, np.float32), np.ones(bert.shape, np.float32))

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return self.center.size

    def adapted(self, texts: Sequence[npt.NDArray[np.int64]]) -> TransformerEncoder:
        """The same model, standardised by texts given as token ids."""
        seen = [self.bert.layers(self._marked(ids)) for ids in texts if len(ids)]
        if len(seen) < 2:
            return self
        all_layers = np.stack(seen).astype(np.float64)
        center, spread = all_layers.mean(axis=0).astype(np.float32), all_layers.std(axis=0)
        scale = np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > 1e-6).astype(np.float32)
        digest = hashlib.sha256(center.tobytes() + scale.tobytes()).hexdigest()[:8]
        return replace(self, id=f"{self.id.partition('+')[0]}+{digest}", center=center, scale=scale)

    def token_ids(self, words: list[str]) -> npt.NDArray[np.int64]:
        """The model's own token ids for the words of a text, in order, int64; an uncovered word is [UNK]."""
        return np.fromiter(chain.from_iterable(map(self._ids.__getitem__, words)), dtype=np.int64)

    def embed(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """The embedding of a text given as token ids, of length 1; float32 [k * d]. One seen of late costs little."""
        if not len(ids):
            return np.zeros(self.dim, dtype=np.float32)
        return self._standardised(self.bert.layers(self._marked(ids)))

    def remembered(self, ids: npt.NDArray[np.int64]) -> FloatArray | None:
        """`embed` where the model need not be asked, in microseconds; else None."""
        if not len(ids):
            return self.embed(ids)
        layers = self.bert.remembered(self._marked(ids))
        return None if layers is None else self._standardised(layers)

    def _standardised(self, layers: FloatArray) -> FloatArray:
        layers = (layers - self.center) * self.scale
        lengths = np.sqrt(np.square(layers).sum(axis=1, keepdims=True) * np.float32(len(layers)))
        embedding: FloatArray = (layers / np.maximum(lengths, np.float32(1e-12))).ravel()
        return embedding

    def _marked(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        first, last = self._ends
        return np.concatenate([[first], ids[:MAX_TOKENS], [last]])


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch on one thread: sums come out the same on every machine, and nothing waits, spinning, for a busy core."""
    import torch

    threads = torch.get_num_threads()
    if threads == 1:  # so that threads which are inside together do not set it back for each other
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _model(config: bytes, weights: bytes) -> Any:
    try:
        from safetensors.torch import load

        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise BundleError(
            f"a transformer encoder needs torch and transformers ({error}): pip install 'router-ml[transformer]', "
            "or train with '--encoder static'"
        ) from None
    try:
        stated = json.loads(config)
    except ValueError as error:
        raise BundleError(f"the encoder's config.json is not JSON: {error}") from None
    if stated.get("model_type") != "bert":
        raise BundleError(f"the encoder is a {stated.get('model_type')!r} model: only those of type 'bert' are read")
    try:
        model = transformers.BertModel(transformers.BertConfig(**stated), add_pooling_layer=False)
        missing = model.load_state_dict(load(weights), strict=False).missing_keys
    except Exception as error:
        raise BundleError(f"the encoder's weights do not fit its config.json ({type(error).__name__})") from error
    if missing:
        raise BundleError(f"the encoder's weights lack {missing[0]} and {len(missing) - 1} others")
    return model.eval()
