"""Sends a load and keeps the records of it.

    open-loop      each request at its time, whatever the others do; with a cap, those that find no room wait, and count from their time
    closed-loop    so many at once, the next one as soon as one ends

A `Phase` ends when everything has ended, when its time and a grace are over, when the server has been lost for too long, or when it is
told to stop; what runs then is cancelled, and is nobody's failure. All on one event loop.
"""

import asyncio
import time
from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from baton.bench.prompts import Planned
from baton.bench.records import OK, UNFINISHED, Record
from baton.bench.target import Payload, Target

LOST_PAUSE_S = 0.1
"""Before a place whose request found no server takes the next one."""

Prepared = tuple[Planned, Payload]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of a phase."""

    duration_s: float | None = None
    """Nothing is due later. None: the requests are the end."""
    grace_s: float = 30.0
    """For what runs when the duration is over; then it is cut off."""
    give_up_s: float = 10.0
    """A server that has been lost for so long is not waited for."""
    concurrency: int | None = None
    """Most at once. None, open-loop only: no limit."""


@dataclass(slots=True)
class Phase:
    """One run of one load; it is used once. Readable while it runs."""

    target: Target
    limits: Limits
    records: list[Record] = field(default_factory=list)
    """Of the requests so far, in the order in which they were due."""
    began_s: float = 0.0
    """On `time.perf_counter`."""
    began_unix_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process, from beginning to end."""
    running: int = 0
    """Requests that were sent and have not ended."""
    ended: int = 0
    failed: int = 0
    lost: str = ""
    """How the server was lost, where the last that was heard of it is that."""
    _lost_since_s: float = 0.0
    _gave_up: asyncio.Event = field(default_factory=asyncio.Event)

    async def open_loop(
        self, requests: Iterable[Prepared], times_s: Iterable[float], stop: asyncio.Event
    ) -> None:
        """Sends each at its time since the beginning, which is now."""
        await self._run(self._keep_schedule(requests, times_s), stop)

    async def closed_loop(self, requests: Iterable[Prepared], stop: asyncio.Event) -> None:
        """Precondition: `limits.concurrency` is set."""
        await self._run(self._keep_places(requests), stop)

    async def _run(self, work: Coroutine[None, None, None], stop: asyncio.Event) -> None:
        limits = self.limits
        timeout_s = None if limits.duration_s is None else limits.duration_s + limits.grace_s
        cpu_s = time.process_time()
        self.began_unix_s, self.began_s = time.time(), time.perf_counter()
        tasks: list[asyncio.Task[object]] = [
            asyncio.create_task(each) for each in (work, stop.wait(), self._gave_up.wait())
        ]
        try:
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            self.wall_s = time.perf_counter() - self.began_s
            self.cpu_s = time.process_time() - cpu_s
        if not tasks[0].cancelled():
            tasks[0].result()

    async def _keep_schedule(self, requests: Iterable[Prepared], times_s: Iterable[float]) -> None:
        duration_s, concurrency = self.limits.duration_s, self.limits.concurrency
        if duration_s is not None:
            times_s = takewhile(lambda at_s: at_s < duration_s, times_s)
        room = None if concurrency is None else asyncio.Semaphore(concurrency)
        async with asyncio.TaskGroup() as group:
            # The times first: where they end, no request is drawn in vain.
            for at_s, prepared in zip(times_s, requests, strict=False):
                due_s = self.began_s + at_s
                # A timer may be early, by half of its resolution.
                while (left_s := due_s - time.perf_counter()) > 0:  # noqa: ASYNC110 - no event but time
                    await asyncio.sleep(left_s)
                group.create_task(self._send(prepared, self._due(prepared, due_s), room))

    async def _keep_places(self, requests: Iterable[Prepared]) -> None:
        assert self.limits.concurrency is not None
        shared = iter(requests)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.limits.concurrency):
                group.create_task(self._keep_place(shared))

    async def _keep_place(self, shared: Iterator[Prepared]) -> None:
        duration_s = self.limits.duration_s
        end_s = float("inf") if duration_s is None else self.began_s + duration_s
        while (now_s := time.perf_counter()) < end_s:
            prepared = next(shared, None)
            if prepared is None:
                return
            record = self._due(prepared, now_s)
            await self._send(prepared, record, None)
            if record.lost:
                await asyncio.sleep(LOST_PAUSE_S)

    def _due(self, prepared: Prepared, due_s: float) -> Record:
        planned, _ = prepared
        record = Record(
            index=len(self.records),
            scheduled_s=due_s,
            planned_input_tokens=planned.input_tokens,
            planned_output_tokens=planned.output_tokens,
        )
        self.records.append(record)
        return record

    async def _send(
        self, prepared: Prepared, record: Record, room: asyncio.Semaphore | None
    ) -> None:
        if room is not None:
            await room.acquire()
        self.running += 1
        try:
            await self.target.send(prepared[1], record)
            self.ended += 1
            self._heard(record)
        except asyncio.CancelledError:
            record.status = UNFINISHED
            raise
        finally:
            self.running -= 1
            record.ended_s = time.perf_counter()
            if room is not None:
                room.release()

    def _heard(self, record: Record) -> None:
        """Whether the server is still there, by how a request ended."""
        self.failed += record.status != OK
        if not record.lost:
            self.lost = ""
            return
        now_s = time.perf_counter()
        if not self.lost:
            self._lost_since_s = now_s
        self.lost = record.message or record.status
        if now_s - self._lost_since_s >= self.limits.give_up_s:
            self._gave_up.set()
