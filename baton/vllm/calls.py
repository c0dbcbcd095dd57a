"""The `Generate` calls that run on a worker: how many wait for blocks, and whom an `Abort` ends. On the worker's event loop."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.errors import CapacityError


class ForeignCall:
    """One call. Ended by an abort, its body is cancelled at its next wait, and `aborted` is set."""

    def __init__(self, timer: asyncio.Timeout) -> None:
        self._timer = timer
        self.waits = True
        """For blocks."""
        self.aborted = False

    def abort(self) -> None:
        """Idempotent."""
        if not self.aborted:
            self.aborted = True
            self._timer.reschedule(asyncio.get_running_loop().time())


class ForeignCalls:
    """See the module docstring."""

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._running: dict[str, set[ForeignCall]] = {}

    @asynccontextmanager
    async def one(self, request_id: str) -> AsyncIterator[ForeignCall]:
        """A call runs inside; an abort leads out of it in peace. Raises `CapacityError` where too many calls wait already."""
        waiting = sum(call.waits for calls in self._running.values() for call in calls)
        if waiting >= self._max_waiting:
            raise CapacityError(f"{waiting} calls wait for KV blocks already")
        timer = asyncio.timeout(None)
        call = ForeignCall(timer)
        self._running.setdefault(request_id, set()).add(call)
        try:
            async with timer:
                yield call
        except TimeoutError:
            if not call.aborted:
                raise
        finally:
            calls = self._running[request_id]
            calls.discard(call)
            if not calls:
                del self._running[request_id]

    def abort(self, request_id: str) -> None:
        """Ends the calls of a request. Idempotent."""
        for call in self._running.get(request_id, ()):
            call.abort()
