"""The worker's side of the fleet: stays a member with every router, tells each its load and its prefix cache, and leaves.

One task per router, on the worker's event loop; a router that is away costs one log line and a slow retry. The whole prefix
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
from baton.service.settings import WorkerSettings
from baton.service.status import error_from_rpc
from baton.types import PrefixDelta, WorkerInfo, WorkerLoad
from baton.v1 import fleet_pb2, fleet_pb2_grpc

_log = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0
MAX_BACKOFF_S = 5.0
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


@dataclass(slots=True)
class _Link:
    """One router."""

    address: str
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
        self._links = [_Link(address) for address in settings.routers]
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_joined(self) -> int:
        """Routers that count this worker as a member."""
        return sum(link.joined for link in self._links)

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._stay(link), name=f"fleet-{link.address}")
            for link in self._links
        ]

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
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._tasks = []

    async def _stay(self, link: _Link) -> None:
        backoff_s = self._settings.rejoin_backoff_s
        while True:
            try:
                await self._belong(link)
            except Exception as error:  # noqa: BLE001 - a router's fault must not end membership
                if not link.lost:
                    _log.warning("not joined to router %s: %s", link.address, _reason(error))
                    link.lost = True
            if link.joined:
                link.joined = False
                backoff_s = self._settings.rejoin_backoff_s
            # Jitter keeps a fleet from returning to a restarted router all at once.
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.5))  # noqa: S311
            backoff_s = min(MAX_BACKOFF_S, 2 * backoff_s)

    async def _belong(self, link: _Link) -> None:
        """One membership, from joining to its loss."""
        async with open_channel(link.address, self._settings) as channel:
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
                        _log.info("joined router %s", link.address)
                    await _first_of(end, link.wake, terms.heartbeat_seconds)
                    if end.done():
                        end.result()
                        raise UnavailableError("the router ended the membership")
            finally:
                end.cancel()

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
