"""Decode waits for a prompt that a router asked it to take, and the router is lost before it calls prefill, or after."""

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from baton.codec import chunk_from_proto, key_to_proto
from baton.errors import AbortedError, PreconditionError
from baton.v1 import decode_pb2
from decode_worker.arrival import ARRIVAL_S
from tests.worker_rig import SIM, Rig, error_of, is_idle, key, sequence, worker_pair

GRACE_S = 20.0
"""Longer than a test lasts: what ends here, ends for another reason."""


async def reserved(rig: Rig, name: str) -> Any:
    """A router's Decode call that holds its blocks, and waits for prefill."""
    call = rig.decode_call(key(name), sequence(100), grace_s=GRACE_S)
    assert (await call.read()).WhichOneof("event") == "reserved"
    return call


def attach(rig: Rig, name: str) -> Any:
    """Another router's call."""
    request = decode_pb2.DecodeServiceAttachRequest(
        key=key_to_proto(key(name)), next_index=0, holder="another"
    )
    return rig.decode_stub.Attach(request, timeout=20)


async def test_blocks_of_a_router_that_died_before_it_called_prefill_are_free_soon() -> None:
    """Promise: nothing waits for a call that cannot come any more, though the attempt could outlive its reader for long."""
    async with worker_pair() as rig:
        call = await reserved(rig, "a")
        await asyncio.sleep(2 * ARRIVAL_S)
        assert not is_idle(await rig.decode.host.engine.refresh_load()), "its router is there"
        call.cancel()
        await rig.settled(timeout_s=ARRIVAL_S + 1.0)


async def test_who_attaches_to_an_attempt_that_prefill_never_heard_of_is_told_so_soon() -> None:
    """Promise: its router froze, or is cut off, between its two calls: the next one can begin anew at once."""
    async with worker_pair() as rig:
        first = await reserved(rig, "a")
        refused, replaced = await asyncio.gather(
            error_of(attach(rig, "a")), error_of(first), return_exceptions=True
        )
        assert isinstance(refused, PreconditionError)
        assert isinstance(replaced, AbortedError)
        await rig.settled()


@pytest.mark.parametrize("late_s", [0.0, ARRIVAL_S / 2])
async def test_who_attaches_while_prefill_computes_gets_every_token(late_s: float) -> None:
    """Promise: a frozen router's call to prefill counts, also where it comes a little later, and however long prefill takes."""
    async with worker_pair(prefill_sim=replace(SIM, step_s=0.3)) as rig:
        wanted = (await rig.generate_locally(key("w"), sequence(100))).tokens
        await reserved(rig, "a")
        reader = attach(rig, "a")
        reading = asyncio.create_task(tokens_of(reader))
        await asyncio.sleep(late_s)
        prefill = rig.prefill_call(key("a"), sequence(100))
        assert await reading == wanted
        prefill.cancel()
        await rig.settled()


async def tokens_of(call: Any) -> list[int]:
    tokens: list[int] = []
    async for response in call:
        if response.HasField("tokens"):
            tokens += chunk_from_proto(response.tokens).token_ids
    return tokens
