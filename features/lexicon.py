"""Terms: tokens and pairs of neighbouring tokens. What the wording of a request tells beside its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from router_ml.types import FloatArray

IntArray = npt.NDArray[np.int64]
MAX_TOKENS = 768
SLOTS = 1 << 17
_UNKNOWN = np.array([-1], dtype=np.int64)
_GOLDEN, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(64 - 17)


def term_keys(tokens: IntArray, vocabulary: int) -> IntArray:
    """The terms of a text as numbers: a token's own id, and vocabulary * (1 + a) + b for a followed by b."""
    tokens = tokens[:MAX_TOKENS]
    return np.concatenate((tokens, (tokens[:-1] + 1) * vocabulary + tokens[1:]))


@dataclass(frozen=True)
class Lexicon:
    """The terms that are known, by key, int64 [t] ascending, and their inverse document frequencies, float32 [t].

    A pair is found by one look-up in a table of slots instead of a search: where two pairs share a slot, the table
    keeps the rarer one, which tells more. `vocabulary` is the number of the encoder's tokens.
    """

    vocabulary: int
    keys: IntArray
    idf: FloatArray
    _token_term: IntArray = field(init=False, repr=False, compare=False)
    _slot_key: IntArray = field(init=False, repr=False, compare=False)
    _slot_term: IntArray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        singles = int(self.keys.searchsorted(self.vocabulary))
        token_term = np.full(self.vocabulary, -1, dtype=np.int64)
        token_term[self.keys[:singles]] = np.arange(singles)
        order = singles + np.argsort(self.idf[singles:], kind="stable")
        slot = _slot(self.keys[order])
        slot_key, slot_term = np.full(SLOTS, -1, dtype=np.int64), np.full(SLOTS, -1, dtype=np.int64)
        slot_key[slot], slot_term[slot] = self.keys[order], order
        object.__setattr__(self, "_token_term", token_term)
        object.__setattr__(self, "_slot_key", slot_key)
        object.__setattr__(self, "_slot_term", slot_term)

    def term_ids(self, tokens: IntArray) -> IntArray:
        """Positions in `keys` of the terms that occur in a text given as token ids; ascending, each once."""
        tokens = tokens[:MAX_TOKENS]
        pairs = (tokens[:-1] + 1) * self.vocabulary + tokens[1:]
        slot = _slot(pairs)
        found = self._slot_term.take(slot[self._slot_key.take(slot) == pairs])
        ids = np.concatenate((_UNKNOWN, self._token_term.take(tokens), found))
        ids.sort()
        distinct: IntArray = ids[1:][ids[1:] != ids[:-1]]
        return distinct  # distinct, and without the unknown (-1), which comes first


def _slot(keys: IntArray) -> IntArray:
    """Multiplicative hashing (Knuth, The Art of Computer Programming 3, 6.4): the product's high bits."""
    product = keys.view(np.uint64) * _GOLDEN
    product >>= _SHIFT
    slots: IntArray = product.view(np.int64)
    return slots
