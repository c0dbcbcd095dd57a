"""Workers come and go while the router runs, and requests notice no more of it than they must."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest

from baton import codec
from baton.errors import BatonError, InvalidRequestError, PreconditionError, UnavailableError
from baton.kv.prefix import block_hashes
from baton.service.status import error_from_rpc
from baton.types import PrefixDelta, Role, WorkerId, WorkerInfo
from baton.v1 import fleet_pb2, inference_pb2
from tests.integration.router_fakes import PROMPT, SPEC, FakeWorker, Handoffs, cluster, expected


async def test_without_workers_a_request_is_unavailable_after_a_bounded_wait() -> None:
    async with cluster(worker_wait_s=0.3) as here:
        began_s = time.monotonic()
        with pytest.raises(UnavailableError):
            await here.generate()
        assert 0.25 < time.monotonic() - began_s < 1.5


async def test_without_a_decode_worker_a_request_is_unavailable_and_says_why() -> None:
    async with cluster(worker_wait_s=0.3) as here:
        await here.prefill("p")
        with pytest.raises(UnavailableError, match="no decode worker has joined"):
            await here.generate()


async def test_a_worker_that_joins_while_a_request_waits_takes_it() -> None:
    async with cluster(worker_wait_s=5.0) as here:
        running = asyncio.create_task(here.generate())
        await asyncio.sleep(0.1)
        await here.decode("d")
        assert (await running).tokens == expected(PROMPT, 10)


async def test_a_stopped_worker_is_avoided_before_its_lease_ends() -> None:
    """Promise: a process that is stopped says nothing of its health; two heartbeats that did not come say it."""
    async with cluster(heartbeat_s=0.5, lease_s=10.0) as here:
        stopped, other = await here.decode("d1"), await here.decode("d2")
        stopped.frozen = True
        fleet = here.app.fleet.registry

        def avoided() -> list[bool]:
            return [worker.suspect for worker in fleet.view({}, time.monotonic()).decode]

        await here.until(lambda: avoided() == [True, False])
        for _ in range(4):
            assert (await here.generate()).tokens == expected(PROMPT, 10)
        assert (len(stopped.keys), len(other.keys)) == (0, 4)
        stopped.frozen = False
        await here.until(lambda: avoided() == [False, False])


async def test_nothing_but_the_role_of_a_member_can_change() -> None:
    async with cluster() as here:
        worker = await here.decode("d")
        call: Any = here.fleet.Join()
        for info in (
            replace(worker.info, worker_id=WorkerId("x")),
            replace(worker.info, worker_id=WorkerId("x"), role=Role.PREFILL),
            replace(worker.info, worker_id=WorkerId("x"), num_blocks=1),
        ):
            announce = fleet_pb2.JoinRequest.Announce(info=codec.worker_info_to_proto(info))
            await call.write(fleet_pb2.JoinRequest(announce=announce))
            if info.role is Role.PREFILL:
                await here.until(lambda: here.app.fleet.registry.infos()[-1].role is Role.PREFILL)
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert isinstance(error_from_rpc(refused.value), InvalidRequestError)
        await here.until(lambda: here.members == ["d"])


async def test_nothing_is_placed_on_a_draining_worker_and_what_runs_there_goes_on() -> None:
    async with cluster() as here:
        goes_on = asyncio.Event()
        first = await here.decode("d1")

        async def script(stage: str) -> None:
            if stage == "token:4":
                await goes_on.wait()

        first.script = script
        running = asyncio.create_task(here.generate())
        await here.until(lambda: first.running == 1)
        first.draining = True
        second = await here.decode("d2")
        await asyncio.sleep(0.2)
        for _ in range(4):
            assert (await here.generate()).tokens == expected(PROMPT, 10)
        assert (len(first.keys), len(second.keys)) == (1, 4)
        goes_on.set()
        answer = await running
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == []


async def test_a_request_waits_while_the_only_decode_worker_drains() -> None:
    async with cluster(worker_wait_s=0.3) as here:
        worker = await here.decode("d")
        worker.draining = True
        await asyncio.sleep(0.2)
        with pytest.raises(UnavailableError, match="draining"):
            await here.generate()
        worker.draining = False
        running = asyncio.create_task(here.generate())
        assert (await running).tokens == expected(PROMPT, 10)


async def test_requests_spread_over_the_workers() -> None:
    async with cluster() as here:
        workers = [await here.decode(f"d{number}") for number in range(3)]
        await asyncio.gather(*(here.generate() for _ in range(9)))
        assert [len(worker.keys) for worker in workers] == [3, 3, 3]


async def test_a_request_goes_where_its_prefix_is_cached() -> None:
    async with cluster() as here:
        workers = [await here.prefill(f"p{number}") for number in range(3)]
        await here.decode("d")
        workers[1].prefix = PrefixDelta(stored=tuple(block_hashes(PROMPT, 16)))
        await asyncio.sleep(0.2)
        for _ in range(4):
            await here.generate()
        assert [len(worker.keys) for worker in workers] == [0, 4, 0]


async def test_a_pair_of_different_kv_digests_is_never_formed() -> None:
    async with cluster() as here:
        other = replace(SPEC, model_fingerprint="other")
        stranger = await here.add(Role.PREFILL, "p1", spec=other)
        await here.decode("d1")
        for _ in range(3):
            assert (await here.generate()).tokens == expected(PROMPT, 10)
        assert stranger.keys == []


async def test_a_silent_worker_is_out_after_its_lease_and_may_come_back() -> None:
    async with cluster(lease_s=0.4) as here:
        worker = await here.decode("d")
        worker.frozen = True
        await here.until(lambda: here.members == [], 2.0)
        again = FakeWorker(Role.DECODE, "d", here.handoffs)
        await again.start(here.address)
        here.workers.append(again)
        await here.until(lambda: here.members == ["d"])
        assert (await here.generate()).tokens == expected(PROMPT, 10)
        assert again.keys


async def test_a_worker_that_joins_anew_replaces_its_former_self() -> None:
    """The former connection may still look alive; its attempts go on elsewhere."""
    async with cluster() as here:
        hangs = asyncio.Event()
        former = await here.decode("d")

        async def hang(stage: str) -> None:
            if stage == "token:4":
                hangs.set()
                await asyncio.Event().wait()

        former.script = hang
        running = asyncio.create_task(here.generate())
        await hangs.wait()
        latter = await FakeWorker(Role.DECODE, "d", here.handoffs).start(here.address)
        here.workers.append(latter)
        answer = await running
        assert answer.tokens == expected(PROMPT, 10)
        assert latter.keys
        await former.stop()
        await asyncio.sleep(0.1)
        assert here.members == ["d"], "the end of the former stream does not end the latter"


async def test_a_worker_of_another_model_is_refused() -> None:
    async with cluster(model_name="mine") as here:
        worker = FakeWorker(Role.DECODE, "d", Handoffs())
        await worker.start(here.address)
        try:
            error = await _join(here.fleet, worker.info)
            assert isinstance(error, PreconditionError)
            assert here.members == []
        finally:
            await worker.stop()


async def test_the_first_worker_names_the_model_where_the_settings_do_not() -> None:
    async with cluster() as here:
        worker = await here.decode("d")
        error = await _join(here.fleet, replace(worker.info, model="another"))
        assert isinstance(error, PreconditionError)
        assert here.members == ["d"]


@pytest.mark.parametrize(
    "message",
    [
        fleet_pb2.JoinRequest(heartbeat=fleet_pb2.JoinRequest.Heartbeat()),
        fleet_pb2.JoinRequest(announce=fleet_pb2.JoinRequest.Announce()),
        fleet_pb2.JoinRequest(),
    ],
    ids=["a heartbeat first", "an empty announcement", "nothing"],
)
async def test_a_malformed_announcement_is_refused(message: fleet_pb2.JoinRequest) -> None:
    async with cluster() as here:
        assert isinstance(await _refusal(here.fleet.Join(), message), InvalidRequestError)
        assert here.members == []


async def test_a_worker_that_leaves_is_gone_at_once() -> None:
    async with cluster(lease_s=30.0) as here:
        worker = await here.decode("d")
        await worker.stop()
        await here.until(lambda: here.members == [], 1.0)


async def test_the_model_is_described_as_its_workers_announce_it() -> None:
    async with cluster() as here:
        empty = await here.inference.GetModel(inference_pb2.GetModelRequest(), timeout=5)
        assert (empty.model, list(empty.workers)) == ("", [])
        prefill, decode = await here.prefill("p"), await here.decode("d")
        model = await here.inference.GetModel(
            inference_pb2.GetModelRequest(model="fake"), timeout=5
        )
        assert model.model == "fake"
        assert model.fingerprint == "fake"
        assert model.dtype == "float32"
        assert (model.vocab_size, model.max_context_tokens) == (256, 4096)
        assert list(model.eos_token_ids) == [0]
        assert [codec.worker_info_from_proto(info) for info in model.workers] == [
            prefill.info,
            decode.info,
        ]
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await here.inference.GetModel(inference_pb2.GetModelRequest(model="x"), timeout=5)
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_metrics_count_members_requests_and_attempts() -> None:
    async with cluster() as here:
        await here.prefill("p")
        await here.decode("d")
        await here.generate()
        read = here.app.metrics.registry.get_sample_value
        await here.until(lambda: read("baton_requests_total", {"outcome": "ok"}) == 1)
        assert read("baton_workers", {"role": "decode", "state": "ready"}) == 1
        assert (
            read("baton_attempts_total", {"outcome": "ok", "reason": "ok", "stage": "decode"}) == 1
        )
        assert read("baton_completion_tokens_total") == 10
        assert read("baton_time_to_first_token_seconds_count") == 1
        assert read("baton_running_requests") == 0


async def _join(fleet: Any, info: WorkerInfo) -> BatonError | None:
    announce = fleet_pb2.JoinRequest.Announce(info=codec.worker_info_to_proto(info))
    return await _refusal(fleet.Join(), fleet_pb2.JoinRequest(announce=announce))


async def _refusal(call: Any, message: fleet_pb2.JoinRequest) -> BatonError | None:
    """How a membership that begins with this message ends."""
    try:
        await call.write(message)
        while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
            pass
    except grpc.aio.AioRpcError as error:
        return error_from_rpc(error)
    except asyncio.InvalidStateError:
        return None
    finally:
        call.cancel()
    return None


async def test_tokens_that_no_worker_joins_rest_at_the_router() -> None:
    """Promise: calls without a tunnel make no more messages to clients than were asked for."""
    async with cluster(client_messages_per_s=1.0) as here:
        await here.prefill("p")
        decode = await here.decode("d")

        async def slowly(stage: str) -> None:
            if stage.startswith("token:"):
                await asyncio.sleep(0.01)

        decode.script = slowly
        messages = [response async for response in here.call(None)]
    chunks = [each.chunk.tokens.token_ids for each in messages if each.HasField("chunk")]
    assert [token for chunk in chunks for token in chunk] == expected(PROMPT, 10)
    assert len(chunks) <= 6
