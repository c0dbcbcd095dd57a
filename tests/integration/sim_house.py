"""A router, prefill and decode workers as they are shipped, with simulated engines, in one process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.settings import RouterSettings, WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.types import WorkerId
from baton.v1 import inference_pb2_grpc, session_pb2_grpc
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.app import RouterApp
from router.text import Tokenizer
from tests.integration.router_fakes import SETTINGS, Answer, request

SIM = SimConfig(num_blocks=128, max_batch_tokens=64, step_s=0.001)
WORKERS = WorkerSettings(reflection=False, handoff_timeout_s=5.0)
LENGTH = 12


def prompt_of(number: int, length: int = 90) -> tuple[int, ...]:
    return tuple((number * 31 + position * 7) % 255 + 1 for position in range(length))


@dataclass
class House:
    """Everything, in one process."""

    app: RouterApp
    inference: inference_pb2_grpc.InferenceServiceStub
    sessions: session_pb2_grpc.SessionServiceStub
    sources: MemorySources = field(default_factory=MemorySources)
    workers: dict[WorkerId, PrefillWorker | DecodeWorker] = field(default_factory=dict)
    worker_settings: WorkerSettings = WORKERS
    sim: SimConfig = SIM
    decode_sim: SimConfig | None = None
    """Of decode workers, where theirs is another."""

    @property
    def settings(self) -> WorkerSettings:
        return replace(self.worker_settings, routers=(f"127.0.0.1:{self.app.fleet_port}",))

    @property
    def app_address(self) -> str:
        """Where clients find the router."""
        return f"127.0.0.1:{self.app.port}"

    async def add_prefill(self) -> None:
        engine = AsyncEngine(lambda: build_sim_engine(self.sim), name="prefill")
        worker = PrefillWorker(self.settings, engine)
        info = await worker.start()
        self.sources.add(info.transfer_address, worker)
        await self._joined(info.worker_id, worker)

    async def add_decode(self) -> None:
        sim = self.decode_sim or self.sim
        engine = AsyncEngine(lambda: build_sim_engine(sim), name="decode")
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
async def house(
    prefill: int,
    decode: int,
    *,
    settings: RouterSettings = SETTINGS,
    workers: WorkerSettings = WORKERS,
    connect: Callable[[str], grpc.aio.Channel] = grpc.aio.insecure_channel,
    tokenizer: Tokenizer | None = None,
    sim: SimConfig = SIM,
    decode_sim: SimConfig | None = None,
) -> AsyncIterator[House]:
    """At the end, every worker is at rest. `connect` opens the clients' channel."""
    app = RouterApp(settings, tokenizer or Tokenizer.of_bytes())
    await app.start()
    async with connect(f"127.0.0.1:{app.port}") as channel:
        inference = inference_pb2_grpc.InferenceServiceStub(channel)
        sessions = session_pb2_grpc.SessionServiceStub(channel)
        here = House(
            app, inference, sessions, worker_settings=workers, sim=sim, decode_sim=decode_sim
        )
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
