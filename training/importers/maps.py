"""What several kinds of logs have alike: flat JSON maps, requests' bodies, our own decision in a call's metadata."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import polars as pl

from training.importers.batch import SIGNALS
from training.importers.conversations import spoken
from training.importers.jsontext import keys_of, written
from training.importers.values import json_said, said

BODY = ("messages", "tools", "prompt", "input")
OURS = "router_ml"
"""The key of a call's metadata under which a caller keeps what the router said: propensity, candidates, version."""
_DECISION = ("propensity", "candidates", "policy_version")


def summed(column: pl.Series, word: str) -> pl.Series:
    """The sum of a flat JSON map's numbers whose key contains `word`, whatever its case, as text; else null.

    Null, too, where it is 0: what writers that know of no price or usage put there. Where one of the numbers cannot be
    read, the map's own text, for `validate` to reject.
    """
    made = [None if text is None else _sum(text, word) for text in column.cast(pl.String).to_list()]
    return pl.Series(made, dtype=pl.String)


def _sum(text: str, word: str) -> str | None:
    if not text.strip():
        return None
    values = _loaded(text)
    if not isinstance(values, dict):
        # ClickHouse's own text of a map has other quotes.
        values = _loaded(text.replace("'", '"'))
    if not isinstance(values, dict):
        return None if values is None else text
    total: float = 0
    try:
        for key, value in values.items():
            if word in key.lower() and value not in (None, ""):
                total += value if isinstance(value, int | float) and not isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return text
    return str(total) if total else None


def _loaded(text: str) -> Any:
    """JSON as Python has it; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def tagged(column: pl.Series, start: str) -> pl.Series:
    """The rest of the first tag that begins with `start`, out of JSON lists of tags; null where there is none."""
    return pl.Series([None if text is None else _tag(text, start) for text in column.cast(pl.String)], dtype=pl.String)


def _tag(text: str, start: str) -> str | None:
    if start not in text and "\\" not in text:
        return None
    tags = _loaded(text)
    for tag in tags if isinstance(tags, list) else ():
        if isinstance(tag, str) and tag.startswith(start):
            return written(tag[len(start) :]) or None
    return None


def request_body(body: pl.Series) -> pl.DataFrame:
    """`messages`, `tools` and `prompt` out of the bodies of requests: JSON objects, lists of messages, or plain text.

    A JSON string is taken out of its quotes, and an object without messages or prompt is a prompt as it stands, as are
    messages that cannot be read (`conversations.spoken`).
    """
    text = body.cast(pl.String)
    frame = text.to_frame("_all").with_columns(_head=pl.col("_all").str.strip_chars_start().str.slice(0, 1))
    keys = keys_of(frame.select(pl.when(pl.col("_head") == "{").then("_all")).to_series(), BODY)
    quoted = pl.when(pl.col("_head") == '"').then(pl.lit('{"v":') + pl.col("_all") + pl.lit("}"))
    bare = keys_of(frame.select(quoted).to_series(), ("v",))["v"].alias("_bare")
    frame = frame.hstack(keys.rename(lambda name: f"_{name}")).hstack([bare])
    whole, given = said("_all"), said("_input")
    is_list = r"^\s*\[\s*\{"
    known = pl.any_horizontal(json_said(f"_{name}").is_not_null() for name in ("messages", "prompt", "input"))
    return spoken(
        frame.select(
            messages=pl.coalesce(
                json_said("_messages"),
                pl.when(given.str.contains(is_list)).then(given),
                pl.when(whole.str.contains(is_list)).then(whole),
            ),
            tools=json_said("_tools"),
            prompt=pl.coalesce(
                said("_prompt"),
                pl.when(~given.str.contains(is_list)).then(given),
                pl.when(~known & ~whole.str.contains(is_list)).then(pl.coalesce("_bare", json_said(whole))),
            ),
        )
    )


def decision_of(text: pl.Series, model: pl.Series) -> pl.DataFrame:
    """`propensity`, `candidates` and `policy_version` of decisions that stand as JSON text in calls' metadata.

    Nulls where its candidates, which are the router's names, do not hold the row's model: it was between others.
    """
    found = keys_of(text, _DECISION)
    mine = [
        names is not None and isinstance(listed := _loaded(names), list) and of in listed
        for names, of in zip(found["candidates"], model, strict=True)
    ]
    return found.select(pl.when(pl.lit(pl.Series(mine, dtype=pl.Boolean))).then(name).alias(name) for name in _DECISION)


def scores_of(scores: pl.Series, request_id: pl.Series) -> pl.DataFrame:
    """A signal for each entry of flat JSON maps of scores, named by its key: numbers, booleans, or {"value": …}.

    What is none of these is the signal's `label`.
    """
    rows = [
        (None if of is None else f"{of}:{name}", of, name, value, label)
        for text, of in zip(scores.cast(pl.String), request_id, strict=True)
        if text is not None
        for name, value, label in _scores(text)
    ]
    names = ("signal", "request_id", "source", "value", "label")
    return pl.DataFrame(rows, schema={name: SIGNALS[name] for name in names}, orient="row")


def _scores(text: str) -> Iterator[tuple[str | None, float | None, str | None]]:
    said_of = _loaded(text)
    for name, value in said_of.items() if isinstance(said_of, dict) else ():
        if isinstance(value, dict):
            value = value.get("value")
        if isinstance(value, int | float):
            yield written(name), float(value), None
        elif value is not None:
            yield written(name), None, written(value)
