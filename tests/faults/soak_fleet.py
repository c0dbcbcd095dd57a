"""The soak's fleet: two routers, each behind a door that can be shut, that share a store of sessions; two workers of each role, each behind
links that can be cut. The first router and the first worker of each role are the veterans, which no fault ends; all other workers can
turn to the other role.

Faults overlap: a router that is asked something may be away, and a worker that somebody waits for may have ended meanwhile.
"""

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import ray

from baton.client import AsyncClient
from baton.engine.sim import SimConfig
from baton.errors import BatonError
from baton.service.settings import LogLevel, WorkerSettings
from baton.transfer.ray_runtime import RayCluster
from baton.types import Role, WorkerId
from baton.worker.actor import RunningWorker
from tests.faults import soak_tasks, soak_workers
from tests.faults.actors import ActorFleet
from tests.faults.links import Link, add_linked
from tests.faults.proxy import Proxy
from tests.faults.roles import set_role
from tests.faults.routers import RouterProcess
from tests.faults.soak_workers import DEDICATED, FLEXIBLE

SIM = SimConfig(num_blocks=1024, max_batch_tokens=256, step_s=0.01)
PER_ROLE = 2
ENVIRON = {
    "BATON_MIN_CLIENT_PING_S": "0.2",
    # Tokens of some steps come joined.
    "BATON_CLIENT_MESSAGES_PER_S": "400",
}
HANDOFF_TIMEOUT_S = 10.0
"""Longer than anybody is away, and short, since a worker awaits so long what one that died has asked for."""
DRAIN_S = 2.0
"""How long a worker that turns lets what runs come to its end."""
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
    turned: dict[WorkerId, Role] = field(default_factory=dict)
    """What workers are that are not what they were started as."""
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
        """Starts workers in the place of those that ended, and were started with that role."""
        while self._started_as(role) + self.coming[role] < PER_ROLE:
            await self.join_linked(role)

    def _started_as(self, role: Role) -> int:
        return sum(worker.info.role is role for worker in self.workers.values())

    def of(self, role: Role) -> list[RunningWorker]:
        """Of that role now."""
        workers = self.workers.items()
        return [each for name, each in workers if self.turned.get(name, each.info.role) is role]

    async def turn(self, worker: RunningWorker, role: Role) -> None:
        """Returns once it was told to take a role, and every router knew of it; or it has ended."""
        name = worker.info.worker_id
        while self.lives(worker) and self.turned.get(name, worker.info.role) is not role:
            with suppress(grpc.RpcError):
                await set_role(worker.info.address, role, DRAIN_S)
                self.turned[name] = role
            await asyncio.sleep(POLL_S)
        for router in self.routers:
            while self.lives(worker) and await _role_at(worker, router) is not role:  # noqa: ASYNC110 - another process's
                await asyncio.sleep(POLL_S)

    def lives(self, worker: RunningWorker) -> bool:
        return worker.info.worker_id in self.workers

    def forget(self, worker: RunningWorker) -> bool:
        """It is no part of the fleet any more. Whether it was."""
        self.turned.pop(worker.info.worker_id, None)
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
    told = await _workers_at(router)
    return told is not None and joined == (worker.info.worker_id in told)


async def _role_at(worker: RunningWorker, router: RouterProcess) -> Role | None:
    """None where the router does not know it, or does not answer."""
    return (await _workers_at(router) or {}).get(worker.info.worker_id)


async def _workers_at(router: RouterProcess) -> dict[str, Role] | None:
    """A router's members; None where it does not answer."""
    with suppress(BatonError, TimeoutError):
        async with asyncio.timeout(ANSWER_S), AsyncClient(router.address) as client:
            return {info.worker_id: info.role for info in (await client.model()).workers}
    return None


@asynccontextmanager
async def soak_fleet(cluster: RayCluster, store: Path) -> AsyncIterator[SoakFleet]:
    """Everything up. `store` is that of sessions."""
    for module in (soak_workers, soak_tasks):
        ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    environ = ENVIRON | {"BATON_SESSION_STORE": f"sqlite://{store}"}
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
        fleet = SoakFleet(cluster, SIM, routers, settings, DEDICATED, {}, stack=stack)
        stack.callback(fleet.end)
        for router in routers:
            door = await Proxy(router.address).start()
            stack.push_async_callback(door.stop)
            fleet.doors.append(door)
            fleet.starting.append(asyncio.Lock())
        veterans = await asyncio.gather(*map(fleet.join_linked, Role))
        fleet.veterans = {worker.info.worker_id for worker in veterans}
        fleet.actors = FLEXIBLE
        await asyncio.gather(*map(fleet.restock, Role))
        yield fleet
