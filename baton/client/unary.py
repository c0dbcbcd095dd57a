"""A call that is no stream: made at the router in use and, where that one is lost or drains, at the next, once at each. A lone one is
tried again: behind one name there may be several.

A call whose answer was lost may have been carried out: a session may have been created that nobody knows, or closed.
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc

from baton.client.recovery import Routers, Services, call_error
from baton.errors import CancelledError, DrainingError, NotFoundError, UnavailableError
from baton.service.status import said_by_peer

Pick = Callable[[Services], Any]
"""The method to call; the stubs are not typed, and nor is what it returns."""


def ask(
    routers: Routers,
    pick: Pick,
    request: object,
    timeout_s: float | None,
    *,
    anywhere: bool = False,
) -> Any:
    """The answer. `timeout_s` is for all tries. Raises the `BatonError` of the last one. What is asked for may be `anywhere`: where one
    router does not have it, the others are asked.
    """
    tries = _Tries(routers, timeout_s, anywhere=anywhere)
    while True:
        try:
            return pick(tries.router)(request, timeout=tries.left_s(), metadata=routers.metadata)
        except grpc.RpcError as error:
            tries.failed(error)


async def ask_async(
    routers: Routers,
    pick: Pick,
    request: object,
    timeout_s: float | None,
    *,
    anywhere: bool = False,
) -> Any:
    """See `ask`."""
    tries = _Tries(routers, timeout_s, anywhere=anywhere)
    while True:
        try:
            with closing_told():
                return await pick(tries.router)(
                    request, timeout=tries.left_s(), metadata=routers.metadata
                )
        except grpc.RpcError as error:
            tries.failed(error)


@contextmanager
def closing_told() -> Iterator[None]:
    """An asyncio call runs inside. Raises `CancelledError`, Baton's, where the call was closed: gRPC says so as if the task had been
    cancelled that waits for it.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise CancelledError("the client closed the call") from None


class _Tries:
    """Of one call."""

    def __init__(self, routers: Routers, timeout_s: float | None, *, anywhere: bool) -> None:
        self._routers = routers
        self._anywhere = anywhere
        self._absent: NotFoundError | None = None
        self.router, *others = routers.each()
        self._others = others or [self.router]
        self._end_s = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        return None if self._end_s is None else max(0.0, self._end_s - time.monotonic())

    def failed(self, error: grpc.RpcError) -> None:
        """Returns where there is another router to try; raises where the error stands."""
        typed = call_error(error, closed=self._routers.closed)
        # Of itself, a router says so by draining only: what else is unavailable is so at all of them.
        lost = isinstance(typed, DrainingError if said_by_peer(error) else UnavailableError)
        if self._anywhere and isinstance(typed, NotFoundError):
            self._absent = typed
            # A lone one has nothing else to say.
            self._others = [other for other in self._others if other is not self.router]
        elif not lost:
            raise typed from error
        if not self._others:
            raise self._absent or typed from error
        if lost:
            self._routers.move_on(self.router)
        self.router = self._others.pop(0)
