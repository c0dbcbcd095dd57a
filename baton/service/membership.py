"""The worker's side of the fleet: stays a member with every router, tells each its load and its prefix cache, and leaves.

One task per router, on the worker's event loop; a router that is away costs one log line and a slow retry. Where the settings say so,
the routers are every address that a name has at the time: a new one is joined, and one that is gone from the name is left once it has
ended the membership, since a router that drains needs its workers. The whole prefix
cache goes out after each (re)join, then changes only. Changes of the draining flag and of the role go out at once. Every wait is bounded by
the lease that the router grants: a router that stopped reading is left, and joined anew.
"""

import asyncio
import logging
import random
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from baton.codec import load_to_proto, prefix_delta_to_proto, worker_info_to_proto
from baton.errors import BatonError, DeadlineError, UnavailableError
from baton.service.channel import open_channel
from baton.service.discovery import RouterAddress, found_routers
from baton.service.settings import WorkerSettings
from baton.service.status import error_from_rpc
from baton.types import PrefixDelta, WorkerInfo, WorkerLoad
from baton.v1 import fleet_pb2, fleet_pb2_grpc

_log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0
MAX_BACKOFF_S = 5.0
DISCOVER_S = 5.0
"""How often the routers' names are looked up."""
MAX_HASHES = 65536
"""Per heartbeat: half a megabyte, within any message limit."""


class Feed(Protocol):
    """One reader's view of a prefix cache; see `baton.engine.aio.PrefixFeed`."""

    def take(self) -> PrefixDelta: ...

    def close(self) -> None: ...


class Reporter(Protocol):
    """What a member reports from; `AsyncEngine` is one."""

    @property
    def load(self) -> WorkerLoad: ...

    def prefix_feed(self) -> Feed: ...


@dataclass(frozen=True, slots=True)
class _Standing:
    """What a worker takes on."""

    draining: bool = False
    stalled: bool = False


@dataclass(slots=True, eq=False)
class _Link:
    """One router."""

    router: RouterAddress
    task: asyncio.Task[None] | None = None
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    joined: bool = False
    told_standing: "_Standing | None" = None
    told: WorkerInfo | None = None
    """What this router was told that the worker is."""
    lost: bool = False
    """Whether the loss of this router was logged and no join has succeeded since."""


class FleetAgent:
    """See the module docstring."""

    def __init__(self, info: WorkerInfo, reporter: Reporter, settings: WorkerSettings) -> None:
        self._info = info
        self._reporter = reporter
        self._settings = settings
        self._standing = _Standing()
        self._links: list[_Link] = []
        self._discovering: asyncio.Task[None] | None = None

    @property
    def num_joined(self) -> int:
        """Routers that count this worker as a member."""
        return sum(link.joined for link in self._links)

    @property
    def num_routers(self) -> int:
        """Routers that are joined, or tried again and again."""
        return len(self._links)

    def start(self) -> None:
        if self._settings.discover_routers:
            self._discovering = asyncio.create_task(self._discover(), name="discover routers")
            return
        for target in self._settings.routers:
            self._add(RouterAddress(target))

    def set_standing(self, *, draining: bool, stalled: bool = False) -> None:
        """Tells every router at once to place nothing new here, or that it may again; what runs on a draining worker goes elsewhere,
        what runs on a stalled one stays.
        """
        standing = _Standing(draining, stalled)
        if standing != self._standing:
            self._standing = standing
            for link in self._links:
                link.wake.set()

    def announce(self, info: WorkerInfo) -> None:
        """The worker's role changed: tells every router at once."""
        self._info = info
        for link in self._links:
            link.wake.set()

    async def told(self, timeout_s: float) -> None:
        """Returns once every joined router was told what the worker is and whether it drains, or after the timeout."""
        end_s = asyncio.get_running_loop().time() + timeout_s
        while any(
            link.joined and (link.told_standing != self._standing or link.told is not self._info)
            for link in self._links
        ):
            if asyncio.get_running_loop().time() >= end_s:
                return
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Leaves every router. Idempotent."""
        tasks = [self._discovering, *(link.task for link in self._links)]
        running = [task for task in tasks if task is not None]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        self._discovering, self._links = None, []

    def _add(self, router: RouterAddress) -> None:
        link = _Link(router)
        link.task = asyncio.create_task(self._stay(link), name=f"fleet-{router.target}")
        self._links.append(link)

    async def _discover(self) -> None:
        known = True
        while True:
            try:
                await self._follow(await found_routers(self._settings.routers))
                known = True
            except OSError as error:  # whoever was found stays
                if known:
                    _log.warning("the routers' names cannot be looked up: %s", error)
                known = False
            await asyncio.sleep(DISCOVER_S)

    async def _follow(self, routers: frozenset[RouterAddress]) -> None:
        """Joins who is new, and gives up who is gone."""
        for router in routers - {link.router for link in self._links}:
            self._add(router)
        gone = [link for link in self._links if link.router not in routers and not link.joined]
        self._links = [link for link in self._links if link not in gone]
        for link in gone:
            assert link.task is not None
            link.task.cancel()
            await asyncio.wait({link.task})

    async def _stay(self, link: _Link) -> None:
        backoff_s = self._settings.rejoin_backoff_s
        while True:
            try:
                await self._belong(link)
            except Exception as error:  # noqa: BLE001 - a router's fault must not end membership
                if not link.lost:
                    _log.warning("not joined to router %s: %s", link.router.target, _reason(error))
                    link.lost = True
            if link.joined:
                link.joined = False
                backoff_s = self._settings.rejoin_backoff_s
            # Jitter keeps a fleet from returning to a restarted router all at once.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))  # noqa: S311
            backoff_s = min(MAX_BACKOFF_S, 2 * backoff_s)

    async def _belong(self, link: _Link) -> None:
        """One membership, from joining to its loss."""
        router = link.router
        async with open_channel(
            router.target, self._settings, server_name=router.server_name
        ) as channel:
            stub = fleet_pb2_grpc.FleetServiceStub(channel)
            call: Any = stub.Join()
            try:
                async with asyncio.timeout(JOIN_TIMEOUT_S):
                    await self._announce(link, call)
                    terms = await self._read(call)
                if terms is None or not terms.HasField("joined"):
                    raise UnavailableError("the router did not answer the announcement")
                await self._report(link, call, terms.joined)
            finally:
                call.cancel()

    async def _announce(self, link: _Link, call: Any) -> None:
        info = self._info
        announce = fleet_pb2.JoinRequest.Announce(info=worker_info_to_proto(info))
        await call.write(fleet_pb2.JoinRequest(announce=announce))
        link.told = info

    async def _report(self, link: _Link, call: Any, terms: fleet_pb2.JoinResponse.Joined) -> None:
        """Heartbeats until the stream ends, which raises."""
        loop = asyncio.get_running_loop()
        with closing(self._reporter.prefix_feed()) as feed:
            end = loop.create_task(self._read(call))
            try:
                while True:
                    link.wake.clear()
                    standing = self._standing
                    async with asyncio.timeout(terms.lease_seconds):
                        if link.told is not self._info:
                            await self._announce(link, call)
                        for message in _heartbeats(self._reporter.load, feed.take(), standing):
                            await call.write(message)
                    link.told_standing = standing
                    if not link.joined:
                        link.joined, link.lost = True, False
                        _log.info("joined router %s", link.router.target)
                    await _first_of(end, link.wake, terms.heartbeat_seconds)
                    if end.done():
                        end.result()
                        raise UnavailableError("the router ended the membership")
            finally:
                end.cancel()
                # An error of its would hold this frame, which holds the call, which holds its connection: until the collector comes by.
                del end

    async def _read(self, call: Any) -> fleet_pb2.JoinResponse | None:
        """None at the end of the stream."""
        response = await call.read()
        return response if isinstance(response, fleet_pb2.JoinResponse) else None


def _heartbeats(
    load: WorkerLoad, delta: PrefixDelta, standing: _Standing
) -> Iterator[fleet_pb2.JoinRequest]:
    """At least one; several where the delta is large."""
    count = max(len(delta.stored), len(delta.evicted), 1)
    for first in range(0, count, MAX_HASHES):
        piece = PrefixDelta(
            stored=delta.stored[first : first + MAX_HASHES],
            evicted=delta.evicted[first : first + MAX_HASHES],
        )
        yield fleet_pb2.JoinRequest(
            heartbeat=fleet_pb2.JoinRequest.Heartbeat(
                load=load_to_proto(load),
                prefix=prefix_delta_to_proto(piece),
                draining=standing.draining,
                stalled=standing.stalled,
            )
        )


async def _first_of(end: asyncio.Task[Any], wake: asyncio.Event, timeout_s: float) -> None:
    """Waits for the end of the stream, a reason to report early, or the time to report."""
    woken = asyncio.create_task(wake.wait())
    try:
        await asyncio.wait({end, woken}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        woken.cancel()


def _reason(error: Exception) -> str:
    typed: BatonError
    if isinstance(error, grpc.RpcError):
        typed = error_from_rpc(error)
    elif isinstance(error, TimeoutError):
        typed = DeadlineError("fleet membership")
    elif isinstance(error, BatonError):
        typed = error
    else:
        return f"{type(error).__name__}: {error}"
    return typed.message
