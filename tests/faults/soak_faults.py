"""The soak's faults: each method is one, and returns once what it took away is back. Two of them may run at a time, on the same victim
too, so whatever a fault finds may have ended before it.
"""

import asyncio
import random
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing, suppress
from functools import partial
from pathlib import Path

from ray.exceptions import RayError

from baton.types import Role, WorkerId
from baton.worker.actor import RunningWorker
from tests.faults.soak_fleet import SoakFleet
from tests.faults.soak_load import Load
from tests.faults.soak_plan import Kind, Target

AWAY_S = 1.0
"""How long what is stopped or cut stays so after everybody has noticed."""
ROUTER_AWAY_S = 3.0
"""Longer than a client takes to notice."""
BRIEF_S = 0.7
"""Shorter than any lease."""
HANG_S = 2.0
"""Longer than any step may take before its worker is not ready."""
STORE_BUSY_S = 1.5
"""Twice that is shorter than a router waits for it, and so is that and a router that is frozen while it writes."""
GIVE_UP_TIMES = 40
"""Requests that are given up at once."""
SLOW_READERS = 4
SLOW_S = 0.04
"""Between two messages that a slow reader takes."""
POLL_S = 0.02

Fault = Callable[[random.Random], Awaitable[None]]
"""Draws its victim."""


class Faults:
    """Of one fleet, under one load."""

    def __init__(self, fleet: SoakFleet, load: Load, store: Path) -> None:
        """`store` is that of sessions."""
        self._store = store
        self._fleet = fleet
        self._load = load
        self._chosen: Counter[WorkerId] = Counter()
        self._stopped: set[WorkerId] = set()
        self._unlinked: set[WorkerId] = set()
        self._turning: set[WorkerId] = set()
        self._routers_out: Counter[int] = Counter()
        self._faults: dict[Kind, Fault] = {}
        for role in (Role.PREFILL, Role.DECODE):
            of_worker = {
                "SIGKILL": self._kill,
                "SIGTERM": self._retire,
                "SIGSTOP": self._stop,
                "brief SIGSTOP": self._stop_briefly,
                "cut off": self._cut,
                "hanging": self._hang,
                "failing": self._fail,
                "turning": self._turn,
            }
            for name, of_role in of_worker.items():
                kind = Kind(f"{name} {role.value}", Target(role.value))
                self._faults[kind] = partial(of_role, role)
        of_router: dict[str, Fault] = {
            "SIGKILL router": partial(self._end_router, [signal.SIGKILL]),
            "SIGTERM router": partial(self._end_router, [signal.SIGTERM]),
            "SIGINT, SIGTERM router": partial(self._end_router, [signal.SIGINT, signal.SIGTERM]),
            "SIGSTOP router": self._stop_router,
            "cut off client": self._cut_clients,
        }
        of_client: dict[str, Fault] = {
            "cancellations": self._cancel,
            "deadlines": self._expire,
            "slow readers": self._read_slowly,
        }
        for name, fault in of_router.items():
            self._faults[Kind(name, Target.ROUTER)] = fault
        self._faults[Kind("busy session store", Target.STORE)] = self._keep_store
        for name, fault in of_client.items():
            self._faults[Kind(name, Target.CLIENT)] = fault

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return tuple(self._faults)

    async def run(self, kind: Kind, rng: random.Random) -> None:
        """One fault."""
        await self._faults[kind](rng)

    async def _mortal(self, role: Role, rng: random.Random) -> RunningWorker:
        """A worker that may end."""
        return await self._one_of(
            lambda: [
                worker
                for worker in self._fleet.of(role)
                if worker.info.worker_id not in self._fleet.veterans
            ],
            rng,
        )

    @asynccontextmanager
    async def _held(
        self, role: Role, rng: random.Random, held: set[WorkerId], *, mortal: bool = False
    ) -> AsyncIterator[RunningWorker]:
        """A worker that the other fault does not hold by the same means: it would let it go too soon."""
        fleet = self._fleet

        def eligible() -> list[RunningWorker]:
            # One that comes has no link yet.
            names = fleet.links.keys() - held - (fleet.veterans if mortal else set())
            return [each for each in fleet.of(role) if each.info.worker_id in names]

        worker = await self._one_of(eligible, rng)
        held.add(worker.info.worker_id)
        try:
            yield worker
        finally:
            held.discard(worker.info.worker_id)

    async def _one_of(
        self, among: Callable[[], list[RunningWorker]], rng: random.Random
    ) -> RunningWorker:
        """The other fault may just have taken the last; then another one is on its way."""
        while not (workers := among()):  # noqa: ASYNC110 - another process
            await asyncio.sleep(POLL_S)
        worker = rng.choice(workers)
        self._chosen[worker.info.worker_id] += 1
        return worker

    async def _kill(self, role: Role, rng: random.Random) -> None:
        worker = await self._mortal(role, rng)
        self._fleet.signal(worker, signal.SIGKILL)
        await self._fleet.restock(worker.info.role)

    async def _retire(self, role: Role, rng: random.Random) -> None:
        worker = await self._mortal(role, rng)
        await self._fleet.join_linked(worker.info.role)
        drained = await self._fleet.retire(worker)
        only = self._chosen[worker.info.worker_id] == 1
        assert drained or not only, "the drain took longer than its grace"
        await self._fleet.restock(worker.info.role)

    async def _stop(self, role: Role, rng: random.Random) -> None:
        async with self._held(role, rng, self._stopped) as worker:
            self._fleet.signal(worker, signal.SIGSTOP)
            await self._fleet.joined(worker, joined=False)
            await asyncio.sleep(AWAY_S)
            self._fleet.signal(worker, signal.SIGCONT)
        await self._fleet.joined(worker)

    async def _stop_briefly(self, role: Role, rng: random.Random) -> None:
        async with self._held(role, rng, self._stopped) as worker:
            self._fleet.signal(worker, signal.SIGSTOP)
            await asyncio.sleep(BRIEF_S)
            self._fleet.signal(worker, signal.SIGCONT)
        await self._fleet.joined(worker)

    async def _cut(self, role: Role, rng: random.Random) -> None:
        async with self._held(role, rng, self._unlinked) as worker:
            link = self._fleet.links[worker.info.worker_id]
            link.cut()
            await self._fleet.joined(worker, joined=False)
            await asyncio.sleep(AWAY_S)
            link.heal()
        await self._fleet.joined(worker)

    async def _hang(self, role: Role, rng: random.Random) -> None:
        worker = await self._one_of(lambda: self._fleet.of(role), rng)
        with suppress(RayError):
            await worker._handle.hang.remote(HANG_S)
        await asyncio.sleep(HANG_S)

    async def _fail(self, role: Role, rng: random.Random) -> None:
        """What has started the worker ends and replaces it."""
        worker = await self._mortal(role, rng)
        with suppress(RayError):
            await worker._handle.fail.remote()
        await worker.ended()
        self._fleet.forget(worker)
        await worker.stop()
        await self._fleet.restock(worker.info.role)

    async def _turn(self, role: Role, rng: random.Random) -> None:
        """To the other role, and back."""
        other = Role.DECODE if role is Role.PREFILL else Role.PREFILL
        async with self._held(role, rng, self._turning, mortal=True) as worker:
            await self._fleet.turn(worker, other)
            await asyncio.sleep(AWAY_S)
            await self._fleet.turn(worker, role)

    async def _end_router(self, numbers: list[signal.Signals], rng: random.Random) -> None:
        """Drains at the first signal, stops at once at the second."""
        index = rng.randrange(1, len(self._fleet.routers))
        router, starting = self._fleet.routers[index], self._fleet.starting[index]
        async with self._without(index):
            async with starting:
                pid = router.pid
                for number in numbers:
                    router.signal(number)
            while router.pid == pid and router.running:  # noqa: ASYNC110 - another process
                await asyncio.sleep(POLL_S)
            async with starting:
                if not router.running:
                    await asyncio.to_thread(router.start)
            await self._rejoined()

    async def _rejoined(self) -> None:
        """Returns once every worker is a member again, but those that the other fault keeps away."""
        for worker in tuple(self._fleet.workers.values()):
            if worker.info.worker_id not in self._stopped | self._unlinked:
                await self._fleet.joined(worker)

    async def _stop_router(self, rng: random.Random) -> None:
        index = rng.randrange(len(self._fleet.routers))
        router, starting = self._fleet.routers[index], self._fleet.starting[index]
        async with self._without(index):
            async with starting:
                router.signal(signal.SIGSTOP)
            await asyncio.sleep(ROUTER_AWAY_S)
            router.signal(signal.SIGCONT)
            await self._rejoined()

    async def _cut_clients(self, rng: random.Random) -> None:
        index = rng.randrange(len(self._fleet.doors))
        async with self._without(index):
            self._fleet.doors[index].cut()
            await asyncio.sleep(ROUTER_AWAY_S)
            self._fleet.doors[index].heal()

    @asynccontextmanager
    async def _without(self, index: int) -> AsyncIterator[None]:
        """Clients lose that router inside; where they have no other one, nobody asks anew."""
        self._routers_out[index] += 1
        try:
            if all(self._routers_out[each] for each in range(len(self._fleet.routers))):
                async with self._load.gate.shut():
                    yield
            else:
                yield
        finally:
            self._routers_out[index] -= 1

    async def _keep_store(self, rng: random.Random) -> None:
        """Another process writes, for long."""
        del rng

        def write() -> None:
            with closing(sqlite3.connect(self._store, isolation_level=None)) as db:
                db.execute("BEGIN IMMEDIATE")
                time.sleep(STORE_BUSY_S)
                db.execute("ROLLBACK")

        await asyncio.to_thread(write)

    async def _cancel(self, rng: random.Random) -> None:
        async def one(after_s: float) -> None:
            asking = asyncio.create_task(self._load.ask())
            await asyncio.sleep(after_s)
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking

        await asyncio.gather(*(one(rng.random()) for _ in range(GIVE_UP_TIMES)))

    async def _expire(self, rng: random.Random) -> None:
        await asyncio.gather(*(self._load.expire(rng.random() / 2) for _ in range(GIVE_UP_TIMES)))

    async def _read_slowly(self, rng: random.Random) -> None:
        del rng
        await asyncio.gather(*(self._load.ask(pause_s=SLOW_S) for _ in range(SLOW_READERS)))
