"""Messages as OpenTelemetry's GenAI conventions have them, to OpenAI-shaped ones.

`gen_ai.input.messages` is `[{"role", "parts": [{"type": "text", "content"}, …]}]` (the schema
gen-ai-input-messages.json of the semantic conventions), as JSON text or as nested OTLP values. Reshaping is the one
thing here that is done row by row in Python: its depth differs from row to row.
"""

from __future__ import annotations

import json
from typing import Any

import polars as pl

from training.importers.jsontext import written


def messages_of(messages: pl.Series, system: pl.Series, tools: pl.Series) -> pl.DataFrame:
    """`messages` and `tools` (OpenAI-shaped JSON text) and `prompt` of what spans say of their input; else null.

    What is neither a list of messages nor an object that holds one is a prompt as it stands.
    """
    found = [(*_reshaped(text, said), _tools(given)) for text, said, given in zip(messages, system, tools, strict=True)]
    return pl.DataFrame(found, schema=dict.fromkeys(("messages", "prompt", "tools"), pl.String()), orient="row")


def _tools(text: str | None) -> str | None:
    said = _plain(text)
    return written(said) if isinstance(said, list) and said else None


def _reshaped(text: str | None, instructions: str | None) -> tuple[str | None, str | None]:
    if text is None:
        return None, None
    said = _plain(text)
    if isinstance(said, dict) and isinstance(said.get("messages"), list):
        said = said["messages"]
    if not isinstance(said, list) or not said or not all(isinstance(one, dict) for one in said):
        return None, written(said) if isinstance(said, str) else text
    made = [_message(one) for one in said]
    if (first := _plain(instructions)) is not None:
        parts = first if isinstance(first, list) else [{"type": "text", "content": first}]
        made.insert(0, _message({"role": "system", "parts": parts}))
    return written(made), None


def _plain(text: str | None) -> Any:
    """JSON text, or OTLP's nested values, as plain values; text that is neither as it is."""
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return _of_otlp(value) if isinstance(value, dict) and set(value) == {"values"} else value


def _of_otlp(value: Any) -> Any:
    """OTLP's AnyValue, ArrayValue or KeyValueList as what it stands for."""
    if not isinstance(value, dict):
        return value
    for name in ("stringValue", "intValue", "doubleValue", "boolValue", "arrayValue", "kvlistValue"):
        if name in value:
            return _of_otlp(value[name])
    items = value.get("values", [])
    if items and all(isinstance(one, dict) and set(one) <= {"key", "value"} for one in items):
        return {one.get("key"): _of_otlp(one.get("value")) for one in items}
    return [_of_otlp(one) for one in items]


def _message(said: dict[str, Any]) -> dict[str, Any]:
    parts = said.get("parts")
    if not isinstance(parts, list):
        return said
    texts, calls, others = [], [], []
    answered = None
    for part in (one for one in parts if isinstance(one, dict)):
        kind = part.get("type")
        if kind == "text":
            texts.append(str(part.get("content", "")))
        elif kind == "tool_call":
            arguments = part.get("arguments")
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
            function = {"name": part.get("name"), "arguments": arguments}
            calls.append({"id": part.get("id"), "type": "function", "function": function})
        elif kind == "tool_call_response":
            answered = part.get("id")
            answer = part.get("response", part.get("result"))
            texts.append(answer if isinstance(answer, str) else json.dumps(answer, ensure_ascii=False))
        elif kind in ("blob", "uri", "file") and part.get("modality", "image") == "image":
            others.append({"type": "image_url", "image_url": {"url": str(part.get("uri", ""))}})
    content: Any = "\n".join(texts)
    if others:
        content = [*([{"type": "text", "text": content}] if content else []), *others]
    made = {"role": said.get("role"), "content": content or None}
    return made | ({"tool_calls": calls} if calls else {}) | ({"tool_call_id": answered} if answered else {})
