"""Workers as they are shipped, Ray actors each in a process of its own, which tests start, drain and kill one by one; and the
routers that they join. Runs on the test's event loop, in the process that is connected to Ray.
"""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from types import MappingProxyType

import baton
from baton.client import AsyncClient
from baton.engine.config import EngineConfig
from baton.engine.sim import SimConfig
from baton.service.settings import LogLevel, WorkerSettings
from baton.transfer.ray_runtime import RayCluster
from baton.types import Role, WorkerId
from baton.worker.actor import ActorConfig, RunningWorker, WorkerActor, launch
from decode_worker.actor import DecodeActor
from prefill_worker.actor import PrefillActor
from tests.faults.probes import load_of, metrics_of, tells_of_rest
from tests.faults.routers import RouterProcess

TALES = Path(baton.__file__).parent / "models" / "tales"
TORCH = EngineConfig(
    model=str(TALES),
    dtype="float32",
    kv_pool_tokens=131072,
    max_batch_tokens=256,
    max_running=256,
    threads=1,
)
"""The shipped model."""
ACTORS: Mapping[Role, type[WorkerActor]] = {Role.PREFILL: PrefillActor, Role.DECODE: DecodeActor}
START_S = 90.0

_numbers = count()


@dataclass(slots=True)
class ActorFleet:
    """See the module docstring."""

    cluster: RayCluster
    engine: EngineConfig | SimConfig
    routers: list[RouterProcess]
    settings: WorkerSettings
    actors: Mapping[Role, type[WorkerActor]]
    workers: dict[WorkerId, RunningWorker]

    @property
    def addresses(self) -> str:
        """Of all routers, for clients."""
        return ",".join(router.address for router in self.routers)

    def of(self, role: Role) -> list[RunningWorker]:
        return [worker for worker in self.workers.values() if worker.info.role is role]

    async def add(self, role: Role, *, settings: WorkerSettings | None = None) -> RunningWorker:
        """Starts a worker; returns once every router has it as a member."""
        settings = settings or self.settings
        config = ActorConfig(
            settings=replace(settings, worker_id=f"{role.value}-{next(_numbers)}"),
            engine=self.engine,
            role=role,
            namespace=self.cluster.namespace,
        )
        async with asyncio.timeout(START_S):
            worker = await launch(self.actors[role], config, lambda *_: None)
            self.workers[worker.info.worker_id] = worker
            await self.joined(worker)
        return worker

    async def joined(self, worker: RunningWorker, *, joined: bool = True) -> None:
        """Returns once every router has the worker as a member, or none has."""
        for router in self.routers:
            async with AsyncClient(router.address) as client:
                while joined != (worker.info.worker_id in await members(client)):  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.02)

    def signal(self, worker: RunningWorker, number: signal.Signals) -> None:
        """To the worker's process; one that is killed is no part of the fleet any more."""
        if number is signal.SIGKILL:
            del self.workers[worker.info.worker_id]
        os.kill(worker.info.pid, number)

    async def retire(self, worker: RunningWorker, grace_s: float = 60.0) -> bool:
        """What SIGTERM makes of a worker: it drains, and ends. Whether everything that it ran ended, or moved, within the grace."""
        drained = await worker.drain(grace_s)
        del self.workers[worker.info.worker_id]
        await worker.stop()
        return drained

    async def at_rest(self, timeout_s: float) -> None:
        """Returns once no worker holds anything for any request, and none holds a block that belongs to no call. Fails with what was told
        until then, and when.
        """
        waiting = list(self.workers.values())
        told: list[str] = []
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                for worker in waiting:
                    while not tells_of_rest(
                        worker.info, load := await asyncio.to_thread(load_of, worker.info)
                    ):
                        told.append(f"{time.monotonic() - began_s:.2f} s: {load}")
                        await asyncio.sleep(0.02)
        except TimeoutError:
            raise AssertionError(f"{worker.info.worker_id} told {told}") from None
        for worker in waiting:
            samples = await asyncio.to_thread(metrics_of, worker.info)
            orphaned = f'baton_worker_orphaned_kv_blocks{{role="{worker.info.role.value}"}}'
            assert samples[orphaned] == 0

    async def total(self, role: Role, metric: str) -> float:
        """A counter's sum over the workers of a role."""
        name = f'{metric}{{role="{role.value}"}}'
        tells = [await asyncio.to_thread(metrics_of, worker.info) for worker in self.of(role)]
        return sum(told[name] for told in tells)

    def end(self) -> None:
        """Leaves no process. Idempotent."""
        for worker in self.workers.values():
            with suppress(ProcessLookupError):
                os.kill(worker.info.pid, signal.SIGCONT)
            worker.kill()
        self.workers.clear()
        for router in self.routers:
            router.end()


async def members(client: AsyncClient) -> set[str]:
    return {info.worker_id for info in (await client.model()).workers}


async def until_true(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Waits for a condition; fails with its name."""
    try:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - conditions are of every kind
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"not within {timeout_s} s: {what}") from None


@asynccontextmanager
async def actor_fleet(
    cluster: RayCluster,
    engine: EngineConfig | SimConfig,
    *,
    prefill: int,
    decode: int,
    routers: int = 1,
    environ: Mapping[str, str] = MappingProxyType({}),
    actors: Mapping[Role, type[WorkerActor]] = ACTORS,
    settings: WorkerSettings | None = None,
) -> AsyncIterator[ActorFleet]:
    """Everything up. `environ` is the routers'."""
    model = {"BATON_MODEL": str(TALES)} if isinstance(engine, EngineConfig) else {}
    processes = [RouterProcess(model | dict(environ)) for _ in range(routers)]
    settings = settings or WorkerSettings(log_level=LogLevel.ERROR)
    async with AsyncExitStack() as stack:
        here = ActorFleet(cluster, engine, processes, settings, actors, {})
        for process in processes:
            stack.callback(process.end)
            await asyncio.to_thread(process.start)
        addresses = tuple(process.address for process in processes)
        here.settings = replace(settings, routers=settings.routers or addresses)
        stack.callback(here.end)
        async with asyncio.TaskGroup() as group:
            for role in [Role.PREFILL] * prefill + [Role.DECODE] * decode:
                group.create_task(here.add(role))
        yield here
