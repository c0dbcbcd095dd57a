"""Log lines: one each, with the request they are about."""

import io
import json
import logging
from collections.abc import Iterator

import pytest

from baton.service import logging as service_logging
from baton.service.settings import LogFormat, LogLevel, ServerSettings
from baton.types import AttemptKey, RequestId


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(stream: io.StringIO, form: LogFormat, environ: dict[str, str] | None = None) -> str:
    service_logging.configure(ServerSettings(log_format=form), stream, environ or {})
    logger = logging.getLogger("baton.test")
    key = AttemptKey(RequestId("r1"), 2)
    service_logging.for_request(logger, key).warning("slow: %d ms", 7)
    logger.debug("not shown")
    return stream.getvalue()


def test_a_plain_line_names_the_request() -> None:
    line = logged(io.StringIO(), LogFormat.PLAIN)
    assert line.endswith("WARNING baton.test: slow: 7 ms request=r1#2\n")
    assert line.count("\n") == 1


def test_a_json_line_is_one_object() -> None:
    entry = json.loads(logged(io.StringIO(), LogFormat.JSON))
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "WARNING",
        "logger": "baton.test",
        "message": "slow: 7 ms",
        "request": "r1#2",
    }


def test_a_json_line_keeps_a_traceback_within_the_line() -> None:
    stream = io.StringIO()
    service_logging.configure(ServerSettings(log_format=LogFormat.JSON), stream, {})
    try:
        int("bad")
    except ValueError:
        logging.getLogger("baton.test").exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "ValueError" in json.loads(stream.getvalue())["exception"]


@pytest.mark.parametrize(
    ("stream", "environ", "coloured"),
    [
        (Terminal, {}, True),
        (Terminal, {"NO_COLOR": "1"}, False),
        (io.StringIO, {}, False),
    ],
)
def test_colours_are_for_terminals_that_did_not_decline(
    stream: type[io.StringIO], environ: dict[str, str], *, coloured: bool
) -> None:
    assert ("\x1b[" in logged(stream(), LogFormat.PLAIN, environ)) is coloured


def test_the_level_is_the_settings() -> None:
    stream = io.StringIO()
    service_logging.configure(ServerSettings(log_level=LogLevel.ERROR), stream, {})
    logging.getLogger("baton.test").warning("hidden")
    assert stream.getvalue() == ""
