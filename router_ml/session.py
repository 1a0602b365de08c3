"""Sessions: which model a conversation is with, what prompt caches still hold of it, and whether it stays.

A provider bills the part of a prompt that it has seen moments ago at a lower price, if the same model sees it again.
That makes the model which a session is with cheaper than it is for anyone else, and a switch dearer by the same amount.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from router_ml.errors import InputError
from router_ml.types import RouteRequest

_WORDS = "a follow-up of few words"
FOLLOW_UP_CHARS = 40
"""A user's turn of at most so many characters ("yes", "ok, do it") goes on with what was asked before."""


@dataclass(frozen=True, slots=True)
class SessionPolicy:
    """When a session leaves its model for one that is better by the policy's own measure.

    It does for one that costs at least the share `min_gain` less, the lost prompt cache counted; or, where the choice
    is by probability, for one with at least that share fewer unacceptable answers. A tenth is more than estimates of
    two models' costs waver by from turn to turn, and less than prices of neighbouring tiers differ by. A prompt is
    taken to be cached for `cache_seconds` after it was sent, if it has `cache_min_tokens` or more (the least that
    providers commonly cache for). With `explore` exploration goes on within sessions; otherwise it draws for their
    first requests only, since a draw throws a cache away and the user meets another model in mid-conversation.
    Raises InputError for values out of range.
    """

    min_gain: float = 0.1
    cache_seconds: float = 300.0
    cache_min_tokens: int = 1024
    explore: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.min_gain) or not 0.0 <= self.min_gain <= 1.0:
            raise InputError(f"session.min_gain has to be a number in [0, 1], not {self.min_gain!r}")
        for name in ("cache_seconds", "cache_min_tokens"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 2**53:
                raise InputError(f"session.{name} has to be a number of 0 or more, not {value!r}")
        if not isinstance(self.explore, bool):
            raise InputError("session.explore has to be true or false")

    @classmethod
    def from_table(cls, table: Mapping[str, Any]) -> SessionPolicy:
        """The table `session` of a policy file. Raises InputError."""
        if unknown := sorted(set(table) - set(cls.__dataclass_fields__)):
            known = ", ".join(cls.__dataclass_fields__)
            raise InputError(f"unknown setting 'session.{unknown[0]}'; known are {known}")
        return cls(**table)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Prefix(NamedTuple):
    """A prompt that a model was sent `age` seconds ago: a conversation's first `messages`, `chars` long with its tools.

    Of a later request of the same conversation it is the beginning; where it is not, the history was rewritten.
    """

    model: str
    messages: int
    chars: int
    age: float


class Session(NamedTuple):
    """What is known of a request's session: the model that served last, and the prompts that models were sent."""

    model: str
    prefixes: tuple[Prefix, ...] = ()


def lengths(request: RouteRequest) -> list[int]:
    """Characters of the prompt up to each message, [n + 1]; the first entry is that of the tools alone."""
    return list(accumulate([len(m.text) + m.extra_chars for m in request.messages], initial=request.tools_chars))


def follow_up(request: RouteRequest) -> Literal["words", "tools"] | None:
    """Whether a request asks nothing new: its last user turn is a few words, or tools have answered since."""
    last = request.messages[-1]
    if last.role != "user":
        return "tools" if any(m.role == "user" for m in request.messages) else None
    short = len(request.messages) > 1 and len(last.text) <= FOLLOW_UP_CHARS and not last.attachments
    return "words" if short else None


def session_of(request: RouteRequest, session: Session | None) -> Session | None:
    """The session with what the request itself says of it: its `previous_model` has the last word.

    Where nothing is known of prompts to that model, it is taken to have been sent, just now, what comes before the last
    answer.
    """
    model = request.previous_model
    if model is None:
        return session
    sent = () if session is None else session.prefixes
    known = any(prefix.model == model for prefix in sent)
    return Session(model, sent if known else (*sent, *answered_prefix(request, model)))


def answered_prefix(request: RouteRequest, model: str, age: float = 0.0) -> tuple[Prefix, ...]:
    """What the last answer in the conversation must have been asked with, as a prompt of `model`; none without one."""
    at = max((i for i, m in enumerate(request.messages) if m.role == "assistant"), default=0)
    return (Prefix(model, at, lengths(request)[at], age),) if at else ()


def cached_shares(request: RouteRequest, session: Session, seconds: float) -> dict[str, float]:
    """Per model, the share of the request's prompt that its cache holds, in (0, 1]; models without any are left out."""
    sizes = lengths(request)
    shares: dict[str, float] = {}
    for model, messages, chars, age in session.prefixes:
        if age <= seconds and messages < len(sizes) and sizes[messages] == chars and chars:
            shares[model] = max(shares.get(model, 0.0), chars / sizes[-1])
    return shares


@dataclass(frozen=True, slots=True)
class Incumbent:
    """The model that a session is with, as the choice sees it. Lists are on the model axis [m].

    `position` is None where it may not serve this request, and `why` says so. `saved_usd` is what warm caches take off
    each model's call: costs have it taken off already. Where it is a follow-up of few words
    no gain is enough to leave: nothing was said that could tell the models apart anew.
    """

    model: str
    position: int | None
    why: str
    names: Sequence[str]
    saved_usd: Sequence[float]
    min_gain: float
    follow_up: Literal["words", "tools"] | None = None

    @property
    def least_gain(self) -> float:
        """The share that a move has to gain."""
        return 1.0 if self.follow_up == "words" else self.min_gain


def settle(
    of: Incumbent,
    at: Sequence[int],
    greedy: int,
    reason: str,
    *,
    min_probability: float,
    p: Sequence[float],
    loss: Sequence[float] | None,
    meeting: Sequence[int],
    fixed: bool,
) -> tuple[int, str]:
    """Whether the session stays: the choice and its reason, from `greedy` and `reason` without a session.

    Candidates are given by their place in `at`, which holds their positions on the model axis. `loss` is what the
    choice minimises among those `meeting` the dial, USD; None where the choice is by `p`. With `fixed` nothing meets it
    and the policy's default is `greedy`, which serves then, whatever the session is with. The dial is held against
    claims; but what was good enough for a question is not left at a mere follow-up while its `p` reaches the dial. A
    session that stays has a loss of at most the least there is, plus the share `least_gain` of its own.
    """
    there = of.names[at[greedy]]
    moves, stays = f"session moves from {of.model} to {there}", f"session stays with {of.model}"
    if of.position is None:
        return greedy, f"{moves}: {of.why}"
    here = at.index(of.position)
    if meeting and loss is not None:
        if here in meeting:
            return _by_loss(of, at, here, reason, loss, meeting)
        if not (of.follow_up and p[here] >= min_probability):
            return greedy, f"{moves}: the former's claim does not reach {min_probability:g}"
        follows = _WORDS if of.follow_up == "words" else "a follow-up"
        reason = f"{stays}: {follows}, and its probability reaches {min_probability:g}"
        return _by_loss(of, at, here, reason, loss, [*meeting, here])
    if here == greedy:
        return here, reason
    if fixed:
        return greedy, f"{moves}: {reason}"
    if math.isnan(p[greedy]):
        return here, f"{stays}: no estimate for any candidate"
    better = f"more probable ({p[greedy]:.3f}, not {p[here]:.3f})"
    if p[greedy] - p[here] <= of.least_gain * (1.0 - p[here]):
        if of.follow_up == "words":
            return here, f"{stays}: {_WORDS}, though {there} is {better}"
        return here, f"{stays}: {there} is hardly {better}"
    return greedy, f"{moves}: {better}"


def _by_loss(
    of: Incumbent, at: Sequence[int], here: int, reason: str, loss: Sequence[float], meeting: Sequence[int]
) -> tuple[int, str]:
    best = min((i for i in meeting if i != here), key=loss.__getitem__, default=here)
    there = of.names[at[best]]
    gain = loss[best] < (1.0 - of.least_gain) * loss[here]
    lost = of.saved_usd[at[here]] - of.saved_usd[at[best]]
    saved = loss[here] - loss[best] + lost  # as if nothing was cached
    cache = f"a prompt cache worth {lost:.3g} USD" if lost > 0.0 else ""
    if gain:
        cache = f", loses {cache}" if cache else ""
        return best, f"session moves from {of.model} to {there}: switching saves {saved:.3g} USD{cache}"
    if not saved > 0.0:
        return here, reason
    cache = f" but lose {cache}" if cache else ""
    least = ""
    if loss[best] < loss[here]:
        least = f", {_WORDS}" if of.follow_up == "words" else f", a gain of less than {of.min_gain:.0%}"
    return here, f"session stays with {of.model}: switching to {there} would save {saved:.3g} USD{cache}{least}"
