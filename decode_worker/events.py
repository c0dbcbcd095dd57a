"""Reads an engine's events so that waiting for the next ones can go on while something else is awaited. Used on the event loop."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

from baton.engine.base import EngineEvent

Batch = tuple[EngineEvent, ...]


class EventReader:
    """An iterator over batches of events. After `pending`, the next item is fetched by a task of its own, which outlives a cancelled
    wait; otherwise there is none, since a task costs about as much as the rest of a token's way.
    """

    def __init__(self, batches: AsyncIterator[Batch]) -> None:
        self._batches = batches
        self._pending: asyncio.Future[Batch | None] | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Ends the fetch."""
        if self._pending is not None:
            self._pending.cancel()
            await asyncio.wait({self._pending})
            if not self._pending.cancelled():
                self._pending.exception()  # it came too late to matter

    def pending(self) -> asyncio.Future[Batch | None]:
        """The fetch of the next batch; None marks the end."""
        if self._pending is None:
            self._pending = asyncio.ensure_future(anext(self._batches, None))
        return self._pending

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Batch:
        if self._pending is None:
            batch = await anext(self._batches, None)
        else:
            batch = await asyncio.shield(self._pending)
            self._pending = None
        if batch is None:
            raise StopAsyncIteration
        return batch
