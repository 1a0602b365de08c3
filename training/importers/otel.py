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

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from router_ml.rawfiles import ORIGINAL
from training.importers.batch import ROW, SIGNALS, Batch, ReadOptions
from training.importers.conversations import spoken
from training.importers.exports import read_export
from training.importers.genai import messages_of
from training.importers.otlp import Event, records_of, spans_of
from training.importers.values import above_0, measured, moment, number, said, status

EVALUATION = "gen_ai.evaluation.result"
CALLS = ("chat", "text_completion", "generate_content", "completion")
_LINE = ("resourceSpans", "resourceLogs")
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


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """Inference spans as rows, evaluations as signals, of a file of OTLP JSON lines or of a folder's files.

    A row's request_id is `TRACE:SPAN`. Settings, all optional: `model`, "request" (the name that was asked for) or
    "response" (the one that answered); `tenant_attribute` and `task_attribute`, attributes of the span or its resource
    ("enduser.id", none). Raises InputError as `read_export` does.
    """
    done = (options.cursor or {}).get("calls", 0)
    for chunk, cursor in read_export(source, _LINE, options):
        # Each line is let go before the next: nested values are many times as large in Python as in a file.
        rows, of_spans, skipped = _spans(chunk.frame["resourceSpans"], options.settings, done)
        records, unread = _records(chunk.frame["resourceLogs"])
        skipped["a log record that is not as OTLP has it"] += unread
        skipped["a line without spans or log records"] += chunk.frame.filter(
            pl.all_horizontal(pl.col(name).is_null() for name in _LINE)
        ).height
        done += rows.height
        yield Batch(
            rows=rows.drop(ORIGINAL),
            cursor=cursor | {"calls": done},
            raw=rows.select(ROW, ORIGINAL),
            rejects=chunk.rejects,
            signals=pl.concat([of_spans, records]),
            skipped=+skipped,
        )


def _spans(lines: pl.Series, settings: Mapping[str, Any], done: int) -> tuple[pl.DataFrame, pl.DataFrame, Counter[str]]:
    """(rows, each with what its span was, signals, how many other spans there are, by why)."""
    about = {"tenant": settings.get("tenant_attribute") or "enduser.id", "task": settings.get("task_attribute")}
    rows: list[tuple[str | None, ...]] = []
    signals: list[tuple[str | None, ...]] = []
    skipped: Counter[str] = Counter()
    for span in (span for line in lines.drop_nulls() for span in spans_of(line)):
        if span is None:
            skipped["a span that is not as OTLP has it"] += 1
            continue
        named = {column: _first(span.attributes, names) for column, names in _NAMES.items()}
        for column, name in about.items():
            named[column] = (_first(span.attributes, (name,)) or _first(span.resource, (name,))) if name else None
        operation = named["operation"]
        if operation is None:
            is_call = named["model"] is not None and named["output_tokens"] is not None
        else:
            is_call = operation in CALLS
        request_id = f"{span.trace}:{span.span}" if span.trace and span.span else None
        if is_call:
            rows.append((request_id, span.trace, span.start, span.end, span.code, span.original, *named.values()))
        elif operation is None and named["provider"] is None and named["model"] is None:
            skipped["no span of generative AI"] += 1
        else:
            skipped[f"no call of a model: {operation or 'no operation named'}"] += 1
        for event in span.events:
            if event.name == EVALUATION:
                signals.append(_signal(event, request_id if is_call else None, None if is_call else span.trace))
    names = ("request_id", "trace_id", "start", "end", "code", ORIGINAL, *_NAMES, *about)
    frame = pl.DataFrame(rows, schema=dict.fromkeys(names, pl.String()), orient="row")
    # A line has many spans: they are numbered by themselves.
    frame = frame.with_columns(pl.int_range(done + 1, pl.len() + done + 1, dtype=pl.Int64).alias(ROW))
    return _rows(frame, settings), _signals(signals), skipped


def _first(attributes: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    """The first of the attributes that says something."""
    return next((text for name in names if (text := attributes.get(name)) and not text.isspace()), None)


def _rows(frame: pl.DataFrame, settings: Mapping[str, Any]) -> pl.DataFrame:
    asked = spoken(messages_of(frame["input"], frame["system"], frame["tools"]))
    frame = frame.drop("tools").hstack(asked)
    start, end = (pl.col(name).cast(pl.Int64, strict=False) for name in ("start", "end"))
    failed = said("error").is_not_null() | said("code").is_in(["2", "STATUS_CODE_ERROR"])
    return frame.select(
        ROW,
        ORIGINAL,
        "request_id",
        "response_id",
        trace_id="trace_id",
        time=moment("start", "ns"),
        session="session",
        tenant="tenant",
        task="task",
        messages="messages",
        tools="tools",
        prompt="prompt",
        model="answered" if settings.get("model") == "response" else "model",
        provider="provider",
        propensity="propensity",
        policy_version="policy_version",
        input_tokens=above_0("input_tokens"),
        output_tokens=above_0("output_tokens"),
        cost_usd=above_0("cost"),
        # A span that has not ended has none, or 0, for its end.
        latency_ms=pl.when((end >= start).fill_null(True)).then(measured((end - start) / 1e6, "end")),
        status=pl.when(failed).then(status("error").replace("ok", "error").fill_null("error")).otherwise(pl.lit("ok")),
    )


def _records(lines: pl.Series) -> tuple[pl.DataFrame, int]:
    """(evaluations among log records, how many records could not be read)."""
    signals, unread = [], 0
    for record in (record for line in lines.drop_nulls() for record in records_of(line)):
        if record is None:
            unread += 1
        elif record.name == EVALUATION:
            has_span = bool(record.span)
            of_span = f"{record.trace}:{record.span}" if has_span and record.trace else None
            signals.append(_signal(record, of_span, None if has_span else record.trace))
    return _signals(signals), unread


def _signal(event: Event, of_span: str | None, of_trace: str | None) -> tuple[str | None, ...]:
    names = ("gen_ai.evaluation.name", "gen_ai.evaluation.score.value", "gen_ai.evaluation.score.label")
    answer = _first(event.attributes, ("gen_ai.response.id",))
    whose = (None, None, answer) if answer else (of_span, of_trace, None)
    return (event.time, *whose, *(_first(event.attributes, (name,)) for name in names))


def _signals(found: list[tuple[str | None, ...]]) -> pl.DataFrame:
    names = ("time", "request_id", "trace_id", "response_id", "source", "value", "label")
    frame = pl.DataFrame(found, schema=dict.fromkeys(names, pl.String()), orient="row")
    # A value that is no number is a word.
    made = frame.with_columns(
        time=moment("time", "ns"),
        value=number("value"),
        label=pl.coalesce("label", "value"),
        signal=None,
        weight=None,
        model=None,
    )
    return made.select(pl.col(name).cast(dtype) for name, dtype in SIGNALS.items())
