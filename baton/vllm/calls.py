"""The `Generate` calls that run on a worker: how many wait for blocks, and whom an `Abort` ends. On the worker's event loop."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from baton.errors import CapacityError


class ForeignCall:
    """One call. An abort sets `aborted`, and cancels the body where it waits for something to tell; what it tells, it tells to the end,
    since gRPC cannot go on with a call after a write that was cancelled.
    """

    def __init__(self, timer: asyncio.Timeout) -> None:
        self._timer = timer
        self._telling = False
        self.waits = True
        """For blocks."""
        self.aborted = False

    def abort(self) -> None:
        """Idempotent."""
        if self.aborted:
            return
        self.aborted = True
        if not self._telling:
            self._timer.reschedule(asyncio.get_running_loop().time())

    @contextmanager
    def telling(self) -> Iterator[bool]:
        """The body writes inside, if this says so: not once the call was aborted, which it looks for afterwards, too."""
        self._telling = True
        try:
            yield not self.aborted
        finally:
            self._telling = False


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
