"""OTLP in proto3's JSON, read by its types: spans and log records with their attributes as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from msgspec import Raw

from training.importers.jsontext import REFUSED, text_of, written

_Read = TypeVar("_Read", bound=msgspec.Struct)
_NONE = Raw()


class _Value(msgspec.Struct, rename="camel", gc=False):
    string_value: Raw = _NONE
    int_value: Raw = _NONE
    double_value: Raw = _NONE
    bool_value: Raw = _NONE
    array_value: Raw = _NONE
    kvlist_value: Raw = _NONE


class _Attribute(msgspec.Struct, gc=False):
    key: str = ""
    value: _Value | None = None


class _Status(msgspec.Struct, gc=False):
    code: Raw = _NONE


class _Event(msgspec.Struct, rename="camel", gc=False):
    name: str | None = None
    time_unix_nano: Raw = _NONE
    attributes: list[_Attribute] | None = None


class _Span(msgspec.Struct, rename="camel", gc=False):
    trace_id: Raw = _NONE
    span_id: Raw = _NONE
    start_time_unix_nano: Raw = _NONE
    end_time_unix_nano: Raw = _NONE
    attributes: list[_Attribute] | None = None
    events: list[_Event] | None = None
    status: _Status | None = None


class _Record(msgspec.Struct, rename="camel", gc=False):
    trace_id: Raw = _NONE
    span_id: Raw = _NONE
    time_unix_nano: Raw = _NONE
    event_name: Raw = _NONE
    attributes: list[_Attribute] | None = None


class _Resource(msgspec.Struct):
    attributes: list[_Attribute] | None = None


class _Scope(msgspec.Struct, rename="camel"):
    spans: list[Raw] | None = None
    log_records: list[Raw] | None = None


class _Group(msgspec.Struct, rename="camel"):
    resource: _Resource | None = None
    scope_spans: list[_Scope] | None = None
    scope_logs: list[_Scope] | None = None


_groups = msgspec.json.Decoder(list[_Group])
_span, _record = msgspec.json.Decoder(_Span), msgspec.json.Decoder(_Record)


@dataclass(frozen=True, slots=True)
class Event:
    """Something that was said at a time (ns since 1970, as text), an event of a span or a log record."""

    trace: str | None
    span: str | None
    name: str | None
    time: str | None
    attributes: dict[str, str]


@dataclass(frozen=True, slots=True)
class Span:
    """A span: its ids, times (ns since 1970, as text), status code, attributes, those of its resource, and events.

    `original` is its JSON text as it was written.
    """

    trace: str | None
    span: str | None
    start: str | None
    end: str | None
    code: str | None
    attributes: dict[str, str]
    resource: dict[str, str]
    events: list[Event]
    original: str


def spans_of(text: str) -> Iterator[Span | None]:
    """The spans of a line's `resourceSpans` (JSON text); None for one that is not as OTLP has it, or for all of it."""
    for group in _read_groups(text):
        if group is None:
            yield None
            continue
        resource = _texts(group.resource.attributes if group.resource else None)
        for raw in (raw for scope in group.scope_spans or () for raw in scope.spans or ()):
            if (span := _read(_span, raw)) is None:
                yield None
                continue
            trace, own = text_of(span.trace_id), text_of(span.span_id)
            yield Span(
                trace=trace,
                span=own,
                start=text_of(span.start_time_unix_nano),
                end=text_of(span.end_time_unix_nano),
                code=text_of(span.status.code) if span.status else None,
                attributes=_texts(span.attributes),
                resource=resource,
                events=[
                    Event(trace, own, event.name, text_of(event.time_unix_nano), _texts(event.attributes))
                    for event in span.events or ()
                ],
                original=bytes(raw).decode(),
            )


def records_of(text: str) -> Iterator[Event | None]:
    """The log records of a line's `resourceLogs`, in the same way."""
    for group in _read_groups(text):
        if group is None:
            yield None
            continue
        for raw in (raw for scope in group.scope_logs or () for raw in scope.log_records or ()):
            if (record := _read(_record, raw)) is None:
                yield None
                continue
            attributes = _texts(record.attributes)
            name = text_of(record.event_name) or attributes.get("event.name")
            ids = text_of(record.trace_id), text_of(record.span_id)
            yield Event(*ids, name, text_of(record.time_unix_nano), attributes)


def _read_groups(text: str) -> list[_Group] | list[None]:
    try:
        return _groups.decode(text)
    except REFUSED:
        pass
    try:
        # NaN, which proto3 writes as text and Python as none.
        return _groups.decode(str(written(json.loads(text, parse_constant=str))))
    except (*REFUSED, ValueError):
        return [None]


def _read(decoder: msgspec.json.Decoder[_Read], raw: Raw) -> _Read | None:
    try:
        return decoder.decode(raw)
    except REFUSED:
        return None


def _texts(attributes: list[_Attribute] | None) -> dict[str, str]:
    """The first value of each attribute, as text; nested ones as JSON text."""
    found: dict[str, str] = {}
    for attribute in attributes or ():
        if attribute.value is not None and attribute.key not in found:
            for raw in msgspec.structs.astuple(attribute.value):
                if (text := text_of(raw)) is not None:
                    found[attribute.key] = text
                    break
    return found
