"""The calls that run on a worker: counted for its drain, and by outcome for its metrics. On the worker's event loop."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from baton.errors import BatonError
from baton.service.metrics import OK, WorkerMetrics, outcome_of


class CallOutcome:
    """How a call ended, for the metrics: cancelled until it is done or fails."""

    def __init__(self) -> None:
        self.label = "cancelled"

    def done(self) -> None:
        """The caller is about to be told the last it waits for; it may cancel rather than read to the end."""
        self.label = OK


class RunningCalls:
    """See the module docstring."""

    def __init__(self, metrics: WorkerMetrics) -> None:
        self._metrics = metrics
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def one(self) -> Iterator[CallOutcome]:
        """A call runs inside."""
        self._count += 1
        self._idle.clear()
        outcome = CallOutcome()
        try:
            yield outcome
        except BatonError as error:
            outcome.label = outcome_of(error)
            raise
        except Exception:
            outcome.label = "internal"
            raise
        finally:
            self._metrics.record_call(outcome.label)
            self._count -= 1
            if not self._count:
                self._idle.set()

    async def idle(self, timeout_s: float) -> bool:
        """Whether none ran at some moment within the timeout."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True
