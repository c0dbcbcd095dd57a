"""The soak's fleet: two routers, each behind a door that can be shut, that share a store of sessions; two workers of each role, each behind
links that can be cut. The first router and the first worker of each role are the veterans, which no fault ends.

Faults overlap: a router that is asked something may be away, and a worker that somebody waits for may have ended meanwhile.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType

import ray

from baton.client import AsyncClient
from baton.engine.sim import SimConfig
from baton.errors import BatonError
from baton.service.settings import LogLevel, WorkerSettings
from baton.transfer.ray_runtime import RayCluster
from baton.types import Role, WorkerId
from baton.worker.actor import RunningWorker
from tests.faults import soak_tasks, soak_workers
from tests.faults.actors import ActorFleet, members
from tests.faults.links import Link, add_linked
from tests.faults.proxy import Proxy
from tests.faults.routers import RouterProcess

SIM = SimConfig(num_blocks=1024, max_batch_tokens=256, step_s=0.01)
PER_ROLE = 2
ENVIRON = {"BATON_MIN_CLIENT_PING_S": "0.2"}
ACTORS = MappingProxyType(
    {Role.PREFILL: soak_workers.SoakPrefillActor, Role.DECODE: soak_workers.SoakDecodeActor}
)
HANDOFF_TIMEOUT_S = 10.0
"""Longer than anybody is away, and short, since a worker awaits so long what one that died has asked for."""
POLL_S = 0.05
ANSWER_S = 1.0
"""How long a router may take to tell its members, before it counts as away."""


@dataclass(slots=True)
class SoakFleet(ActorFleet):
    """See the module docstring."""

    doors: list[Proxy] = field(default_factory=list)
    """Of the routers, for clients."""
    links: dict[WorkerId, Link] = field(default_factory=dict)
    veterans: set[WorkerId] = field(default_factory=set)
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    """Ends doors and links."""
    coming: Counter[Role] = field(default_factory=Counter)
    """Workers that start now."""
    starting: list[asyncio.Lock] = field(default_factory=list)
    """Held while a router is started."""

    async def join_linked(self, role: Role) -> RunningWorker:
        """Starts a worker; returns once it is a member everywhere, or has ended again."""
        self.coming[role] += 1
        try:
            worker, link = await add_linked(self, role, self.stack)
        finally:
            self.coming[role] -= 1
        self.links[worker.info.worker_id] = link
        return worker

    async def restock(self, role: Role) -> None:
        """Starts workers in the place of those that ended."""
        while len(self.of(role)) + self.coming[role] < PER_ROLE:
            await self.join_linked(role)

    def lives(self, worker: RunningWorker) -> bool:
        return worker.info.worker_id in self.workers

    def forget(self, worker: RunningWorker) -> bool:
        """It is no part of the fleet any more. Whether it was."""
        return self.workers.pop(worker.info.worker_id, None) is not None

    async def joined(self, worker: RunningWorker, *, joined: bool = True) -> None:
        """Returns once every router has the worker as a member, or none has; each is asked one after the other."""
        for router in self.routers:
            while self.lives(worker) and not await is_member(worker, router, joined=joined):  # noqa: ASYNC110 - another process's
                await asyncio.sleep(POLL_S)

    async def whole(self) -> None:
        """Returns once every worker was a member everywhere."""
        for worker in tuple(self.workers.values()):
            await self.joined(worker)

    def signal(self, worker: RunningWorker, number: signal.Signals) -> None:
        """No effect on one that has ended."""
        ends = number is signal.SIGKILL
        if self.forget(worker) if ends else self.lives(worker):
            os.kill(worker.info.pid, number)

    async def retire(self, worker: RunningWorker, grace_s: float = 60.0) -> bool:
        drained = await worker.drain(grace_s)
        self.forget(worker)
        await worker.stop()
        return drained


async def is_member(worker: RunningWorker, router: RouterProcess, *, joined: bool) -> bool:
    """Whether a router answers, and says so."""
    with suppress(BatonError, TimeoutError):
        async with asyncio.timeout(ANSWER_S), AsyncClient(router.address) as client:
            return joined == (worker.info.worker_id in await members(client))
    return False


@asynccontextmanager
async def soak_fleet(cluster: RayCluster, store: str) -> AsyncIterator[SoakFleet]:
    """Everything up. `store` is that of sessions."""
    for module in (soak_workers, soak_tasks):
        ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    environ = ENVIRON | {"BATON_SESSION_STORE": store}
    routers = [RouterProcess(environ, module="tests.faults.soak_router") for _ in range(2)]
    settings = WorkerSettings(
        log_level=LogLevel.ERROR,
        routers=tuple(router.address for router in routers),
        handoff_timeout_s=HANDOFF_TIMEOUT_S,
    )
    async with AsyncExitStack() as stack:
        for router in routers:
            stack.callback(router.end)
            await asyncio.to_thread(router.start)
        fleet = SoakFleet(cluster, SIM, routers, settings, ACTORS, {}, stack=stack)
        stack.callback(fleet.end)
        for router in routers:
            door = await Proxy(router.address).start()
            stack.push_async_callback(door.stop)
            fleet.doors.append(door)
            fleet.starting.append(asyncio.Lock())
        roles = [role for role in Role for _ in range(PER_ROLE)]
        started = await asyncio.gather(*(fleet.join_linked(role) for role in roles))
        fleet.veterans = {started[roles.index(role)].info.worker_id for role in Role}
        yield fleet
