"""Reading OpenAI-shaped requests: what counts as text, attachment and need, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from router_ml.conversation import ATTACHMENT_CHARS, parse_messages, request_of, request_of_log_row
from router_ml.errors import InputError
from router_ml.types import Message

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}


def test_a_conversation_keeps_every_turn_and_what_it_carries() -> None:
    raw = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, IMAGE, {"type": "text", "text": "this?"}]},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}, {"id": "2"}]},
        {"role": "tool", "content": "a cat", "tool_call_id": "1"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}, {"type": "thinking"}], "tool_calls": 3},
        {"role": "user", "content": ["and", {"type": "input_audio", "input_audio": {}}]},
    ]
    assert parse_messages(raw) == (
        Message("system", "Be brief."),
        Message("user", "What is\nthis?", attachments=1, extra_chars=ATTACHMENT_CHARS),
        Message("assistant", "", extra_chars=len('[{"id": "1"}, {"id": "2"}]')),
        Message("tool", "a cat"),
        Message("assistant", "no", extra_chars=1),
        Message("user", "and", attachments=1, extra_chars=ATTACHMENT_CHARS),
    )


def test_needs_follow_from_the_request() -> None:
    plain = request_of(prompt="hi")
    assert plain.messages == (Message("user", "hi"),) and plain.needs == frozenset()
    request = request_of(
        messages=[{"role": "user", "content": [IMAGE]}],
        tools=[TOOL],
        response_format={"type": "json_schema", "json_schema": {}},
        needs={"vision"},
        tenant="acme",
    )
    assert request.needs == {"tools", "vision", "json"} and request.tenant == "acme"
    assert request.tools == 1 and request.tools_chars == len(json.dumps([TOOL]))
    assert request_of(prompt="hi", tools=[], response_format={"type": "text"}).needs == frozenset()


def test_a_log_row_reads_as_the_live_request_does() -> None:
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    live = request_of(messages=messages, tools=[TOOL])
    assert request_of_log_row(None, json.dumps(messages), json.dumps([TOOL])) == live
    assert request_of_log_row("2+2?", None) == request_of(prompt="2+2?")
    for broken in ("{", "not json", "[" * 100_000, "1" * 10_000):
        with pytest.raises(InputError, match="not JSON"):
            request_of_log_row(None, broken)


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({}, "exactly one of 'prompt'"),
        ({"prompt": "x", "messages": []}, "exactly one of 'prompt'"),
        ({"messages": []}, "'messages' is empty"),
        ({"messages": "hello"}, "'messages' has to be an array"),
        ({"messages": {"role": "user"}}, "'messages' has to be an array"),
        ({"messages": ["hello"]}, r"messages\[0\] has to be an object"),
        ({"messages": [{"role": "user", "content": "x"}, {"content": "y"}]}, r"messages\[1\].role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\].role has to be one of assistant"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"messages\[0\].role"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": {"text": "x"}}]}, r"messages\[0\].content"),
        ({"messages": [{"role": "user", "content": [7]}]}, r"messages\[0\].content has a part"),
        ({"prompt": "x", "tools": "search"}, "'tools' has to be an array"),
        ({"prompt": "x", "tools": {"a": 1}}, "'tools' has to be an array"),
    ],
)
def test_what_is_not_a_request_is_refused_without_quoting_it(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        request_of(**parts)


def test_a_picture_with_a_caption_is_still_a_picture() -> None:
    part = {"type": "image_url", "image_url": {"url": "data:,"}, "text": "caption"}
    request = request_of(messages=[{"role": "user", "content": [{"type": "text", "text": "What is it?"}, part]}])
    assert request.needs == {"vision"}


def test_what_tools_were_called_with_counts_for_the_context_window() -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": "x" * 400_000}}]
    request = request_of(messages=[{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": calls}])
    assert sum(message.extra_chars for message in request.messages) > 400_000
