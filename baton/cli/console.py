"""How commands speak to a terminal: rich on a TTY, plain text elsewhere or under NO_COLOR, and one way to report errors."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import typer
from rich.console import Console
from rich.markup import escape

from baton.errors import (
    BatonError,
    CancelledError,
    CapacityError,
    DrainingError,
    InvalidRequestError,
    ModelLoadError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from baton.service.status import said_by_peer

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


PLAIN_WIDTH = 120
"""Of lines in files and pipes, which have no width of their own."""


def stdout() -> Console:
    """Answers and tables."""
    return _console(on_stderr=False)


def stderr() -> Console:
    """Everything that is not the answer, so that output can be piped."""
    return _console(on_stderr=True)


def _console(*, on_stderr: bool) -> Console:
    console = Console(stderr=on_stderr, highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PLAIN_WIDTH
    return console


@contextmanager
def reported(*, asking: bool = True) -> Iterator[None]:
    """Turns what Baton raises, and Ctrl-C, into a message and an exit code."""
    try:
        yield
    except BatonError as error:
        report(stderr(), error, asking=asking)
        code = EXIT_USAGE if isinstance(error, InvalidRequestError | NotFoundError) else EXIT_FAILED
        raise typer.Exit(code) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


_NO_MODEL = ("hub", "not a directory", "holds neither")
"""What the message says where there is no checkpoint, rather than one that cannot be used."""


class _Delays(logging.Handler):
    """Tells people why an answer is late, each reason once."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._told:
            self._told.add(message)
            stderr().print(f"[dim]{escape(message)}[/]", soft_wrap=True)


@contextmanager
def delays_told() -> Iterator[None]:
    """Inside, the client says what it waits for where an answer has stopped."""
    logger, handler = logging.getLogger("baton.client"), _Delays()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def report(console: Console, error: BatonError, *, asking: bool = True) -> None:
    """What went wrong, and what may help; `asking` a server, or running one."""
    console.print(f"[bold red]error[/]: {escape(error.message)}", soft_wrap=True)
    hint = _hint(error, asking=asking)
    if hint:
        console.print(f"[dim]{escape(hint)}[/]", soft_wrap=True)


def _hint(error: BatonError, *, asking: bool) -> str:  # noqa: PLR0911 - one for each kind
    match error:
        case UnavailableError(message=message) if "cannot listen" in message:
            return "Another server has the port; --port 0 and --metrics-port 0 take free ones."
        case DrainingError():
            return "The server is about to stop."
        case UnavailableError(__cause__=grpc.RpcError() as cause) if said_by_peer(cause):
            return "The router is there; `baton fleet` tells of its workers."
        case UnavailableError() if asking:
            return "Is a server running there? Start one with `baton serve`, or name another."
        case UnauthenticatedError():
            return "Put the key into BATON_API_KEY."
        case CapacityError(retry_after_s=seconds):
            return f"The server is busy; try again in {seconds:.1f} s."
        case ModelLoadError(message=message) if any(word in message for word in _NO_MODEL):
            return "--model takes a Hugging Face directory (config.json, *.safetensors, tokenizer.json) or a hub id."
        case CancelledError():
            return "Someone ended the request by its id."
        case _:
            return ""


def seconds(value: float | None) -> str:
    """A duration as people read it: 3.2 ms, 1.25 s; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def size(num_bytes: int) -> str:
    """A number of bytes as people read it."""
    if num_bytes < 1024:
        return f"{num_bytes} B"
    if num_bytes < 1024 * 1024:
        return f"{num_bytes / 1024:.1f} KiB"
    return f"{num_bytes / 1024 / 1024:.1f} MiB"
