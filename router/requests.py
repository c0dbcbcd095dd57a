"""The requests that the router serves now: their ids, their turn, and how to end one from outside.

Used on the router's event loop. An entry is held by the request's own task, inside `enter`, and goes with it.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    DrainingError,
    NotFoundError,
)
from baton.service.metrics import RouterMetrics
from baton.types import RequestId


class _Running:
    """One request, and the task that serves it."""

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task = task
        self.error: BatonError | None = None

    def abort(self, error: BatonError) -> None:
        """The request ends with `error`, at its next await. The first call decides."""
        if self.error is None:
            self.error = error
            self._task.cancel()

    def uncancel(self) -> None:
        """The cancellation has arrived."""
        self._task.uncancel()


class RequestTable:
    """See the module docstring."""

    def __init__(self, *, max_running: int, max_queued: int, metrics: RouterMetrics) -> None:
        self._turns = asyncio.Semaphore(max_running)
        self._max_queued = max_queued
        self._metrics = metrics
        self._requests: dict[RequestId, _Running] = {}
        self._queued = 0
        self._refuses = False
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return len(self._requests)

    @asynccontextmanager
    async def enter(self, request_id: RequestId) -> AsyncIterator[None]:
        """Serves a request inside the context, once it is its turn. Raises `DrainingError` while draining, `AlreadyExistsError` where
        one of that id is here, `CapacityError` where the queue is full, and what the request was aborted with.
        """
        if self._refuses:
            raise DrainingError("the router is draining")
        if request_id in self._requests:
            raise AlreadyExistsError(f"a request {request_id!r} runs")
        task = asyncio.current_task()
        assert task is not None
        running = self._requests[request_id] = _Running(task)
        self._idle.clear()
        try:
            await self._take_turn()
            self._metrics.running.inc()
            try:
                yield
            finally:
                self._metrics.running.dec()
                self._turns.release()
        except asyncio.CancelledError:
            if running.error is None:
                raise
            running.uncancel()
            raise running.error from None
        finally:
            if self._requests.get(request_id) is running:
                del self._requests[request_id]
            if not self._requests:
                self._idle.set()

    def replace(self, request_id: RequestId) -> None:
        """A request of that id, if one is here, gives up its id: another stream goes on with it, and its own will end."""
        self._requests.pop(request_id, None)

    def cancel(self, request_id: str) -> None:
        """Ends a request with `CancelledError`. Raises `NotFoundError`."""
        running = self._requests.get(RequestId(request_id))
        if running is None:
            raise NotFoundError("request", request_id)
        running.abort(CancelledError(f"request {request_id!r} was cancelled"))

    def refuse_new(self) -> None:
        """From now on, no request enters."""
        self._refuses = True

    async def idle(self, timeout_s: float) -> bool:
        """Returns once no request is here; False after the timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def abort_all(self, error: BatonError) -> None:
        """Ends every request."""
        for running in tuple(self._requests.values()):
            running.abort(error)

    async def _take_turn(self) -> None:
        if not self._turns.locked():
            await self._turns.acquire()
            return
        if self._queued >= self._max_queued:
            raise CapacityError(f"{self._queued} requests wait already")
        self._queued += 1
        self._metrics.queued.inc()
        try:
            await self._turns.acquire()
        finally:
            self._queued -= 1
            self._metrics.queued.dec()
