"""Whether processes that lived through a soak hold more than fresh ones that did the same calm work: files, threads, asyncio tasks."""

import asyncio
import itertools
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial

from baton.client import AsyncClient, Result
from baton.types import Role
from baton.worker.actor import RunningWorker
from tests.faults.probes import metrics, num_files, num_threads
from tests.faults.routers import RouterProcess
from tests.faults.soak_fleet import HANDOFF_TIMEOUT_S, SoakFleet
from tests.faults.soak_load import Load
from tests.faults.soak_router import TASKS
from tests.faults.soak_workers import DEDICATED, FLEXIBLE

REST_S = 60.0
SETTLE_S = 2 * HANDOFF_TIMEOUT_S
"""Time for what was asked by workers that died to be given up."""
FILES_SLACK = 5
"""Connections that gRPC and Ray open and close as they like."""
THREADS_SLACK = 8
"""The event loop's own pool grows to six, and gRPC's and Ray's as they like."""
POLL_S = 0.5
CALM_CASES = 24
"""For each router."""


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process holds."""

    files: int
    threads: int
    tasks: Counter[str]
    """By what they run."""

    def excess(self, fresh: "Holdings", num_peers: int) -> list[str]:
        """What it holds beyond a fresh one; empty where that is nothing to speak of. Some tasks run for each peer that one has called,
        which the fresh one may not have done.
        """
        found = []
        if self.files > fresh.files + FILES_SLACK:
            found.append(f"{self.files} files, not {fresh.files}")
        if self.threads > fresh.threads + THREADS_SLACK:
            found.append(f"{self.threads} threads, not {fresh.threads}")
        more = [name for name, n in self.tasks.items() if n > max(num_peers, fresh.tasks[name])]
        found += [f"{self.tasks[name]} {name}, not {fresh.tasks[name]}" for name in more]
        return found

    def told(self) -> str:
        return f"{self.files} files, {self.threads} threads, {self.tasks.total()} tasks"


async def find_leaks(fleet: SoakFleet, load: Load) -> None:
    """Raises AssertionError where anything is left. Precondition: nothing runs. Ends the load: what its clients keep open at the routers
    is no leak.
    """
    await load.close()
    new = fleet.routers[-1]
    new.signal(signal.SIGTERM)
    await asyncio.to_thread(new.wait)
    await asyncio.to_thread(new.start)
    lived = list(fleet.workers.values())
    fresh = await fresh_workers(fleet)
    await fleet.whole()
    assert not attempts_of(new)
    results = await ask_calmly(fleet, load, CALM_CASES)
    assert not any(a.failure for result in results for a in result.attempts)
    counted = sum(attempts_of(router)["ok"] for router in fleet.routers)
    assert counted >= sum(len(result.completions) for result in results)
    await fleet.at_rest(REST_S)
    await settle(fleet, lived, fresh)


async def ask_calmly(fleet: SoakFleet, load: Load, count: int) -> list[Result]:
    """So many cases at each router."""
    results = []
    for router in fleet.routers:
        async with AsyncClient(router.address) as client:
            asked = await asyncio.gather(*(load.ask(client) for _ in range(count)))
        results += list(itertools.chain(*asked))
    return results


async def fresh_workers(fleet: SoakFleet) -> dict[tuple[Role, bool], RunningWorker]:
    """Of each role, one that can turn to the other role and one that cannot, as veterans."""
    fresh = {}
    for actors in (DEDICATED, FLEXIBLE):
        fleet.actors = actors
        for role in Role:
            fresh[role, actors is DEDICATED] = await fleet.join_linked(role)
    return fresh


async def settle(
    fleet: SoakFleet,
    lived: list[RunningWorker],
    fresh: dict[tuple[Role, bool], RunningWorker],
) -> None:
    """Returns once each process was seen to hold no more than its fresh like."""
    old, new = fleet.routers

    async def routers() -> tuple[Holdings, Holdings]:
        return await asyncio.to_thread(of_router, old), await asyncio.to_thread(of_router, new)

    async def workers(worker: RunningWorker) -> tuple[Holdings, Holdings]:
        like = fresh[worker.info.role, worker.info.worker_id in fleet.veterans]
        return await of_worker(worker), await of_worker(like)

    end_s = time.monotonic() + SETTLE_S
    waiting: dict[str, Callable[[], Awaitable[tuple[Holdings, Holdings]]]] = {"router": routers}
    for worker in lived:
        age = "veteran" if worker.info.worker_id in fleet.veterans else "mortal"
        waiting[f"{age} {worker.info.worker_id}"] = partial(workers, worker)
    while waiting:
        for name, look in tuple(waiting.items()):
            mine, other = await look()
            num_peers = len(fleet.workers) if look is routers else len(fleet.routers)
            if not (excess := mine.excess(other, num_peers)):
                print(f"{name}: {mine.told()}; fresh {other.told()}")  # noqa: T201
                del waiting[name]
            assert not excess or time.monotonic() < end_s, f"{name} has left {excess}"
        await asyncio.sleep(POLL_S)


async def of_worker(worker: RunningWorker) -> Holdings:
    tasks: Counter[str] = await worker._handle.tasks.remote()
    return Holdings(num_files(worker.info.pid), num_threads(worker.info.pid), tasks)


def of_router(router: RouterProcess) -> Holdings:
    tasks: Counter[str] = Counter()
    for name, value in metrics(router.metrics_port).items():
        if name.startswith(f"{TASKS}{{"):
            tasks[name.partition('name="')[2].rpartition('"')[0]] = int(value)
    return Holdings(num_files(router.pid), num_threads(router.pid), tasks)


def attempts_of(router: RouterProcess) -> Counter[str]:
    """By reason. Requests that ended, ended by an attempt; nothing runs any more."""
    told = metrics(router.metrics_port)
    served = [name for name in told if name.startswith(("baton_running_req", "baton_queued_req"))]
    assert not any(told[name] for name in served)
    attempts: Counter[str] = Counter()
    for name, value in told.items():
        if name.startswith("baton_attempts_total"):
            attempts[name.partition('reason="')[2].partition('"')[0]] += int(value)
    return attempts
