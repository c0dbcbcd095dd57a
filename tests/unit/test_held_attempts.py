"""An attempt apart from its readers: who reads it, who has it, and what a reader that is stuck does to the next one."""

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from baton.engine.base import Held
from baton.errors import (
    AbortedError,
    CancelledError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from baton.types import (
    AttemptKey,
    FinishReason,
    PositionLogprobs,
    RequestId,
    RequestRecord,
    SamplingParams,
    Sequence,
    TokenChunk,
    TokenLogprob,
)
from decode_worker.decoder import DecodeJob, JobEvent, JobFinished, JobReserved, JobTokens
from decode_worker.held import HeldAttempts, Terms

KEY = AttemptKey(RequestId("r/1"))
JOB = DecodeJob(
    key=KEY,
    sequence=Sequence((1, 2, 3), (), SamplingParams(max_tokens=100)),
    source=None,
    digest="d",
    timeout_s=60.0,
)


def terms(grace_s: float = 10.0) -> Terms:
    return Terms(record=RequestRecord(request_id="r", deadline_unix_s=0.0), grace_s=grace_s)


class Script:
    """The events of a job, one for each `step`."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._steps: asyncio.Queue[None] = asyncio.Queue()

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._steps.put_nowait(None)

    async def events(self) -> AsyncGenerator[JobEvent, None]:
        yield JobReserved(0.0, 0)
        for index in range(self._tokens):
            await self._steps.get()
            yield JobTokens(TokenChunk(index, (index,)))
        yield JobFinished(FinishReason.LENGTH, 0)


class Ear:
    """A reader that writes down what it hears."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.finished = False
        self.heard = asyncio.Event()

    async def write(self, event: JobEvent) -> None:
        if isinstance(event, JobTokens):
            self.tokens += event.chunk.token_ids
        self.finished |= isinstance(event, JobFinished)
        self.heard.set()


@pytest.mark.parametrize("from_index", [None, 0], ids=["in the attempt's task", "catching up"])
async def test_a_reader_that_is_stuck_does_not_hold_up_the_next_one(
    from_index: int | None,
) -> None:
    """Promise: a router that froze, with its flow-control window full, costs the router that attaches nothing."""
    attempts, script, stuck, ear = HeldAttempts(), Script(5), asyncio.Event(), Ear()

    async def freeze(event: JobEvent) -> None:
        if isinstance(event, JobTokens):
            stuck.set()
            await asyncio.Event().wait()

    attempt = attempts.start(JOB, terms(), script.events())
    if from_index is not None:
        script.step(3)
    first = asyncio.create_task(attempt.read(freeze, "one", from_index))
    if from_index is None:
        await asyncio.sleep(0)
        script.step(3)
    await stuck.wait()
    second = asyncio.create_task(attempt.read(ear.write, "two", 0))
    script.step(2)
    async with asyncio.timeout(5):
        await second
        with pytest.raises(AbortedError):
            await first
    assert ear.tokens == [0, 1, 2, 3, 4]
    assert ear.finished
    await attempts.close()


async def test_an_unread_attempt_goes_on_and_is_read_again_from_anywhere() -> None:
    attempts, script, ear = HeldAttempts(), Script(4), Ear()
    attempt = attempts.start(JOB, terms(), script.events())
    reading = asyncio.create_task(attempt.read(ear.write, "one", 0))
    script.step(2)
    while len(ear.tokens) < 2:
        ear.heard.clear()
        await ear.heard.wait()
    reading.cancel()
    await asyncio.wait({reading})
    script.step(2)
    await asyncio.wait({attempt.task}, timeout=5)
    (found,) = attempts.find("r", "")
    assert (found.end_index, found.failed) == (4, False)
    late = Ear()
    await found.read(late.write, "two", 1)
    assert (late.tokens, late.finished) == ([1, 2, 3], True)
    await attempts.close()


@pytest.mark.parametrize("next_index", [1, 5])
async def test_tokens_that_it_does_not_know_are_refused_and_disturb_no_reader(
    next_index: int,
) -> None:
    """An attempt that went on after two tokens knows neither those nor tokens to come."""
    attempts, ear = HeldAttempts(), Ear()

    async def events() -> AsyncGenerator[JobEvent, None]:
        yield JobTokens(TokenChunk(2, (2, 3)))
        await asyncio.Event().wait()

    job = replace(JOB, sequence=replace(JOB.sequence, generated=(0, 1)))
    attempt = attempts.start(job, terms(), events())
    reading = asyncio.create_task(attempt.read(ear.write, "one", 2))
    await asyncio.wait_for(ear.heard.wait(), 5)
    with pytest.raises(PreconditionError):
        await attempt.read(Ear().write, "two", next_index)
    assert (attempt.holder, ear.tokens) == ("one", [2, 3])
    assert not reading.done()
    await attempts.close()
    await asyncio.gather(reading, return_exceptions=True)


async def test_only_the_holder_releases_and_what_is_released_cannot_begin() -> None:
    attempts, script = HeldAttempts(), Script(1)
    attempt = attempts.start(JOB, terms(), script.events())
    reading = asyncio.create_task(attempt.read(Ear().write, "one", 0))
    await asyncio.sleep(0)
    assert not await attempts.release(KEY, "another")
    assert await attempts.release(KEY, "one")
    with pytest.raises(CancelledError):
        await reading
    with pytest.raises(NotFoundError):
        attempts.get(KEY)
    assert not await attempts.release(KEY, "one")
    with pytest.raises(CancelledError):
        attempts.start(JOB, terms(), script.events())


async def test_nobody_comes_and_the_grace_ends_it() -> None:
    attempts, script = HeldAttempts(), Script(1)
    attempt = attempts.start(JOB, terms(grace_s=0.05), script.events())
    reading = asyncio.create_task(attempt.read(Ear().write, "one", 0))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({attempt.task}, timeout=5)
    assert attempt.task.cancelled()
    async with asyncio.timeout(5):
        while attempts.find("r", ""):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_who_comes_after_the_grace_is_told_so() -> None:
    """Promise: a router that attaches too late gets an error that it can act on, not a cancellation, which it would take for its own."""
    attempts, script = HeldAttempts(), Script(1)
    attempt = attempts.start(JOB, terms(grace_s=0.05), script.events())
    reading = asyncio.create_task(attempt.read(Ear().write, "one", 0))
    await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({attempt.task}, timeout=5)
    with pytest.raises(UnavailableError, match="read by nobody"):
        await attempt.read(Ear().write, "two", 0)
    await attempts.close()


async def test_a_reader_that_attaches_while_a_stuck_write_ends_is_served() -> None:
    """Promise: a call that broke in the middle of a write, which takes its time to end, costs the next reader nothing."""
    attempts, script, ear = HeldAttempts(), Script(3), Ear()
    stuck, ending, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def freeze(event: JobEvent) -> None:
        if isinstance(event, JobTokens):
            stuck.set()
            try:
                await asyncio.Event().wait()
            finally:
                ending.set()
                await may_end.wait()

    attempt = attempts.start(JOB, terms(), script.events())
    first = asyncio.create_task(attempt.read(freeze, "one", None))
    await asyncio.sleep(0)
    script.step(3)
    async with asyncio.timeout(5):
        await stuck.wait()
        first.cancel()
        await ending.wait()
        second = asyncio.create_task(attempt.read(ear.write, "two", 0))
        await asyncio.sleep(0)
        may_end.set()
        await second
    assert (ear.tokens, ear.finished) == ([0, 1, 2], True)
    await attempts.close()


async def test_an_attempts_successor_gets_the_log_probabilities_that_belong_to_its_newest_token() -> (
    None
):
    """Promise: also where a slow reader keeps the attempt from telling its last tokens until after it was stopped."""
    attempts, written = HeldAttempts(), asyncio.Event()
    is_read, may_write = asyncio.Event(), asyncio.Event()

    async def events() -> AsyncGenerator[JobEvent, None]:
        await is_read.wait()
        for index, token in enumerate((7, 8)):
            logprob = PositionLogprobs(TokenLogprob(token, -1.0), ())
            yield JobTokens(TokenChunk(index, (token,), (logprob,)))
        await asyncio.Event().wait()

    async def write(_event: JobEvent) -> None:
        written.set()
        await may_write.wait()

    attempt = attempts.start(JOB, terms(), events())
    reading = asyncio.create_task(attempt.read(write, "one", None))
    await asyncio.sleep(0)
    is_read.set()
    async with asyncio.timeout(5):
        await written.wait()
        attempt.stop_at(Held(2, 8))
        ready = attempt.stopped_at()
        assert (ready.first_token, ready.logprobs) == (8, None)
        may_write.set()
        while attempt.end_index < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
    ready = attempt.stopped_at()
    assert ready.logprobs == PositionLogprobs(TokenLogprob(8, -1.0), ())
    reading.cancel()
    await attempts.close()
