"""Measures how long a stream pauses for each fault: real processes over Ray, simulated engines with steps of 10 ms.

    python -m benchmarks.recovery [--rounds 20] [--out benchmarks/results/recovery.json]

Every round starts the streams, strikes the process that most of them use once all are where the fault is to hit them, and takes, of
each stream that was hit, the longest wait between two messages after the fault: to find it, to start a new attempt, and to
compute what the peer took with it. Then it makes the fleet whole again. Of clients that cancel at random instants, it takes the time
from the last one's leaving until no worker holds a block for any of them.
"""

import argparse
import asyncio
import random
import signal
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from baton.client import AsyncClient, ConnectionOptions, SamplingOptions
from baton.engine.sim import SimConfig
from baton.service.settings import RouterSettings
from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local
from baton.types import Role, WorkerId
from baton.worker.actor import RunningWorker
from benchmarks.report import write_report
from tests.faults.actors import ActorFleet, actor_fleet
from tests.faults.links import Link, add_linked
from tests.faults.probes import load_of
from tests.faults.proxy import Proxy

STREAMS = 8
SIM = SimConfig(num_blocks=4096, max_batch_tokens=512, step_s=0.01)
SAMPLING = SamplingOptions(max_tokens=500, temperature=0.0, ignore_eos=True)
PINGS = ConnectionOptions(keepalive_s=1.0, keepalive_timeout_s=1.0)
LEAVING = 100
"""Clients that cancel in one round."""
FIRST = 20
"""Messages of a stream before the fault, where decode is hit."""


@dataclass(slots=True)
class Heard:
    """When a stream's messages came."""

    at_s: list[float]
    hit: bool = False

    def pause_s(self, struck_s: float) -> float:
        """The longest wait that ended after the fault; where there was no message before, it counts from the fault."""
        before = [at_s for at_s in self.at_s if at_s <= struck_s]
        times = [*(before[-1:] or [struck_s]), *self.at_s[len(before) :]]
        return max(later - earlier for earlier, later in pairwise(times))


class Rounds:
    """The fleet under test: two workers of each role, two routers, everything through proxies."""

    def __init__(
        self,
        fleet: ActorFleet,
        doors: list[Proxy],
        links: dict[WorkerId, Link],
        stack: AsyncExitStack,
    ) -> None:
        self._fleet = fleet
        self._doors = doors
        self._links = links
        self._stack = stack
        self._serial = 0

    async def add(self, role: Role) -> RunningWorker:
        worker, link = await add_linked(self._fleet, role, self._stack)
        self._links[worker.info.worker_id] = link
        return worker

    async def worker_round(
        self, role: Role, strike: Callable[[RunningWorker], Awaitable[object]]
    ) -> list[float]:
        """Pauses of the streams that the worker had."""
        messages = FIRST if role is Role.DECODE else 0
        async with AsyncClient(self._fleet.addresses) as client:
            heard, struck_s = await self._run(client, role, messages, strike)
        return [each.pause_s(struck_s) for each in heard if each.hit]

    async def drain_round(self, role: Role) -> list[float]:
        """Longest waits of the streams that were moved."""
        await self.add(role)
        async with AsyncClient(self._fleet.addresses) as client:
            heard, struck_s = await self._run(client, role, FIRST, self._fleet.retire)
        return [each.pause_s(struck_s) for each in heard if each.hit]

    async def router_round(self, strike: Callable[[], Awaitable[object]]) -> list[float]:
        """Pauses of all streams: all use the first router."""
        first, second = self._doors
        async with AsyncClient(f"{first.address},{second.address}", connection=PINGS) as client:
            heard, struck_s = await self._run(client, Role.DECODE, FIRST, lambda _: strike())
        return [each.pause_s(struck_s) for each in heard]

    async def cancel_round(self) -> list[float]:
        """Seconds until both pools are at rest after many cancellations."""
        rng = random.Random(self._serial)

        async def leave(client: AsyncClient) -> None:
            self._serial += 1
            prompt = [(self._serial * 31 + i * 7) % 255 + 1 for i in range(rng.randrange(1, 500))]
            asking = asyncio.create_task(client.complete(prompt, sampling=SAMPLING))
            await asyncio.sleep(rng.random())
            asking.cancel()
            await asyncio.wait({asking})

        async with AsyncClient(self._fleet.addresses) as client:
            await asyncio.gather(*(leave(client) for _ in range(LEAVING)))
            left_s = time.monotonic()
            await self._fleet.at_rest(30)
        return [time.monotonic() - left_s]

    async def make_whole(self, role: Role) -> None:
        """Two of that role, every worker a member everywhere, nothing held."""
        while len(self._fleet.of(role)) < 2:
            await self.add(role)
        for worker in tuple(self._fleet.workers.values()):
            await self._fleet.joined(worker)
        await self._fleet.at_rest(30)

    async def _run(
        self,
        client: AsyncClient,
        role: Role,
        messages: int,
        strike: Callable[[RunningWorker], Awaitable[object]],
    ) -> tuple[list[Heard], float]:
        heard = [Heard([]) for _ in range(STREAMS)]
        struck: asyncio.Future[RunningWorker] = asyncio.get_running_loop().create_future()

        async def read(number: int) -> None:
            self._serial += 1
            prompt = [(self._serial * 31 + i * 7) % 255 + 1 for i in range(500)]
            prompt[:2] = divmod(self._serial, 255)
            async with client.generate(prompt, sampling=SAMPLING, timeout_s=60) as stream:
                async for _ in stream:
                    heard[number].at_s.append(time.monotonic())
                name = (await struck).info.worker_id
                heard[number].hit = any(
                    name in (a.prefill_worker, a.decode_worker) and a.failure
                    for a in stream.result.attempts
                )

        async with asyncio.TaskGroup() as group:
            for number in range(STREAMS):
                group.create_task(read(number))
            # Prompts of 500 tokens take a step each: prefill is at work for 80 ms.
            await asyncio.sleep(0.04)
            while any(len(each.at_s) < messages for each in heard):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            struck.set_result(await asyncio.to_thread(busiest, self._fleet.of(role)))
            struck_s = time.monotonic()
            await strike(struck.result())
        return heard, struck_s


def busiest(workers: list[RunningWorker]) -> RunningWorker:
    """Now."""
    return max(workers, key=lambda worker: load_of(worker.info).running_requests)


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of round."""

    name: str
    run: Callable[[], Awaitable[list[float]]]
    whole: Callable[[], Awaitable[None]]


class Faults:
    """Every kind, with how the fleet becomes whole again."""

    def __init__(
        self, rounds: Rounds, fleet: ActorFleet, doors: list[Proxy], links: dict[WorkerId, Link]
    ) -> None:
        self._rounds = rounds
        self._fleet = fleet
        self._doors = doors
        self._links = links

    def all(self) -> list[Fault]:
        return [
            *self._of(Role.PREFILL),
            *self._of(Role.DECODE),
            Fault(
                "decode: SIGTERM, requests move",
                lambda: self._rounds.drain_round(Role.DECODE),
                lambda: self._rounds.make_whole(Role.DECODE),
            ),
            Fault(
                "router: SIGKILL",
                lambda: self._rounds.router_round(self._kill_router),
                self._restart_router,
            ),
            Fault(
                "router: network cut, pings of 1 s",
                lambda: self._rounds.router_round(self._cut_door),
                self._heal_door,
            ),
            Fault(
                f"{LEAVING} cancel: blocks free",
                self._rounds.cancel_round,
                lambda: self._rounds.make_whole(Role.DECODE),
            ),
        ]

    def _of(self, role: Role) -> list[Fault]:
        async def stop(worker: RunningWorker) -> None:
            self._fleet.signal(worker, signal.SIGSTOP)

        async def kill(worker: RunningWorker) -> None:
            self._fleet.signal(worker, signal.SIGKILL)

        async def cut(worker: RunningWorker) -> None:
            self._links[worker.info.worker_id].cut()

        def fault(
            name: str,
            strike: Callable[[RunningWorker], Awaitable[object]],
            whole: Callable[[], Awaitable[None]],
        ) -> Fault:
            return Fault(
                f"{role.value}: {name}", lambda: self._rounds.worker_round(role, strike), whole
            )

        return [
            fault("SIGKILL", kill, lambda: self._rounds.make_whole(role)),
            fault("SIGSTOP", stop, lambda: self._wake(role)),
            fault("network cut", cut, lambda: self._wake(role)),
        ]

    async def _wake(self, role: Role) -> None:
        for link in self._links.values():
            link.heal()
        for worker in self._fleet.of(role):
            self._fleet.signal(worker, signal.SIGCONT)
        await self._rounds.make_whole(role)

    async def _kill_router(self) -> None:
        self._fleet.routers[0].signal(signal.SIGKILL)

    async def _restart_router(self) -> None:
        await asyncio.to_thread(self._fleet.routers[0].wait)
        await asyncio.to_thread(self._fleet.routers[0].start)
        await self._rounds.make_whole(Role.DECODE)

    async def _cut_door(self) -> None:
        self._doors[0].cut()

    async def _heal_door(self) -> None:
        self._doors[0].heal()
        await self._rounds.make_whole(Role.DECODE)


async def measure(cluster: RayCluster, times: int, only: list[str]) -> dict[str, list[float]]:
    """Seconds, by fault."""
    environ = {"BATON_MIN_CLIENT_PING_S": "0.2", "BATON_ORPHAN_GRACE_S": "2"}
    figures: dict[str, list[float]] = {}
    async with (
        AsyncExitStack() as stack,
        actor_fleet(cluster, SIM, prefill=0, decode=0, routers=2, environ=environ) as fleet,
    ):
        doors = [await Proxy(router.address).start() for router in fleet.routers]
        for door in doors:
            stack.push_async_callback(door.stop)
        links: dict[WorkerId, Link] = {}
        rounds = Rounds(fleet, doors, links, stack)
        for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE):
            await rounds.add(role)
        for fault in Faults(rounds, fleet, doors, links).all():
            if not any(each in fault.name for each in only):
                continue
            found: list[float] = []
            for _ in range(times):
                found += await fault.run()
                await fault.whole()
            figures[fault.name] = found
            print(f"{fault.name:<36}{line(found)}", flush=True)
    return figures


def summary(pauses_s: list[float]) -> dict[str, float]:
    """Of one fault."""
    ordered = sorted(pauses_s)
    if not ordered:
        return {"streams": 0}
    return {
        "streams": len(ordered),
        "p50_s": round(statistics.median(ordered), 3),
        "p99_s": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 3),
        "max_s": round(ordered[-1], 3),
    }


def line(pauses_s: list[float]) -> str:
    """The same, for people."""
    return "  ".join(f"{name} {value:g}" for name, value in summary(pauses_s).items())


def main() -> None:
    """Measures, prints and writes every fault."""
    parser = argparse.ArgumentParser(description="how long streams pause for each fault")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", nargs="+", default=[""], help="faults whose names contain one")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/recovery.json"))
    args = parser.parse_args()
    settings = RouterSettings()
    with start_local(LocalRaySettings(namespace="baton-recovery", prestarted_workers=4)) as cluster:
        figures = asyncio.run(measure(cluster, args.rounds, args.only))
    write_report(
        args.out,
        settings={
            "rounds": args.rounds,
            "streams": STREAMS,
            "heartbeat_s": settings.heartbeat_s,
            "lease_s": settings.lease_s,
            "step_s": SIM.step_s,
        },
        raw={name: [round(each, 4) for each in found] for name, found in figures.items()},
        summary={name: summary(found) for name, found in figures.items()},
    )


if __name__ == "__main__":
    main()
