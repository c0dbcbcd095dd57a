"""Workers turn from prefill to decode and back while they serve, as operators and routers tell them to."""

import asyncio
import random
from functools import partial

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import InvalidRequestError, PreconditionError, UnavailableError
from baton.service.status import error_from_rpc
from baton.types import Role
from baton.v1 import worker_pb2, worker_pb2_grpc
from tests.integration.flex_house import FlexHouse, flex_house
from tests.worker_rig import error_of, key, sequence, worker_pair

PREFILL, DECODE = Role.PREFILL, Role.DECODE
ROLES = {"a": PREFILL, "b": PREFILL, "c": DECODE, "d": DECODE}
LENGTH = 24


def prompt_of(number: int, length: int = 90) -> tuple[int, ...]:
    return tuple((number * 31 + position * 7) % 255 + 1 for position in range(length))


@pytest.fixture(scope="module")
def reference() -> list[list[int]]:
    """What one worker that never changes answers."""

    async def collect() -> list[list[int]]:
        async with flex_house({"only": DECODE}) as here:
            return [
                (await here.generate(prompt_of(n), max_tokens=LENGTH, seed=n)).tokens
                for n in range(24)
            ]

    return asyncio.run(collect())


async def health(address: str, service: str) -> str:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


async def load(here: FlexHouse, reference: list[list[int]], stop: asyncio.Event) -> int:
    """One client that asks until told to stop; every answer must be right, and no attempt fail: it may move on, with its KV. Returns how
    many.
    """
    rng = random.Random(id(stop) + id(reference))
    asked = 0
    while not stop.is_set():
        number = rng.randrange(len(reference))
        answer = await here.generate(prompt_of(number), max_tokens=LENGTH, seed=number)
        assert answer.tokens == reference[number]
        failures = [attempt.failure for attempt in answer.end.attempts]
        assert set(answer.failures) <= {"DRAINING"}, f"a role change cost an attempt: {failures}"
        asked += 1
    return asked


@pytest.mark.parametrize("drain_timeout_s", [5.0, 0.0])
async def test_roles_change_back_and_forth_under_load_and_nobody_can_tell(
    reference: list[list[int]], drain_timeout_s: float
) -> None:
    """Promise: role changes lose no request, change no token, fail no attempt, and leave the pools at rest; also where the new role is
    announced while calls of the old one run.
    """
    async with flex_house(ROLES) as here:
        stop = asyncio.Event()
        clients = [asyncio.create_task(load(here, reference, stop)) for _ in range(8)]
        for _ in range(3):
            for name, role in (("b", DECODE), ("c", PREFILL), ("b", PREFILL), ("c", DECODE)):
                answer = await here.set_role(name, role, drain_timeout_s)
                assert answer.previous_role != answer.info.role
                assert here.workers[name].host.info.role is role
                await here.until(partial(here.is_known, name, role))
        stop.set()
        assert min(await asyncio.gather(*clients)) > 0


async def test_the_new_role_finds_the_old_ones_cache() -> None:
    """Promise: a change of role recomputes nothing that is still cached."""
    async with flex_house({"a": PREFILL, "b": DECODE, "c": DECODE}) as here:
        prompt = prompt_of(1, 160)
        await here.generate(prompt, max_tokens=4, seed=1)
        await here.set_role("a", DECODE)
        for name in ("b", "c"):
            await here.set_role(name, PREFILL)
        await here.until(lambda: here.roles["a"] is DECODE and here.roles["c"] is PREFILL)
        answer = await here.generate(prompt, max_tokens=4, seed=1)
        assert answer.end.attempts[0].decode_worker == "a"
        assert answer.end.usage.cached_tokens >= 144


async def test_a_change_waits_for_what_has_nowhere_to_go_and_takes_nothing_new() -> None:
    async with flex_house({"a": DECODE}) as here:
        worker = here.workers["a"].host
        running = asyncio.create_task(here.generate(prompt_of(1), max_tokens=300, seed=1))
        await here.until(lambda: worker.num_calls == 1)
        changing = asyncio.create_task(here.set_role("a", PREFILL, 20.0))
        await here.until(lambda: worker.changing_to is PREFILL)
        assert await health(worker.info.address, "baton.v1.DecodeService") == "NOT_SERVING"
        assert await health(worker.info.address, "") == "SERVING"
        status = await here.stubs["a"].GetStatus(worker_pb2.GetStatusRequest())
        assert (status.changing_to, status.running_calls) == (1, 1)
        late = asyncio.create_task(here.generate(prompt_of(2), max_tokens=2, seed=1))
        assert (await changing).running_calls == 0
        assert len((await running).tokens) == 300
        assert await health(worker.info.address, "baton.v1.PrefillService") == "SERVING"
        assert await health(worker.info.address, "baton.v1.DecodeService") == "NOT_SERVING"
        assert not late.done()
        await here.set_role("a", DECODE)
        assert len((await late).tokens) == 2


async def test_an_answer_moves_on_and_the_change_does_not_wait_for_its_end() -> None:
    """Promise: a role change takes as long as handing over, not as the longest answer, and computes nothing twice."""
    async with flex_house({"a": DECODE, "b": DECODE}) as here:
        undisturbed = await here.generate(prompt_of(1), max_tokens=600, seed=1)
        running = asyncio.create_task(here.generate(prompt_of(1), max_tokens=600, seed=1))
        await here.until(lambda: any(w.host.load.used_blocks for w in here.workers.values()))
        busy = next(name for name, w in here.workers.items() if w.host.load.used_blocks)
        assert (await here.set_role(busy, PREFILL, 20.0)).running_calls == 0
        assert not running.done()
        answer = await running
        assert answer.tokens == undisturbed.tokens
        assert answer.failures == ["DRAINING"]


async def test_a_caller_that_leaves_leaves_the_role_as_it_was() -> None:
    async with flex_house({"a": DECODE}) as here:
        running = asyncio.create_task(here.generate(prompt_of(1), max_tokens=300, seed=1))
        await here.until(lambda: here.workers["a"].host.num_calls == 1)
        changing = asyncio.create_task(here.set_role("a", PREFILL, 20.0))
        await here.until(lambda: here.workers["a"].host.changing_to is PREFILL)
        changing.cancel()
        await here.until(lambda: here.workers["a"].host.changing_to is None)
        assert here.workers["a"].host.info.role is DECODE
        assert len((await here.generate(prompt_of(2), max_tokens=2, seed=1)).tokens) == 2
        await running


async def test_setting_the_role_it_has_is_answered_at_once() -> None:
    async with flex_house({"a": DECODE}) as here:
        for role in (DECODE, PREFILL, PREFILL, DECODE):
            answer = await here.set_role("a", role)
            assert answer.info.role == {PREFILL: 1, DECODE: 2}[role]
        assert tuple(answer.info.can_be) == (1, 2)


async def test_a_drained_worker_takes_no_role_and_no_calls() -> None:
    async with flex_house({"a": DECODE, "b": DECODE}) as here:
        for _ in range(2):
            drained = await here.stubs["a"].Drain(worker_pb2.DrainRequest(timeout_seconds=2))
            assert drained.running_calls == 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await here.set_role("a", PREFILL)
        assert isinstance(error_from_rpc(refused.value), PreconditionError)
        answer = await here.generate(prompt_of(1), max_tokens=2, seed=1)
        assert answer.end.attempts[0].decode_worker == "b"


async def test_a_worker_of_one_role_refuses_another_and_answers_the_rest() -> None:
    async with worker_pair() as rig:
        stub = worker_pb2_grpc.WorkerServiceStub(rig.prefill_channel)
        for number, error in ((2, PreconditionError), (0, InvalidRequestError)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.SetRole(worker_pb2.SetRoleRequest(role=number))  # type: ignore[arg-type]
            assert isinstance(error_from_rpc(refused.value), error)
        same = await stub.SetRole(worker_pb2.SetRoleRequest(role=1))  # type: ignore[arg-type]
        assert tuple(same.info.can_be) == (1,)
        status = await stub.GetStatus(worker_pb2.GetStatusRequest())
        assert (status.load.free_blocks, status.draining, status.problem) == (64, False, "")
        with pytest.raises(grpc.aio.AioRpcError) as bad:
            await stub.Drain(worker_pb2.DrainRequest(timeout_seconds=-1))
        assert isinstance(error_from_rpc(bad.value), InvalidRequestError)
        await stub.Drain(worker_pb2.DrainRequest())
        assert isinstance(
            await error_of(rig.prefill_call(key("late"), sequence(20))), UnavailableError
        )
