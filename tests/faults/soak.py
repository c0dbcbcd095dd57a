"""The soak: faults of every kind, one after another in random order, under steady load, and then a search for anything left behind.

    python -m tests.faults.soak [--minutes 10] [--seed 0]

Routers and workers are processes as they are shipped, KV goes over Ray, and engines are simulated: their tokens depend on every
KV entry before them. Every answer is compared with the undisturbed one; no request of the steady load may fail.
"""

import argparse
import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field

import ray

from baton.engine.sim import SimConfig
from baton.errors import CapacityError, DeadlineError
from baton.service.settings import LogLevel, WorkerSettings
from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local
from baton.types import Role, WorkerId
from baton.worker.actor import RunningWorker
from tests.faults import counting
from tests.faults.actors import ActorFleet, actor_fleet
from tests.faults.links import Link, add_linked
from tests.faults.probes import metrics, num_files, num_threads
from tests.faults.proxy import Proxy
from tests.faults.routers import RouterProcess
from tests.faults.soak_load import Load, Trace, undisturbed

SIM = SimConfig(num_blocks=1024, max_batch_tokens=256, step_s=0.01)
WIDTH = 12
"""Requests at any time."""
ENVIRON = {"BATON_MIN_CLIENT_PING_S": "0.2"}
AWAY_S = 1.0
"""How long what is stopped or cut stays so after everybody has noticed."""
BRIEF_S = 0.7
"""Shorter than any lease."""
FILES_SLACK = 12
"""Connections that gRPC and Ray open and close as they like."""
THREADS_SLACK = 8
TASKS_SLACK = 4
REST_S = 60.0
LONGEST = 12
"""Rows of the longest waits."""
LONGEST_WAIT_S = 10.0
"""Several times what one fault costs (two heartbeats and a second), for faults that overlap on a busy machine; a hang is longer."""


@dataclass(slots=True)
class Row:
    """One kind of fault."""

    times: int = 0
    disturbed: int = 0
    """Requests that went on in another attempt, or on another stream."""
    gaps_s: list[float] = field(default_factory=list)
    """The longest wait of each."""


@dataclass(slots=True)
class Report:
    """What a soak found."""

    rows: dict[str, Row] = field(default_factory=dict)
    requests: int = 0
    longest_calm_gap_s: float = 0.0
    """Of requests that went through in one attempt and on one stream."""
    attempts: Counter[str] = field(default_factory=Counter)
    """By reason, as the routers that live at the end count them."""
    longest: list[str] = field(default_factory=list)
    """The requests that waited longest, and why."""

    def table(self) -> str:
        lines = [f"{'fault':<28}{'times':>6}{'disturbed':>11}{'p50 s':>8}{'p99 s':>8}"]
        for name, row in sorted(self.rows.items()):
            gaps = sorted(row.gaps_s)
            told = [f"{quantile(gaps, q):8.2f}" for q in (0.5, 0.99)] if gaps else ["       -"] * 2
            lines.append(f"{name:<28}{row.times:>6}{row.disturbed:>11}{''.join(told)}")
        lines.append(f"{self.requests} requests, none failed, none differs")
        lines.append(f"longest wait of the others: {self.longest_calm_gap_s:.2f} s")
        lines.append(f"attempts: {dict(self.attempts)}")
        lines += ["longest waits of all:", *self.longest]
        return "\n".join(lines)


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Soak:
    """The faults. One fleet, one load; each method is one fault, and returns once the fleet is whole again."""

    def __init__(
        self,
        *,
        fleet: ActorFleet,
        links: dict[WorkerId, Link],
        doors: list[Proxy],
        load: Load,
        rng: random.Random,
        stack: AsyncExitStack,
    ) -> None:
        self._fleet = fleet
        self._links = links
        self._doors = doors
        self._load = load
        self._rng = rng
        self._stack = stack
        self.faults: tuple[tuple[str, Callable[[], Awaitable[None]]], ...] = (
            ("SIGKILL prefill", lambda: self._kill(Role.PREFILL)),
            ("SIGKILL decode", lambda: self._kill(Role.DECODE)),
            ("SIGKILL router", lambda: self._end_router(signal.SIGKILL)),
            ("SIGTERM prefill", lambda: self._retire(Role.PREFILL)),
            ("SIGTERM decode", lambda: self._retire(Role.DECODE)),
            ("SIGTERM router", lambda: self._end_router(signal.SIGTERM)),
            ("SIGINT, SIGTERM router", lambda: self._end_router(signal.SIGINT, signal.SIGTERM)),
            ("SIGSTOP prefill", lambda: self._stop(Role.PREFILL)),
            ("SIGSTOP decode", lambda: self._stop(Role.DECODE)),
            ("SIGSTOP router", self._stop_router),
            ("brief SIGSTOP prefill", lambda: self._stop_briefly(Role.PREFILL)),
            ("brief SIGSTOP decode", lambda: self._stop_briefly(Role.DECODE)),
            ("cut off prefill", lambda: self._cut(Role.PREFILL)),
            ("cut off decode", lambda: self._cut(Role.DECODE)),
            ("cut off client", self._cut_clients),
            ("cancellations", self._cancel),
            ("deadlines", self._expire),
            ("slow readers", self._read_slowly),
        )

    def _any(self, role: Role) -> RunningWorker:
        return self._rng.choice(self._fleet.of(role))

    async def add(self, role: Role) -> RunningWorker:
        worker, link = await add_linked(self._fleet, role, self._stack)
        self._links[worker.info.worker_id] = link
        return worker

    async def _kill(self, role: Role) -> None:
        self._fleet.signal(self._any(role), signal.SIGKILL)
        await self.add(role)

    async def _retire(self, role: Role) -> None:
        worker = self._any(role)
        await self.add(role)
        assert await self._fleet.retire(worker), "the drain took longer than its grace"

    async def _stop(self, role: Role) -> None:
        worker = self._any(role)
        self._fleet.signal(worker, signal.SIGSTOP)
        await self._fleet.joined(worker, joined=False)
        await asyncio.sleep(AWAY_S)
        self._fleet.signal(worker, signal.SIGCONT)
        await self._fleet.joined(worker)

    async def _stop_briefly(self, role: Role) -> None:
        worker = self._any(role)
        self._fleet.signal(worker, signal.SIGSTOP)
        await asyncio.sleep(BRIEF_S)
        self._fleet.signal(worker, signal.SIGCONT)
        await self._fleet.joined(worker)

    async def _cut(self, role: Role) -> None:
        worker = self._any(role)
        link = self._links[worker.info.worker_id]
        link.cut()
        await self._fleet.joined(worker, joined=False)
        await asyncio.sleep(AWAY_S)
        link.heal()
        await self._fleet.joined(worker)

    async def _end_router(self, *numbers: signal.Signals) -> None:
        """Drains at the first signal, stops at once at the second."""
        router = self._rng.choice(self._fleet.routers)
        for number in numbers:
            router.signal(number)
        await asyncio.to_thread(router.wait)
        await asyncio.to_thread(router.start)
        await self._whole()

    async def _stop_router(self) -> None:
        router = self._rng.choice(self._fleet.routers)
        router.signal(signal.SIGSTOP)
        await asyncio.sleep(4 * AWAY_S)
        router.signal(signal.SIGCONT)
        await self._whole()

    async def _cut_clients(self) -> None:
        door = self._rng.choice(self._doors)
        door.cut()
        await asyncio.sleep(4 * AWAY_S)
        door.heal()

    async def _cancel(self) -> None:
        async def one() -> None:
            asking = asyncio.create_task(self._load.ask())
            await asyncio.sleep(self._rng.random())
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking

        await asyncio.gather(*(one() for _ in range(40)))

    async def _expire(self) -> None:
        async def one() -> None:
            case = self._load.any_case()
            timeout_s = self._rng.random() / 2
            # A deadline that cannot be kept is refused at once.
            with suppress(DeadlineError, CapacityError):
                await self._load.client.complete(
                    case.prompt, sampling=case.sampling, timeout_s=timeout_s
                )

        await asyncio.gather(*(one() for _ in range(40)))

    async def _read_slowly(self) -> None:
        await asyncio.gather(*(self._load.ask(pause_s=0.2) for _ in range(4)))

    async def _whole(self) -> None:
        for worker in tuple(self._fleet.workers.values()):
            await self._fleet.joined(worker)


async def soak(cluster: RayCluster, *, seconds: float, seed: int) -> Report:
    """Runs for so long, and a little longer; raises AssertionError for whatever breaks a promise."""
    ray.cloudpickle.register_pickle_by_value(counting)  # type: ignore[no-untyped-call]
    actors = {
        Role.PREFILL: counting.CountingPrefillActor,
        Role.DECODE: counting.CountingDecodeActor,
    }
    settings = WorkerSettings(log_level=LogLevel.ERROR)
    report = Report()
    async with (
        AsyncExitStack() as stack,
        actor_fleet(
            cluster,
            SIM,
            prefill=0,
            decode=0,
            routers=2,
            environ=ENVIRON,
            actors=actors,
            settings=settings,
        ) as fleet,
    ):
        doors = [await Proxy(router.address).start() for router in fleet.routers]
        for door in doors:
            stack.push_async_callback(door.stop)
        one, two = (door.address for door in doors)
        links: dict[WorkerId, Link] = {}
        rng = random.Random(seed)
        load = Load([f"{one},{two}", f"{two},{one}"], [])
        stack.push_async_callback(load.close)
        here = Soak(fleet=fleet, links=links, doors=doors, load=load, rng=rng, stack=stack)
        await asyncio.gather(
            *(here.add(role) for role in (Role.PREFILL, Role.PREFILL, Role.DECODE, Role.DECODE))
        )
        load.know(await undisturbed(fleet.addresses))
        windows = await disturb(here, load, rng, seconds)
        account(report, windows, load.traces)
        waits = [trace.gap_s for trace in load.traces]
        assert max(waits) < LONGEST_WAIT_S, "\n".join(report.longest)
        await fleet.at_rest(REST_S)
        await find_leaks(here, fleet, load)
        for router in fleet.routers:
            report.attempts += attempts_of(router)
    return report


async def disturb(
    here: Soak, load: Load, rng: random.Random, seconds: float
) -> list[tuple[str, float]]:
    """Fault after fault while the load runs; when each began."""
    windows: list[tuple[str, float]] = []
    end_s = time.monotonic() + seconds
    async with asyncio.TaskGroup() as group:
        with load.running(group, WIDTH):
            while time.monotonic() < end_s:
                for name, fault in rng.sample(here.faults, len(here.faults)):
                    windows.append((name, time.monotonic()))
                    print(f"{name}", flush=True)  # noqa: T201
                    async with asyncio.timeout(REST_S):
                        await fault()
                    if time.monotonic() >= end_s:
                        break
            windows.append(("calm", time.monotonic()))
    return windows


def account(report: Report, windows: list[tuple[str, float]], traces: list[Trace]) -> None:
    """Each disturbed request belongs to the fault during which its longest wait began."""
    report.requests = len(traces)
    for name, _ in windows[:-1]:
        report.rows.setdefault(name, Row()).times += 1
    for trace in traces:
        if not trace.disturbed:
            report.longest_calm_gap_s = max(report.longest_calm_gap_s, trace.gap_s)
            continue
        ended_s = trace.gap_began_s + trace.gap_s
        name = next(n for n, began_s in reversed(windows) if began_s <= ended_s)
        row = report.rows.setdefault(name, Row())
        row.disturbed += 1
        row.gaps_s.append(trace.gap_s)
    disturbed = sorted((t for t in traces if t.disturbed), key=lambda t: t.gap_s, reverse=True)
    report.longest = [told(trace, windows) for trace in disturbed[:LONGEST]]


def told(trace: Trace, windows: list[tuple[str, float]]) -> str:
    """The wait, the faults that it spans with the time from its begin to theirs, and the request's way."""
    ended_s = trace.gap_began_s + trace.gap_s
    before = [w for w in windows if w[1] <= trace.gap_began_s][-1:]
    during = [w for w in windows if trace.gap_began_s < w[1] <= ended_s]
    faults = ", ".join(f"{name} {at_s - trace.gap_began_s:+.2f}" for name, at_s in before + during)
    way = "; ".join(trace.attempts)
    return f"  {trace.gap_s:6.2f} s after {trace.gap_at} messages: {faults}\n      {way}\n      {trace.times}"


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


async def find_leaks(here: Soak, fleet: ActorFleet, load: Load) -> None:
    """Compares processes that have lived through the soak with fresh ones that did the same calm work."""
    old_router, new_router = fleet.routers
    new_router.signal(signal.SIGTERM)
    await asyncio.to_thread(new_router.wait)
    await asyncio.to_thread(new_router.start)
    veterans = list(fleet.workers.values())
    fresh = {role: await here.add(role) for role in Role}
    for veteran in veterans:
        await fleet.joined(veteran)
    before = attempts_of(new_router)
    assert not before
    results = await asyncio.gather(*(load.ask() for _ in range(48)))
    assert not any(a.failure for result in results for a in result.attempts)
    counted = sum((attempts_of(router)["ok"] for router in fleet.routers), start=0)
    assert counted >= sum(len(result.completions) for result in results)
    await fleet.at_rest(REST_S)
    for veteran in veterans:
        await compare(veteran, fresh[veteran.info.role])
    assert num_files(old_router.pid) <= num_files(new_router.pid) + FILES_SLACK
    assert num_threads(old_router.pid) <= num_threads(new_router.pid) + THREADS_SLACK


async def compare(veteran: RunningWorker, fresh: RunningWorker) -> None:
    old, new = veteran.info, fresh.info
    files = num_files(old.pid), num_files(new.pid)
    threads = num_threads(old.pid), num_threads(new.pid)
    tasks = [await each._handle.num_tasks.remote() for each in (veteran, fresh)]
    print(f"{old.worker_id}: {files=} {threads=} {tasks=}")  # noqa: T201
    assert files[0] <= files[1] + FILES_SLACK
    assert threads[0] <= threads[1] + THREADS_SLACK
    assert tasks[0] <= tasks[1] + TASKS_SLACK


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="faults of every kind under steady load")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with start_local(LocalRaySettings(namespace="baton-soak", prestarted_workers=4)) as cluster:
        report = asyncio.run(soak(cluster, seconds=60 * args.minutes, seed=args.seed))
    print(report.table())  # noqa: T201


if __name__ == "__main__":
    main()
