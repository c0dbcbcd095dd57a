"""What metrics cost on the way of a token and of a request, and a scrape.

python -m benchmarks.metrics_cost --calls 20000 --repeats 7
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from prometheus_client import generate_latest

from baton.engine.sim import SimConfig, build_sim_engine
from baton.lifecycle import SPLIT_STAGES, Event, Timeline
from baton.service.metrics import Objectives, RouterMetrics, WorkerMetrics
from baton.types import Role, WorkerLoad
from benchmarks.report import write_report

OBJECTIVES = Objectives(ttft_s=1.0, tpot_s=0.1)


def works() -> dict[str, Callable[[], object]]:
    """One unit of each."""
    router, worker = RouterMetrics(), WorkerMetrics(Role.DECODE)
    worker.watch(build_sim_engine(SimConfig(num_blocks=64)).info, WorkerLoad, lambda: 0.0)
    timeline = Timeline(received_s=0.0)
    order = [event for event in Event if event not in (Event.RECEIVED, Event.LOST, Event.RECOVERED)]
    for position, event in enumerate(order, start=1):
        timeline.record(event, position * 0.05)

    def request() -> None:
        router.record_placement(0.0001)
        router.record_attempt(None, "decode")
        router.record_stages(timeline.durations(SPLIT_STAGES))
        router.record_handoff(0.01, 1 << 20)
        router.record_ttft_error(0.01)
        router.record_request(
            timeline,
            None,
            prompt_tokens=100,
            cached_tokens=10,
            completion_tokens=20,
            longest_tokens=20,
            objectives=OBJECTIVES,
        )

    def call() -> None:
        worker.record_queue(0.001, prompt_tokens=100, hit_tokens=10)
        worker.record_handoff(0.01, 1 << 20)
        worker.record_call("ok")

    return {
        "router, a message with tokens": lambda: router.record_token_gap(0.02),
        "router, a request": request,
        "decode worker, a step's tokens of a request": lambda: worker.record_decode_tokens(1),
        "decode worker, a call": call,
        "router, a scrape": lambda: generate_latest(router.registry),
        "worker, a scrape": lambda: generate_latest(worker.registry),
    }


def microseconds(work: Callable[[], object], calls: int) -> float:
    """Of the processor, for each of so many calls."""
    began_s = time.thread_time()
    for _ in range(calls):
        work()
    return (time.thread_time() - began_s) / calls * 1e6


def main() -> None:
    """Measures each interleaved with the others, and writes the figures."""
    parser = argparse.ArgumentParser(description="Measures what metrics cost.")
    parser.add_argument("--calls", type=int, default=20000)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/metrics_cost.json"))
    given = parser.parse_args()
    raw: dict[str, list[float]] = {}
    for _ in range(given.repeats):
        for name, work in works().items():
            calls = max(1, given.calls // 200) if name.endswith("scrape") else given.calls
            raw.setdefault(name, []).append(round(microseconds(work, calls), 3))
    summary = {
        name: {"median_us": statistics.median(each), "best_us": min(each)}
        for name, each in raw.items()
    }
    for name, figures in summary.items():
        print(f"{name}: {figures['median_us']:.1f} us (best {figures['best_us']:.1f})")
    settings = {"calls": given.calls, "repeats": given.repeats}
    write_report(given.output, settings=settings, raw=raw, summary=summary)


if __name__ == "__main__":
    main()
