"""The decode worker alone: prompts it computes itself, bad requests, drain, slow readers, preemption."""

import asyncio
import math
from dataclasses import replace

import grpc
import pytest

from baton.codec import key_to_proto, worker_info_from_proto
from baton.errors import DeadlineError, InvalidRequestError, PreconditionError, UnavailableError
from baton.service.settings import WorkerSettings
from baton.service.status import error_from_rpc
from baton.types import Role
from baton.v1 import decode_pb2
from tests.worker_rig import SIM, Rig, error_of, key, sequence, worker_pair


async def metrics_of(rig: Rig) -> str:
    """The decode worker's exposition."""
    host, port = rig.decode.host.info.metrics_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    await writer.wait_closed()
    return text


async def test_without_a_source_decode_computes_the_prompt_itself() -> None:
    async with worker_pair() as rig:
        answer = await rig.generate_locally(key("a"), sequence(50, max_tokens=9))
        assert len(answer.tokens) == 9
        assert answer.decode_events[:2] == ["reserved", "kv_received"]
        assert answer.decode_events[-1] == "finished"
        again = await rig.generate_locally(key("b"), sequence(50, max_tokens=9))
        assert again.tokens == answer.tokens
        await rig.settled()


async def test_tokens_of_a_step_travel_in_one_message() -> None:
    async with worker_pair(decode_sim=replace(SIM, step_s=0.02)) as rig:
        answer = await rig.generate_locally(key("a"), sequence(10, max_tokens=6))
        assert answer.decode_events.count("tokens") == 6


async def test_a_reader_that_falls_behind_gets_its_tokens_in_larger_messages() -> None:
    async with worker_pair(decode_sim=replace(SIM, num_blocks=256)) as rig:
        call = rig.decode_call(key("a"), sequence(10, max_tokens=2000), local=True)
        await call.read()
        await asyncio.sleep(0.5)
        chunks = []
        while True:
            event = await call.read()
            if event.HasField("finished"):
                break
            chunks.append(len(event.tokens.token_ids))
        assert sum(chunks) == 2000
        assert max(chunks) > 1
        await rig.settled()


async def test_a_preempted_request_ends_with_the_same_tokens_and_says_so() -> None:
    """Running out of blocks costs time, never a token."""
    tight = replace(SIM, num_blocks=10, prefix_cache=False, step_s=0.005)
    async with worker_pair() as rig:
        jobs = [sequence(40, max_tokens=60, start=i) for i in range(3)]
        wanted = [await rig.generate_locally(key(f"w{i}"), job) for i, job in enumerate(jobs)]
    async with worker_pair(decode_sim=tight) as rig:
        got = await asyncio.gather(
            *(rig.generate_locally(key(f"g{i}"), job) for i, job in enumerate(jobs))
        )
        assert [g.tokens for g in got] == [w.tokens for w in wanted]
        text = await metrics_of(rig)
        line = next(x for x in text.splitlines() if x.startswith("baton_worker_preemptions_total"))
        assert float(line.split()[-1]) > 0
        await rig.settled()


async def test_bad_requests_are_refused_by_name_and_harm_nothing() -> None:
    async with worker_pair() as rig:
        rig.digest, digest = "0" * 32, rig.digest
        assert isinstance(
            await error_of(rig.decode_call(key("a"), sequence(20))), PreconditionError
        )
        rig.digest = digest
        for field, call in (
            ("key.request_id", rig.decode_call(key(""), sequence(20))),
            ("prompt", rig.decode_call(key("c"), sequence(5000))),
            ("prompt", rig.decode_call(key("d"), sequence(5000), local=True)),
        ):
            error = await error_of(call)
            assert isinstance(error, InvalidRequestError)
            assert error.violations[0].field == field
        empty = decode_pb2.DecodeRequest(source=decode_pb2.KvSource(worker_id="p"))
        empty.key.request_id = "e"
        empty.sequence.prompt.append(1)
        error = await error_of(rig.decode_stub.Decode(empty))
        assert isinstance(error, InvalidRequestError)
        empty.ClearField("source")
        empty.sequence.sampling.max_tokens = empty.sequence.sampling.seed = 1
        for grace_s in (-1.0, math.inf, math.nan):
            empty.grace_seconds = grace_s
            error = await error_of(rig.decode_stub.Decode(empty))
            assert isinstance(error, InvalidRequestError)
            assert error.violations[0].field == "grace_seconds"
        assert len((await rig.generate(key("good"), sequence(20))).tokens) == 8
        await rig.settled()


async def test_a_source_that_nobody_serves_is_unavailable() -> None:
    async with worker_pair() as rig:
        rig.sources.remove("prefill-0")
        call = rig.decode_call(key("a"), sequence(20))
        assert isinstance(await error_of(call), UnavailableError)
        await rig.settled()


async def test_prefill_that_never_comes_ends_at_the_callers_deadline() -> None:
    """A wait for KV is bounded by the caller's deadline even where prefill lives and never got the request."""
    async with worker_pair() as rig:
        call = rig.decode_call(key("a"), sequence(20), timeout=0.4)
        assert isinstance(await error_of(call), DeadlineError)
        await rig.settled()


async def test_a_call_without_a_deadline_gets_the_default_one() -> None:
    async with worker_pair(settings=WorkerSettings(default_timeout_s=0.3)) as rig:
        call = rig.decode_call(key("a"), sequence(20), timeout=None)
        assert isinstance(await error_of(call), DeadlineError)
        await rig.settled()


async def test_a_drain_lets_running_requests_finish_and_refuses_new_ones() -> None:
    async with worker_pair(decode_sim=replace(SIM, step_s=0.01)) as rig:
        running = asyncio.create_task(rig.generate_locally(key("a"), sequence(20, max_tokens=40)))
        await asyncio.sleep(0.1)
        draining = asyncio.create_task(rig.decode.drain(5))
        await asyncio.sleep(0.01)
        refused = await error_of(rig.decode_call(key("b"), sequence(20)))
        assert isinstance(refused, UnavailableError)
        assert not draining.done()
        assert len((await running).tokens) == 40
        assert await draining
        await rig.settled()


async def test_stopping_ends_running_requests_with_unavailable() -> None:
    """A worker that must go at once leaves callers with a status that a router retries."""
    async with worker_pair(decode_sim=replace(SIM, step_s=0.01)) as rig:
        call = rig.decode_call(key("a"), sequence(20, max_tokens=1000), local=True)
        await call.read()
        await rig.decode.stop()
        assert isinstance(await error_of(call), UnavailableError)


async def test_info_tells_what_the_worker_is() -> None:
    async with worker_pair() as rig:
        answer = await rig.decode_stub.GetInfo(decode_pb2.DecodeServiceGetInfoRequest())
        info = worker_info_from_proto(answer.info)
        assert info == rig.decode.host.info
        assert info.role is Role.DECODE


async def test_the_block_gauges_add_up_to_the_pool() -> None:
    async with worker_pair(decode_sim=replace(SIM, step_s=0.01)) as rig:
        call = rig.decode_call(key("a"), sequence(40, max_tokens=100), local=True)
        for _ in range(5):
            await call.read()
        lines = (await metrics_of(rig)).splitlines()
        blocks = {
            line.partition('state="')[2].partition('"')[0]: float(line.split()[-1])
            for line in lines
            if line.startswith("baton_worker_kv_blocks{")
        }
        assert sum(blocks.values()) == 64
        assert blocks["used"] > 0
        call.cancel()
        await rig.settled()


@pytest.mark.parametrize("local", [True, False])
async def test_max_tokens_beyond_the_context_end_at_the_context(*, local: bool) -> None:
    small = replace(SIM, max_context_tokens=64)
    async with worker_pair(prefill_sim=small, decode_sim=small) as rig:
        seq = sequence(40, max_tokens=1000)
        generate = rig.generate_locally if local else rig.generate
        answer = await generate(key("a"), seq)
        assert len(answer.tokens) == 24
        await rig.settled()


async def test_a_handover_that_nobody_waits_for_any_more_stops_nothing() -> None:
    """Promise: a router whose patience was shorter than a step goes on reading, and gets every token."""
    slow = replace(SIM, step_s=0.3)
    async with worker_pair(decode_sim=slow) as rig:
        wanted = await rig.generate_locally(key("w"), sequence(10, max_tokens=8))
        other = asyncio.create_task(rig.generate_locally(key("o"), sequence(10, max_tokens=30)))
        call, tokens = (
            rig.decode_call(key("a"), sequence(10, max_tokens=8), local=True),
            list[int](),
        )
        asked = False
        async for response in call:
            tokens += response.tokens.token_ids
            if len(tokens) == 3 and not asked:
                asked = True
                hand_over = decode_pb2.HandOverRequest(key=key_to_proto(key("a")))
                # The engine stops it after the step that has just begun, and says so after the one that follows.
                with pytest.raises(grpc.RpcError) as refused:
                    await rig.decode_stub.HandOver(hand_over, timeout=1.1 * slow.step_s)
                assert isinstance(error_from_rpc(refused.value), DeadlineError)
        assert tokens == wanted.tokens
        other.cancel()
        await asyncio.gather(other, return_exceptions=True)
        await rig.settled()
