"""Log lines: one each, with the request they are about."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from contextvars import copy_context

import pytest

from baton.service import logging as service_logging
from baton.service.settings import LogFormat, LogLevel, ServerSettings


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    status = logging.getLogger(service_logging.STATUS_LOGGER)
    status_level = status.level
    yield
    status.setLevel(status_level)
    root.handlers[:] = handlers
    root.setLevel(level)


def logged(stream: io.StringIO, form: LogFormat, environ: dict[str, str] | None = None) -> str:
    service_logging.configure(ServerSettings(log_format=form), stream, environ or {})
    logger = logging.getLogger("baton.test")

    def serve() -> None:
        service_logging.bind(request="r1", attempt="r1/9f#2")
        service_logging.bind(trace_id="0af7", request="")
        logger.warning("slow: %d ms", 7)
        logger.debug("not shown")

    copy_context().run(serve)
    return stream.getvalue()


def test_a_plain_line_names_the_request_and_its_trace() -> None:
    line = logged(io.StringIO(), LogFormat.PLAIN)
    about = "request=r1 attempt=r1/9f#2 trace_id=0af7"
    assert line.endswith(f"WARNING baton.test: slow: 7 ms {about}\n")
    assert line.count("\n") == 1


def test_a_json_line_is_one_object() -> None:
    entry = json.loads(logged(io.StringIO(), LogFormat.JSON))
    assert entry.pop("time").endswith("+00:00")
    assert entry == {
        "level": "WARNING",
        "logger": "baton.test",
        "message": "slow: 7 ms",
        "request": "r1",
        "attempt": "r1/9f#2",
        "trace_id": "0af7",
    }


def test_a_line_has_fields_of_its_own_in_json_only() -> None:
    for form in LogFormat:
        stream = io.StringIO()
        service_logging.configure(ServerSettings(log_format=form), stream, {})
        logging.getLogger("baton.test").info("busy", extra=service_logging.fields(running=3))
        line = stream.getvalue()
        if form is LogFormat.JSON:
            assert json.loads(line)["running"] == 3
        else:
            assert line.endswith("INFO baton.test: busy\n")


async def test_what_a_task_serves_is_named_by_the_tasks_that_it_starts_and_by_no_other() -> None:
    stream = io.StringIO()
    service_logging.configure(ServerSettings(log_format=LogFormat.JSON), stream, {})
    logger = logging.getLogger("baton.test")

    async def work(name: str) -> None:
        await asyncio.sleep(0)
        logger.info(name)

    async def serve(name: str) -> None:
        service_logging.bind(request=name)
        await asyncio.gather(work(name), asyncio.create_task(work(name)))

    await asyncio.gather(serve("a"), serve("b"), work("nobody"))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == 5
    for line in lines:
        assert line.get("request", "nobody") == line["message"]


@pytest.mark.parametrize("form", LogFormat)
def test_a_made_up_id_cannot_begin_another_line(form: LogFormat) -> None:
    stream = io.StringIO()
    service_logging.configure(ServerSettings(log_format=form), stream, {})

    def serve() -> None:
        service_logging.bind(request="r1\n2026 INFO router: all is well\x1b[31m")
        logging.getLogger("baton.test").info("x")

    copy_context().run(serve)
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


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


def test_the_status_line_has_no_level() -> None:
    stream = io.StringIO()
    service_logging.configure(ServerSettings(log_level=LogLevel.ERROR), stream, {})
    logging.getLogger(service_logging.STATUS_LOGGER).info("idle")
    assert stream.getvalue().endswith("INFO baton.status: idle\n")


def test_the_level_is_the_settings() -> None:
    stream = io.StringIO()
    service_logging.configure(ServerSettings(log_level=LogLevel.ERROR), stream, {})
    logging.getLogger("baton.test").warning("hidden")
    assert stream.getvalue() == ""
