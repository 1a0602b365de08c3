"""What columns of other people's logs mean, as polars expressions: times, numbers, statuses, text that says nothing."""

from __future__ import annotations

import polars as pl

from router_ml.errors import InputError
from router_ml.log_schema import LOG_SCHEMA

# How many of a unit make one second, a US dollar, a millisecond.
TIME_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
COST_UNITS = {"usd": 1.0, "cents": 100.0, "millicents": 100_000.0, "microusd": 1_000_000.0}
LATENCY_UNITS = {"ms": 1.0, "s": 0.001, "us": 1_000.0, "ns": 1_000_000.0}
UNITS: dict[str, dict[str, float]] = {
    "time": {k: float(v) for k, v in TIME_UNITS.items()},
    "cost_usd": COST_UNITS,
    "latency_ms": LATENCY_UNITS,
}
_OK = ("ok", "success", "succeeded", "successful", "completed", "complete", "true", "stop", "unset")
_TIMEOUT = ("timeout", "timed_out", "timed out", "deadline_exceeded", "408", "504", "524")
_LIMITED = ("rate_limited", "rate_limit", "ratelimit", "too_many_requests", "resource_exhausted", "429")
# What writers of CSV put where there is nothing.
_NOTHING = ("null", "NULL", "None", "\\N")
_CANCELLED = ("cancelled", "canceled", "aborted", "client_closed_request", "499")


def said(column: str | pl.Expr, *nothing: str) -> pl.Expr:
    """Text, null where it is empty or one of `nothing`."""
    text = pl.col(column) if isinstance(column, str) else column
    text = text.cast(pl.String)
    return pl.when(~text.str.strip_chars().is_in(["", *nothing])).then(text)


def json_said(column: str | pl.Expr) -> pl.Expr:
    """JSON text, null where it is empty: {}, [], "" or null, however spaced."""
    return said(column, "{}", "[]", '""', "null", "{ }", "[ ]")


def number(column: str | pl.Expr) -> pl.Expr:
    """A number out of text or numbers, Float64; null where it is none. NaN and infinities stay, to be rejected."""
    value = pl.col(column) if isinstance(column, str) else column
    return value.cast(pl.String).str.strip_chars().cast(pl.Float64, strict=False)


def measured(value: pl.Expr, column: str) -> pl.Expr:
    """A number that was made of a column's, as text; the column's own text where that is no number.

    `validate` reads it and rejects what is none, so that no number is lost in silence.
    """
    return pl.when(number(column).is_null()).then(said(column, *_NOTHING)).otherwise(value.cast(pl.String))


def as_found(column: str) -> pl.Expr:
    """A number as it was found, as text, for `validate` to read or reject; null where nothing is said."""
    return said(column, *_NOTHING)


def above_0(column: str) -> pl.Expr:
    """The same, null where it is 0, too: what writers that know of no price or usage put there."""
    return pl.when(number(column).ne_missing(0)).then(as_found(column))


def moment(column: str, unit: str | None = None) -> pl.Expr:
    """A time: text or times as they are, for `validate` to read; with `unit` (of `TIME_UNITS`) a number since 1970.

    Raises InputError for another unit.
    """
    if unit is None:
        return pl.col(column)
    if unit not in TIME_UNITS:
        raise InputError(f"unknown unit of time {unit!r}: choose one of {', '.join(TIME_UNITS)}")
    text = pl.col(column).cast(pl.String).str.strip_chars()
    # Whole numbers first: a float has not the digits for nanoseconds.
    whole = text.cast(pl.Int64, strict=False)
    each = 1_000_000 // TIME_UNITS[unit]
    # Cut off, not wrapped around to some other time, where the unit is not the numbers' own.
    most = (2**63 - 1) // max(each, 1)
    micros = whole.clip(-most, most) * each if each else whole.floordiv(1_000)
    broken = (text.cast(pl.Float64, strict=False) * (1_000_000 / TIME_UNITS[unit])).round().cast(pl.Int64, strict=False)
    return pl.coalesce(micros, broken).cast(LOG_SCHEMA["time"])


def scaled(column: str, name: str, unit: str) -> pl.Expr:
    """A number of `unit` in the log column's own (`cost_usd`, `latency_ms`), as `measured`.

    Raises InputError for another unit.
    """
    units = UNITS.get(name)
    if units is None or name == "time":
        raise InputError(f"{name!r} has no unit to choose: there are cost_usd, latency_ms and time")
    if unit not in units:
        raise InputError(f"unknown unit {unit!r} of {name}: choose one of {', '.join(units)}")
    return measured(number(column) / units[unit], column)


def status(column: str | pl.Expr) -> pl.Expr:
    """One of `router_ml.types.STATUSES` out of a word or HTTP's number; null stays null, what is unknown is `error`."""
    word = said(column).str.strip_chars().str.to_lowercase()
    return (
        pl.when(word.is_null())
        .then(None)
        .when(word.is_in(list(_OK)) | word.str.contains(r"^2\d\d$"))
        .then(pl.lit("ok"))
        .when(word.is_in(list(_TIMEOUT)) | word.str.contains("timeout|timed.?out"))
        .then(pl.lit("timeout"))
        .when(word.is_in(list(_LIMITED)) | word.str.contains("rate.?limit"))
        .then(pl.lit("rate_limited"))
        .when(word.is_in(list(_CANCELLED)) | word.str.contains("cancel"))
        .then(pl.lit("cancelled"))
        .otherwise(pl.lit("error"))
    )
