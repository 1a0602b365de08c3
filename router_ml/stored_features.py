"""What the learner saw of a request as bytes: kept with a decision, they explain it later without its prompt.

Some 2,000 bytes for 13 candidates, little-endian, behind a tag that names the layout. They are as they lie in memory:
leaving out what all candidates share would halve them, at thirty times the time, which routing would wait for.
Words can be guessed from an embedding (Morris et al. 2023, arXiv 2310.06816), so keeping features can be turned off.
"""

from __future__ import annotations

import struct

import numpy as np

from router_ml.errors import InputError
from router_ml.types import CandidateFeatures

_TAG = b"rmf1"
_HEAD = struct.Struct("<4s4Id")  # tag; m candidates, d columns, k parts, embedding of e; input tokens
_FLOAT = np.dtype("<f4")


def pack_features(features: CandidateFeatures) -> bytes:
    """The features as bytes, from which every number comes back bit for bit; takes about a microsecond."""
    m, d = features.rows.shape
    embedding = b"" if features.embedding is None else features.embedding.tobytes()
    head = _HEAD.pack(_TAG, m, d, len(features.parts), len(embedding) // _FLOAT.itemsize, features.input_tokens)
    arrays = (features.rows, features.parts, np.asarray(features.output_tokens, dtype=_FLOAT))
    return b"".join((head, *(array.tobytes() for array in arrays), embedding))


def unpack_features(data: bytes) -> CandidateFeatures:
    """The inverse of `pack_features`. Raises InputError for bytes that are not its own."""
    try:
        tag, m, d, k, e, input_tokens = _HEAD.unpack_from(data)
        if tag != _TAG:
            raise ValueError(f"their layout is {tag!r}")
        numbers = np.frombuffer(data, dtype=_FLOAT, offset=_HEAD.size).astype(np.float32)
        if len(numbers) != m * d + k * m + m + e:
            raise ValueError("their length is wrong")
    except (struct.error, ValueError) as error:
        raise InputError(
            f"the decision's stored features cannot be read ({error}): use the version of router-ml that stored them"
        ) from None
    # Copies: the C API takes whole arrays, each with its own memory.
    rows, parts, tokens, embedding = (a.copy() for a in np.split(numbers, np.cumsum([m * d, k * m, m])))
    return CandidateFeatures(rows.reshape(m, d), parts.reshape(k, m), tokens, input_tokens, embedding if e else None)
