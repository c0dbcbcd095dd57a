"""The status line: what two snapshots say, and when it is said."""

import logging
from dataclasses import replace

import pytest

from baton.engine.sim import SimConfig, build_sim_engine
from baton.errors import UnavailableError
from baton.lifecycle import Event, Timeline
from baton.service.logging import STATUS_LOGGER
from baton.service.metrics import RouterMetrics, WorkerMetrics
from baton.service.status_line import (
    Report,
    Snapshot,
    StatusLine,
    buckets,
    report,
    used_share,
    worker_snapshot,
)
from baton.types import Role, WorkerLoad

INF = float("inf")
START = Snapshot(
    at_s=100.0,
    prompt_tokens=1000,
    looked_up_tokens=2000,
    generated_tokens=500,
    reused_tokens=100,
    handoff_bytes=5e6,
    running=0,
    waiting=0,
    kv_used=0.0,
    ttft_s=((0.125, 4), (0.25, 4), (INF, 4)),
)


def test_a_line_tells_what_was_done_since_the_last_one() -> None:
    after = Snapshot(
        at_s=110.0,
        prompt_tokens=2000,
        looked_up_tokens=3000,
        generated_tokens=1500,
        reused_tokens=350,
        handoff_bytes=30e6,
        running=3,
        waiting=2,
        kv_used=0.125,
        ttft_s=((0.125, 5), (0.25, 7), (INF, 8)),
    )
    told = report(START, after)
    assert told == Report(
        prompt_tokens_per_s=100.0,
        generation_tokens_per_s=100.0,
        running=3,
        waiting=2,
        kv_used=0.125,
        prefix_hit_rate=0.25,
        handoff_bytes_per_s=2.5e6,
        ttft_p50_s=0.1875,
    )
    assert str(told) == (
        "prompt 100.0 tok/s, generation 100.0 tok/s, running 3, waiting 2, KV 12.5%, "
        "prefix hits 25.0%, handoff 2.5 MB/s, TTFT p50 188 ms"
    )


def test_what_is_not_known_is_left_out() -> None:
    told = report(START, replace(START, at_s=101.0, running=1, generated_tokens=510))
    assert (told.prefix_hit_rate, told.ttft_p50_s) == (None, None)
    assert str(told) == (
        "prompt 0.0 tok/s, generation 10.0 tok/s, running 1, waiting 0, KV 0.0%, handoff 0.0 MB/s"
    )


@pytest.mark.parametrize(
    ("counts", "median_s"),
    [
        ((8, 8, 8), 0.0625),  # all in the first bucket
        ((4, 6, 8), 0.25),  # at a bound
        ((4, 4, 9), 0.25),  # beyond all bounds: at least the last
        ((4, 4, 4), None),
    ],
)
def test_the_median_is_of_the_window_alone(
    counts: tuple[int, int, int], median_s: float | None
) -> None:
    now = tuple(zip((0.125, 0.25, INF), counts, strict=True))
    told = report(START, replace(START, at_s=110.0, ttft_s=now))
    assert told.ttft_p50_s == median_s


def test_counts_that_fell_are_no_work_done() -> None:
    told = report(START, replace(START, at_s=110.0, prompt_tokens=5, generated_tokens=0))
    assert told.prompt_tokens_per_s == told.generation_tokens_per_s == 0


def test_the_used_share_is_of_all_blocks() -> None:
    one = WorkerLoad(free_blocks=3, cached_blocks=3, used_blocks=1, reserved_blocks=1)
    other = WorkerLoad(free_blocks=8)
    assert used_share([one, other]) == pytest.approx(2 / 16)
    assert used_share([]) == 0


def test_a_workers_snapshot_is_read_from_its_metrics() -> None:
    metrics = WorkerMetrics(Role.PREFILL)
    load = WorkerLoad(free_blocks=6, used_blocks=2, running_requests=2, waiting_requests=1)
    info = build_sim_engine(SimConfig(num_blocks=8)).info
    metrics.watch(info, lambda: load, lambda: 0.0)
    before = worker_snapshot(metrics.registry, load)
    metrics.record_queue(0.1, prompt_tokens=64, hit_tokens=16)
    metrics.record_prefill(0.1, computed_tokens=48)
    metrics.role = Role.DECODE  # what was done in either role counts
    metrics.record_decode_tokens(7)
    metrics.record_handoff(0.1, 4096)
    after = worker_snapshot(metrics.registry, load)
    told = report(replace(before, at_s=0.0), replace(after, at_s=1.0))
    assert told == Report(
        prompt_tokens_per_s=64.0,
        generation_tokens_per_s=7.0,
        running=2,
        waiting=1,
        kv_used=0.25,
        prefix_hit_rate=0.25,
        handoff_bytes_per_s=4096.0,
        ttft_p50_s=None,
    )


def test_what_prefill_computed_for_decode_was_no_hit_of_decodes() -> None:
    metrics, load = WorkerMetrics(Role.DECODE), WorkerLoad(free_blocks=8)
    info = build_sim_engine(SimConfig(num_blocks=8)).info
    metrics.watch(info, lambda: load, lambda: 0.0)
    before = worker_snapshot(metrics.registry, load)
    metrics.record_queue(0.1, prompt_tokens=1000, hit_tokens=20)
    after = worker_snapshot(metrics.registry, load)
    told = report(replace(before, at_s=0.0), replace(after, at_s=1.0))
    assert told.prefix_hit_rate == pytest.approx(0.02)


def test_the_routers_times_to_the_first_token_are_read_from_its_histogram() -> None:
    metrics = RouterMetrics()
    name = "baton_time_to_first_token_seconds"
    before = buckets(metrics.registry, name)
    for ttft_s in (0.03, 0.04, 0.3):
        timeline = Timeline(received_s=0.0)
        timeline.record(Event.FIRST_TOKEN, ttft_s)
        metrics.record_request(
            timeline, None, prompt_tokens=1, cached_tokens=0, completion_tokens=1, longest_tokens=1
        )
    after = buckets(metrics.registry, name)
    told = report(replace(START, ttft_s=before), replace(START, at_s=110.0, ttft_s=after))
    assert told.ttft_p50_s is not None
    assert 0.025 < told.ttft_p50_s <= 0.05


async def test_an_idle_process_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    busy = replace(START, running=1)
    taken = iter([START, START, START, busy, busy, START, START])

    def times() -> Snapshot:
        times.at_s += 10.0  # type: ignore[attr-defined]
        return replace(next(taken), at_s=times.at_s)  # type: ignore[attr-defined]

    times.at_s = 0.0  # type: ignore[attr-defined]

    async def take() -> Snapshot:
        return times()

    caplog.set_level(logging.INFO, STATUS_LOGGER)
    line = StatusLine(take, 10.0)
    for _ in range(7):
        await line.tell()
    idle = [record.getMessage().startswith("idle") for record in caplog.records]
    assert idle == [True, False, False, True]
    assert vars(caplog.records[1])["fields"]["running"] == 1


async def test_who_does_not_answer_is_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    async def take() -> Snapshot:
        raise UnavailableError("gone")

    caplog.set_level(logging.INFO, STATUS_LOGGER)
    line = StatusLine(take, 10.0)
    await line.tell()
    await line.tell()
    assert not caplog.records


async def test_without_an_interval_nothing_runs() -> None:
    async def take() -> Snapshot:
        pytest.fail("nobody asked")

    line = StatusLine(take, 0.0)
    line.start()
    await line.close()
