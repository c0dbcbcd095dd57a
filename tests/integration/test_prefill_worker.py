"""The prefill worker alone: readiness, pulls, release, drain, health."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.codec import key_to_proto, worker_info_from_proto
from baton.engine.aio import AsyncEngine
from baton.engine.base import Engine
from baton.engine.sim import build_sim_engine
from baton.errors import (
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    ModelLoadError,
    PreconditionError,
    UnavailableError,
)
from baton.service.settings import WorkerSettings
from baton.transfer.base import KVMeta, PullRequest, Ready, Refused
from baton.types import AttemptKey, Role
from baton.v1 import prefill_pb2
from prefill_worker.worker import PrefillWorker
from tests.worker_rig import SIM, Rig, error_of, key, sequence, worker_pair

SERVICE = "baton.v1.PrefillService"


def pull_request(rig: Rig, attempt: AttemptKey, first: int, last: int) -> PullRequest:
    return PullRequest(key=attempt, first=first, last=last, digest=rig.digest)


async def until_computed(call: Any) -> None:
    while (await call.read()).WhichOneof("event") != "first_token":
        pass


async def health(rig: Rig, service: str) -> str:
    stub = health_pb2_grpc.HealthStub(rig.prefill_channel)
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def until_health(rig: Rig, service: str, expected: str) -> None:
    async with asyncio.timeout(2):
        while await health(rig, service) != expected:  # noqa: ASYNC110 - its call is how it is asked
            await asyncio.sleep(0.05)


async def test_ready_may_be_asked_before_the_prefill_call_arrives() -> None:
    async with worker_pair() as rig:
        waiting = asyncio.create_task(rig.prefill.ready(key("a"), 5))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        call = rig.prefill_call(key("a"), sequence(40))
        ready = await waiting
        assert isinstance(ready, Ready)
        first = None
        while first is None:
            event = await call.read()
            first = event.first_token.token if event.HasField("first_token") else None
        assert list(first.token_ids) == [ready.first_token]
        call.cancel()
        await rig.settled()


async def test_ready_is_refused_after_its_timeout() -> None:
    async with worker_pair() as rig:
        refused = await rig.prefill.ready(key("never"), 0.05)
        assert isinstance(refused, Refused)
        assert refused.reason == DeadlineError.reason
        await rig.settled()


async def test_the_call_ends_with_handed_once_the_last_token_is_pulled() -> None:
    async with worker_pair() as rig:
        call = rig.prefill_call(key("a"), sequence(40), skip=16)
        await until_computed(call)
        for first, last in ((16, 30), (30, 40)):
            meta, kv = await rig.prefill.pull(pull_request(rig, key("a"), first, last))
            assert isinstance(meta, KVMeta)
            assert kv is not None
            assert kv.shape[2] == last - first
        handed = await call.read()
        assert handed.handed.kv_bytes == 24 * 16
        assert not await call.read()
        meta, kv = await rig.prefill.pull(pull_request(rig, key("a"), 0, 40))
        assert isinstance(meta, Refused)
        assert (meta.reason, kv) == (PreconditionError.reason, None)
        await rig.settled()


async def test_nothing_is_waited_for_where_decode_holds_everything() -> None:
    async with worker_pair() as rig:
        call = rig.prefill_call(key("a"), sequence(40), skip=40)
        await until_computed(call)
        assert (await call.read()).HasField("handed")
        await rig.settled()


@pytest.mark.parametrize(("first", "last"), [(0, 41), (10, 10), (-1, 5), (20, 10)])
async def test_a_pull_of_tokens_that_are_not_there_is_refused(first: int, last: int) -> None:
    async with worker_pair() as rig:
        call = rig.prefill_call(key("a"), sequence(40))
        await until_computed(call)
        meta, kv = await rig.prefill.pull(pull_request(rig, key("a"), first, last))
        assert isinstance(meta, Refused)
        assert kv is None
        call.cancel()
        await rig.settled()


async def test_a_pull_for_another_model_or_before_its_time_is_refused() -> None:
    async with worker_pair(prefill_sim=replace(SIM, step_s=0.05)) as rig:
        call = rig.prefill_call(key("a"), sequence(100))
        await call.read()
        early, _ = await rig.prefill.pull(pull_request(rig, key("a"), 0, 10))
        assert isinstance(early, Refused)
        await until_computed(call)
        other = replace(pull_request(rig, key("a"), 0, 10), digest="0" * 32)
        foreign, _ = await rig.prefill.pull(other)
        assert isinstance(foreign, Refused)
        assert foreign.reason == PreconditionError.reason
        stale, _ = await rig.prefill.pull(pull_request(rig, key("a", 1), 0, 10))
        assert isinstance(stale, Refused)
        call.cancel()
        await rig.settled()


@pytest.mark.parametrize("computed", [False, True])
async def test_release_ends_the_call_and_the_wait_of_decode(*, computed: bool) -> None:
    """A router whose Prefill call was cut off can still free what it holds, at any stage, and twice."""
    async with worker_pair(prefill_sim=replace(SIM, step_s=0.02)) as rig:
        call = rig.prefill_call(key("a"), sequence(150))
        waiting = asyncio.create_task(rig.prefill.ready(key("a"), 5))
        await call.read()
        if computed:
            await until_computed(call)
        request = prefill_pb2.ReleaseRequest(key=key_to_proto(key("a")))
        assert (await rig.prefill_stub.Release(request)).released
        assert isinstance(await error_of(call), CancelledError)
        assert isinstance(await waiting, Ready if computed else Refused)
        assert not (await rig.prefill_stub.Release(request)).released
        await rig.settled()


async def test_release_ends_a_wait_for_an_attempt_that_never_came() -> None:
    async with worker_pair() as rig:
        waiting = asyncio.create_task(rig.prefill.ready(key("a"), 5))
        await asyncio.sleep(0.01)
        request = prefill_pb2.ReleaseRequest(key=key_to_proto(key("a")))
        assert not (await rig.prefill_stub.Release(request)).released
        assert await waiting == Refused("CANCELLED", "attempt a#0 was released")
        await rig.settled()


async def test_a_request_id_can_be_used_again_once_its_call_has_ended() -> None:
    async with worker_pair() as rig:
        for _ in range(3):
            assert len((await rig.generate(key("same"), sequence(20))).tokens) == 8
        await rig.settled()


async def test_bad_requests_are_refused_by_name_and_harm_nothing() -> None:
    async with worker_pair() as rig:
        rig.digest, digest = "0" * 32, rig.digest
        assert isinstance(
            await error_of(rig.prefill_call(key("a"), sequence(20))), PreconditionError
        )
        rig.digest = digest
        for field, call in (
            ("skip_tokens", rig.prefill_call(key("b"), sequence(20), skip=21)),
            ("key.request_id", rig.prefill_call(key(""), sequence(20))),
            ("prompt", rig.prefill_call(key("c"), sequence(5000))),
            ("sequence.prompt", rig.prefill_call(key("d"), sequence(0))),
        ):
            error = await error_of(call)
            assert isinstance(error, InvalidRequestError)
            assert error.violations[0].field == field
        assert len((await rig.generate(key("good"), sequence(20))).tokens) == 8
        await rig.settled()


async def test_a_drain_waits_for_the_last_pull_and_refuses_new_calls() -> None:
    """Prefill leaves only when decode has taken what it waits for: no planned stop costs a recomputation."""
    async with worker_pair() as rig:
        call = rig.prefill_call(key("a"), sequence(40))
        await until_computed(call)
        early = asyncio.create_task(rig.prefill.ready(key("other"), 5))
        await asyncio.sleep(0.01)
        draining = asyncio.create_task(rig.prefill.drain(5))
        assert (await early) == Refused(UnavailableError.reason, "the prefill worker is draining")
        refused = await error_of(rig.prefill_call(key("b"), sequence(40)))
        assert isinstance(refused, UnavailableError)
        assert await health(rig, SERVICE) == "NOT_SERVING"
        assert await health(rig, "") == "SERVING"
        late = await rig.prefill.ready(key("later"), 5)
        assert isinstance(late, Refused)
        assert not draining.done()
        await rig.prefill.pull(pull_request(rig, key("a"), 0, 40))
        assert await draining
        assert (await call.read()).HasField("handed")


async def test_a_drain_ends_after_its_grace() -> None:
    async with worker_pair() as rig:
        call = rig.prefill_call(key("a"), sequence(40))
        await until_computed(call)
        assert not await rig.prefill.drain(0.1)
        call.cancel()
        await rig.settled()


async def test_info_tells_what_the_worker_is() -> None:
    async with worker_pair() as rig:
        answer = await rig.prefill_stub.GetInfo(prefill_pb2.PrefillServiceGetInfoRequest())
        info = worker_info_from_proto(answer.info)
        assert info == rig.prefill.host.info
        assert (info.role, info.model, info.num_blocks) == (Role.PREFILL, "sim", 64)
        assert answer.load.free_blocks == 64


async def test_health_is_serving_only_while_the_engine_makes_progress() -> None:
    """Health is no promise that the process lives, but that requests get on."""
    settings = WorkerSettings(stall_limit_s=0.1)
    slow = replace(SIM, step_s=2.5)
    async with worker_pair(prefill_sim=slow, settings=settings) as rig:
        assert await health(rig, SERVICE) == "SERVING"
        call = rig.prefill_call(key("a"), sequence(20))
        await until_health(rig, SERVICE, "NOT_SERVING")
        await until_health(rig, "", "NOT_SERVING")
        await until_computed(call)
        await until_health(rig, SERVICE, "SERVING")


async def test_an_engine_that_hangs_ends_its_calls() -> None:
    """Promise: a wedged engine is an error in bounded time, so that its requests go on elsewhere."""
    settings = WorkerSettings(stall_limit_s=0.1, hang_limit_s=0.3)
    async with worker_pair(prefill_sim=replace(SIM, step_s=3.0), settings=settings) as rig:
        began_s = time.monotonic()
        error = await error_of(rig.prefill_call(key("a"), sequence(20)))
        assert isinstance(error, InternalError)
        assert time.monotonic() - began_s < 2.0
        assert rig.prefill.host.engine.failed


async def test_a_worker_whose_model_does_not_load_says_so_and_leaves_nothing_running() -> None:
    def build() -> Engine:
        raise ModelLoadError("/models/x/config.json", "is not JSON")

    worker = PrefillWorker(WorkerSettings(), AsyncEngine(build, name="bad"))
    with pytest.raises(ModelLoadError, match="is not JSON"):
        await worker.start()
    await worker.stop()


async def test_calls_before_the_model_is_loaded_are_refused_as_unavailable() -> None:
    release = asyncio.Event()
    loop = asyncio.get_running_loop()

    def build() -> Engine:
        asyncio.run_coroutine_threadsafe(release.wait(), loop).result(5)
        return build_sim_engine(SIM)

    worker = PrefillWorker(WorkerSettings(port=0), AsyncEngine(build, name="slow"))
    starting = asyncio.create_task(worker.start())
    async with asyncio.timeout(5):
        while not worker.host.port:  # noqa: ASYNC110 - a port is no event
            await asyncio.sleep(0.01)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{worker.host.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        raw = channel.unary_unary(
            f"/{SERVICE}/GetInfo",
            request_serializer=bytes,
            response_deserializer=prefill_pb2.PrefillServiceGetInfoResponse.FromString,
        )
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await raw(b"")
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
    release.set()
    await starting
    await worker.stop()
