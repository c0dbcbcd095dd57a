"""Health means progress: what turns a worker's `grpc.health.v1` and its routers' view of it, with faults put into real engines."""

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.engine.aio import AsyncEngine
from baton.engine.batch import BatchRow, Sampled
from baton.engine.engine import PagedEngine
from baton.engine.sim import SimConfig, SimRunner
from baton.service.settings import RouterSettings, WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.v1 import decode_pb2_grpc
from decode_worker.worker import DecodeWorker
from router.app import RouterApp
from router.text import Tokenizer
from tests.worker_rig import Rig, key, sequence, worker_pair

SERVICE = "baton.v1.DecodeService"
TWO_HEARTBEATS_S = 2 * RouterSettings().heartbeat_s
BUSY_S = 1.0
"""What a busy machine may add to a bound."""
SIM = SimConfig(num_blocks=16, max_batch_tokens=256)


class FaultyRunner(SimRunner):
    """Computes until it is told to hang."""

    def __init__(self, config: SimConfig) -> None:
        super().__init__(config)
        self.sound = threading.Event()
        self.sound.set()

    def run(self, rows: Sequence[BatchRow]) -> list[Sampled | None]:
        assert self.sound.wait(20)
        return super().run(rows)


class Health:
    """Follows one service's health, and remembers every state."""

    def __init__(self, channel: grpc.aio.Channel, service: str) -> None:
        self.states: list[str] = []
        self._changed = asyncio.Event()
        self._task = asyncio.create_task(self._follow(channel, service))

    async def until(self, state: str, timeout_s: float) -> None:
        async with asyncio.timeout(timeout_s):
            while not self.states or self.states[-1] != state:
                self._changed.clear()
                await self._changed.wait()

    async def _follow(self, channel: grpc.aio.Channel, service: str) -> None:
        stub = health_pb2_grpc.HealthStub(channel)
        async for answer in stub.Watch(health_pb2.HealthCheckRequest(service=service)):
            self.states.append(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
            self._changed.set()

    async def end(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


@asynccontextmanager
async def watched(channel: grpc.aio.Channel, service: str) -> AsyncIterator[Health]:
    health = Health(channel, service)
    try:
        await health.until("SERVING", 5)
        yield health
    finally:
        await health.end()


@asynccontextmanager
async def faulty_decode(
    config: SimConfig,
) -> AsyncIterator[tuple[FaultyRunner, RouterApp, Rig]]:
    """One decode worker over a runner that can be made to hang, with a router."""
    runner = FaultyRunner(config)
    app = RouterApp(RouterSettings(port=0, reflection=False), Tokenizer.of_bytes())
    await app.start()
    engine = AsyncEngine(
        lambda: PagedEngine(runner, max_batch_tokens=config.max_batch_tokens, max_running=8),
        name="faulty",
    )
    settings = WorkerSettings(routers=(f"127.0.0.1:{app.port}",))
    worker = DecodeWorker(settings, engine, MemoryTransport(MemorySources(), ByteCredits(1 << 20)))
    try:
        info = await worker.start()
        async with grpc.aio.insecure_channel(info.address) as channel:
            rig = Rig.__new__(Rig)
            rig.decode, rig.digest = worker, info.spec.digest
            rig.decode_channel = channel
            rig.decode_stub = decode_pb2_grpc.DecodeServiceStub(channel)
            yield runner, app, rig
    finally:
        runner.sound.set()
        await worker.stop()
        await app.stop()


async def until_draining(app: RouterApp, *, draining: bool) -> None:
    """The router places nothing there, or does again."""
    async with asyncio.timeout(TWO_HEARTBEATS_S + BUSY_S):
        while [w.draining for w in app.fleet.registry.view({}, 0.0).decode] != [draining]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_a_wedged_engine_thread_is_not_serving_within_two_heartbeats() -> None:
    """Promise: a step that hangs turns health, and the router's view, within two heartbeats; one that ends turns them back."""
    async with (
        faulty_decode(replace(SIM, step_s=0.001)) as (runner, app, rig),
        watched(rig.decode_channel, SERVICE) as service,
        watched(rig.decode_channel, "") as process,
    ):
        await rig.generate_locally(key("warm"), sequence(20))
        call = rig.decode_call(key("a"), sequence(20, max_tokens=100), local=True)
        await call.read()
        runner.sound.clear()
        await service.until("NOT_SERVING", TWO_HEARTBEATS_S + BUSY_S)
        await process.until("NOT_SERVING", BUSY_S)
        await until_draining(app, draining=True)
        assert "a step has run" in rig.decode.host.problem
        runner.sound.set()
        await service.until("SERVING", 5)
        await process.until("SERVING", 5)
        await until_draining(app, draining=False)
        call.cancel()


async def test_long_chunks_that_are_legitimate_do_not_turn_health() -> None:
    """Promise: a step that takes long because it computes much is progress, also the first of its size."""
    slow = replace(SIM, token_s=0.006, max_batch_tokens=220)
    async with (
        faulty_decode(slow) as (_runner, _app, rig),
        watched(rig.decode_channel, SERVICE) as health,
    ):
        await rig.generate_locally(key("short"), sequence(8, max_tokens=20))
        for number in (1, 2):
            # 1.3 s a chunk, nearly twice the shortest limit.
            answer = await rig.generate_locally(
                key(f"long{number}"), sequence(215, max_tokens=4, start=number)
            )
            assert len(answer.tokens) == 4
        assert health.states == ["SERVING"]


async def test_an_exhausted_pool_that_does_not_move_is_not_serving() -> None:
    """Promise: a worker whose requests wait for blocks that nobody gives back is not ready for more, though its process is well; it
    serves again once a block is free.
    """
    async with (
        worker_pair(decode_sim=SIM) as rig,
        watched(rig.decode_channel, SERVICE) as service,
        watched(rig.decode_channel, "") as process,
    ):
        holder = rig.decode_call(key("holder"), sequence(200))
        await holder.read()
        waiting = rig.decode_call(key("waiting"), sequence(200, start=2))
        await service.until("NOT_SERVING", TWO_HEARTBEATS_S + BUSY_S)
        assert "blocks that do not move" in rig.decode.host.problem
        assert process.states == ["SERVING"]
        holder.cancel()
        assert (await waiting.read()).HasField("reserved")
        await service.until("SERVING", 5)
        waiting.cancel()
        await rig.settled()


async def test_a_full_pool_that_moves_is_serving() -> None:
    """Promise: a queue before a pool that is full is no fault as long as those ahead get on."""
    slow = replace(SIM, step_s=0.02)
    async with worker_pair(decode_sim=slow) as rig, watched(rig.decode_channel, SERVICE) as health:
        calls = [
            asyncio.create_task(
                rig.generate_locally(key(f"r{n}"), sequence(150, max_tokens=50, start=n))
            )
            for n in range(3)
        ]
        for call in calls:
            assert len((await call).tokens) == 50
        assert health.states == ["SERVING"]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_an_idle_worker_stays_well(role: str) -> None:
    """Promise: having nothing to do is no lack of progress."""
    async with worker_pair(settings=WorkerSettings(progress_limit_s=0.1)) as rig:
        channel = rig.prefill_channel if role == "prefill" else rig.decode_channel
        async with watched(channel, "") as health:
            await rig.generate(key("a"), sequence(20))
            await asyncio.sleep(0.5)
            assert health.states == ["SERVING"]
