"""The soak: faults of every kind, one or two at a time in random order, under steady load, and then a search for anything left behind.

    python -m tests.faults.soak [--minutes 10 | --once] [--seed 0]

Routers and workers are processes as they are shipped, KV goes over Ray, and engines are simulated: their tokens depend on every
KV entry before them. Every answer is compared with the undisturbed one; no request of the steady load may fail.

A fault may begin at any instant of another one, whatever the two kinds are, on the same victim too. Three rules bound what they
may do together:

    veterans   a router and a worker of each role are never ended, so that what they leak adds up; they are frozen, cut off and hang
               like all others, and so both routers, or all workers of a role, may be gone at once
    stranded   where both faults take away routers, or workers of one role, the next one begins after both: a request waits
               `worker_wait_s` for a worker, and a client `reconnect_s` for a router, and no outage that others prolong ends by itself
    unasked    while clients have no router at all, nobody asks anew: what no router has accepted, a client gives up after 3 s, which
               is less than a router takes to come back. What was accepted goes on
"""

import argparse
import asyncio
import random
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local
from tests.faults.soak_cases import undisturbed
from tests.faults.soak_faults import Faults
from tests.faults.soak_fleet import soak_fleet
from tests.faults.soak_leaks import REST_S, attempts_of, find_leaks
from tests.faults.soak_load import Load
from tests.faults.soak_plan import Kind, Lasted, Plan, may_strand
from tests.faults.soak_report import Report, account

WIDTH = 12
"""Requests at any time."""
AT_ONCE = 2
"""Faults."""
STAGGER_S = 1.0
"""Longest time between the begin of a fault and that of the next one beside it."""
LONGEST_WAIT_S = 15.0
"""A client's patience, `reconnect_s`: more than a router that has just started waits for its workers. A hang is longer."""


class Disturbance:
    """Begins fault after fault. `lasted` has those that are over."""

    def __init__(self, faults: Faults, plan: Plan, seed: int) -> None:
        self._faults = faults
        self._plan = plan
        self._seed = seed
        self._lasting: dict[asyncio.Task[None], Kind] = {}
        self._began_s = time.monotonic()
        self.lasted: list[Lasted] = []

    async def run(self, seconds: float | None) -> None:
        """Until the plan is done, or the time is over; and all faults too."""
        end_s = None if seconds is None else time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            number = 0
            while not self._plan.is_done and (end_s is None or time.monotonic() < end_s):
                rng = random.Random(f"{self._seed}:{number}")
                alone = self._plan.draw_alone()
                await self._until_at_most(0 if alone else AT_ONCE - 1)
                kind = self._plan.draw(next(iter(self._lasting.values()), None))
                task = group.create_task(self._run(kind, rng))
                self._lasting[task] = kind
                task.add_done_callback(self._lasting.pop)
                if alone or may_strand(list(self._lasting.values())):
                    await self._until_at_most(0)
                else:
                    await asyncio.wait({task}, timeout=rng.random() * STAGGER_S)
                number += 1

    async def _until_at_most(self, count: int) -> None:
        while len(self._lasting) > count:
            await asyncio.wait(self._lasting, return_when=asyncio.FIRST_COMPLETED)

    async def _run(self, kind: Kind, rng: random.Random) -> None:
        began_s = time.monotonic()
        print(f"{began_s - self._began_s:6.1f} s {kind.name}", flush=True)  # noqa: T201
        try:
            async with asyncio.timeout(REST_S):
                await self._faults.run(kind, rng)
        except Exception as error:
            error.add_note(f"during {kind.name}")
            raise
        self.lasted.append(Lasted(kind.name, began_s, time.monotonic()))


async def soak(cluster: RayCluster, *, seconds: float | None, seed: int) -> Report:
    """Runs for so long, or until each kind was there once, and a little longer; raises AssertionError for whatever breaks a promise."""
    async with AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="baton-soak-"))
        store = Path(directory) / "sessions.db"
        fleet = await stack.enter_async_context(soak_fleet(cluster, store))
        one, two = (door.address for door in fleet.doors)
        load = Load([f"{one},{two}", f"{two},{one}"])
        stack.push_async_callback(load.close)
        load.know(await undisturbed(fleet.addresses))
        faults = Faults(fleet, load, store)
        plan = Plan(faults.kinds, random.Random(seed), once=seconds is None)
        disturbance = Disturbance(faults, plan, seed)
        async with asyncio.TaskGroup() as group:
            with load.running(group, WIDTH):
                await disturbance.run(seconds)
        report = account(disturbance.lasted, load.traces)
        count = len(faults.kinds)
        report.num_possible_pairs = count * (count + 1) // 2
        assert report.longest_gap_s < LONGEST_WAIT_S, "\n".join(report.longest)
        await fleet.at_rest(REST_S)
        await find_leaks(fleet, load)
        for router in fleet.routers:
            report.attempts += attempts_of(router)
    return report


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="faults of every kind under steady load")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--once", action="store_true", help="until each kind was there once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    seconds = None if args.once else 60 * args.minutes
    with start_local(LocalRaySettings(namespace="baton-soak", prestarted_workers=4)) as cluster:
        report = asyncio.run(soak(cluster, seconds=seconds, seed=args.seed))
    print(report.table())  # noqa: T201


if __name__ == "__main__":
    main()
