"""Portkey's logs export, and feedback as its API takes it: JSON lines.

The columns are those of Portkey's "Logs Export" page (Portkey-AI/docs, logs-export.md). What matters here:
- `cost` is in cents of a US dollar, `response_time` in ms.
- `request` and `response` are objects with a `body`; older exports have `request.body` and `response.body`. Exports
  without those columns have no prompts: such rows count for cost, volume and reliability.
- `cache_status` HIT or SEMANTIC HIT: no model was called, at no cost; latency and retries say nothing.
- `retry_success_count` is how many retries it took; -1 says that none helped.
- Older exports have no `id`: the trace, the time and the model together then name the call.
- Feedback (`POST /feedback`: trace_id, value from -10 to 10, weight from 0 to 1) names a trace, and one trace may have
  several calls.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from router_ml.log_schema import LOG_SCHEMA, convert
from router_ml.types import CACHED
from training.importers.batch import ROW, SIGNALS, Batch, ReadOptions
from training.importers.exports import read_export
from training.importers.jsontext import keys_of, written
from training.importers.maps import OURS, decision_of, request_body
from training.importers.values import above_0, as_found, measured, number, said, status

COLUMNS = (
    "id", "trace_id", "created_at", "request", "request.body", "response", "response.body", "is_success", "ai_org",
    "ai_model", "req_units", "res_units", "cost", "cost_currency", "request_url", "response_status_code",
    "response_time", "cache_status", "retry_success_count", "virtual_key", "metadata", "feedback", "value", "weight",
)  # fmt: skip
SOURCE = "feedback"
"""The source of Portkey's feedback, for rules: `feedback=score,min=-10,max=10` or `feedback=thumbs`."""
_OTHER = "/(embeddings|images|audio|moderations|files|batches|rerank|fine_tuning)"


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """Calls as rows, feedback as signals, of a file or of a folder's files.

    Settings, all optional: `session_key`, `tenant_key` and `task_key`, the keys of `metadata` with these ("session_id",
    "_user", "task"). Raises InputError as `read_export` does.
    """
    keys = {"request": ("body", "url"), "response": ("body",)}
    for chunk, cursor in read_export(source, COLUMNS, options):
        frame = chunk.frame
        for name in ("request", "response"):
            body = keys_of(frame[name], keys[name]).rename(lambda key, name=name: f"_{name}_{key}")  # type: ignore[misc]
            frame = frame.hstack(body)
        vote = said("ai_model").is_null() & number("value").is_not_null()
        url = pl.coalesce(said("request_url"), said("_request_url"))
        other = ~vote & url.str.contains(_OTHER).fill_null(False)
        calls = frame.filter(~vote & ~other)
        yield Batch(
            rows=_rows(calls, options.settings),
            cursor=cursor,
            raw=chunk.raw_of,
            rejects=chunk.rejects,
            signals=pl.concat([_votes(frame.filter(vote)), _votes_inside(calls)]),
            skipped={"no chat or text completion": n} if (n := frame.filter(other).height) else {},
        )


def _call_id() -> pl.Expr:
    return pl.coalesce(said("id"), pl.concat_str(said("trace_id"), said("created_at"), said("ai_model"), separator="|"))


def _rows(frame: pl.DataFrame, settings: Mapping[str, Any]) -> pl.DataFrame:
    names = {
        "session": settings.get("session_key") or "session_id",
        "tenant": settings.get("tenant_key") or "_user",
        "task": settings.get("task_key") or "task",
    }
    inside = keys_of(frame["metadata"], list(dict.fromkeys([OURS, *names.values()]))).rename(lambda key: f"_m_{key}")
    body = frame.select(b=pl.coalesce(said("_request_body"), said("request.body")))["b"]
    frame = frame.hstack(inside).hstack(request_body(body).rename(lambda name: f"_{name}"))
    answer = frame.select(pl.coalesce(said("_response_body"), said("response.body"))).to_series()
    frame = frame.hstack(keys_of(answer, ("id",)).rename({"id": "_answer"}))
    called = ~said("cache_status").str.to_uppercase().str.ends_with("HIT").fill_null(False)
    ok = said("is_success").str.to_lowercase().is_in(["1", "true", "1.0"])
    code = status("response_status_code")
    dollars = said("cost_currency").str.to_uppercase().fill_null("USD") == "USD"
    retries = number("retry_success_count")
    return frame.select(
        ROW,
        request_id=_call_id(),
        response_id=pl.when(called).then(said("_answer")),
        trace_id=said("trace_id"),
        time=pl.col("created_at"),
        **{name: said(f"_m_{key}") for name, key in names.items()},
        key=said("virtual_key"),
        messages="_messages",
        tools="_tools",
        prompt="_prompt",
        model=said("ai_model"),
        provider=pl.when(called).then(said("ai_org")),
        **decision_of(frame[f"_m_{OURS}"], frame.select(said("ai_model")).to_series()).to_dict(),
        input_tokens=above_0("req_units"),
        output_tokens=above_0("res_units"),
        cost_usd=pl.when(~called).then(pl.lit("0"))
        .when(dollars & number("cost").ne_missing(0)).then(measured(number("cost") / 100, "cost")),
        latency_ms=pl.when(called).then(as_found("response_time")),
        status=pl.when(~called).then(pl.lit(CACHED)).otherwise(
            pl.when(ok).then(pl.lit("ok")).when(ok.is_null()).then(code).otherwise(
                code.replace("ok", "error").fill_null("error")
            )
        ),
        retries=pl.when(called & (retries >= 0).fill_null(True)).then(as_found("retry_success_count")),
    )  # fmt: skip


def _votes(frame: pl.DataFrame) -> pl.DataFrame:
    """Feedback that has a line of its own: it names a trace."""
    times = convert(frame.select(time="created_at"), {"time": LOG_SCHEMA["time"]})[0]
    return _as_signals(frame.select(
        signal=said("id"), time=times["time"], trace_id=said("trace_id"), value=number("value"), weight=number("weight")
    ))  # fmt: skip


def _votes_inside(frame: pl.DataFrame) -> pl.DataFrame:
    """Feedback that stands in a call's row, an object or a list of them: it names that call."""
    calls = frame.select(request_id=_call_id(), feedback=pl.col("feedback").cast(pl.String)).drop_nulls("feedback")
    votes = [(of, vote) for of, text in calls.iter_rows() for vote in _objects(text)]
    found = pl.DataFrame(votes, schema={"request_id": pl.String, "vote": pl.String}, orient="row")
    said_of = keys_of(found["vote"], ("id", "value", "weight"))
    # A value that is no number is a word, which the import counts as one that cannot be read.
    return _as_signals(found.hstack(said_of).select(
        signal=said("id"), request_id="request_id", value=number("value"), label=said("value"), weight=number("weight")
    ).filter(pl.any_horizontal(pl.col("value", "label").is_not_null())))  # fmt: skip


def _objects(text: str) -> list[str]:
    """The JSON objects of a list of them, or the one that there is, each as text."""
    try:
        return [
            str(written(one)) for one in json.loads(f"[{text}]") for one in (one if isinstance(one, list) else [one])
        ]
    except (ValueError, RecursionError):
        return []


def _as_signals(found: pl.DataFrame) -> pl.DataFrame:
    return convert(found.with_columns(source=pl.lit(SOURCE)), SIGNALS)[0]
