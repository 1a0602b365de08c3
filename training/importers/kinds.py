"""The kinds of logs that can be read, by name. A reader is imported when it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import cast

from router_ml.errors import InputError
from training.importers.batch import Reader


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of source: the module whose `read` reads it, and what it is in words.

    With `updates` a row that is read again replaces the one in the log, where it says something else: an outcome that
    came later; such a source has one row a request. Otherwise the first one stays. A `live` source says how things
    are now; of exports one that was made before may be read after.
    """

    module: str
    what: str
    updates: bool = False
    live: bool = False

    @property
    def reader(self) -> Reader:
        """The function that reads it."""
        return cast(Reader, import_module(f"training.importers.{self.module}").read)


KINDS: dict[str, Kind] = {
    "litellm": Kind("litellm", "LiteLLM_SpendLogs: a Postgres URL, or a CSV, JSONL or Parquet export"),
    "langfuse": Kind("langfuse", "Langfuse's export, observations and scores: a file or a folder", updates=True),
    "otel": Kind("otel", "OpenTelemetry's GenAI spans and evaluations: OTLP as JSON lines"),
    "portkey": Kind("portkey", "Portkey's logs export and feedback: JSON lines"),
    "helicone": Kind("helicone", "Helicone's requests: JSON lines, CSV or Parquet", updates=True),
    "table": Kind("table", "a CSV, JSONL or Parquet file with a map of its columns"),
    "store": Kind("store", "the service's own store: an SQLite file or an SQLAlchemy URL", updates=True, live=True),
}


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises InputError for another."""
    if name not in KINDS:
        raise InputError(f"unknown kind of log {name!r}: choose one of {', '.join(KINDS)}")
    return KINDS[name]
