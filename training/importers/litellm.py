"""LiteLLM's spend log: the table `LiteLLM_SpendLogs` in Postgres, or an export of it (CSV, JSONL, Parquet).

What its columns mean was read in litellm 1.110.2 (`litellm/proxy/schema.prisma`,
`litellm/proxy/spend_tracking/spend_tracking_utils.py`), and seen in rows that its proxy wrote
(`tests/fixtures/litellm`). What matters here:
- `model_group` is the name by which models are asked for, and so the router's model id; `model` is the deployment's.
- After a fallback `model_group` is the group that served; the one that was asked for is `original_model_group` in
  `metadata`, which has `attempted_fallbacks` and `attempted_retries` too. It becomes `fallback_from`: the action.
- `messages` is `{}` even where prompts are stored: they are in `proxy_server_request` then, cut at 2,048 characters a
  string unless the proxy is told otherwise. Without them a row counts for cost, volume, latency and reliability.
- A cache hit has the status `cached` and costs nothing: nothing was called, so that latency, retries and provider are
  null. Its request_id is the first answer's with `_cache_hit` and a time behind it.
- Spend 0 is what LiteLLM says of a model without a price, and 0 tokens of a stream without usage: both are null.
- `request_id` is the id of the answer (`response_id`), `litellm_call_id` that of the call (`trace_id`), which a client
  gets as the header `x-litellm-call-id`. There is no feedback in the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA, convert
from router_ml.types import CACHED
from training.importers.batch import ROW, Batch, ReadOptions
from training.importers.conversations import spoken
from training.importers.files import Chunk, read_columns
from training.importers.jsontext import keys_of
from training.importers.maps import BODY, OURS, tagged
from training.importers.values import above_0, as_found, json_said, number, said

TABLE = "LiteLLM_SpendLogs"
COLUMNS = (
    "request_id", "litellm_call_id", "call_type", "api_key", "spend", "prompt_tokens", "completion_tokens",
    "startTime", "endTime", "request_duration_ms", "model", "model_id", "model_group", "custom_llm_provider",
    "metadata", "cache_hit", "request_tags", "team_id", "organization_id", "end_user", "messages", "session_id",
    "status", "proxy_server_request",
)  # fmt: skip
# Calls that answer a prompt; the rest (embeddings, images, files, health checks) is nothing to route here.
CALLS = (
    "completion", "acompletion", "text_completion", "atext_completion", "responses", "aresponses",
    "anthropic_messages", "generate_content", "agenerate_content", "generate_content_stream",
    "agenerate_content_stream",
)  # fmt: skip
# What is wanted of JSON columns: `metadata` alone is some 11 kB a row, most of it the model's entry in the price list.
_METADATA = (
    "attempted_fallbacks", "attempted_retries", "original_model_group", "error_information", "internal_call_origin",
    "is_silent_experiment", "billed_retry_attempt", "spend_logs_metadata",
)  # fmt: skip
_ERROR = ("llm_provider", "error_code", "error_class")
_DECISION = ("propensity", "candidates", "policy_version")  # what the plugin says, in `spend_logs_metadata`
MODEL_COLUMNS = ("model_group", "model")
TENANT_COLUMNS = ("team_id", "organization_id", "end_user", "api_key")


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """Rows of the spend log at a Postgres URL, or of an export.

    Settings, all optional: `model`, the column that is the model's name (`model_group`; `model` where there is none);
    `tenant`, the column that is the tenant (by default the team, else the organisation, else the end user); `task_tag`,
    the beginning of the request tag whose rest is the task ("task:"); for Postgres those of `postgres.read_table`.
    Raises InputError for another setting's value, and as `read_columns` and `read_table` do.
    """
    settings = options.settings
    for name, choices in (("model", MODEL_COLUMNS), ("tenant", TENANT_COLUMNS)):
        if settings.get(name) not in (None, *choices):
            raise InputError(f"{name} cannot be {settings[name]!r}: choose one of {', '.join(choices)}")
    keys = {"metadata": _METADATA, "proxy_server_request": BODY}
    if is_postgres(source):
        from training.importers.postgres import read_table  # psycopg is no part of [train]

        order = ("startTime", "request_id")
        chunks: Iterator[Chunk] = read_table(source, TABLE, COLUMNS, order=order, options=options, keys=keys)
    else:
        chunks = read_columns(source, COLUMNS, cursor=options.cursor, chunk_rows=options.chunk_rows)
    for chunk in chunks:
        frame, skipped = _requests(chunk.frame)
        yield Batch(
            rows=_rows(frame, settings),
            raw=chunk.raw_of,
            rejects=chunk.rejects,
            cursor=chunk.cursor,
            skipped=skipped,
        )


def is_postgres(source: str) -> bool:
    """Whether a source is the URL of a Postgres."""
    scheme, is_url, _ = source.partition("://")
    return bool(is_url) and scheme.partition("+")[0] in ("postgres", "postgresql")


def _requests(frame: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """The rows that are requests of callers, with `metadata`'s fields as columns; how many others there are, by why."""
    frame = frame.hstack(keys_of(frame["metadata"], _METADATA))
    frame = frame.hstack(keys_of(frame["error_information"], _ERROR))
    failed = pl.col("status").cast(pl.String) == "failure"
    # A wrong key, a spent budget, a model that it does not have: LiteLLM then has no deployment, or guesses one, but
    # knows of no attempt and of no provider that failed.
    untried = said("llm_provider").is_null() & pl.col("attempted_retries").is_null()
    refused = failed & (said("model_id").is_null() | untried)
    call = said("call_type")
    why = (
        pl.when(call.is_not_null() & ~call.is_in(list(CALLS)))
        .then(pl.lit("no chat or text completion"))
        .when(said("internal_call_origin").is_not_null())
        .then(pl.lit("a call of LiteLLM's own"))
        .when(pl.col("is_silent_experiment") == "true")
        .then(pl.lit("a silent experiment"))
        .when(pl.col("billed_retry_attempt") == "true")
        .then(pl.lit("an attempt that was billed beside its request"))
        .when(refused)
        .then(pl.lit("refused before a model was called"))
    )
    reasons = frame.select(why.alias("why"))["why"]
    return frame.filter(reasons.is_null()), dict(reasons.drop_nulls().value_counts().iter_rows())


def _rows(frame: pl.DataFrame, settings: Mapping[str, Any]) -> pl.DataFrame:
    times, _ = convert(frame, {"startTime": LOG_SCHEMA["time"], "endTime": LOG_SCHEMA["time"]})
    took = (times["endTime"] - times["startTime"]).dt.total_microseconds() / 1000
    ours = keys_of(keys_of(frame["spend_logs_metadata"], (OURS,))[OURS], _DECISION)
    if settings.get("model") == "model":  # a decision is one between the names that callers use
        ours = ours.clear(len(ours))
    task = tagged(frame["request_tags"], settings.get("task_tag") or "task:")
    frame = frame.hstack(_asked(frame)).hstack(ours).with_columns(
        _took=took, _task=task, _cached=said("cache_hit").str.to_lowercase() == "true"
    )  # fmt: skip
    called = ~pl.col("_cached").fill_null(False)
    served = said(settings.get("model") or "model_group").fill_null(said("model"))
    asked = pl.when(number("attempted_fallbacks") > 0).then(said("original_model_group"))
    tenant = said(settings["tenant"]) if settings.get("tenant") else pl.coalesce(
        said("team_id"), said("organization_id"), said("end_user")
    )  # fmt: skip
    return frame.select(
        ROW,
        request_id=said("request_id"),
        response_id=pl.when(called).then(said("request_id")),
        trace_id=said("litellm_call_id"),
        time=pl.col("startTime"),
        session=said("session_id"),
        tenant=tenant,
        key=said("api_key"),
        task=said("_task"),
        messages="_messages",
        tools="_tools",
        prompt="_prompt",
        model=served,
        provider=pl.when(called).then(said("custom_llm_provider")),
        candidates="candidates",
        propensity="propensity",
        policy_version="policy_version",
        input_tokens=above_0("prompt_tokens"),
        output_tokens=above_0("completion_tokens"),
        cost_usd=pl.when(called).then(above_0("spend")).otherwise(pl.lit("0")),
        latency_ms=pl.when(called).then(pl.coalesce(as_found("request_duration_ms"), pl.col("_took").cast(pl.String))),
        status=pl.when(called).then(_status()).otherwise(pl.lit(CACHED)),
        retries=pl.when(called).then(pl.col("attempted_retries")),
        fallback_from=pl.when(asked != served).then(asked),
    )


def _asked(frame: pl.DataFrame) -> pl.DataFrame:
    """`_messages`, `_tools` and `_prompt`."""
    body = keys_of(frame["proxy_server_request"], BODY).rename(lambda name: f"_{name}")
    given = said("_input")
    is_list = given.str.starts_with("[")
    asked = body.with_columns(frame["messages"].cast(pl.String).alias("_own")).select(
        messages=pl.coalesce(json_said("_own"), json_said("_messages"), json_said(pl.when(is_list).then(given))),
        tools=json_said("_tools"),
        prompt=pl.coalesce(said("_prompt"), said(pl.when(~is_list).then(given))),
    )
    return spoken(asked).rename(lambda name: f"_{name}")


def _status() -> pl.Expr:
    code, name = pl.col("error_code"), pl.col("error_class")
    state = said("status").str.to_lowercase()
    return (
        pl.when(state.is_null())
        .then(None)
        .when(state == "success")
        .then(pl.lit("ok"))
        .when(code.is_in(["408", "504"]) | name.str.contains("Timeout"))
        .then(pl.lit("timeout"))
        .when((code == "429") | name.str.contains("RateLimit"))
        .then(pl.lit("rate_limited"))
        .when((code == "499") | name.str.contains("Cancel"))
        .then(pl.lit("cancelled"))
        .otherwise(pl.lit("error"))
    )
