"""The transformer encoder: a sentence transformer of the BERT family, run by torch. Better than the table, and slow.

An embedding takes milliseconds where the static table takes microseconds, so it is a choice (docs/benchmarks.md says
what it buys). The mean of the last layer's vectors, scaled to length 1, is what all-MiniLM-L6-v2 was trained for
(Reimers & Gurevych 2019, arXiv 1908.10084). One text at a time: in a batch the last bits would depend on the company,
and a live request would not get the row that training gave it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
_REMEMBERED = 1 << 16


@dataclass(frozen=True)
class TransformerEncoder:
    """A BERT model by its files: `tokens` is its vocabulary in order, `config` its config.json, `weights` safetensors.

    `id` names the weights: two encoders with the same id give the same vectors. Raises BundleError when torch or
    transformers is not installed, or when the files are not those of a BERT model.
    """

    id: str
    tokens: tuple[str, ...]
    config: bytes = field(repr=False)
    weights: bytes = field(repr=False)
    pieces: bool = field(default=True, init=False)
    _ids: WordIds = field(init=False, repr=False, compare=False)
    _model: Any = field(init=False, repr=False, compare=False)
    _ends: tuple[int, int] = field(init=False, repr=False, compare=False)
    _seen: dict[bytes, FloatArray] = field(init=False, repr=False, compare=False, default_factory=dict)
    _one_at_a_time: threading.Lock = field(init=False, repr=False, compare=False, default_factory=threading.Lock)

    def __post_init__(self) -> None:
        try:
            ends, unknown = (self.tokens.index("[CLS]"), self.tokens.index("[SEP]")), self.tokens.index("[UNK]")
        except ValueError as error:
            raise BundleError(f"encoder {self.id!r}: its vocabulary lacks a mark of BERT's ({error})") from None
        object.__setattr__(self, "_ends", ends)
        object.__setattr__(self, "_ids", WordIds(self.tokens, True, (unknown,)))
        object.__setattr__(self, "_model", _bert(self.id, self.config, self.weights))

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self._model.config.hidden_size)

    def token_ids(self, words: list[str]) -> npt.NDArray[np.int64]:
        """The model's own token ids for the words of a text, in order, int64; an uncovered word is [UNK]."""
        return np.fromiter(chain.from_iterable(map(self._ids.__getitem__, words)), dtype=np.int64)

    def embed(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """The embedding of a text given as token ids, of length 1; float32 [d]. The last 65,536 are remembered."""
        if not len(ids):
            return np.zeros(self.dim, dtype=np.float32)
        key = ids[:MAX_TOKENS].tobytes()
        found = self._seen.get(key)
        if found is None:
            found = self._embed(ids[:MAX_TOKENS])
            with self._one_at_a_time:
                while len(self._seen) >= _REMEMBERED:
                    del self._seen[next(iter(self._seen))]
                self._seen[key] = found
        return found

    def _embed(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        import torch

        first, last = self._ends
        tokens = torch.from_numpy(np.concatenate([[first], ids, [last]]))[None]
        with one_torch_thread(), torch.inference_mode():
            mean = (
                self._model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state[0].mean(dim=0)
            )
            vector: FloatArray = (mean / mean.norm().clamp(min=1e-12)).numpy()
        return vector


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


def _bert(name: str, config: bytes, weights: bytes) -> Any:
    try:
        from safetensors.torch import load

        transformers: Any = import_module("transformers")
    except ImportError as error:
        raise BundleError(
            f"encoder {name!r} needs torch and transformers ({error}): pip install 'router-ml[transformer]', "
            "or train with '--encoder static'"
        ) from None
    stated = json.loads(config)
    if stated.get("model_type") != "bert":
        raise BundleError(
            f"encoder {name!r} is a {stated.get('model_type')!r} model: only those of type 'bert' are read"
        )
    model = transformers.BertModel(transformers.BertConfig(**stated), add_pooling_layer=False)
    missing = model.load_state_dict(load(weights), strict=False).missing_keys
    if missing:
        raise BundleError(f"encoder {name!r}: its weights lack {missing[0]} and {len(missing) - 1} others")
    return model.eval()
