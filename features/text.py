"""Requests to text, words and text statistics: what every other feature starts from."""

from __future__ import annotations

import math
import unicodedata

import numpy as np

from router_ml.types import FloatArray, RouteRequest

MAX_CHARS = 1024
"""Characters of a conversation that are read for features: bounds the time of a decision, whatever is sent."""
_HEAD = 768
_SHORT_TURN = 200

STATISTICS = (
    "log_chars",
    "log_words",
    "digit_share",
    "upper_share",
    "punctuation_share",
    "newline_share",
    "non_ascii_share",
    "symbol_share",
    "questions",
    "chars_per_word",
    "list_marks",
    "code_marks",
    "log_conversation_chars",
    "turns",
    "log_tools_chars",
    "tools",
    "attachments",
)

_LIST_MARKS = ("\n(", "\n-")
_CODE_MARKS = ("```", ";\n")

_CLASSES = (
    b"0123456789",
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    b".,:;!'\"()-",
    b"\n",
    bytes(range(128, 256)),
    b"$\\=+*/<>^_|~{}[]@#%&`",
    b"?",
)
_CLASS_OF = bytes(next((i + 1 for i, chars in enumerate(_CLASSES) if byte in chars), 0) for byte in range(256))
_COUNTED = tuple(bytes([i + 1]) for i in range(len(_CLASSES)))


def request_text(request: RouteRequest) -> str:
    """The text that stands for a request: what was asked last, with as much of the conversation as it needs.

    The system prompt is the harness's, not the request's, so it is left out unless there is nothing else. A short
    last message ("yes", "and in French?") means nothing alone: what the user said before it comes before it. What
    others said since (answers, tool results) is there with its end, and with half as many characters as the user's at
    most: the pages that a tool returns, or the last answer had, are not what was asked. Longer texts are cut in the
    middle to `MAX_CHARS`.
    """
    turns = [m for m in request.messages if m.role not in ("system", "developer") and m.text]
    if not turns:
        turns = [m for m in request.messages if m.text]
    if len(turns) == 1:
        return _cut(turns[0].text)
    asked = [i for i, m in enumerate(turns) if m.role == "user"] or list(range(len(turns)))
    parts: dict[int, str] = {}
    size = 0
    for position in reversed(asked):
        if size >= _SHORT_TURN:
            break
        text = turns[position].text
        parts[position] = text[size - MAX_CHARS :] if parts else _cut(text)
        size += len(parts[position]) + 1
    room = size // 2
    for position in range(len(turns) - 1, min(parts, default=0), -1):
        if room <= 0:
            break
        if position not in parts:
            parts[position] = turns[position].text[-room:]
            room -= len(parts[position]) + 1
    return _cut("\n".join([parts[position] for position in sorted(parts)]))


def words(text: str) -> list[str]:
    """Lower-case words and single punctuation marks, split as BERT's uncased tokenizer splits them.

    The rules are those of BertNormalizer and BertPreTokenizer: control characters dropped, accents stripped, every
    punctuation mark and CJK character a word of its own. All of them look at one character at a time, so one table
    holds them.
    """
    return text.translate(_TABLE).split()


def text_statistics(request: RouteRequest, text: str, text_words: list[str]) -> FloatArray:
    """Counts and shares of `text` and of the conversation around it, float32 [len(STATISTICS)]."""
    data = text.encode("utf-8", "surrogatepass").translate(_CLASS_OF)
    size = max(len(data), 1)
    counts = [data.count(number) for number in _COUNTED]
    n_words = max(len(text_words), 1)
    chars = conversation_chars(request)
    return np.array(
        [
            math.log1p(len(text)),
            math.log1p(len(text_words)),
            counts[0] / size,
            counts[1] / size,
            counts[2] / size,
            counts[3] / size,
            counts[4] / size,
            counts[5] / size,
            min(counts[6], 10),
            len(text) / n_words,
            min(text.count(_LIST_MARKS[0]) + text.count(_LIST_MARKS[1]), 50),
            min(text.count(_CODE_MARKS[0]) + text.count(_CODE_MARKS[1]), 50),
            math.log1p(chars),
            min(len(request.messages), 100),
            math.log1p(request.tools_chars),
            min(request.tools, 100),
            min(sum([m.attachments for m in request.messages]), 20),
        ],
        dtype=np.float32,
    )


def conversation_chars(request: RouteRequest) -> int:
    """Characters that a model would have to read: every message, its tool calls and attachments, and the tools."""
    return sum([len(m.text) + m.extra_chars for m in request.messages]) + request.tools_chars


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[:_HEAD] + "\n" + text[-(MAX_CHARS - _HEAD - 1) :]


class _Table(dict[int, str]):
    """What becomes of each character, worked out when it is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = out = "".join(map(_split, unicodedata.normalize("NFD", _clean(chr(code)))))
        return out


def _clean(char: str) -> str:
    """BertNormalizer's clean-up, and its spaces around CJK characters."""
    code, category = ord(char), unicodedata.category(char)
    if char in "\t\n\r" or category == "Zs":
        return " "
    if code in (0, 0xFFFD) or category in ("Cc", "Cf", "Cn", "Co", "Cs"):
        return ""
    return f" {char} " if any(low <= code <= high for low, high in _CJK) else char


def _split(char: str) -> str:
    """Accents away, lower case, and spaces around punctuation, as BertPreTokenizer splits."""
    category = unicodedata.category(char)
    if category == "Mn":
        return ""
    if category.startswith("P") or ("!" <= char <= "~" and not char.isalnum()):
        return f" {char} "
    return char.lower()


_CJK = (
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B920, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)
_TABLE = _Table()
