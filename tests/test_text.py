"""Requests to text, words and statistics."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.text import MAX_CHARS, STATISTICS, conversation_chars, request_text, text_statistics, words
from router_ml.conversation import request_of
from router_ml.types import Message, RouteRequest


def _turns(*texts: tuple[str, str]) -> RouteRequest:
    return RouteRequest(messages=tuple(Message(role, text) for role, text in texts))


def test_a_plain_prompt_is_its_own_text() -> None:
    assert request_text(request_of(prompt="What is 2 + 2?")) == "What is 2 + 2?"


def test_the_system_prompt_is_not_the_request() -> None:
    request = _turns(("system", "You are a very long boilerplate."), ("user", "Sort this list."))
    assert request_text(request) == "Sort this list."


def test_a_system_prompt_alone_is_better_than_nothing() -> None:
    assert request_text(_turns(("system", "Say hello."))) == "Say hello."


def test_a_short_follow_up_is_read_with_the_conversation_before_it() -> None:
    question = "Prove that every bounded sequence of real numbers has a convergent subsequence."
    request = _turns(("user", question), ("assistant", "Shall I go on with the second half?"), ("user", "yes"))
    text = request_text(request)
    assert question in text
    assert text.endswith("yes")


def test_a_long_last_message_stands_alone() -> None:
    request = _turns(("user", "an old topic"), ("assistant", "an answer"), ("user", "new topic " * 60))
    assert "old topic" not in request_text(request)


def test_tool_results_after_the_question_count() -> None:
    request = _turns(("user", "What is the weather? " * 20), ("assistant", ""), ("tool", "rain in Oslo"))
    text = request_text(request)
    assert "weather" in text
    assert "rain in Oslo" in text


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant", "tool"]), st.text(max_size=5000)), min_size=1)
)
def test_any_conversation_gives_bounded_text_and_finite_statistics(turns: list[tuple[str, str]]) -> None:
    request = _turns(*turns)
    text = request_text(request)
    assert len(text) <= MAX_CHARS
    statistics = text_statistics(request, text, words(text))
    assert statistics.shape == (len(STATISTICS),)
    assert np.isfinite(statistics).all()


def test_lone_surrogates_do_not_break_the_statistics() -> None:
    request = request_of(prompt="broken \ud800 text")
    assert np.isfinite(text_statistics(request, request_text(request), words(request_text(request)))).all()


def test_tools_and_attachments_count() -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    picture = {"type": "image_url", "image_url": {"url": "data:,"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, picture]}]
    plain, rich = request_of(prompt="What is it?"), request_of(messages=messages, tools=tools)
    at = {name: i for i, name in enumerate(STATISTICS)}
    before = text_statistics(plain, "What is it?", words("What is it?"))
    after = text_statistics(rich, "What is it?", words("What is it?"))
    for name in ("tools", "attachments", "log_tools_chars", "log_conversation_chars"):
        assert after[at[name]] > before[at[name]], name
    assert conversation_chars(rich) > conversation_chars(plain)


def test_words_split_as_bert_does() -> None:
    assert words("Don't STOP, É=é!") == ["don", "'", "t", "stop", ",", "e", "=", "e", "!"]
    assert words("北京 is x²") == ["北", "京", "is", "x²"]
    assert words("a\x00b\x07c\td") == ["abc", "d"]


def test_what_a_tool_returns_does_not_drown_the_question() -> None:
    question = "Prove that every bounded sequence of real numbers has a convergent subsequence."
    request = _turns(("user", question), ("assistant", "I look it up."), ("tool", "line of a file\n" * 500 + "the end"))
    text = request_text(request)
    assert text.startswith(question) and text.endswith("the end")
    assert len(text) <= 1.5 * len(question) + 2


def test_a_long_answer_does_not_drown_the_question_that_a_short_turn_follows_up_on() -> None:
    question = "Prove that every bounded sequence of real numbers has a convergent subsequence."
    answer = "Let us begin with the definition of a limit. " * 50 + "Shall I go on?"
    turns = [("user", question), ("assistant", answer), ("user", "yes"), ("assistant", answer), ("user", "continue")]
    text = request_text(_turns(*turns))
    assert text.startswith(question) and text.endswith("continue") and "yes" in text and "Shall I go on?" in text
    assert len(text) <= 1.5 * (len(question) + len("yes continue")) + 6


def test_a_short_turn_after_a_very_long_one_is_still_read() -> None:
    request = _turns(("user", "a word " * 2000 + "the end"), ("assistant", "Understood."), ("user", "yes"))
    text = request_text(request)
    assert len(text) <= MAX_CHARS and text.endswith("yes") and "the end" in text
