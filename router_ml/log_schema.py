"""What a row of the request log holds, and which rows may enter it. Serving never imports it: it needs polars."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from router_ml.catalog import Catalog
from router_ml.errors import InputError
from router_ml.log_texts import unreadable_messages, unreadable_tools
from router_ml.rawfiles import BROKEN_UTF8, JSON_COLUMNS, REASON, REJECT_SCHEMA, ROW, plain, rejected
from router_ml.types import CACHED, MOST_TOKENS, MOST_USD, STATUSES

_TIME = pl.Datetime("us", "UTC")
# One row is one attempt: `model` served it; where `fallback_from` is set, that is the model that the policy had chosen,
# and `propensity` is the probability of that choice. `messages` and `tools` are JSON text. Null means absent.
# Rows of one `cluster` were drawn together, as a canary's sessions or tenants are: they are not independent.
LOG_SCHEMA = pl.Schema(
    {
        "request_id": pl.String(),
        "time": _TIME,
        "session": pl.String(),
        "tenant": pl.String(),
        "key": pl.String(),
        "task": pl.String(),
        "prompt": pl.String(),
        "messages": pl.String(),
        "tools": pl.String(),
        "candidates": pl.List(pl.String()),
        "model": pl.String(),
        "provider": pl.String(),
        "propensity": pl.Float64(),
        "policy_version": pl.String(),
        "input_tokens": pl.Int64(),
        "output_tokens": pl.Int64(),
        "cost_usd": pl.Float64(),
        "latency_ms": pl.Float64(),
        "status": pl.String(),
        "retries": pl.Int64(),
        "fallback_from": pl.String(),
        "quality": pl.Float64(),
        "quality_source": pl.String(),
        "cluster": pl.String(),
    }
)
REQUIRED = ("request_id", "time", "model")
_FUTURE = timedelta(days=1)


class HashSet:
    """64-bit hashes in sorted runs that are merged as they grow: 8 bytes a hash, where a Python set takes some 60."""

    def __init__(self) -> None:
        self._runs: list[npt.NDArray[np.uint64]] = []

    def contains(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which of the hashes, uint64 [n], were added before; bool [n]."""
        found = np.zeros(len(hashes), dtype=bool)
        order = np.argsort(hashes)  # look-ups in order stay in the cache: six times faster among ten million
        for run in self._runs:
            found[order] |= run[np.minimum(np.searchsorted(run, hashes[order]), len(run) - 1)] == hashes[order]
        return found

    def add(self, hashes: npt.NDArray[np.uint64]) -> None:
        """Adds the hashes, uint64 [n]."""
        if not len(hashes):
            return
        run = np.unique(hashes)
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")
        self._runs.append(run)


@dataclass
class ValidationState:
    """What `validate` carries from one chunk of a file to the next: rows read, latest time, hashes of request ids."""

    rows: int = 0
    latest: datetime | None = None
    single: HashSet = field(default_factory=HashSet)
    full: HashSet = field(default_factory=HashSet)
    full_pairs: HashSet = field(default_factory=HashSet)


def validate(
    frame: pl.DataFrame,
    *,
    catalog: Catalog | None = None,
    state: ValidationState | None = None,
    max_disorder_s: float = 0.0,
    now: datetime | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Splits one chunk of a log into the rows that fit `LOG_SCHEMA` and the rejects, in the order given.

    Returns (good with exactly `LOG_SCHEMA`'s columns, rejects with `REJECT_SCHEMA`: the row's 1-based number, every
    reason joined by "; ", and the whole original row as JSON). Columns are cast value by value, so a bad value costs
    its row and not the chunk; missing optional columns become nulls, unknown ones are left out of the good rows.

    A request_id may come again only when both rows have propensity exactly 1.0 and different models: the request was
    sent to every one of them. A row's time may lie at most `max_disorder_s` seconds before the latest time before it,
    and at most a day after `now` (default: the clock). Pass the same `state` for every chunk of a file; ids are kept in
    it as 64-bit hashes, so that among n rows a good one is taken for a duplicate with probability below n^2 / 2^64.
    Raises InputError when a required column is missing altogether.
    """
    state = ValidationState() if state is None else state
    now = datetime.now(UTC) if now is None else now
    missing = [name for name in REQUIRED if name not in frame.columns]
    if missing:
        raise InputError(
            f"the log has no column {missing[0]!r}: every row needs {', '.join(REQUIRED)}; it has "
            f"{', '.join(c for c in frame.columns if not c.startswith('__')) or 'no columns'}"
        )
    good, lost = convert(frame, LOG_SCHEMA)
    free = (pl.col("status") == CACHED) & pl.col("cost_usd").is_null()
    good = good.with_columns(cost_usd=pl.when(free).then(0.0).otherwise("cost_usd"))
    if ROW not in frame.columns:
        frame = frame.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(ROW) + state.rows)
    if REASON in frame.columns:
        lost[REASON] = frame[REASON].is_not_null()

    wrong = _wrong_values(good, lost, catalog)
    late, future, state.latest = _wrong_times(good["time"], state.latest, max_disorder_s, now)
    wrong["time runs backwards"], wrong["time in the future"] = late, future
    bad = _any([*wrong.values(), *lost.values()], frame.height)
    wrong["duplicate request_id"] = _duplicates(good, bad, state)
    bad |= wrong["duplicate request_id"]
    state.rows += frame.height
    if not bad.any():
        return good, pl.DataFrame(schema=REJECT_SCHEMA)

    reasons = {name: mask for name, mask in wrong.items() if mask.any()}
    reasons |= {_lost_reason(frame, name): mask for name, mask in lost.items() if name != REASON and mask.any()}
    return good.filter(~bad), rejected(frame, reasons)


def convert(frame: pl.DataFrame, schema: Mapping[str, pl.DataType]) -> tuple[pl.DataFrame, dict[str, pl.Series]]:
    """Casts the frame's columns to `schema`, value by value; absent columns become nulls, others are left out.

    Returns the cast frame and, per column that lost a value in the cast, the bool mask of its rows.
    """
    columns, lost = [], {}
    for name, dtype in schema.items():
        if name not in frame.columns:
            columns.append(_nulls(dtype, frame.height).alias(name))
            continue
        before = frame[name]
        after = before if before.dtype == dtype else _cast(before, dtype, json_text=name in JSON_COLUMNS)
        if isinstance(dtype, pl.List):
            holes = after.list.eval(pl.element().is_null()).list.any().fill_null(False)
            after = after.zip_with(~holes, _nulls(dtype, len(after)))
        columns.append(after.alias(name))
        if after.null_count() > before.null_count():
            lost[name] = before.is_not_null() & after.is_null()
    return pl.DataFrame(columns, schema=pl.Schema(schema)), lost


def _cast(values: pl.Series, dtype: pl.DataType, *, json_text: bool) -> pl.Series:
    """`values` as `dtype`, null where a value does not convert without loss."""
    nothing = _nulls(dtype, len(values))
    source = values.dtype
    if source == pl.Null:
        return nothing
    if isinstance(dtype, pl.Datetime):
        return _times(values, nothing)
    if isinstance(dtype, pl.List):
        if source == pl.String:
            return pl.Series([_string_list(text) for text in values], dtype=dtype)
        return values.cast(dtype, strict=False) if isinstance(source, pl.List | pl.Array) else nothing
    if dtype == pl.String:
        if source == pl.Binary:
            return pl.Series([None if raw is None else _decoded(raw) for raw in values], dtype=dtype)
        if isinstance(source, pl.List | pl.Array | pl.Struct):
            if not json_text:
                return nothing
            items = (plain(value) for value in values.to_list())
            return pl.Series([v if v is None else json.dumps(v, ensure_ascii=False) for v in items], dtype=dtype)
        return values.cast(dtype, strict=False)
    if not (source.is_numeric() or source in (pl.String, pl.Boolean)) or (source == pl.Boolean and dtype.is_integer()):
        return nothing
    if source == pl.String:
        values = values.str.strip_chars()
    if dtype.is_integer() and not source.is_integer():
        # "12.0" is a whole number that some writers make of 12; 12.5 tokens is a mistake.
        floats = values.cast(pl.Float64, strict=False)
        is_whole = (floats == floats.round()).fill_null(False)
        whole = floats.zip_with(is_whole, _nulls(floats.dtype, len(floats)))
        exact = values.cast(dtype, strict=False) if source == pl.String else nothing
        return exact.zip_with(exact.is_not_null(), whole.cast(dtype, strict=False))
    return values.cast(dtype, strict=False)


def _times(values: pl.Series, nothing: pl.Series) -> pl.Series:
    """Times in UTC; a time without an offset is taken as UTC, a bare number (seconds? milliseconds?) as wrong."""
    source = values.dtype
    if isinstance(source, pl.Datetime) and source.time_zone is not None:
        return values.dt.convert_time_zone("UTC").dt.cast_time_unit("us")
    if isinstance(source, pl.Datetime | pl.Date):
        return values.cast(pl.Datetime("us"), strict=False).dt.replace_time_zone("UTC")
    if source != pl.String:
        return nothing
    text = pl.col("t").str.strip_chars().str.replace(" ", "T", literal=True).str.replace("[zZ]$", "+00:00")
    aware = text.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%:z", time_unit="us", strict=False)
    naive = [
        text.str.to_datetime(form, time_unit="us", strict=False).dt.replace_time_zone("UTC")
        for form in ("%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%dT%H:%M", "%Y-%m-%d")
    ]
    return values.to_frame("t").select(pl.coalesce(aware, *naive)).to_series()


def _string_list(text: str | None) -> list[Any] | None:
    try:
        value = None if text is None else json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and all(isinstance(v, str) for v in value) else None


def _decoded(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _wrong_values(rows: pl.DataFrame, lost: Mapping[str, pl.Series], catalog: Catalog | None) -> dict[str, pl.Series]:
    """Masks of the rows with an impossible value, by reason. A value that was lost in the cast is not also missing."""
    checks: dict[str, pl.Expr] = {}
    for name in REQUIRED:
        absent = (
            pl.col(name).is_null() | (pl.col(name) == "") if LOG_SCHEMA[name] == pl.String else pl.col(name).is_null()
        )
        checks[f"missing {name}"] = absent & ~pl.lit(lost[name]) if name in lost else absent
    if catalog is not None:
        checks["unknown model"] = ~pl.col("model").is_in(list(catalog.ids)) & (pl.col("model") != "")
    chosen = pl.coalesce("fallback_from", "model")
    checks["model not among its candidates"] = chosen.is_not_null() & ~pl.col("candidates").list.contains(chosen)
    checks["propensity outside (0, 1]"] = ~((pl.col("propensity") > 0) & (pl.col("propensity") <= 1))
    checks["quality outside [0, 1]"] = ~pl.col("quality").is_between(0, 1)
    for name in ("cost_usd", "latency_ms"):
        checks[f"{name} not finite"] = ~pl.col(name).is_finite()
    for name in ("cost_usd", "latency_ms", "input_tokens", "output_tokens", "retries"):
        checks[f"negative {name}"] = pl.col(name) < 0
    checks["cost_usd of more than a million"] = pl.col("cost_usd").is_finite() & (pl.col("cost_usd") > MOST_USD)
    for name in ("input_tokens", "output_tokens"):
        checks[f"{name} of more than 10^10"] = pl.col(name) > MOST_TOKENS
    checks["unknown status"] = ~pl.col("status").is_in(list(STATUSES))
    masks = rows.select(check.fill_null(False).alias(reason) for reason, check in checks.items())
    return {reason: masks[reason] for reason in checks} | {
        "messages are no conversation": unreadable_messages(rows["messages"]),
        "tools are no JSON array": unreadable_tools(rows["tools"]),
    }


def _wrong_times(
    times: pl.Series, latest: datetime | None, max_disorder_s: float, now: datetime
) -> tuple[pl.Series, pl.Series, datetime | None]:
    """(runs backwards, in the future, the latest time so far). Times in the future do not push the others back."""
    future = (times > now + _FUTURE).fill_null(False)
    past = times.to_frame("t").select(pl.when(~pl.lit(future)).then(pl.col("t"))).to_series()
    before = pl.concat([pl.Series([latest], dtype=_TIME), past]).cum_max().fill_null(strategy="forward")
    late = (past < before[:-1] - timedelta(seconds=max_disorder_s)).fill_null(False)
    return late, future, before[-1]


def _duplicates(rows: pl.DataFrame, bad: pl.Series, state: ValidationState) -> pl.Series:
    """Rows whose request_id came before in a row that is not bad; `state` takes up the ids of the rows that stay."""
    keys = _keys(rows).with_columns(
        ok=~bad & rows["request_id"].is_not_null(), at=pl.int_range(pl.len(), dtype=pl.Int64)
    )
    ids = keys["id"].to_numpy()
    was_single, was_full = state.single.contains(ids), state.full.contains(ids)
    if was_single.any() or was_full.any() or keys["id"].n_unique() < keys.height:
        # An id's first good row settles whether the id is one attempt or one sent to every model.
        keys = keys.with_columns(
            first=pl.col("at").filter("ok").min().over("id"),
            first_full=pl.col("full").filter("ok").first().over("id"),
            first_pair=pl.col("at").filter(pl.col("ok") & pl.col("full")).min().over("pair"),
            was_single=pl.Series(was_single),
            was_full=pl.Series(was_full),
            was_pair=pl.Series(state.full_pairs.contains(keys["pair"].to_numpy())),
        ).with_columns(
            again=pl.col("was_single") | pl.col("was_full") | (pl.col("first") < pl.col("at")).fill_null(False),
            same_model=pl.col("was_pair") | (pl.col("first_pair") < pl.col("at")).fill_null(False),
            shadow=pl.when("was_full")
            .then(True)
            .otherwise(pl.col("first_full") & ~pl.col("was_single"))
            .fill_null(False),
        )
        rule = pl.col("again") & ~(pl.col("shadow") & pl.col("full") & ~pl.col("same_model"))
        duplicate = keys.select(rule & rows["request_id"].is_not_null()).to_series()
    else:
        duplicate = pl.repeat(False, keys.height, eager=True)
    take_up(rows.filter(keys["ok"] & ~duplicate), state)
    return duplicate


def already_in(rows: pl.DataFrame, state: ValidationState, *, one_a_request: bool = False) -> pl.Series:
    """Which rows (`request_id`, `model`, `propensity`) stand in the log that `state` has seen; bool [n].

    A request that was sent to several models is there for a model only where that model's row is, unless there is
    `one_a_request`: then the model of a row may be another one when it is read again.
    """
    keys = _keys(rows)
    single = state.single.contains(keys["id"].to_numpy())
    if one_a_request:
        return pl.Series(single | state.full.contains(keys["id"].to_numpy()))
    pair = state.full_pairs.contains(keys["pair"].to_numpy())
    return pl.Series(single | (pair & keys["full"].to_numpy()))


def take_up(rows: pl.DataFrame, state: ValidationState) -> None:
    """Tells `state` of rows (`request_id`, `model`, `propensity`) that a log holds already."""
    keys = _keys(rows)
    full = keys.filter("full")
    state.single.add(keys.filter(~pl.col("full"))["id"].to_numpy())
    state.full.add(full["id"].to_numpy())
    state.full_pairs.add(full["pair"].to_numpy())


def _keys(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.select(
        id=pl.col("request_id").hash(1),
        pair=pl.struct("request_id", "model").hash(2),
        full=(pl.col("propensity") == 1.0).fill_null(False),
    )


def _nulls(dtype: pl.DataType, height: int) -> pl.Series:
    return pl.Series([None], dtype=dtype).new_from_index(0, height)


def _any(masks: list[pl.Series], height: int) -> pl.Series:
    total = pl.repeat(False, height, eager=True)
    for mask in masks:
        total = total | mask
    return total


def _lost_reason(frame: pl.DataFrame, name: str) -> str:
    is_text = frame[name].dtype == pl.Binary and LOG_SCHEMA[name] == pl.String
    return BROKEN_UTF8 if is_text else f"wrong type: {name}"
