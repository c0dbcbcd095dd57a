"""The load generator's loops: against a server whose latencies are known exactly, and against a router with a simulated engine."""

import asyncio
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from itertools import count, islice
from types import TracebackType
from typing import Self

import numpy as np
import pytest

from baton.bench.figures import Objective, Slo, figures_of
from baton.bench.grpc_target import GrpcTarget
from baton.bench.lengths import Lengths
from baton.bench.levels import Level, Measured, Plan, Run
from baton.bench.prompts import Planned, TokenVocabulary, replayed, synthetic
from baton.bench.records import OK, UNFINISHED, Record
from baton.bench.runner import Limits, Phase
from baton.bench.target import Described, Options
from baton.bench.traces import Trace, TraceEntry
from baton.errors import NotFoundError, UnavailableError
from tests.integration.sim_house import SIM, house

LONG_S = 60.0


@dataclass
class Exact:
    """A server that takes as long as each request says, on paper: nobody waits, so that what is measured is known to the last digit. Those
    with a hold stay until it is let go.
    """

    described: Described = field(default_factory=lambda: Described(name="exact", model="m"))
    hold: asyncio.Event | None = None
    lost_from: float = float("inf")
    """Requests of this number and later find no server."""
    most_running: int = 0
    running: int = 0

    def prepare(self, planned: Planned) -> int:
        assert planned.output_tokens is not None
        return planned.output_tokens

    async def send(self, payload: int, record: Record) -> None:
        if record.index >= self.lost_from:
            record.failed("CONNECTION", "nobody there", lost=True)
            return
        record.begin()
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await (asyncio.sleep(0) if self.hold is None else self.hold.wait())
            # Of the request with k tokens, the first takes k ms and each other one k us.
            first_s = record.sent_s + payload / 1e3
            for index in range(payload):
                record.arrived(first_s + index * payload / 1e6, 1)
            record.completion_tokens = payload
            record.status = OK
        finally:
            self.running -= 1

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def planned(tokens: int = 2) -> Planned:
    return Planned(prompt=[1, 2], input_tokens=2, output_tokens=tokens)


def ready(target: Exact, requests: int) -> Iterator[tuple[Planned, int]]:
    return ((each, target.prepare(each)) for each in (planned(i + 2) for i in range(requests)))


async def until(condition: object, what: str) -> None:
    assert callable(condition)
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert condition(), what


async def test_percentiles_are_those_of_the_servers_latencies() -> None:
    """Every figure of 500 requests is the one that follows from their known latencies."""
    target = Exact()
    phase = Phase(target, Limits(concurrency=7))
    await phase.closed_loop(ready(target, 500), asyncio.Event())
    figures = figures_of(phase.records, [Slo(Objective.TTFT, 0.1005)])
    tokens = np.arange(2, 502)
    assert figures.ttft_s is not None
    assert figures.itl_s is not None
    assert figures.e2e_s is not None
    for share, ttft, itl, e2e in (
        (50, figures.ttft_s.p50, figures.itl_s.p50, figures.e2e_s.p50),
        (90, figures.ttft_s.p90, figures.itl_s.p90, figures.e2e_s.p90),
        (95, figures.ttft_s.p95, figures.itl_s.p95, figures.e2e_s.p95),
        (99, figures.ttft_s.p99, figures.itl_s.p99, figures.e2e_s.p99),
    ):
        assert ttft == pytest.approx(np.percentile(tokens / 1e3, share))
        assert itl == pytest.approx(np.percentile(tokens / 1e6, share))
        assert e2e == pytest.approx(
            np.percentile(tokens / 1e3 + (tokens - 1) * tokens / 1e6, share)
        )
    assert figures.goodput is not None
    assert figures.goodput.requests == 99
    assert figures.output_tokens == tokens.sum()
    assert sorted(record.index for record in phase.records) == list(range(500))


async def test_a_closed_loop_keeps_exactly_so_many_running() -> None:
    target = Exact(hold=asyncio.Event())
    phase = Phase(target, Limits(concurrency=5))
    loop = asyncio.create_task(phase.closed_loop(ready(target, 12), asyncio.Event()))
    await until(lambda: target.running == 5, "five run")
    assert phase.running == 5
    assert target.hold is not None
    target.hold.set()
    await loop
    assert target.most_running == 5
    assert phase.ended == 12


async def test_an_open_loop_waits_for_nobody_and_keeps_its_times() -> None:
    """Requests go out at their times though none is answered; never early, and each in its turn."""
    target = Exact(hold=asyncio.Event())
    phase = Phase(target, Limits())
    due = [0, 0.01, 0.02, 0.02, 0.05]
    loop = asyncio.create_task(phase.open_loop(ready(target, 9), due, asyncio.Event()))
    await until(lambda: target.running == 5, "all five are out")
    assert target.hold is not None
    target.hold.set()
    await loop
    assert [r.scheduled_s - phase.began_s for r in phase.records] == pytest.approx(due)
    assert all(r.sent_s >= r.scheduled_s for r in phase.records)
    assert all(r.status == OK for r in phase.records)


async def test_requests_that_wait_for_room_count_from_when_they_were_due() -> None:
    """Coordinated omission: with one place and a slow server, latency since send hides the queue, and latency since due does not."""
    target = Exact(hold=asyncio.Event())
    phase = Phase(target, Limits(concurrency=1))
    loop = asyncio.create_task(phase.open_loop(ready(target, 3), [0, 0, 0], asyncio.Event()))
    await until(lambda: len(phase.records) == 3, "all are due")
    waited_since_s = time.perf_counter()
    await until(lambda: target.running == 1, "one runs")
    assert phase.running == 1
    await asyncio.sleep(0.03)
    assert target.hold is not None
    target.hold.set()
    await loop
    assert target.most_running == 1
    second = phase.records[1]
    assert second.sent_s - second.scheduled_s >= 0.03
    assert second.sent_s > waited_since_s
    figures = figures_of(phase.records)
    assert figures.ttft_s is not None
    assert figures.ttft_since_due_s is not None
    assert figures.ttft_s.max == pytest.approx(0.004)
    assert figures.ttft_since_due_s.max >= 0.03


async def test_stopping_cuts_off_what_runs_and_counts_it_as_nobodys_failure() -> None:
    target, stop = Exact(hold=asyncio.Event()), asyncio.Event()
    phase = Phase(target, Limits(concurrency=2))
    loop = asyncio.create_task(phase.open_loop(ready(target, 4), [0, 0, 0, LONG_S], stop))
    await until(lambda: target.running == 2, "two run")
    await until(lambda: len(phase.records) == 3, "one waits")
    stop.set()
    await loop
    assert [record.status for record in phase.records] == [UNFINISHED] * 3
    assert phase.records[2].sent_s == 0
    assert (target.running, phase.running, phase.failed) == (0, 0, 0)


async def test_when_the_time_is_over_nothing_more_is_due_and_a_grace_later_all_is_cut_off() -> None:
    target = Exact(hold=asyncio.Event())
    phase = Phase(target, Limits(duration_s=0.02, grace_s=0.05))
    await phase.open_loop(ready(target, 100), [0, 0.01, 0.03, 0.04], asyncio.Event())
    assert [record.status for record in phase.records] == [UNFINISHED] * 2
    assert phase.wall_s >= 0.07
    endless = Phase(Exact(), Limits(duration_s=0.05, concurrency=2))
    await endless.closed_loop(ready(Exact(), 10**9), asyncio.Event())
    assert endless.ended == len(endless.records) > 2
    assert endless.records[-1].scheduled_s <= endless.began_s + 0.05


async def test_a_server_that_is_lost_for_too_long_ends_the_run() -> None:
    target = Exact(lost_from=3)
    phase = Phase(target, Limits(concurrency=2, give_up_s=0.25))
    await phase.closed_loop(ready(target, 10**9), asyncio.Event())
    assert phase.lost == "nobody there"
    assert phase.failed == len(phase.records) - 3
    assert figures_of(phase.records).errors == {"CONNECTION": phase.failed}


async def test_a_server_that_comes_back_was_not_lost() -> None:
    class Restarted(Exact):
        async def send(self, payload: int, record: Record) -> None:
            if record.index in (2, 3):
                record.failed("CONNECTION", "nobody there", lost=True)
            else:
                await super().send(payload, record)

    target = Restarted()
    phase = Phase(target, Limits(concurrency=1, give_up_s=LONG_S))
    await phase.closed_loop(ready(target, 6), asyncio.Event())
    assert (phase.lost, phase.failed, phase.ended) == ("", 2, 6)


async def test_a_bug_in_a_target_is_raised_not_counted() -> None:
    class Broken(Exact):
        async def send(self, payload: int, record: Record) -> None:  # noqa: ARG002
            raise RuntimeError("a bug")

    target = Broken()
    with pytest.raises(ExceptionGroup) as raised:
        await Phase(target, Limits(concurrency=2)).closed_loop(ready(target, 4), asyncio.Event())
    assert raised.group_contains(RuntimeError, match="a bug")


class Silent:
    """A watcher that only counts."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def preparing(self, what: str, done: int, total: int) -> None:
        assert 0 < done <= total, what

    def began(self, what: str, phase: Phase, total: int | None) -> None:  # noqa: ARG002
        self.phases.append(f"{what} {total}")

    def ended(self) -> None:
        pass


async def run_plan(target: Exact, plan: Plan, stop: asyncio.Event) -> tuple[list[Measured], Silent]:
    watcher, numbers = Silent(), count(2)
    requests = (planned(next(numbers)) for _ in count())
    run = Run(target, plan, requests, warm_up=requests, watcher=watcher, stop=stop)
    await run.warm_up()
    return [measured async for measured in run.levels()], watcher


async def test_a_sweep_warms_up_once_and_gives_each_level_requests_of_its_own() -> None:
    plan = Plan(
        levels=(Level(concurrency=2), Level(rate_per_s=5000.0), Level(concurrency=1)),
        requests=40,
        warm_up=3,
    )
    levels, watcher = await run_plan(Exact(), plan, asyncio.Event())
    assert watcher.phases == ["warm-up 3", "2 at once 40", "5000/s 40", "1 at once 40"]
    tokens = [record.planned_output_tokens for level in levels for record in level.records]
    assert tokens == list(range(5, 125))
    assert not any(level.lost or level.interrupted for level in levels)


async def test_a_sweep_ends_with_the_level_that_is_stopped_or_loses_the_server() -> None:
    plan = Plan(levels=(Level(concurrency=1), Level(concurrency=2)), requests=3)
    lost, _ = await run_plan(Exact(lost_from=2), plan, asyncio.Event())
    assert [level.lost for level in lost] == ["nobody there"]
    stop = asyncio.Event()
    stop.set()
    stopped, _ = await run_plan(Exact(), plan, stop)
    assert [level.interrupted for level in stopped] == [True]


async def test_a_trace_is_replayed_at_its_times() -> None:
    plan = Plan(levels=(Level(replayed=True),), requests=None, trace_times_s=(0.0, 0.01, 0.03))
    ((level,), watcher) = await run_plan(Exact(), plan, asyncio.Event())
    due = [record.scheduled_s - level.began_s for record in level.records]
    assert due == pytest.approx([0.0, 0.01, 0.03])
    assert watcher.phases == ["replay 3"]


# Against a router.


async def measure(address: str, requests: Iterator[Planned], number: int) -> list[Record]:
    options = Options(temperature=0.0, timeout_s=30)
    async with GrpcTarget(address, options, connections=2) as target:
        prepared = [(each, target.prepare(each)) for each in islice(requests, number)]
        phase = Phase(target, Limits(concurrency=4))
        await phase.closed_loop(prepared, asyncio.Event())
        return phase.records


async def test_latencies_of_a_router_are_no_less_than_its_engine_takes() -> None:
    """With 10 ms a step and a chunk of 64 tokens, 150 tokens of prompt take three steps and each token one. What the client measures
    contains what the router measured; its shares of the whole are the same.
    """
    step_s = 0.01
    async with house(0, 1, sim=replace(SIM, step_s=step_s)) as here:
        vocabulary = TokenVocabulary(256, (0,))
        lengths = Lengths.parse("150", "--isl"), Lengths.parse("12", "--osl")
        requests = synthetic(vocabulary, *lengths, np.random.default_rng(0), lambda prompt: prompt)
        records = await measure(f"127.0.0.1:{here.app.port}", requests, 12)
    assert [record.status for record in records] == [OK] * 12
    for record in records:
        assert (record.prompt_tokens, record.completion_tokens) == (150, 12)
        assert sum(record.chunk_tokens) == 12
        # Decode computed the prompt itself.
        assert [worker[0] for worker in record.workers] == [">"]
        timings = record.timings
        assert timings is not None
        assert timings.first_token_at_s is not None
        assert timings.last_token_at_s is not None
        ttft_s = record.chunk_s[0] - record.sent_s
        assert ttft_s >= timings.first_token_at_s >= 3 * step_s
        assert record.chunk_s[-1] - record.sent_s >= timings.last_token_at_s
    figures = figures_of(records)
    assert figures.itl_s is not None
    # Parts may arrive together, but the answer as a whole takes its eleven steps.
    assert figures.itl_s.p50 >= 0.9 * step_s
    assert figures.output_tokens_per_s <= 4 / step_s


async def test_replayed_prefixes_are_found_in_the_servers_cache() -> None:
    trace = Trace(
        tuple(
            TraceEntry(at_s=0.0, input_tokens=80, output_tokens=3, blocks=(1, 2, 10 + index))
            for index in range(4)
        ),
        block_tokens=32,
    )
    async with house(0, 1) as here:
        address = f"127.0.0.1:{here.app.port}"
        requests = list(replayed(TokenVocabulary(256, (0,)), trace, 0, lambda prompt: prompt))
        first = await measure(address, iter(requests[:1]), 1)
        others = await measure(address, iter(requests[1:]), 3)
    assert first[0].cached_tokens == 0
    assert all(record.cached_tokens == 64 for record in others)


async def test_refusals_are_counted_by_status_and_a_dead_router_is_lost() -> None:
    async with AsyncExitStack() as connected:
        async with house(0, 1) as here:
            address = f"127.0.0.1:{here.app.port}"
            too_long = [Planned(prompt=[1] * 5000, input_tokens=5000, output_tokens=1)]
            (record,) = await measure(address, iter(too_long), 1)
            assert (record.status, record.lost) == ("INVALID_ARGUMENT", False)
            assert "context" in record.message
            target = await connected.enter_async_context(GrpcTarget(address, Options(timeout_s=5)))
        record = Record(index=0, scheduled_s=0.0)
        await target.send(target.prepare(planned()), record)
    assert (record.status, record.lost) == ("UNAVAILABLE", True)


async def test_a_server_that_cannot_be_used_is_refused_before_the_run() -> None:
    with pytest.raises(UnavailableError):
        await GrpcTarget("127.0.0.1:1", Options()).__aenter__()
    async with house(0, 1) as here:
        with pytest.raises(NotFoundError):
            await GrpcTarget(f"127.0.0.1:{here.app.port}", Options(model="another")).__aenter__()
