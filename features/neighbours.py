"""The past requests that a bundle keeps to show beside a decision: whose outcomes were seen on requests like this one.

They take no part in the decision. Their file is read when the first explanation is asked for, not when a bundle is
loaded. Of their text nothing is kept unless whoever trained asked for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from router_ml.bundle import pack_arrays, unpack_arrays
from router_ml.errors import BundleError
from router_ml.types import FloatArray

MOST = 20_000
"""Requests that are kept: the newest."""
PROMPT_CHARS = 200


@dataclass(frozen=True)
class Neighbours:
    """n past requests, newest first: their ids in the log, embeddings of length 1 float32 [n, e], and outcomes.

    `outcomes` float32 [n, m] holds each model's quality in [0, 1] in the catalogue's order, NaN where it is not known.
    `prompts` are the beginnings of their texts, or None.
    """

    ids: tuple[str, ...]
    embeddings: FloatArray
    outcomes: FloatArray
    prompts: tuple[str, ...] | None = None

    def nearest(self, embedding: FloatArray, k: int) -> list[tuple[int, float]]:
        """Rows of the k nearest requests and their cosine, nearest first, of equals the newest first.

        Fewer than k where fewer are kept, none for an embedding of zeros: a text without a known word is like nothing.
        """
        norm = float(np.linalg.norm(embedding))
        if norm == 0.0:
            return []
        similarity = self.embeddings @ (embedding / np.float32(norm))
        return [(int(i), float(similarity[i])) for i in np.argsort(-similarity, kind="stable")[:k]]


def newest_rows(outcomes: npt.NDArray[np.float32], most: int = MOST) -> npt.NDArray[np.int64]:
    """Row numbers, ascending, of the `most` newest of requests [n, m], oldest first, that have an outcome."""
    rows: npt.NDArray[np.int64] = np.flatnonzero(~np.isnan(outcomes).all(axis=1))[-most:]
    return rows


def newest(
    ids: Sequence[str],
    embeddings: npt.NDArray[np.float32],
    outcomes: npt.NDArray[np.float32],
    prompts: Sequence[str] | None = None,
    *,
    most: int = MOST,
) -> Neighbours:
    """The `most` newest of requests that are given oldest first, those without any outcome left out.

    `embeddings` [n, e] may have any length; `prompts` are cut to `PROMPT_CHARS` characters.
    """
    rows = newest_rows(outcomes, most)[::-1]
    norms = np.linalg.norm(embeddings[rows], axis=1, keepdims=True)
    unit = embeddings[rows] / np.where(norms > 0.0, norms, np.float32(1.0))
    return Neighbours(
        tuple(ids[i] for i in rows),
        unit.astype(np.float32),
        outcomes[rows].astype(np.float32),
        None if prompts is None else tuple(prompts[i][:PROMPT_CHARS] for i in rows),
    )


def to_bytes(neighbours: Neighbours) -> bytes:
    """The bundle's file: an `.npz` with embeddings in float16, the texts as UTF-8 JSON in an array of bytes."""
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": _text(neighbours.ids),
        "embeddings": neighbours.embeddings.astype(np.float16),
        "outcomes": neighbours.outcomes,
    }
    if neighbours.prompts is not None:
        arrays["prompts"] = _text(neighbours.prompts)
    return pack_arrays(arrays)


def from_bytes(data: bytes, name: str) -> Neighbours:
    """The inverse of `to_bytes`, but for what float16 rounds. Raises BundleError."""
    arrays = unpack_arrays(data, name)
    try:
        ids = tuple(json.loads(arrays["ids"].tobytes()))
        prompts = tuple(json.loads(arrays["prompts"].tobytes())) if "prompts" in arrays else None
        found = Neighbours(ids, arrays["embeddings"].astype(np.float32), arrays["outcomes"], prompts)
    except (KeyError, ValueError) as error:
        raise BundleError(f"{name} holds no past requests ({error}): train the bundle again") from None
    if not len(ids) == len(found.embeddings) == len(found.outcomes) == len(ids if prompts is None else prompts):
        raise BundleError(f"the arrays of {name} differ in length: train the bundle again")
    return found


def _text(values: Sequence[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(json.dumps(list(values), ensure_ascii=False).encode(), dtype=np.uint8)
