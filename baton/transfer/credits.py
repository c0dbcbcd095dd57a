"""The bound on KV bytes that a decode worker has in flight: the object store does not push back (it spills to disk), so decode
does, before it asks.

One `ByteCredits` belongs to one decode worker and is used on its event loop only. Grants are first come, first served: a small
request never overtakes a large one, so none starves. Invariant: `in_use_bytes` is the sum of the leases held, never more than
the budget; and nobody waits while the head of the queue would fit.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class _Waiter:
    cost: int
    granted: asyncio.Future[None]


class ByteCredits:
    """A budget of bytes, lent by `lease`."""

    def __init__(self, budget_bytes: int) -> None:
        if budget_bytes <= 0:
            raise ValueError(f"budget_bytes must be positive, not {budget_bytes}")
        self.budget_bytes = budget_bytes
        self._leased: list[int] = []
        self._waiters: deque[_Waiter] = deque()

    @property
    def in_use_bytes(self) -> int:
        """Bytes on loan."""
        return sum(self._leased)

    @property
    def waiting(self) -> int:
        """Requests that wait for credit."""
        return len(self._waiters)

    @asynccontextmanager
    async def lease(self, num_bytes: int) -> AsyncIterator[None]:
        """Holds `num_bytes` inside the context, entered once they are free. A request larger than the budget takes all of it, and so
        runs alone.
        """
        cost = min(num_bytes, self.budget_bytes)
        await self._acquire(cost)
        try:
            yield
        finally:
            self._release(cost)

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        assert 0 <= self.in_use_bytes <= self.budget_bytes, self._leased
        if self._waiters and not self._waiters[0].granted.done():
            assert self.in_use_bytes + self._waiters[0].cost > self.budget_bytes, (
                "head of queue fits"
            )

    async def _acquire(self, cost: int) -> None:
        if not self._waiters and self.in_use_bytes + cost <= self.budget_bytes:
            self._leased.append(cost)
            return
        waiter = _Waiter(cost, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter.granted.cancelled():
                self._forget(waiter)
            else:  # granted and cancelled in one turn of the loop
                self._release(cost)
            raise

    def _release(self, cost: int) -> None:
        self._leased.remove(cost)
        self._grant()

    def _forget(self, waiter: _Waiter) -> None:
        if waiter in self._waiters:
            self._waiters.remove(waiter)
            self._grant()

    def _grant(self) -> None:
        while self._waiters:
            waiter = self._waiters[0]
            if not waiter.granted.done():
                if self.in_use_bytes + waiter.cost > self.budget_bytes:
                    return
                self._leased.append(waiter.cost)
                waiter.granted.set_result(None)
            self._waiters.popleft()
