"""A thread that runs functions one after the other, for what belongs to one thread and may hang: it does not keep its process from
ending, as those of `concurrent.futures` do.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class SerialThread:
    """See the module docstring. Methods may be called in any thread, and never block."""

    def __init__(self, name: str) -> None:
        """Starts it."""
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """What it returns or raises, in its turn. Cancelled before that, it is not called. Precondition: not stopped."""
        future: Future[T] = Future()
        self._waiting.put(partial(_settle, future, function))
        return future

    def stop(self) -> None:
        """The thread ends once it has done what was submitted."""
        self._waiting.put(None)

    def _run(self) -> None:
        while (settle := self._waiting.get()) is not None:
            settle()
            # While it waits, it holds nothing of what it did.
            del settle


def _settle(future: Future[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except BaseException as error:  # noqa: BLE001 - whoever waits gets it
        future.set_exception(error)
        # It holds the error, which holds this frame.
        del future
    else:
        future.set_result(result)
