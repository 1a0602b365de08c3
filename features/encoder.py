"""The static encoder: a text is the mean of its tokens' vectors. It needs numpy alone, and microseconds.

The table comes from training (`training.encoders`): distilled from a sentence transformer as model2vec does
(https://github.com/MinishLab/model2vec), or made from TF-IDF and a truncated SVD. Tokenising here instead of with the
`tokenizers` package gives the same ids (a test compares them) in about a quarter of the time, because words are looked
up whole and only unknown ones are cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import numpy.typing as npt

from router_ml.errors import BundleError
from router_ml.types import FloatArray

_CACHE_LIMIT = 100_000
_LONGEST_WORD = 100  # BERT's WordPiece gives a longer word up as unknown


@dataclass(frozen=True)
class StaticEncoder:
    """A token table [v, d] with its vocabulary. `pieces` says whether unknown words are cut into WordPieces.

    `id` names the table and how it was made: two encoders with the same id give the same vectors.
    """

    id: str
    tokens: tuple[str, ...]
    table: FloatArray
    pieces: bool
    _ids: WordIds = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.table.ndim != 2 or len(self.tokens) != len(self.table):
            raise BundleError(f"encoder {self.id!r}: {len(self.tokens)} tokens for a table of shape {self.table.shape}")
        object.__setattr__(self, "_ids", WordIds(self.tokens, self.pieces))

    @property
    def dim(self) -> int:
        """Length of an embedding."""
        return int(self.table.shape[1])

    def adapted(self, texts: Sequence[npt.NDArray[np.int64]]) -> StaticEncoder:
        """Itself: the table is the same for every log."""
        return self

    def token_ids(self, words: list[str]) -> npt.NDArray[np.int64]:
        """Row numbers of the table for the words of a text, in order, int64; uncovered words are left out."""
        return np.fromiter(chain.from_iterable(map(self._ids.__getitem__, words)), dtype=np.int64)

    def embed(self, ids: npt.NDArray[np.int64]) -> FloatArray:
        """The embedding of a text given as token ids: mean token vector, scaled to length 1; float32 [d]."""
        if not len(ids):
            return np.zeros(self.dim, dtype=np.float32)
        vector: FloatArray = np.dot(np.ones(len(ids), dtype=np.float32), self.table.take(ids, axis=0))
        norm = float(np.sqrt(np.dot(vector, vector)))
        return vector / np.float32(norm) if norm > 0.0 else vector


class Encoder(Protocol):
    """A text, given as words, to token ids and from these to an embedding: the static table or a transformer.

    `id` names it, `tokens` are its vocabulary in the order of the ids, `pieces` says whether unknown words are cut.
    `adapted` makes the encoder for a log from the token ids of its texts.
    """

    @property
    def id(self) -> str: ...  # noqa: D102
    @property
    def tokens(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def pieces(self) -> bool: ...  # noqa: D102
    @property
    def dim(self) -> int: ...  # noqa: D102
    def adapted(self, texts: Sequence[npt.NDArray[np.int64]]) -> Encoder: ...  # noqa: D102
    def token_ids(self, words: list[str]) -> npt.NDArray[np.int64]: ...  # noqa: D102
    def embed(self, ids: npt.NDArray[np.int64]) -> FloatArray: ...  # noqa: D102


class WordIds(dict[str, tuple[int, ...]]):
    """Word to its tokens' ids. A word that is not a token is cut on first sight and remembered.

    One that cannot be cut has the ids `unknown`.
    """

    def __init__(self, tokens: tuple[str, ...], pieces: bool, unknown: tuple[int, ...] = ()) -> None:
        self._tokens = {token: i for i, token in enumerate(tokens)}
        self._pieces, self._unknown = pieces, unknown
        super().__init__({token: (i,) for token, i in self._tokens.items() if not (pieces and token.startswith("##"))})

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = self._cut(word) if self._pieces and len(word) <= _LONGEST_WORD else self._unknown
        if len(self) < _CACHE_LIMIT:
            self[word] = ids
        return ids

    def _cut(self, word: str) -> tuple[int, ...]:
        """Greedy longest match first (Wu et al. 2016, arXiv 1609.08144), as BERT's WordPiece does it."""
        ids: list[int] = []
        start = 0
        while start < len(word):
            for end in range(len(word), start, -1):
                found = self._tokens.get(word[start:end] if start == 0 else "##" + word[start:end])
                if found is not None:
                    ids.append(found)
                    start = end
                    break
            else:
                return self._unknown
        return tuple(ids)
