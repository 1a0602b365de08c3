"""Helicone's requests: rows of its query API (`HeliconeRequest`) or of its table `request_response_rmt`.

The fields are those of Helicone's public types (Helicone/helicone, `HeliconeRequest` and `RequestResponseRMT`; the REST
page post-v1requestquery). What matters here:
- Times of answers are `delay_ms` (`latency` in the table), both ms.
- There is a price only where `costUSD` is; the table's `cost` is in a unit of its own and is left.
- `scores` is a map of integers, any scale: each key is a source of feedback; `feedback_rating` is true or false.
- `properties` is a map; the session is its `Helicone-Session-Id`.
- `request_model` is the name that the caller used, `model` and `response_model` what answered.
- An answer from the cache has a `cache_reference_id` other than zeros: no model was called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA, convert
from router_ml.types import CACHED
from training.importers.batch import ROW, SIGNALS, Batch, ReadOptions
from training.importers.exports import read_export
from training.importers.jsontext import keys_of
from training.importers.maps import OURS, decision_of, request_body, scores_of
from training.importers.values import above_0, as_found, said, status

COLUMNS = (
    "request_id", "request_created_at", "response_id", "response_created_at", "response_status", "status", "model",
    "request_model", "response_model", "provider", "delay_ms", "latency", "prompt_tokens", "completion_tokens",
    "request_body", "response_body", "request_path", "target_url", "request_user_id", "user_id", "properties",
    "request_properties", "scores", "feedback_id", "feedback_created_at", "feedback_rating", "costUSD",
    "cache_reference_id",
)  # fmt: skip
MODEL_COLUMNS = ("request_model", "model", "response_model")
RATING = "feedback"
"""The source of a rating; the scores' keys are sources, too."""
_AS_SCORE = "helicone-score-feedback"
_OTHER = "/(embeddings|images|audio|moderations|files|batches|rerank|fine_tuning)"
_NO_CACHE = "00000000-0000-0000-0000-000000000000"


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """Requests as rows, their scores and ratings as signals, of a file or of a folder's files.

    Settings, all optional: `model`, the column with the router's model id (one of `MODEL_COLUMNS`, "request_model"; the
    others where it is empty); `session_key`, `tenant_key` and `task_key`, the keys of `properties` with these
    ("Helicone-Session-Id", none: the user, "task"). Raises InputError for another setting's value, and as
    `read_export` does.
    """
    if (model := options.settings.get("model")) not in (None, *MODEL_COLUMNS):
        raise InputError(f"model cannot be {model!r}: choose one of {', '.join(MODEL_COLUMNS)}")
    for chunk, cursor in read_export(source, COLUMNS, options):
        url = pl.coalesce(said("target_url"), said("request_path"))
        other = chunk.frame.select(url.str.contains(_OTHER).fill_null(False)).to_series()
        calls = chunk.frame.filter(~other)
        yield Batch(
            rows=_rows(calls, options.settings),
            cursor=cursor,
            raw=chunk.raw_of,
            rejects=chunk.rejects,
            signals=_signals(calls),
            skipped={"no chat or text completion": int(other.sum())} if other.any() else {},
        )


def _rows(frame: pl.DataFrame, settings: Mapping[str, Any]) -> pl.DataFrame:
    names = {
        "session": settings.get("session_key") or "Helicone-Session-Id",
        "tenant": settings.get("tenant_key"),
        "task": settings.get("task_key") or "task",
    }
    keys = list(dict.fromkeys([OURS, *(key for key in names.values() if key)]))
    properties = frame.select(p=pl.coalesce(said("properties", "{}"), said("request_properties", "{}")))["p"]
    inside = keys_of(properties, keys).rename(lambda key: f"_p_{key}")
    body = request_body(frame["request_body"]).rename(lambda name: f"_{name}")
    answer = keys_of(frame["response_body"], ("id",)).rename({"id": "_answer"})
    frame = frame.hstack(inside).hstack(body).hstack(answer)
    given = {name: said(f"_p_{key}") if key else pl.lit(None, pl.String) for name, key in names.items()}
    model = pl.coalesce(map(said, (settings.get("model") or MODEL_COLUMNS[0], *MODEL_COLUMNS)))
    called = said("cache_reference_id", _NO_CACHE).is_null()
    return frame.select(
        ROW,
        request_id=said("request_id"),
        response_id=pl.when(called).then(pl.coalesce(said("_answer"), said("response_id"))),
        time=pl.col("request_created_at"),
        session=given["session"],
        tenant=given["tenant"].fill_null(pl.coalesce(said("request_user_id"), said("user_id"))),
        task=given["task"],
        messages="_messages",
        tools="_tools",
        prompt="_prompt",
        model=model,
        provider=pl.when(called).then(said("provider")),
        **decision_of(frame[f"_p_{OURS}"], frame.select(model).to_series()).to_dict(),
        input_tokens=above_0("prompt_tokens"),
        output_tokens=above_0("completion_tokens"),
        cost_usd=pl.when(called).then(above_0("costUSD")).otherwise(pl.lit("0")),
        latency_ms=pl.when(called).then(pl.coalesce(as_found("delay_ms"), as_found("latency"))),
        # Below 0 are Helicone's own numbers; without an answer yet nothing is known.
        status=pl.when(~called)
        .then(pl.lit(CACHED))
        .when(said("response_created_at").is_not_null())
        .then(status(pl.coalesce(said("response_status"), said("status")))),
    )


def _signals(frame: pl.DataFrame) -> pl.DataFrame:
    ids = frame.select(said("request_id"))["request_id"]
    times = convert(frame.select(time="feedback_created_at"), {"time": LOG_SCHEMA["time"]})[0]
    word = said("feedback_rating").str.to_lowercase()
    rated = frame.with_columns(times).select(
        signal=pl.coalesce(said("feedback_id"), pl.concat_str(said("request_id"), pl.lit(f":{RATING}"))),
        time="time",
        request_id=said("request_id"),
        source=pl.lit(RATING),
        value=pl.when(word.is_in(["true", "1"])).then(1.0).when(word.is_in(["false", "0"])).then(0.0),
    ).drop_nulls("value")  # fmt: skip
    # A rating stands among the scores, too.
    scores = scores_of(frame["scores"], ids)
    again = (pl.col("source") == _AS_SCORE) & pl.col("request_id").is_in(rated["request_id"].implode())
    scores = scores.filter(~again).with_columns(pl.col("source").replace(_AS_SCORE, RATING))
    return pl.concat([convert(part, SIGNALS)[0] for part in (rated, scores)])
