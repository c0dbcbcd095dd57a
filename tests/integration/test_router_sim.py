"""Router, prefill workers and decode workers as they are shipped, with simulated engines, in one process.

The simulated engine's tokens depend on every KV entry before them, so that equal streams mean that no KV was lost or misplaced.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.settings import WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.types import WorkerId
from baton.v1 import inference_pb2_grpc
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.app import RouterApp
from router.text import Tokenizer
from tests.integration.router_fakes import SETTINGS, Answer, request

SIM = SimConfig(num_blocks=128, max_batch_tokens=64, step_s=0.001)
LENGTH = 12


def prompt_of(number: int, length: int = 90) -> tuple[int, ...]:
    return tuple((number * 31 + position * 7) % 255 + 1 for position in range(length))


@dataclass
class House:
    """Everything, in one process."""

    app: RouterApp
    inference: inference_pb2_grpc.InferenceServiceStub
    sources: MemorySources = field(default_factory=MemorySources)
    workers: dict[WorkerId, PrefillWorker | DecodeWorker] = field(default_factory=dict)

    @property
    def settings(self) -> WorkerSettings:
        return WorkerSettings(
            routers=(f"127.0.0.1:{self.app.port}",), reflection=False, handoff_timeout_s=5.0
        )

    async def add_prefill(self) -> None:
        engine = AsyncEngine(lambda: build_sim_engine(SIM), name="prefill")
        worker = PrefillWorker(self.settings, engine)
        info = await worker.start()
        self.sources.add(info.transfer_address, worker)
        await self._joined(info.worker_id, worker)

    async def add_decode(self) -> None:
        engine = AsyncEngine(lambda: build_sim_engine(SIM), name="decode")
        transport = MemoryTransport(self.sources, ByteCredits(1 << 20))
        worker = DecodeWorker(self.settings, engine, transport)
        info = await worker.start()
        self.sources.add(info.transfer_address, worker)
        await self._joined(info.worker_id, worker)

    async def kill(self, worker_id: str) -> None:
        worker = self.workers.pop(WorkerId(worker_id))
        self.sources.remove(worker_id)
        await worker.stop()

    def call(self, number: int, **changes: object) -> Any:
        sampling = {"max_tokens": LENGTH, "seed": number, "ignore_eos": True}
        message = request(prompt=prompt_of(number), **(sampling | changes))
        return self.inference.Generate(message, timeout=20)

    async def generate(self, number: int, **changes: object) -> Answer:
        answer = Answer()
        async for response in self.call(number, **changes):
            answer.add(response)
        return answer

    async def settled(self) -> None:
        """Every block of every worker is free or cached, and the router claims nothing."""
        assert len(self.app.table) == 0
        async with asyncio.timeout(5):
            for worker in self.workers.values():
                while True:
                    load = await worker.host.engine.refresh_load()
                    held = load.used_blocks + load.reserved_blocks + load.in_flight_blocks
                    if not held and not load.running_requests + load.waiting_requests:
                        break
                    await asyncio.sleep(0.01)
                await worker.host.engine.check_integrity()
        assert self.app.fleet.registry.claimed_tokens() == 0

    async def _joined(self, worker_id: WorkerId, worker: PrefillWorker | DecodeWorker) -> None:
        self.workers[worker_id] = worker
        members = self.app.fleet.registry.infos
        async with asyncio.timeout(5):
            while worker_id not in [info.worker_id for info in members()]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@asynccontextmanager
async def house(prefill: int, decode: int) -> AsyncIterator[House]:
    app = RouterApp(SETTINGS, Tokenizer.of_bytes())
    await app.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        here = House(app, inference_pb2_grpc.InferenceServiceStub(channel))
        try:
            for _ in range(prefill):
                await here.add_prefill()
            for _ in range(decode):
                await here.add_decode()
            yield here
            await here.settled()
        finally:
            for worker_id in list(here.workers):
                await here.kill(worker_id)
            await app.stop()


@pytest.fixture(scope="module")
def reference() -> dict[int, Sequence[int]]:
    """What one undisturbed decode worker without prefill workers answers."""

    async def collect() -> dict[int, Sequence[int]]:
        async with house(0, 1) as here:
            return {number: (await here.generate(number)).tokens for number in range(40)}

    return asyncio.run(collect())


async def test_the_split_answer_is_the_local_one(reference: dict[int, Sequence[int]]) -> None:
    async with house(1, 1) as here:
        answers = await asyncio.gather(*(here.generate(number) for number in range(40)))
        assert [answer.tokens for answer in answers] == list(reference.values())
        assert all(answer.failures == [] for answer in answers)
        assert all(answer.end.attempts[0].prefill_worker for answer in answers)
        for _ in range(2):
            again = await here.generate(3)
            assert again.tokens == reference[3]
        assert again.end.usage.cached_tokens >= 80


async def test_decode_is_killed_at_every_token_and_nobody_can_tell(
    reference: dict[int, Sequence[int]],
) -> None:
    """The worker that serves the request is stopped the moment that the client has k tokens."""
    async with house(1, 2) as here:
        for k in range(1, LENGTH):
            answer = Answer()
            killed = None
            async for response in here.call(k):
                answer.add(response)
                if killed is None and len(answer.tokens) >= k and answer.finished is None:
                    killed = asyncio.create_task(_kill_serving(here))
            assert answer.tokens == reference[k]
            if killed is not None:
                await killed
            await here.add_decode()


async def test_prefill_is_killed_at_random_instants_and_nobody_can_tell(
    reference: dict[int, Sequence[int]],
) -> None:
    rng = random.Random(3)
    async with house(2, 2) as here:
        for round_ in range(6):
            numbers = range(round_ * 6, round_ * 6 + 6)
            running = asyncio.gather(*(here.generate(number) for number in numbers))
            await asyncio.sleep(rng.random() * 0.05)
            victim = next(w for w in here.workers if isinstance(here.workers[w], PrefillWorker))
            await here.kill(victim)
            answers = await running
            assert [answer.tokens for answer in answers] == [reference[n] for n in numbers]
            await here.add_prefill()


async def test_a_single_token_takes_one_attempt_however_often_it_is_asked(
    reference: dict[int, Sequence[int]],
) -> None:
    """Prefill's token ends the request while decode waits for KV that never comes: that is no failure."""
    async with house(1, 1) as here:
        for number in range(25):
            answer = await here.generate(number, max_tokens=1)
            assert answer.tokens == list(reference[number][:1])
            assert answer.failures == []


async def test_cancelled_requests_free_every_block() -> None:
    rng = random.Random(5)
    async with house(1, 1) as here:

        async def cancel_soon(number: int) -> None:
            call = here.call(number % 40, max_tokens=200)
            await asyncio.sleep(rng.random() * 0.08)
            call.cancel()

        for start in range(0, 60, 20):
            await asyncio.gather(*(cancel_soon(number) for number in range(start, start + 20)))
        async with asyncio.timeout(5):
            while len(here.app.table):  # noqa: ASYNC110 - the handlers unwind
                await asyncio.sleep(0.01)


async def _kill_serving(here: House) -> None:
    serving = [w for w, each in here.workers.items() if each.host.num_calls]
    decodes = [w for w in serving if isinstance(here.workers[w], DecodeWorker)]
    if decodes:
        await here.kill(decodes[0])
