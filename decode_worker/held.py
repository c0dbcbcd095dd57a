"""Attempts apart from the calls that read them, so that an attempt outlives its reader for a grace.

    Decode ──▶ running, read ──▶ ended ─┐ within the grace, its tokens stay known
                │        ▲              ├─▶ (forgotten)
         reader lost   Attach           │
                ▼        │              │
              running, unread ──────────┤ grace over, Release, deadline: what it holds is freed
              stopped ──────────────────┘ handed over: its KV waits for another decode worker

A call that breaks says nothing about why: its router may have died, or cut off. So a router that does not want an attempt any
more says so by `release`, and a lost reader alone leaves the attempt running. Used on the worker's event loop; an attempt's
task writes to its reader itself, which costs a token no detour.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

from baton.engine.base import Held
from baton.errors import (
    AbortedError,
    AlreadyExistsError,
    BatonError,
    CancelledError,
    DeadlineError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from baton.transfer.base import Ready
from baton.types import AttemptKey, PositionLogprobs, RequestRecord, TokenChunk
from decode_worker.decoder import (
    DecodeJob,
    JobEvent,
    JobFinished,
    JobKvReceived,
    JobReserved,
    JobTokens,
)

MAX_ENDED = 4096
"""Attempts that have ended and are still known."""
MAX_UNWANTED = 256
"""Attempts that were released and are unknown."""

Write = Callable[[JobEvent], Awaitable[None]]
"""Sends an event to a call's peer; raises anything where the call is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a router says of an attempt beside the job."""

    record: RequestRecord
    grace_s: float
    """How long it goes on unread, and its tokens are known after its end."""


class _Reader:
    """A call that reads an attempt."""

    def __init__(self, write: Write) -> None:
        self._write = write
        self._writing: asyncio.Timeout | None = None
        """Around the write that is under way."""
        self.replaced: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def tell(self, event: JobEvent) -> None:
        """Writes; raises anything where the call is over, and `TimeoutError` once it was left."""
        try:
            async with asyncio.timeout(None) as self._writing:
                await self._write(event)
        finally:
            self._writing = None

    def leave(self) -> None:
        """Gives up the write that is under way: a router that froze would hold the attempt up for good. Idempotent."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.reschedule(asyncio.get_running_loop().time())

    def replace(self) -> None:
        """Another call reads the attempt from now on. Idempotent."""
        if not self.replaced.done():
            self.replaced.set_result(None)
        self.leave()


class HeldAttempt:
    """See the module docstring."""

    def __init__(
        self, job: DecodeJob, terms: Terms, events: AsyncGenerator[JobEvent, None]
    ) -> None:
        self.job = job
        self.terms = terms
        self._events = events
        self._token_ids: list[int] = []
        self._logprobs: list[PositionLogprobs] = []
        self._finished: JobFinished | None = None
        self._latest: _Reader | None = None
        """Whoever attached last."""
        self._reader: _Reader | None = None
        """The same, once it has caught up and while its call lasts."""
        self._grace: asyncio.TimerHandle | None = None
        self._ended_by: BatonError | None = None
        self._stopped: Ready | None = None
        """Where it was stopped, with the newest token, whose log-probabilities may yet have to be told."""
        self._stopped_index = 0
        """Output position after that token."""
        self.hand_overs = 0
        """How many calls wait for it to stop."""
        self.holder = ""
        """Who read it last."""
        self.task: asyncio.Task[None]

    @property
    def end_index(self) -> int:
        """Output position after the last token."""
        return len(self.job.sequence.generated) + len(self._token_ids)

    @property
    def failed(self) -> bool:
        """Whether no more tokens will come, and the last one has not."""
        return (self.task.done() or self._stopped is not None) and self._finished is None

    @property
    def is_stopped(self) -> bool:
        """Whether somebody was told, or is about to be, where it stopped."""
        return self._stopped is not None

    def stop_at(self, held: Held) -> None:
        """It generates no more, and its KV is held. Idempotent."""
        if self._stopped is None:
            self._stopped, self._stopped_index = (
                Ready(held.newest_token, time.time()),
                held.end_index,
            )

    def stopped_at(self) -> Ready:
        """What a decode worker that goes on must know. Raises `PreconditionError` where it was not stopped."""
        if self._stopped is None:
            raise PreconditionError(f"attempt {self.job.key} was not handed over")
        # A reader that is slow may have kept it from telling its last tokens.
        if not self._logprobs or self.end_index != self._stopped_index:
            return self._stopped
        return replace(self._stopped, logprobs=self._logprobs[-1])

    def start(self) -> None:
        """Begins the work."""
        self.task = asyncio.create_task(self._run(), name=f"decode {self.job.key}")

    async def read(self, write: Write, holder: str, next_index: int | None) -> None:
        """Writes the attempt's events until its end: from now on, or with the tokens from `next_index` on. Raises what the attempt
        failed with, `AbortedError` once another reads it, and `PreconditionError` where it does not know the tokens at `next_index`.
        """
        first = len(self.job.sequence.generated)
        if next_index is not None and not first <= next_index <= self.end_index:
            told = f"attempt {self.job.key} knows tokens [{first}, {self.end_index})"
            raise PreconditionError(f"{told}, not those from {next_index} on")
        reader = self._take_over(write, holder)
        try:
            if next_index is not None:
                await self._replay(reader, next_index)
                if self._stopped is not None:
                    raise PreconditionError(f"attempt {self.job.key} was handed over")
            if not reader.replaced.done():
                self._reader = reader
            await asyncio.wait({self.task, reader.replaced}, return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError:
            if not reader.replaced.done():
                raise
        finally:
            self.job.orphaned.set()
            if not reader.replaced.done():
                self._reader = None
                reader.leave()
                self._begin_grace()
        if reader.replaced.done():
            raise AbortedError(f"another router reads attempt {self.job.key}")
        if self.task.cancelled() and self._ended_by is not None:
            raise self._ended_by
        await self.task

    async def end(self, why: BatonError) -> None:
        """Ends the work; returns once everything that it holds was given back. A reader gets `why`."""
        self._ended_by = why
        if self._grace is not None:
            self._grace.cancel()
        self.task.cancel()
        await asyncio.wait({self.task})

    def _take_over(self, write: Write, holder: str) -> _Reader:
        if self._grace is not None:
            self._grace.cancel()
            self._grace = None
        if self._latest is not None:
            self._latest.replace()
        self._reader, self.holder = None, holder
        self._latest = _Reader(write)
        return self._latest

    async def _replay(self, reader: _Reader, next_index: int) -> None:
        """Writes what was said before; returns with nothing left to say, in the same step of the event loop."""
        first = len(self.job.sequence.generated)
        at = next_index - first
        while at < len(self._token_ids):
            end = len(self._token_ids)
            chunk = TokenChunk(
                first + at, tuple(self._token_ids[at:end]), tuple(self._logprobs[at:end])
            )
            await reader.tell(JobTokens(chunk))
            at = end
        if self._finished is not None:
            await reader.tell(self._finished)

    def _begin_grace(self) -> None:
        if not self.task.done():
            loop = asyncio.get_running_loop()
            self._grace = loop.call_later(self.terms.grace_s, self._give_up)

    def _give_up(self) -> None:
        self._ended_by = UnavailableError(f"attempt {self.job.key} was read by nobody for too long")
        self.task.cancel()

    async def _run(self) -> None:
        timer = asyncio.timeout(self.job.timeout_s)
        try:
            async with timer, aclosing(self._events) as events:
                async for event in events:
                    self._note(event)
                    if self._reader is not None:
                        await self._tell(self._reader, event)
        except TimeoutError:
            if timer.expired():
                raise DeadlineError("call") from None
            raise

    def _note(self, event: JobEvent) -> None:
        match event:
            case JobKvReceived(first=TokenChunk() as first):
                self._add(first)
            case JobTokens(chunk):
                self._add(chunk)
            case JobFinished():
                self._finished = event
            case JobReserved() | JobKvReceived():
                pass

    def _add(self, chunk: TokenChunk) -> None:
        self._token_ids.extend(chunk.token_ids)
        self._logprobs.extend(chunk.logprobs)

    async def _tell(self, reader: _Reader, event: JobEvent) -> None:
        try:
            await reader.tell(event)
        except Exception:  # noqa: BLE001 - gRPC raises several things for a call that is over, whose handler is told too
            if self._reader is reader:
                self._reader = None


class HeldAttempts:
    """Every attempt that is here, by key and by the client's request."""

    def __init__(self) -> None:
        self._attempts: dict[AttemptKey, HeldAttempt] = {}
        self._by_request: dict[str, set[AttemptKey]] = {}
        self._ended: dict[AttemptKey, asyncio.TimerHandle] = {}
        self._unwanted: deque[AttemptKey] = deque(maxlen=MAX_UNWANTED)
        """Released before they began: a call may overtake the one before it."""

    def __contains__(self, key: AttemptKey) -> bool:
        return key in self._attempts

    def start(
        self, job: DecodeJob, terms: Terms, events: AsyncGenerator[JobEvent, None]
    ) -> HeldAttempt:
        """Begins an attempt. Raises `AlreadyExistsError`, and `CancelledError` where it was released before."""
        if job.key in self._unwanted:
            raise CancelledError(f"attempt {job.key} was released")
        if job.key in self._attempts:
            raise AlreadyExistsError(f"attempt {job.key} is already here")
        attempt = self._attempts[job.key] = HeldAttempt(job, terms, events)
        self._by_request.setdefault(terms.record.request_id, set()).add(job.key)
        attempt.start()
        attempt.task.add_done_callback(lambda task: self._on_end(attempt, task))
        return attempt

    def get(self, key: AttemptKey) -> HeldAttempt:
        """Raises `NotFoundError`."""
        if key not in self._attempts:
            raise NotFoundError("attempt", str(key))
        return self._attempts[key]

    def find(self, request_id: str, tenant: str) -> list[HeldAttempt]:
        """A client's request's attempts."""
        found = [self._attempts[key] for key in self._by_request.get(request_id, ())]
        return [attempt for attempt in found if attempt.terms.record.tenant == tenant]

    async def release(self, key: AttemptKey, holder: str) -> bool:
        """Ends an attempt and forgets it; no effect where somebody other than `holder` reads it, or did last. Idempotent."""
        attempt = self._attempts.get(key)
        if attempt is None:
            self._unwanted.append(key)
            return False
        if attempt.holder != holder:
            return False
        await attempt.end(CancelledError(f"attempt {key} was released"))
        self._forget(key)
        return True

    async def close(self) -> None:
        """Ends and forgets every attempt: the worker stops."""
        why = UnavailableError("the worker stopped")
        await asyncio.gather(*(attempt.end(why) for attempt in tuple(self._attempts.values())))
        for key in tuple(self._attempts):
            self._forget(key)

    def _on_end(self, attempt: HeldAttempt, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # a reader, where there is one, is told; nobody else has to be
        key, grace_s = attempt.job.key, attempt.terms.grace_s
        if self._attempts.get(key) is not attempt:
            return
        if not grace_s:
            self._forget(key)
            return
        loop = asyncio.get_running_loop()
        self._ended[key] = loop.call_later(grace_s, self._forget, key)
        if len(self._ended) > MAX_ENDED:
            self._forget(next(iter(self._ended)))

    def _forget(self, key: AttemptKey) -> None:
        attempt = self._attempts.pop(key, None)
        if timer := self._ended.pop(key, None):
            timer.cancel()
        if attempt is None:
            return
        request_id = attempt.terms.record.request_id
        keys = self._by_request[request_id]
        keys.discard(key)
        if not keys:
            del self._by_request[request_id]
