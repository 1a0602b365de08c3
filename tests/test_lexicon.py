"""Terms and their look-up."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.lexicon import MAX_TOKENS, Lexicon, term_keys

VOCABULARY = 50


def _lexicon(keys: list[int]) -> Lexicon:
    unique = np.unique(np.array(keys, dtype=np.int64))
    return Lexicon(VOCABULARY, unique, np.linspace(1, 5, len(unique), dtype=np.float32))


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=60), st.lists(st.integers(0, VOCABULARY - 1), max_size=200))
def test_finds_exactly_the_terms_of_a_text(train: list[int], tokens: list[int]) -> None:
    known = term_keys(np.array(train, dtype=np.int64), VOCABULARY)
    lexicon = _lexicon(known.tolist())
    text = np.array(tokens, dtype=np.int64)
    expected = sorted(set(np.searchsorted(lexicon.keys, sorted(set(known) & set(term_keys(text, VOCABULARY))))))
    assert lexicon.term_ids(text).tolist() == expected


def test_pairs_that_share_a_slot_keep_the_rarer() -> None:
    rng = np.random.default_rng(0)
    vocabulary = 30_000
    keys = np.unique((rng.integers(0, vocabulary, 200_000) + 1) * vocabulary + rng.integers(0, vocabulary, 200_000))
    idf = rng.random(len(keys), dtype=np.float32)
    lexicon = Lexicon(vocabulary, keys, idf)
    found = np.zeros(len(keys), dtype=bool)
    for i in range(0, len(keys), 997):
        first, second = divmod(int(keys[i]) - vocabulary, vocabulary)
        ids = lexicon.term_ids(np.array([first, second]))
        found[ids] = True
        assert set(ids.tolist()) <= {i}
    assert found[::997].mean() > 0.4  # 200,000 pairs in 131,072 slots
    assert idf[::997][found[::997]].mean() > idf[::997][~found[::997]].mean()


def test_only_the_first_tokens_are_read() -> None:
    lexicon = _lexicon([7])
    assert lexicon.term_ids(np.array([1] * MAX_TOKENS + [7])).tolist() == []
    assert lexicon.term_ids(np.array([1] * (MAX_TOKENS - 1) + [7])).tolist() == [0]
