"""Which of a log's conversations can be read, told at some microseconds a row: what `conversation` takes, by types.

Serving never imports it: it needs polars.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec
import polars as pl

from router_ml.conversation import parse_messages
from router_ml.errors import InputError

_SLICE = 8_192


class _Part(msgspec.Struct):
    """Any object."""


class _Message(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[str | _Part] | None = None


_messages = msgspec.json.Decoder(list[_Message]).decode
_tools = msgspec.json.Decoder(list[msgspec.Raw]).decode
_REFUSED = (msgspec.DecodeError, RecursionError)


def unreadable_messages(texts: pl.Series) -> pl.Series:
    """Which texts are no JSON of messages that a request can be made of (`conversation.parse_messages`); bool [n].

    Null is none of them, nor is what says nothing: `[]`, `{}`, `null`.
    """
    return _which_not(texts, _messages, _is_conversation)


def unreadable_tools(texts: pl.Series) -> pl.Series:
    """Which texts are no JSON array of tools, and not null or nothing either; bool [n]."""
    return _which_not(texts, _tools, _is_list)


def _which_not(texts: pl.Series, quick: Any, thorough: Any) -> pl.Series:
    found: list[bool] = []
    for at in range(0, len(texts) if texts.null_count() < len(texts) else 0, _SLICE):
        for text in texts[at : at + _SLICE].to_list():
            if text is None:
                found.append(False)
                continue
            try:
                quick(text)
            except _REFUSED:
                # Much that is refused can be read: NaN, which Python writes, and the empty text.
                found.append(not thorough(text))
            else:
                found.append(False)
    return pl.Series(found or [False] * len(texts), dtype=pl.Boolean)


def _is_conversation(text: str) -> bool:
    try:
        said = json.loads(text) if text else None
        if said:
            parse_messages(said)
        json.dumps(said, ensure_ascii=False).encode()  # half a surrogate pair is in no text
    except (InputError, ValueError, RecursionError):
        return False
    return True


def _is_list(text: str) -> bool:
    try:
        said = json.loads(text) if text else None
    except (ValueError, RecursionError):
        return False
    return said is None or isinstance(said, list)
