"""What an attempt does with the words of its workers: at once, in whoever's turn they come."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

import pytest

from baton.errors import UnavailableError
from baton.lifecycle import Timeline
from baton.types import (
    AttemptKey,
    FinishReason,
    RequestId,
    RequestRecord,
    SamplingParams,
    Sequence,
    TokenChunk,
)
from baton.v1 import common_pb2, decode_pb2
from router.attempt import Attempt
from router.attempt_calls import Terms
from router.members import Member, Pair, Watch
from router.streams import Broken, Follower
from router.tunnel import TunnelledCall
from tests.unit.test_fleet_place import decode_worker

RESERVED = decode_pb2.DecodeResponse(reserved=decode_pb2.DecodeResponse.Reserved())
KV = decode_pb2.DecodeResponse(kv_received=decode_pb2.DecodeResponse.KvReceived())
TOKEN = decode_pb2.DecodeResponse(tokens=common_pb2.TokenChunk(first_index=0, token_ids=[7]))
FINISHED = decode_pb2.DecodeResponse(
    finished=decode_pb2.DecodeResponse.Finished(reason=common_pb2.FINISH_REASON_LENGTH)
)


class Call:
    """A call whose worker says what the test has it say."""

    def __init__(self) -> None:
        self.cancelled = False

    rests = False

    def follow(self, follower: Follower) -> None:
        self.say, self.end, self.err = follower

    def cancel(self) -> None:
        self.cancelled = True


class Decode:
    """The part of a member that an attempt uses."""

    def __init__(self) -> None:
        self.info = decode_worker("d")
        self.worker_id = self.info.worker_id
        self.call = Call()
        self.released = False
        self.draining = False

    def call_decode(self, *_: object) -> Call:
        return self.call

    def release_decode(self, *_: object) -> None:
        self.released = True

    async def hand_over(self, *_: object) -> int:
        return 1

    def watch(self, watch: Watch) -> None:
        self.watched = watch

    def unwatch(self, _: object) -> None: ...


@dataclass
class Running:
    """An attempt that has called its worker, and what it told of the output."""

    attempt: Attempt
    task: asyncio.Task[None]
    decode: Decode
    told: list[object] = field(default_factory=list)
    enough: bool = False
    """Whether the sink wants no more."""


@asynccontextmanager
async def running(*, elsewhere: bool = False) -> AsyncIterator[Running]:
    decode = Decode()

    def put(chunk: TokenChunk) -> bool:
        here.told.append(chunk.token_ids)
        return here.enough

    attempt = Attempt(
        AttemptKey(RequestId("r"), 0),
        Sequence((1, 2, 3), (), SamplingParams(max_tokens=1)),
        Pair(None, cast("Member", decode)),
        sink=put,
        on_finished=lambda: here.told.append("finished"),
        timeline=Timeline(received_s=0.0),
        deadline_s=time.monotonic() + 60,
        terms=Terms(
            record=RequestRecord(request_id="r", deadline_unix_s=0.0), grace_s=0.0, holder="h"
        ),
        elsewhere=lambda: elsewhere,
    )
    here = Running(attempt, asyncio.create_task(attempt.run()), decode)
    await asyncio.sleep(0)
    try:
        yield here
    finally:
        here.task.cancel()
        await asyncio.gather(here.task, return_exceptions=True)


async def test_the_output_is_finished_before_anybody_else_has_a_turn() -> None:
    """So that who takes the last tokens finds the rest of the text with them. A call that is told to its end is let be: its worker
    ends it, and need not hear that.
    """
    async with running() as here:
        for response in (RESERVED, KV, TOKEN, FINISHED):
            here.decode.call.say(response)
        assert here.told == [(7,), "finished"]
        await here.task
        assert here.attempt.finish_reason is FinishReason.LENGTH
        assert not here.decode.call.cancelled
        assert not here.decode.released


async def test_a_call_that_has_more_to_say_is_cancelled_and_its_worker_freed() -> None:
    async with running() as here:
        here.enough = True
        for response in (RESERVED, KV, TOKEN):
            here.decode.call.say(response)
        await here.task
        assert here.told == [(7,)]
        assert here.decode.call.cancelled
        assert here.decode.released


async def test_a_broken_call_is_a_failure_of_its_worker() -> None:
    async with running() as here:
        here.decode.call.end(Broken(UnavailableError("gone"), from_worker=False))
        await here.task
        assert here.attempt.failure is not None
        assert here.attempt.failure.blame == here.decode.worker_id
        assert here.decode.released


async def test_what_the_router_cannot_use_frees_the_worker_that_said_it() -> None:
    """An event of a newer release, say: the worker does not know that nobody listens any more."""
    async with running() as here:
        parsed: list[decode_pb2.DecodeResponse] = [decode_pb2.DecodeResponse()]
        call = TunnelledCall(lambda _: parsed.pop(), lambda: None)
        call.follow(Follower(here.decode.call.say, here.decode.call.end, here.decode.call.err))
        call.deliver(b"")
        await here.task
        assert here.attempt.failure is not None
        assert here.attempt.failure.blame == here.decode.worker_id
        assert here.decode.released


async def test_an_end_that_leaves_out_a_token_is_a_failure_at_once() -> None:
    late = decode_pb2.DecodeResponse(tokens=common_pb2.TokenChunk(first_index=1, token_ids=[8]))
    async with running() as here:
        for response in (RESERVED, KV, late, FINISHED):
            here.decode.call.say(response)
        await asyncio.wait_for(here.task, 5)
        assert here.attempt.failure is not None
        assert here.attempt.failure.blame == here.decode.worker_id


@pytest.mark.parametrize("cancelled", [False, True])
async def test_kv_that_moves_on_is_kept_for_the_next_attempt_unless_there_is_none(
    *, cancelled: bool
) -> None:
    async with running(elsewhere=True) as here:
        for response in (RESERVED, KV, TOKEN):
            here.decode.call.say(response)
        here.decode.draining = True
        here.decode.watched.on_draining()
        await asyncio.sleep(0)
        assert here.attempt.left is not None
        assert not here.task.done()
        if cancelled:
            here.task.cancel()
        await asyncio.gather(here.task, return_exceptions=True)
        assert here.task.cancelled() == cancelled
        assert here.decode.released == cancelled


async def test_a_bug_ends_the_attempt_and_frees_its_worker() -> None:
    """It is no failure that another attempt could recover from."""
    async with running() as here:
        here.decode.call.err(ZeroDivisionError())
        with pytest.raises(ExceptionGroup) as raised:
            await here.task
        assert raised.group_contains(ZeroDivisionError)
        assert here.decode.call.cancelled
        assert here.decode.released
