"""What several kinds of logs have alike: flat JSON maps, requests' bodies, our own decision in a call's metadata."""

from __future__ import annotations

import polars as pl

from training.importers.batch import SIGNALS
from training.importers.values import json_said, keys_of, number, said

BODY = ("messages", "tools", "prompt", "input")
_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
OURS = "router_ml"
"""The key of a call's metadata under which a caller keeps what the router said: propensity, candidates, version."""


def summed(column: str | pl.Expr, word: str) -> pl.Expr:
    """The sum of a flat JSON map's numbers whose key contains `word`, whatever its case; null where there is none."""
    text = pl.col(column) if isinstance(column, str) else column
    found = text.cast(pl.String).str.extract_all(rf'(?i)"[^"]*{word}[^"]*"\s*:\s*"?{_NUMBER}')
    numbers = found.list.eval(pl.element().str.extract(rf"({_NUMBER})$").cast(pl.Float64, strict=False))
    return pl.when(numbers.list.len() > 0).then(numbers.list.sum())


def above_0(value: pl.Expr) -> pl.Expr:
    """The value, null where it is 0: what writers that know of no price or usage put there."""
    return pl.when(value != 0).then(value)


def request_body(body: pl.Series) -> pl.DataFrame:
    """`messages`, `tools` and `prompt` out of the bodies of requests: JSON objects, lists of messages, or plain text.

    A JSON string is taken out of its quotes, and an object without messages or prompt is a prompt as it stands.
    """
    text = body if isinstance(body.dtype, pl.Struct) else body.cast(pl.String).str.strip_chars()
    keys = keys_of(text, BODY) if isinstance(text.dtype, pl.Struct) else _keys_of_objects(text)
    frame = keys.rename(lambda name: f"_{name}").with_columns(
        pl.lit(None, pl.String).alias("_all") if isinstance(text.dtype, pl.Struct) else text.alias("_all")
    )
    whole, given = said("_all"), said("_input")
    is_list = r"^\[\s*\{"
    quoted = whole.str.contains(r'^"[\s\S]*"$')
    # JSON text of a string, out of its quotes by way of an object.
    bare = (pl.lit('{"v":') + pl.when(quoted).then(whole) + pl.lit("}")).str.json_path_match("$.v")
    known = pl.any_horizontal(json_said(f"_{name}").is_not_null() for name in ("messages", "prompt", "input"))
    return frame.select(
        messages=pl.coalesce(
            json_said("_messages"),
            pl.when(given.str.contains(is_list)).then(given),
            pl.when(whole.str.contains(is_list)).then(whole),
        ),
        tools=json_said("_tools"),
        prompt=pl.coalesce(
            said("_prompt"),
            pl.when(~given.str.contains(is_list)).then(given),
            pl.when(~known & ~whole.str.contains(is_list)).then(pl.coalesce(bare, json_said(whole))),
        ),
    )


def _keys_of_objects(text: pl.Series) -> pl.DataFrame:
    objects = text.to_frame("o").select(pl.when(pl.col("o").str.starts_with("{")).then("o"))
    return keys_of(objects.to_series(), BODY)


def decision_of(text: pl.Expr, model: pl.Expr) -> dict[str, pl.Expr]:
    """`propensity`, `candidates` and `policy_version` of a decision that stands as JSON text in a call's metadata.

    Nulls where its candidates, which are the router's names, do not hold the model: it was between others.
    """
    candidates = text.str.json_path_match("$.candidates")
    other = candidates.is_not_null() & ~candidates.str.contains(
        pl.concat_str(pl.lit('"'), model, pl.lit('"')), literal=True
    )
    mine = pl.when(~other.fill_null(True)).then(text)
    return {
        "propensity": number(mine.str.json_path_match("$.propensity")),
        "candidates": mine.str.json_path_match("$.candidates"),
        "policy_version": mine.str.json_path_match("$.policy_version"),
    }


def scores_of(scores: pl.Series, request_id: pl.Series, time: pl.Series | None = None) -> pl.DataFrame:
    """A signal for each entry of flat JSON maps of scores, named by its key: numbers, booleans, or {"value": …}."""
    pair = r'"((?:[^"\\]|\\.)*)"\s*:\s*(?:\{\s*"value"\s*:\s*)?(' + _NUMBER + "|true|false)"
    frame = pl.DataFrame({"request_id": request_id, "text": scores.cast(pl.String)})
    frame = frame.with_columns(pl.lit(None, SIGNALS["time"]).alias("time") if time is None else time.alias("time"))
    found = frame.with_columns(pl.col("text").str.extract_all(pair).alias("pair")).explode("pair").drop_nulls("pair")
    value = pl.col("pair").str.extract(pair, 2).replace({"true": "1", "false": "0"}).cast(pl.Float64, strict=False)
    source = pl.col("pair").str.extract(pair, 1)
    return found.select(
        pl.concat_str("request_id", source, separator=":").alias("signal"),
        "time",
        "request_id",
        source.alias("source"),
        value.alias("value"),
    )
