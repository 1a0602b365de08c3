"""Conversations as other APIs have them to OpenAI-shaped messages, and what is none to a prompt as it stands."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from router_ml.conversation import ROLES, parse_messages
from router_ml.errors import InputError
from router_ml.log_texts import unreadable_messages
from training.importers.jsontext import written

# Roles, and LangChain's types, by OpenAI's names.
_ROLES = {"model": "assistant", "ai": "assistant", "bot": "assistant", "human": "user"}
# Items of the Responses API that are no one's words: what the model thought, and references to what is not there.
_UNSAID = ("reasoning", "item_reference", "compaction")


def read_messages(texts: pl.Series) -> pl.Series:
    """Messages (JSON text) that `router_ml.conversation` reads: as they are, else mapped; unchanged where neither can.

    Mapped are items of the Responses API (calls of functions, their outputs; reasoning is left out), the roles model,
    ai, bot and human, content that is one part, and halves of surrogate pairs, which become U+FFFD.
    """
    return _read(texts)[0]


def spoken(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with `messages` that can be read (`read_messages`); what cannot is `prompt`, where there is none."""
    messages, bad = _read(frame["messages"])
    if not bad.any():
        return frame.with_columns(messages)
    return frame.with_columns(
        messages=messages.zip_with(~bad, messages.clear(len(bad))),
        prompt=frame["prompt"].zip_with(~bad | frame["prompt"].is_not_null(), messages),
    )


def _read(texts: pl.Series) -> tuple[pl.Series, pl.Series]:
    """(the texts, mapped where that is needed, which of them still cannot be read: bool [n])."""
    bad = unreadable_messages(texts)
    if not bad.any():
        return texts, bad
    at, mapped = bad.arg_true(), [_mapped(text) for text in texts.filter(bad)]
    texts = texts.clone().scatter(at, pl.Series(mapped, dtype=pl.String).fill_null(texts.filter(bad)))
    return texts, bad.clone().scatter(at, [text is None for text in mapped])


def _mapped(text: str) -> str | None:
    try:
        said = json.loads(text)
        messages = [one for item in said for one in _of_item(item)] if isinstance(said, list) else []
        made = written(messages)
        parse_messages(json.loads(made or "null"))
    except (InputError, ValueError, RecursionError, TypeError):
        return None
    return made if messages else None


def _of_item(item: Any) -> Iterable[dict[str, Any]]:
    if not isinstance(item, Mapping):
        raise TypeError("a message is an object")
    kind, role = str(item.get("type") or ""), item.get("role")
    if kind in _UNSAID:
        return
    if role is None and kind.endswith("_output"):
        output = item.get("output")
        content = output if isinstance(output, str | list) else json.dumps(output, ensure_ascii=False)
        yield {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    elif role is None and kind.endswith("_call"):
        given: Any = next((item[name] for name in ("arguments", "input", "action") if item.get(name) is not None), {})
        arguments = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
        function = {"name": item.get("name") or kind.removesuffix("_call"), "arguments": arguments}
        call = {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}
        yield {"role": "assistant", "content": None, "tool_calls": [call]}
    else:
        name = str(role or kind).lower()
        content = item.get("content", item.get("parts"))
        if isinstance(content, Mapping):
            content = [content]
        yield {**item, "role": name if name in ROLES else _ROLES.get(name, name), "content": content}
