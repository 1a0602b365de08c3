"""OpenAI-shaped conversations to `Message`s: the one reading that training logs and live requests share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from router_ml.errors import InputError
from router_ml.types import Message, RouteRequest

# The kinds of part that are words; a part of any other kind is an attachment.
_SPOKEN = ("text", "refusal", "thinking", "reasoning")
ATTACHMENT_CHARS = 4000
"""What a picture or file counts for in a context window, as characters of text: some 1,000 tokens."""
_PICTURES = ("image_url", "image", "input_image")
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})


def parse_messages(raw: Any) -> tuple[Message, ...]:
    """Reads the `messages` array of an OpenAI chat request, oldest first.

    Raises InputError that names the message and what it should have been.
    """
    if not isinstance(raw, Sequence) or isinstance(raw, str | bytes):
        raise InputError("'messages' has to be an array of objects with 'role' and 'content'")
    return tuple(_message(i, entry) for i, entry in enumerate(raw))


def request_of(
    *,
    prompt: str | None = None,
    messages: Any = None,
    tools: Any = None,
    response_format: Any = None,
    **fields: Any,
) -> RouteRequest:
    """Builds a `RouteRequest` from the parts of an OpenAI-shaped body; `fields` are `RouteRequest`'s own.

    Exactly one of `prompt` and `messages` is needed. Tools, attached pictures and a JSON `response_format` become
    capabilities that the request needs. Raises InputError.
    """
    if (prompt is None) == (messages is None):
        raise InputError("give exactly one of 'prompt' (a string) and 'messages' (an array)")
    turns = (Message("user", prompt),) if prompt is not None else parse_messages(messages)
    if not turns:
        raise InputError("'messages' is empty: it needs at least one message")
    if tools is not None and (not isinstance(tools, Sequence) or isinstance(tools, str | bytes)):
        raise InputError("'tools' has to be an array of tool definitions")
    needs = set(fields.pop("needs", ()))
    if tools:
        needs.add("tools")
    if any(turn.attachments for turn in turns):
        needs.add("vision")
    if isinstance(response_format, Mapping) and response_format.get("type") in ("json_object", "json_schema"):
        needs.add("json")
    return RouteRequest(
        messages=turns,
        tools=len(tools) if tools else 0,
        tools_chars=len(json.dumps(tools)) if tools else 0,
        needs=frozenset(needs),
        **fields,
    )


def request_of_log_row(prompt: str | None, messages: str | None, tools: str | None = None) -> RouteRequest:
    """The request that a log row's `prompt`, or its `messages` and `tools` (JSON text), describe. Raises InputError."""
    try:
        parsed_tools = json.loads(tools) if tools else None
        parsed = json.loads(messages) if messages else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"'messages' or 'tools' is not JSON: {error}") from None
    if parsed:
        return request_of(messages=parsed, tools=parsed_tools)
    return request_of(prompt=prompt or "", tools=parsed_tools)


def _message(position: int, entry: Any) -> Message:
    where = f"messages[{position}]"
    if not isinstance(entry, Mapping):
        raise InputError(f"{where} has to be an object with 'role' and 'content', not {type(entry).__name__}")
    role = entry.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}.role has to be one of {', '.join(sorted(ROLES))}")
    calls = entry.get("tool_calls") or entry.get("function_call")
    text, attachments = _content(where, entry.get("content"))
    extra = len(json.dumps(calls)) if calls else 0
    return Message(role, text, attachments, extra + attachments * ATTACHMENT_CHARS)


def _content(where: str, content: Any) -> tuple[str, int]:
    if content is None:
        return "", 0
    if isinstance(content, str):
        return content, 0
    if not isinstance(content, Sequence):
        raise InputError(f"{where}.content has to be a string, null or an array of parts")
    texts, attachments = [], 0
    for part in content:
        if isinstance(part, str):
            texts.append(part)
        elif not isinstance(part, Mapping):
            raise InputError(f"{where}.content has a part that is neither a string nor an object")
        elif part.get("type") in _PICTURES:
            attachments += 1
        elif words := [part[name] for name in _SPOKEN if isinstance(part.get(name), str)]:
            texts.append(words[0])
        elif part.get("type") not in _SPOKEN:
            attachments += 1
    return "\n".join(texts), attachments
