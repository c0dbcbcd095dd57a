"""A run: a warm-up, then one level of load after another, each with requests of its own. On one event loop.

All requests of a level are drawn, tokenized and serialized before it begins; where their number is not known, `AHEAD` of them are, and the
rest while others run.
"""

import asyncio
import gc
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass
from itertools import chain, islice, takewhile
from typing import Protocol

import numpy as np

from baton.bench.arrivals import ArrivalPattern, arrival_times
from baton.bench.figures import Figures, Slo, figures_of
from baton.bench.prompts import Planned
from baton.bench.records import Record
from baton.bench.runner import Limits, Phase, Prepared
from baton.bench.target import Target

AHEAD = 1000
_BREATH = 32
"""Requests prepared between two looks at what else happens."""
WARM_UP_CONCURRENCY = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """A load. With a rate or times of its own it is open-loop, and concurrency is a cap; else closed-loop."""

    rate_per_s: float | None = None
    concurrency: int | None = None
    replayed: bool = False
    """At the trace's times."""

    def __str__(self) -> str:
        cap = "" if self.concurrency is None else f"{self.concurrency} at once"
        if self.replayed:
            load = "replay"
        elif self.rate_per_s is not None:
            load = f"{self.rate_per_s:g}/s"
        else:
            return cap
        return f"{load}, at most {cap}" if cap else load


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is run."""

    levels: tuple[Level, ...]
    requests: int | None
    """Of each level; None: until the duration is over, or the trace."""
    pattern: ArrivalPattern = ArrivalPattern.POISSON
    burstiness: float = 1.0
    trace_times_s: tuple[float, ...] = ()
    warm_up: int = 0
    """Requests before the first level, which no figure contains."""
    duration_s: float | None = None
    """Of each level."""
    grace_s: float = 30.0
    give_up_s: float = 10.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A level, and what came of it."""

    level: Level
    records: tuple[Record, ...]
    began_s: float
    """On the records' clock."""
    began_unix_s: float
    wall_s: float
    client_cpu_s: float
    """Of the load generator. Near wall_s, it was the bottleneck."""
    lost: str
    """How the server was lost, where it was in the end."""
    interrupted: bool

    def figures(self, slos: tuple[Slo, ...] = ()) -> Figures:
        """See `baton.bench.figures`."""
        return figures_of(self.records, slos)


class Watcher(Protocol):
    """Whoever shows progress."""

    def preparing(self, what: str, done: int, total: int) -> None:
        """So many requests are ready."""

    def began(self, what: str, phase: Phase, total: int | None) -> None:
        """The phase runs; it has so many requests, where that is known."""

    def ended(self) -> None:
        """It does not any more."""


class Run:
    """Carries out a plan on a connected target."""

    def __init__(
        self,
        target: Target,
        plan: Plan,
        requests: Iterator[Planned],
        *,
        warm_up: Iterator[Planned],
        watcher: Watcher,
        stop: asyncio.Event,
    ) -> None:
        self._target = target
        self._plan = plan
        self._requests = requests
        self._warm_up_requests = warm_up
        self._watcher = watcher
        self._stop = stop

    async def warm_up(self) -> Phase | None:
        """None where there is none."""
        plan = self._plan
        if not plan.warm_up:
            return None
        prepared = await self._prepare("warm-up", self._warm_up_requests, plan.warm_up)
        concurrency = plan.levels[0].concurrency or WARM_UP_CONCURRENCY
        phase = self._phase(min(concurrency, plan.warm_up), None)
        await self._timed("warm-up", phase, plan.warm_up, phase.closed_loop(prepared, self._stop))
        return phase

    async def levels(self) -> AsyncIterator[Measured]:
        """Yields each level as it ends, until one is interrupted or loses the server."""
        for index, level in enumerate(self._plan.levels):
            phase = await self._level(level, index)
            yield Measured(
                level=level,
                records=tuple(phase.records),
                began_s=phase.began_s,
                began_unix_s=phase.began_unix_s,
                wall_s=phase.wall_s,
                client_cpu_s=phase.cpu_s,
                lost=phase.lost,
                interrupted=self._stop.is_set(),
            )
            if phase.lost or self._stop.is_set():
                return

    async def _level(self, level: Level, index: int) -> Phase:
        plan, name = self._plan, str(level)
        phase = self._phase(level.concurrency, plan.duration_s)
        times_s = self._times(level, index)
        if times_s is not None:
            prepared = await self._prepare(name, self._requests, len(times_s))
            work = phase.open_loop(prepared, times_s, self._stop)
            await self._timed(name, phase, len(prepared), work)
        elif plan.requests is not None:
            prepared = await self._prepare(name, self._requests, plan.requests)
            work = phase.closed_loop(prepared, self._stop)
            await self._timed(name, phase, len(prepared), work)
        else:
            prepared = await self._prepare(name, self._requests, AHEAD)
            endless = chain(prepared, map(self._ready, self._requests))
            await self._timed(name, phase, None, phase.closed_loop(endless, self._stop))
        return phase

    def _times(self, level: Level, index: int) -> list[float] | None:
        """When the requests are due; None closed-loop."""
        plan = self._plan
        if level.replayed:
            times_s: Iterator[float] = iter(plan.trace_times_s)
        elif level.rate_per_s is not None:
            rng = np.random.default_rng([plan.seed, index])
            times_s = arrival_times(plan.pattern, level.rate_per_s, rng, burstiness=plan.burstiness)
        else:
            return None
        if plan.duration_s is not None:
            end_s = plan.duration_s
            times_s = takewhile(lambda at_s: at_s < end_s, times_s)
        return list(islice(times_s, plan.requests))

    def _phase(self, concurrency: int | None, duration_s: float | None) -> Phase:
        limits = Limits(
            duration_s=duration_s,
            grace_s=self._plan.grace_s,
            give_up_s=self._plan.give_up_s,
            concurrency=concurrency,
        )
        return Phase(self._target, limits)

    async def _prepare(self, what: str, requests: Iterator[Planned], count: int) -> list[Prepared]:
        prepared: list[Prepared] = []
        for planned in islice(requests, count):
            prepared.append(self._ready(planned))
            if len(prepared) % _BREATH == 0:
                self._watcher.preparing(what, len(prepared), count)
                await asyncio.sleep(0)
                if self._stop.is_set():
                    break
        return prepared

    def _ready(self, planned: Planned) -> Prepared:
        return planned, self._target.prepare(planned)

    async def _timed(
        self, what: str, phase: Phase, total: int | None, work: Coroutine[None, None, None]
    ) -> None:
        # What lives through the phase need not be looked at by the collector again and again.
        gc.collect()
        gc.freeze()
        self._watcher.began(what, phase, total)
        try:
            await work
        finally:
            self._watcher.ended()
            gc.unfreeze()
