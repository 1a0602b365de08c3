"""OpenTelemetry's GenAI spans, and `gen_ai.evaluation.result` events, as OTLP in JSON lines.

Such a file is what the collector's file exporter writes: a line is a TracesData or a LogsData message in proto3's JSON
(opentelemetry-proto; keys in lowerCamelCase, 64-bit integers as text, ids in hex). Attribute names are those of the
GenAI semantic conventions (open-telemetry/semantic-conventions-genai) and the older ones that are still written:
`gen_ai.system`, `gen_ai.usage.prompt_tokens`, `gen_ai.prompt`. What matters here:
- Only inference operations are calls; agents, tools, embeddings and other spans are counted and left.
- There is no attribute for costs in the conventions; `gen_ai.usage.cost`, which some libraries write, is taken as USD.
- An evaluation is an event of a span, or a log record; it names the answer by `gen_ai.response.id`, else by its span.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from training.importers.batch import ROW, SIGNALS, Batch, ReadOptions
from training.importers.exports import read_export
from training.importers.genai import messages_of
from training.importers.maps import above_0
from training.importers.values import keys_of, moment, number, said, status

EVALUATION = "gen_ai.evaluation.result"
CALLS = ("chat", "text_completion", "generate_content", "completion")
_VALUE = pl.Struct({
    **dict.fromkeys(("stringValue", "intValue", "doubleValue", "boolValue"), pl.String()),
    **dict.fromkeys(("arrayValue", "kvlistValue"), pl.String()),
})  # fmt: skip
_ATTRIBUTES = pl.List(pl.Struct({"key": pl.String(), "value": _VALUE}))
_EVENT = {"name": pl.String(), "timeUnixNano": pl.String(), "attributes": _ATTRIBUTES}
_SPAN = pl.Struct({
    **dict.fromkeys(("traceId", "spanId", "startTimeUnixNano", "endTimeUnixNano"), pl.String()),
    "attributes": _ATTRIBUTES,
    "events": pl.List(pl.Struct(_EVENT)),
    "status": pl.Struct({"code": pl.String(), "message": pl.String()}),
})  # fmt: skip
_RECORD = pl.Struct({
    **dict.fromkeys(("timeUnixNano", "observedTimeUnixNano", "traceId", "spanId", "eventName"), pl.String()),
    "attributes": _ATTRIBUTES,
})  # fmt: skip
_RESOURCE = pl.Struct({"attributes": _ATTRIBUTES})
_LINE = {
    "resourceSpans": pl.List(pl.Struct(
        {"resource": _RESOURCE, "scopeSpans": pl.List(pl.Struct({"spans": pl.List(_SPAN)}))}
    )),
    "resourceLogs": pl.List(pl.Struct(
        {"resource": _RESOURCE, "scopeLogs": pl.List(pl.Struct({"logRecords": pl.List(_RECORD)}))}
    )),
}  # fmt: skip
# A column of the row, and the attributes that it is read from: the first that is there.
_NAMES: dict[str, tuple[str, ...]] = {
    "operation": ("gen_ai.operation.name", "llm.request.type"),
    "provider": ("gen_ai.provider.name", "gen_ai.system"),
    "model": ("gen_ai.request.model", "gen_ai.response.model"),
    "answered": ("gen_ai.response.model", "gen_ai.request.model"),
    "response_id": ("gen_ai.response.id",),
    "input_tokens": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    "output_tokens": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    "cost": ("gen_ai.usage.cost",),
    "session": ("gen_ai.conversation.id", "session.id"),
    "input": ("gen_ai.input.messages", "gen_ai.prompt"),
    "system": ("gen_ai.system_instructions",),
    "tools": ("gen_ai.tool.definitions",),
    "error": ("error.type",),
    "propensity": ("router_ml.propensity",),
    "policy_version": ("router_ml.policy_version",),
}
_SCORE = ("gen_ai.evaluation.name", "gen_ai.evaluation.score.value", "gen_ai.evaluation.score.label",
          "gen_ai.response.id", "event.name")  # fmt: skip


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """Inference spans as rows, evaluations as signals, of a file of OTLP JSON lines or of a folder's files.

    A row's request_id is `TRACE:SPAN`. Settings, all optional: `model`, "request" (the name that was asked for) or
    "response" (the one that answered); `tenant_attribute` and `task_attribute`, attributes of the span or its resource
    ("enduser.id", none). Raises InputError as `read_export` does.
    """
    done = (options.cursor or {}).get("calls", 0)
    for chunk, cursor in read_export(source, list(_LINE), options):
        lines = pl.concat([chunk.frame.select(ROW), _nested(chunk.frame)], how="horizontal")
        nothing = lines.filter(pl.all_horizontal(pl.col(name).is_null() for name in _LINE)).height
        rows, raw, of_spans, skipped = _spans(lines, options.settings, done)
        done += rows.height
        if nothing:
            skipped["a line without spans or log records"] = nothing
        yield Batch(
            rows=rows,
            cursor=cursor | {"calls": done},
            raw=raw,
            rejects=chunk.rejects,
            signals=pl.concat([of_spans, _records(lines)]),
            skipped=skipped,
        )


def _nested(frame: pl.DataFrame) -> pl.DataFrame:
    """The lines' messages with their types: `json_decode` does not read a number as text, the reader of lines does."""
    text = frame.select(pl.concat_str(
        pl.lit("{"), *(pl.lit(f'"{name}":') + said(name).fill_null("null") + pl.lit(end) for name, end in
                       zip(_LINE, (",", "}"), strict=True))
    ).str.replace_all("\n", " ", literal=True).alias("line"))["line"]  # fmt: skip
    if text.is_empty():
        return pl.DataFrame(schema=_LINE)
    return pl.read_ndjson(text.str.join("\n").item().encode(), schema=_LINE)


def _opened(lines: pl.DataFrame, outer: str, scopes: str, items: str) -> pl.DataFrame:
    """A row per span or record, with the attributes of its resource."""
    return (
        lines.select(ROW, pl.col(outer)).explode(outer).unnest(outer)
        .with_columns(pl.col("resource").struct.field("attributes").alias("_resource")).drop("resource")
        .explode(scopes).unnest(scopes).explode(items).drop_nulls(items).unnest(items)
        .with_row_index("_n")
    )  # fmt: skip


def _attributes(frame: pl.DataFrame, names: tuple[str, ...], column: str = "attributes") -> pl.DataFrame:
    """A column of text for each of the attributes that are asked for, in the order of the frame's `_n`."""
    value = pl.col(column).struct.field("value")
    fields = ("stringValue", "intValue", "doubleValue", "boolValue", "arrayValue", "kvlistValue")
    long = (
        frame.select("_n", column).explode(column).drop_nulls(column)
        .select("_n", key=pl.col(column).struct.field("key"),
                value=pl.coalesce(value.struct.field(field) for field in fields))
        .filter(pl.col("key").is_in(list(names)))
    )  # fmt: skip
    # A join for each name: as many aggregates that filter took far longer.
    parts = {str(key): part.select("_n", "value") for (key,), part in long.partition_by("key", as_dict=True).items()}
    found = frame.select("_n")
    for name in names:
        part = parts.get(name, long.select("_n", "value").clear()).unique("_n", keep="first", maintain_order=True)
        found = found.join(part.rename({"value": name}), on="_n", how="left", maintain_order="left")
    return found.drop("_n")


def _spans(
    lines: pl.DataFrame, settings: Mapping[str, Any], done: int
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, dict[str, int]]:
    """(rows, the spans that they were, signals, how many other spans there are, by why)."""
    spans = _opened(lines, "resourceSpans", "scopeSpans", "spans")
    about = {"tenant": settings.get("tenant_attribute") or "enduser.id", "task": settings.get("task_attribute")}
    extra = tuple(name for name in about.values() if name)
    every = tuple(dict.fromkeys(name for names in _NAMES.values() for name in names))
    own = _attributes(spans, (*every, *extra))
    resource = _attributes(spans, extra, "_resource").rename(lambda name: f"_r_{name}")
    columns = {name: pl.coalesce(said(one) for one in names) for name, names in _NAMES.items()}
    for name, attribute in about.items():
        known = [said(attribute), said(f"_r_{attribute}")] if attribute else [pl.lit(None, pl.String)]
        columns[name] = pl.coalesce(known)
    named = pl.concat([own, resource], how="horizontal").select(**columns)
    ids = pl.concat_str(said("traceId"), said("spanId"), separator=":")
    spans = spans.with_columns(request_id=ids)
    calls = named.select(is_call=pl.when(pl.col("operation").is_not_null())
        .then(pl.col("operation").is_in(list(CALLS)))
        .otherwise(pl.col("model").is_not_null() & pl.col("output_tokens").is_not_null()))["is_call"]  # fmt: skip
    is_genai = named.select(pl.coalesce("operation", "provider", "model").is_not_null()).to_series()
    why = pl.DataFrame({"why": named["operation"], "genai": is_genai}).filter(~calls).select(
        pl.when("genai").then(pl.lit("no call of a model: ") + pl.col("why").fill_null("no operation named"))
        .otherwise(pl.lit("no span of generative AI"))
    ).to_series()  # fmt: skip
    # A line has many spans: they are numbered by themselves.
    raw = spans.filter(calls).with_columns(pl.int_range(done + 1, pl.len() + done + 1, dtype=pl.Int64).alias(ROW))
    rows = _rows(raw, named.filter(calls), settings)
    return (
        rows,
        raw.drop("_n", "request_id"),
        _events(spans.with_columns(is_call=calls)),
        dict(why.value_counts().iter_rows()),
    )


def _rows(spans: pl.DataFrame, named: pl.DataFrame, settings: Mapping[str, Any]) -> pl.DataFrame:
    state = keys_of(spans["status"], ("code",)).rename({"code": "_code"})
    spoken = messages_of(named["input"], named["system"], named["tools"])
    ids = spans.select(ROW, "request_id", "traceId", "startTimeUnixNano", "endTimeUnixNano")
    frame = pl.concat([ids, state, named.drop("tools"), spoken], how="horizontal")
    took = number("endTimeUnixNano") - number("startTimeUnixNano")
    nanos = (pl.col("endTimeUnixNano").cast(pl.Int64, strict=False)
             - pl.col("startTimeUnixNano").cast(pl.Int64, strict=False))  # fmt: skip
    failed = said("error").is_not_null() | said("_code").is_in(["2", "STATUS_CODE_ERROR"])
    return frame.select(
        ROW,
        "request_id",
        "response_id",
        trace_id=said("traceId"),
        time=moment("startTimeUnixNano", "ns"),
        session="session",
        tenant="tenant",
        task="task",
        messages="messages",
        tools="tools",
        prompt="prompt",
        model="answered" if settings.get("model") == "response" else "model",
        provider="provider",
        propensity=number("propensity"),
        policy_version="policy_version",
        input_tokens=above_0(number("input_tokens")),
        output_tokens=above_0(number("output_tokens")),
        cost_usd=above_0(number("cost")),
        latency_ms=pl.when(took >= 0).then(nanos / 1e6),
        status=pl.when(failed).then(status("error").replace("ok", "error").fill_null("error")).otherwise(pl.lit("ok")),
    )


def _events(spans: pl.DataFrame) -> pl.DataFrame:
    """The evaluations among spans' own events: of that span, where it is a call and no answer is named."""
    found = (
        spans.select("request_id", "traceId", "is_call", "events").explode("events").drop_nulls("events")
        .unnest("events").filter(pl.col("name") == EVALUATION).with_row_index("_n")
    )  # fmt: skip
    of_span = pl.when("is_call").then("request_id")
    return _signals(found, of_span, pl.when(~pl.col("is_call")).then("traceId"), "timeUnixNano")


def _records(lines: pl.DataFrame) -> pl.DataFrame:
    records = _opened(lines, "resourceLogs", "scopeLogs", "logRecords")
    named = pl.concat([records, _attributes(records, ("event.name",))], how="horizontal")
    found = named.filter(pl.coalesce(said("eventName"), said("event.name")) == EVALUATION).drop("event.name")
    has_span = said("spanId").is_not_null()
    of_span = pl.when(has_span).then(pl.concat_str(said("traceId"), said("spanId"), separator=":"))
    return _signals(found, of_span, pl.when(~has_span).then(said("traceId")), "timeUnixNano")


def _signals(found: pl.DataFrame, of_span: pl.Expr, of_trace: pl.Expr, time: str) -> pl.DataFrame:
    frame = pl.concat([found, _attributes(found, _SCORE)], how="horizontal")
    answer = said("gen_ai.response.id")
    return frame.select(
        signal=pl.lit(None, pl.String),
        time=moment(time, "ns"),
        request_id=pl.when(answer.is_null()).then(of_span),
        trace_id=pl.when(answer.is_null()).then(of_trace),
        response_id=answer,
        source=said("gen_ai.evaluation.name"),
        value=number("gen_ai.evaluation.score.value"),
        label=said("gen_ai.evaluation.score.label"),
        weight=pl.lit(None, pl.Float64),
    ).select(pl.col(name).cast(dtype) for name, dtype in SIGNALS.items())
