"""A router and flexible workers as they are shipped, with simulated engines, in one process."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from baton.codec import role_to_proto
from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.settings import RouterSettings, WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.types import Role
from baton.v1 import inference_pb2_grpc, worker_pb2, worker_pb2_grpc
from flex_worker.worker import FlexWorker
from router.app import RouterApp
from router.text import Tokenizer
from tests.integration.router_fakes import SETTINGS, Answer, request
from tests.worker_rig import is_idle

SIM = SimConfig(num_blocks=256, max_batch_tokens=64, step_s=0.001)


@dataclass
class FlexHouse:
    """Everything, in one process."""

    app: RouterApp
    inference: inference_pb2_grpc.InferenceServiceStub
    workers: dict[str, FlexWorker] = field(default_factory=dict)
    stubs: dict[str, worker_pb2_grpc.WorkerServiceStub] = field(default_factory=dict)

    async def generate(
        self, prompt: Sequence[int], *, max_tokens: int, seed: int, timeout_s: float = 30
    ) -> Answer:
        answer = Answer()
        message = request(prompt=prompt, max_tokens=max_tokens, seed=seed, ignore_eos=True)
        async for response in self.inference.Generate(message, timeout=timeout_s):
            answer.add(response)
        return answer

    async def set_role(
        self, worker_id: str, role: Role, drain_timeout_s: float = 5.0
    ) -> worker_pb2.SetRoleResponse:
        message = worker_pb2.SetRoleRequest(
            role=role_to_proto(role), drain_timeout_seconds=drain_timeout_s
        )
        answer: Any = await self.stubs[worker_id].SetRole(message, timeout=20)
        assert isinstance(answer, worker_pb2.SetRoleResponse)
        return answer

    @property
    def roles(self) -> dict[str, Role]:
        """As the router knows them."""
        return {info.worker_id: info.role for info in self.app.fleet.registry.infos()}

    def is_known(self, worker_id: str, role: Role) -> bool:
        """Whether the router knows the role."""
        return self.roles.get(worker_id) is role

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - conditions are of every kind
                await asyncio.sleep(0.005)

    async def settled(self) -> None:
        """Nothing is held for any request, anywhere."""
        await self.until(lambda: len(self.app.table) == 0)
        async with asyncio.timeout(5):
            for worker in self.workers.values():
                while worker.host.num_calls or not is_idle(await worker.host.engine.refresh_load()):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                await worker.host.engine.check_integrity()
                worker.check_integrity()
        assert self.app.fleet.registry.claimed_tokens() == 0
        self.app.fleet.registry.check_integrity()


@asynccontextmanager
async def flex_house(
    roles: Mapping[str, Role],
    *,
    sim: SimConfig = SIM,
    settings: RouterSettings = SETTINGS,
    **worker_settings: Any,
) -> AsyncIterator[FlexHouse]:
    """Flexible workers by their names and first roles. At the end nothing may be held."""
    app = RouterApp(settings, Tokenizer.of_bytes())
    sources = MemorySources()
    async with AsyncExitStack() as stack:
        await app.start()
        stack.push_async_callback(app.stop)
        address = f"127.0.0.1:{app.port}"
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        here = FlexHouse(app, inference_pb2_grpc.InferenceServiceStub(channel))
        common = WorkerSettings(
            routers=(address,), reflection=False, handoff_timeout_s=5.0, **worker_settings
        )
        for name, role in roles.items():
            engine = AsyncEngine(lambda: build_sim_engine(sim), name=name)
            transport = MemoryTransport(sources, ByteCredits(1 << 20))
            worker = FlexWorker(replace(common, worker_id=name), role, engine, transport)
            info = await worker.start()
            stack.push_async_callback(worker.stop)
            stack.enter_context(sources.serving(name, worker))
            worker_channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(info.address)
            )
            here.workers[name] = worker
            here.stubs[name] = worker_pb2_grpc.WorkerServiceStub(worker_channel)
        await here.until(lambda: set(here.roles) == set(roles))
        yield here
        await here.settled()
