"""Signals that end `baton serve`, as events on its loop."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager

NUMBERS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """SIGINT and SIGTERM: the first one drains, the second one stops at once."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hears signals inside the context."""
        self.listen()
        try:
            yield
        finally:
            for number in NUMBERS:
                asyncio.get_running_loop().remove_signal_handler(number)

    def listen(self) -> None:
        """Takes the handlers, back from whoever has replaced them: starting Ray does."""
        for number in NUMBERS:
            asyncio.get_running_loop().add_signal_handler(number, self._heard)

    def _heard(self) -> None:
        (self.second if self.first.is_set() else self.first).set()
