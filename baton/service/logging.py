"""Log lines: plain or JSON, each with the request that it is about. What a prompt or an answer said is never logged, by anyone.

`configure` is called once, by a process's `__main__` or actor; everything else uses `logging.getLogger(__name__)`. Whoever begins to
serve a request says so by `bind`, and every line names it that its task writes from then on, and the tasks that it starts.
"""

import json
import logging
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import TextIO

from baton.service.settings import LogFormat, ServerSettings

_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m", "DEBUG": "\x1b[2m"}
_RESET = "\x1b[0m"
_NOTHING: Mapping[str, str] = MappingProxyType({})
_ABOUT: ContextVar[Mapping[str, str]] = ContextVar("about", default=_NOTHING)
"""What the lines of a task are about."""
STATUS_LOGGER = "baton.status"
"""Has a setting of its own, and writes at any level."""


def configure(settings: ServerSettings, stream: TextIO, environ: Mapping[str, str]) -> None:
    """Sends everything at or above the level to the stream, one line each. Colours only on a terminal, and never with NO_COLOR."""
    handler = logging.StreamHandler(stream)
    if settings.log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(PlainFormatter(colour=stream.isatty() and not environ.get("NO_COLOR")))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(settings.log_level.name)
    logging.getLogger(STATUS_LOGGER).setLevel(logging.INFO)


def bind(*, request: str = "", attempt: str = "", trace_id: str = "") -> None:
    """For the rest of the task, every line that it writes is about this; what is empty stays as it was."""
    given = {"request": request, "attempt": attempt, "trace_id": trace_id}
    # A peer may have made them up: one line stays one line.
    named = {
        name: value if value.isprintable() else ascii(value)
        for name, value in given.items()
        if value
    }
    if named:
        _ABOUT.set({**_ABOUT.get(), **named})


def fields(**values: object) -> dict[str, Mapping[str, object]]:
    """`extra` of a line whose JSON form has these as members, beside the message that tells them to people."""
    return {"fields": values}


class PlainFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,000 INFO router.fleet: message request=r1 trace_id=0af7…`."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if about := _ABOUT.get():
            first, *rest = line.split("\n", 1)
            named = " ".join(f"{name}={value}" for name, value in about.items())
            line = "\n".join([f"{first} {named}", *rest])
        colour = _COLOURS.get(record.levelname) if self._colour else None
        return line if colour is None else f"{colour}{line}{_RESET}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message; request, attempt, trace_id, a line's own fields and exception where
    there are any.
    """

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= _ABOUT.get()
        own = record.__dict__.get("fields")
        if isinstance(own, Mapping):
            entry |= own
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)
