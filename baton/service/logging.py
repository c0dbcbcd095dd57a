"""Log lines: plain or JSON, each with the request it is about. What a prompt or an answer said is never logged, by anyone.

`configure` is called once, by a process's `__main__` or actor; everything else uses `logging.getLogger(__name__)`, wrapped by
`for_request` where a request is at hand.
"""

import json
import logging
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

from baton.service.settings import LogFormat, ServerSettings

_COLOURS = {"WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[31m", "DEBUG": "\x1b[2m"}
_RESET = "\x1b[0m"


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


def for_request(logger: logging.Logger, request: object) -> "RequestLogger":
    """A logger whose lines name the request; `request` is a request id or an attempt key."""
    return RequestLogger(logger, {"request": str(request)})


class RequestLogger(logging.LoggerAdapter[logging.Logger]):
    """See `for_request`."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "extra": self.extra}


class PlainFormatter(logging.Formatter):
    """`2026-01-31 12:00:00,000 INFO router.fleet: message request=r1`."""

    def __init__(self, *, colour: bool) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        request = _request_of(record)
        if request is not None:
            first, *rest = line.split("\n", 1)
            line = "\n".join([f"{first} request={request}", *rest])
        colour = _COLOURS.get(record.levelname) if self._colour else None
        return line if colour is None else f"{colour}{line}{_RESET}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and request and exception where there are any."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        request = _request_of(record)
        if request is not None:
            entry["request"] = request
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def _request_of(record: logging.LogRecord) -> str | None:
    request = record.__dict__.get("request")
    return request if isinstance(request, str) else None
