"""Langfuse's export: `observations_v2` and `scores`, Parquet, CSV or JSON lines, a file or the project's folder.

What the fields mean is in Langfuse's "Blob storage export field reference" (langfuse.com/docs/api-and-data-platform/
features/blob-storage-export-fields). What matters here:
- Only observations of the type GENERATION are calls of a model; agents, tools, spans and embeddings lie around them.
- `latency` is in ms for integrations made before 2026-04-01 and in s after: the difference of the times is taken, and
  the column only where there is no end time.
- `usage_details` and `cost_details` are maps. Tokens of the input are all keys with "input", cached ones too, as in
  Langfuse's own sums. 0 stands for no usage and no price.
- `provided_model_name` is what the caller's library said, often with a date; where metadata has the name that callers
  use, say so (`model_key`).
- A score names an observation, or a trace alone: it then goes to one answer, by its rule, and never to each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA, convert
from training.importers.batch import ROW, Batch, ReadOptions
from training.importers.exports import read_export
from training.importers.jsontext import keys_of
from training.importers.maps import OURS, decision_of, request_body, summed, tagged
from training.importers.values import LATENCY_UNITS, above_0, measured, number, said, status

OBSERVATION = (
    "id", "trace_id", "type", "start_time", "end_time", "name", "metadata", "level", "status_message", "input",
    "provided_model_name", "usage_details", "cost_details", "total_cost", "latency", "user_id", "session_id",
    "tags", "trace_name", "prompt_name",
)  # fmt: skip
SCORE = ("timestamp", "observation_id", "dataset_run_id", "value", "source", "data_type", "string_value")
TASK_COLUMNS = ("name", "trace_name", "prompt_name")


def read(source: str, options: ReadOptions) -> Iterator[Batch]:
    """Generations as rows, scores as signals, of a file or of a folder with `observations_v2/` and `scores/`.

    A score's source is `annotation:NAME`, `eval:NAME` or `api:NAME`, as Langfuse says where it comes from. Settings,
    all optional: `model_key`, `tenant_key`, the keys of `metadata` with the router's model id and the tenant (otherwise
    the model's name as provided, and the user); `task_column`, one of `TASK_COLUMNS` (otherwise the tag that begins
    with `task_tag`, "task:"); `latency_unit`, that of `latency` ("s"). Raises InputError for another setting's value,
    and as `read_export` does.
    """
    settings = options.settings
    if (column := settings.get("task_column")) not in (None, *TASK_COLUMNS):
        raise InputError(f"task_column cannot be {column!r}: choose one of {', '.join(TASK_COLUMNS)}")
    if (unit := settings.get("latency_unit") or "s") not in LATENCY_UNITS:
        raise InputError(f"latency_unit cannot be {unit!r}: choose one of {', '.join(LATENCY_UNITS)}")
    for chunk, cursor in read_export(source, [*OBSERVATION, *SCORE], options, folders=("observations_v2", "scores")):
        scored = said("type").is_null() & (said("data_type").is_not_null() | said("value").is_not_null())
        is_score = chunk.frame.select(scored.fill_null(False)).to_series()
        signals, skipped = _signals(chunk.frame.filter(is_score))
        frame = chunk.frame.filter(~is_score)
        kinds = frame.select(said("type").fill_null("of no type").str.to_uppercase()).to_series()
        calls = kinds == "GENERATION"
        counts = kinds.filter(~calls).value_counts()
        skipped |= {f"no call of a model: {kind}": count for kind, count in counts.iter_rows()}
        yield Batch(
            rows=_rows(frame.filter(calls), settings, unit),
            cursor=cursor,
            raw=chunk.raw_of,
            rejects=chunk.rejects,
            signals=signals,
            skipped=skipped,
        )


def _signals(scores: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    kind = said("data_type").str.to_uppercase().fill_null("NUMERIC")
    why = (
        pl.when(kind == "TEXT")
        .then(pl.lit("a score that is a text"))
        .when(said("observation_id").is_null() & said("trace_id").is_null())
        .then(pl.lit("a score of no answer (of a session or a run of a data set)"))
    )
    reasons = scores.select(why.alias("why"))["why"]
    found = scores.filter(reasons.is_null())
    times = convert(found.select(time="timestamp"), {"time": LOG_SCHEMA["time"]})[0]
    of_answer = said("observation_id")
    signals = found.hstack(times).select(
        signal=said("id"),
        time="time",
        request_id=of_answer,
        trace_id=pl.when(of_answer.is_null()).then(said("trace_id")),
        source=pl.concat_str(said("source").str.to_lowercase().fill_null("api"), pl.lit(":"), said("name")),
        # A category's number is its place in a list, which says nothing of its worth.
        value=pl.when(kind != "CATEGORICAL").then(number("value")),
        label=said("string_value"),
    )
    return signals, dict(reasons.drop_nulls().value_counts().iter_rows())


def _rows(frame: pl.DataFrame, settings: Mapping[str, Any], unit: str) -> pl.DataFrame:
    metadata = {name: settings.get(f"{name}_key") for name in ("model", "tenant")}
    keys = [OURS, *(key for key in metadata.values() if key)]
    inside = keys_of(frame["metadata"], list(dict.fromkeys(keys))).rename(lambda name: f"_m_{name}")
    times = convert(frame, {"start_time": LOG_SCHEMA["time"], "end_time": LOG_SCHEMA["time"]})[0]
    took = (times["end_time"] - times["start_time"]).dt.total_microseconds() / 1000
    body = request_body(frame["input"]).rename(lambda name: f"_{name}")
    frame = (
        frame.hstack(inside)
        .hstack(body)
        .with_columns(
            _took=took.cast(pl.String),
            _task=tagged(frame["tags"], settings.get("task_tag") or "task:"),
            **{f"_{key}": summed(frame["usage_details"], key) for key in ("input", "output")},
            **{f"_cost_{key}": summed(frame["cost_details"], key) for key in ("total", "")},
        )
    )
    given = {name: said(f"_m_{key}") if key else pl.lit(None, pl.String) for name, key in metadata.items()}
    column = settings.get("task_column")
    model = given["model"].fill_null(said("provided_model_name"))
    failed = status("status_message").replace("ok", "error").fill_null("error")
    return frame.select(
        ROW,
        request_id=said("id"),
        trace_id=said("trace_id"),
        time=pl.col("start_time"),
        session=said("session_id"),
        tenant=given["tenant"].fill_null(said("user_id")),
        task=said(column) if column else said("_task"),
        messages="_messages",
        tools="_tools",
        prompt="_prompt",
        model=model,
        **decision_of(frame[f"_m_{OURS}"], frame.select(model).to_series()).to_dict(),
        input_tokens="_input",
        output_tokens="_output",
        cost_usd=pl.coalesce(above_0("total_cost"), "_cost_total", "_cost_"),
        latency_ms=pl.coalesce("_took", measured(number("latency") / LATENCY_UNITS[unit], "latency")),
        status=pl.when(said("level").str.to_uppercase() == "ERROR")
        .then(failed)
        .when(pl.col("_took").is_not_null() | number("latency").is_not_null())
        .then(pl.lit("ok")),
    )
