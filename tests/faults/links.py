"""Workers and clients whose connections can be cut one by one: every connection of theirs goes through a `Proxy`.

A worker listens on 127.0.0.1 and says that it is at 127.0.0.2, where its proxy listens on the same port.
"""

from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from baton.service.settings import WorkerSettings
from baton.types import Role
from baton.worker.actor import RunningWorker
from tests.faults.actors import ActorFleet
from tests.faults.proxy import Proxy
from tests.ports import free_port

ADVERTISED = "127.0.0.2"


@dataclass(frozen=True, slots=True)
class Link:
    """All of one process's connections to routers, in both directions. KV, which goes through Ray, is not part of it."""

    proxies: tuple[Proxy, ...]

    def cut(self) -> None:
        for proxy in self.proxies:
            proxy.cut()

    def heal(self) -> None:
        for proxy in self.proxies:
            proxy.heal()


async def add_linked(
    fleet: ActorFleet, role: Role, stack: AsyncExitStack
) -> tuple[RunningWorker, Link]:
    """Starts a worker behind proxies, which live as long as the stack."""
    port = free_port()
    inward = await Proxy(f"127.0.0.1:{port}").start(ADVERTISED, port)
    outward = [await Proxy(router.address).start() for router in fleet.routers]
    for proxy in (inward, *outward):
        stack.push_async_callback(proxy.stop)
    settings = linked(fleet.settings, port, outward)
    return await fleet.add(role, settings=settings), Link((inward, *outward))


def linked(settings: WorkerSettings, port: int, outward: list[Proxy]) -> WorkerSettings:
    return replace(
        settings,
        port=port,
        advertise_host=ADVERTISED,
        routers=tuple(proxy.address for proxy in outward),
    )
