"""The log's lines, as text or as JSON: one line a record, and of an exception its type and place, never its text.

An exception's text may quote what failed, and what failed may be a prompt. The same holds for what other libraries say
with an exception, and for all that asyncio says: of these only the part that no value can be in is kept.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import sys
import threading
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal

Format = Literal["text", "json"]
_OURS = {"router_ml", "features", "serving", "__main__"}
_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime"}
_VALUES = re.compile(r"[<('\"{\[].*", re.DOTALL)  # where a repr may begin
_FRAMES = 20  # of an exception, the innermost
_CHAIN = 5  # exceptions that led to one another


def exception_of(error: BaseException | None) -> list[dict[str, Any]]:
    """An exception and those that it came from: types and places, innermost first, without their texts."""
    chain: list[dict[str, Any]] = []
    while error is not None and len(chain) < _CHAIN:
        frames = traceback.extract_tb(error.__traceback__)[-_FRAMES:]
        at = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
        chain.append({"type": type(error).__name__, "at": at})
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return chain


class LineFormatter(logging.Formatter):
    """One line a record. Fields of it are what our own loggers give as `extra`, and `exception`."""

    def __init__(self, form: Format) -> None:
        super().__init__()
        self.form = form

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _message(record),
        }
        if _ours(record):
            given = {name: value for name, value in vars(record).items() if name not in _STANDARD}
            fields |= {name: _plain(value) for name, value in given.items() if name not in fields}
        if record.exc_info and record.exc_info[1] is not None:
            fields["exception"] = exception_of(record.exc_info[1])
        if self.form == "json":
            return json.dumps(fields)
        time, level, logger, message = (str(fields.pop(name)) for name in ("time", "level", "logger", "message"))
        rest = "".join(f" {name}={json.dumps(value)}" for name, value in fields.items())
        shown = "".join(c if c.isprintable() else " " for c in message)  # what ends a line or moves a terminal's cursor
        return f"{time} {level} {logger}: {' '.join(shown.split())}{rest}"


def _ours(record: logging.LogRecord) -> bool:
    return record.name.partition(".")[0] in _OURS


def _message(record: logging.LogRecord) -> str:
    message = record.getMessage()
    if _ours(record):
        return message
    if record.exc_info or record.name == "asyncio":
        message = _VALUES.sub("", message.partition("\n")[0])
    return message.strip()


def _plain(value: object) -> str | int | float | bool | None:
    """A field's value as JSON can hold it; of what is no plain value only the type."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return type(value).__name__


class _Lines(logging.StreamHandler[Any]):
    """Writes lines to what stderr is at that time. A record that cannot be formatted is named, not shown."""

    def __init__(self, form: Format) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(LineFormatter(form))

    @property
    def stream(self) -> Any:
        """Where the lines go."""
        return sys.stderr

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        """Says that a record is lost; the library would print its arguments."""
        said = logging.makeLogRecord({"name": __name__, "levelno": logging.ERROR, "levelname": "ERROR"})
        said.msg = "a record of %s, line %d, cannot be written: %s"
        said.args = (record.pathname, record.lineno, getattr(sys.exc_info()[0], "__name__", "?"))
        with contextlib.suppress(OSError, ValueError):  # stderr itself may be gone
            self.stream.write(self.format(said) + self.terminator)


def configure(form: Format) -> None:
    """Makes every line that this process logs one of `form`, those of uvicorn and other libraries and warnings, too."""
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if type(handler) in (logging.StreamHandler, _Lines):  # a library's own, or ours in another format
            root.removeHandler(handler)
    root.addHandler(_Lines(form))
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)


def configured() -> Format:
    """The format that `configure` was given; "text" where it was not called."""
    ours = [handler.formatter for handler in logging.getLogger().handlers if isinstance(handler, _Lines)]
    return ours[0].form if ours and isinstance(ours[0], LineFormatter) else "text"


def log_uncaught() -> None:
    """Makes exceptions that nobody catches, in any thread, lines of the log: Python itself would print their texts."""
    log = logging.getLogger(__name__)

    def uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt | SystemExit):
            log.critical("an exception that nobody caught: %s", kind.__name__, exc_info=error)

    sys.excepthook = uncaught
    sys.unraisablehook = lambda what: uncaught(what.exc_type, what.exc_value, what.exc_traceback)
    threading.excepthook = lambda what: uncaught(what.exc_type, what.exc_value, what.exc_traceback)
