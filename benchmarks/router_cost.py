"""What the router costs, by the CPU time of its own process; load, router and workers are three processes.

one_token           requests of one token, so many at once: requests per CPU-second; decode computes the prompt
one_token_pair      the same with a prefill and a decode worker for each request: the first token is prefill's
streams             256 streams of many tokens: tokens per CPU-second, and tokens per message to the clients
latency             one request at a time, in turn through the router and straight to the decode worker: added TTFT and ITL
bare_grpc           the measure of all this: a process that serves streaming calls, and one that forwards them, a call for each, and do
                    nothing else

python -m benchmarks.router_cost
"""

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from benchmarks.report import write_report
from benchmarks.router_latency import run_latency
from benchmarks.router_load import Measured, run_load, running_router, running_workers


@contextmanager
def running_forwarder(*arguments: str) -> Iterator[tuple[Measured, str]]:
    """A process of `benchmarks.processes.forwarder`, and its port."""
    command = [sys.executable, "-m", "benchmarks.processes.forwarder", *arguments]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        try:
            yield Measured(process, f"127.0.0.1:{port}"), port
        finally:
            process.stdin.close()
            process.wait(20)


async def run_bare(
    forwarder: Measured, *, concurrency: int, requests: int, messages: int
) -> tuple[float, float]:
    """CPU and wall seconds of so many calls."""
    async with grpc.aio.insecure_channel(forwarder.address) as channel:
        stub = channel.unary_stream("/bare/Stream", None, None)
        left = iter(range(requests))

        async def stream() -> None:
            for _ in left:
                async for _message in stub(b"%d" % messages):
                    pass

        cpu_s, wall_s = forwarder.cpu_s, time.perf_counter()
        await asyncio.gather(*(stream() for _ in range(concurrency)))
        return forwarder.cpu_s - cpu_s, time.perf_counter() - wall_s


def bare_grpc(args: argparse.Namespace) -> dict[str, Any]:
    """Calls of three messages, as an answer of one token has, and 256 calls of many."""
    with (
        running_forwarder("backend") as (server, port),
        running_forwarder("forward", port) as (forwarder, _),
    ):
        short = partial(run_bare, concurrency=args.concurrency, requests=args.requests, messages=3)
        asyncio.run(run_bare(forwarder, concurrency=32, requests=300, messages=3))
        served_s, _ = asyncio.run(short(server))
        short_s, _ = asyncio.run(short(forwarder))
        long_s, wall_s = asyncio.run(
            run_bare(forwarder, concurrency=256, requests=256, messages=200)
        )
    return {
        "served_requests_per_cpu_s": round(args.requests / served_s, 1),
        "requests_per_cpu_s": round(args.requests / short_s, 1),
        "messages_per_cpu_s": round(256 * 200 / long_s, 1),
        "utilisation": round(long_s / wall_s, 3),
    }


def one_token(args: argparse.Namespace, *, pair: bool) -> dict[str, Any]:
    """Requests of one token."""
    with (
        running_router(max_running=4096) as router,
        running_workers(router, kind=args.workers, prefill=int(pair), decode=2),
    ):
        # Through a pair, the second token is decode's: with one only, nothing would be handed over.
        load = partial(
            run_load,
            router,
            concurrency=args.concurrency,
            prompt_tokens=64 if pair else 16,
            new_tokens=2 if pair else 1,
        )
        asyncio.run(load(requests=300))
        return asyncio.run(load(requests=args.requests))


def streams(args: argparse.Namespace, *, step_ms: float) -> dict[str, Any]:
    """Many tokens on many streams."""
    with (
        running_router(max_running=4096) as router,
        running_workers(router, kind=args.workers, decode=4, step_ms=step_ms),
    ):
        asyncio.run(
            run_load(router, concurrency=256, requests=256, prompt_tokens=16, new_tokens=16)
        )
        return asyncio.run(
            run_load(
                router,
                concurrency=256,
                requests=256,
                prompt_tokens=16,
                new_tokens=args.stream_tokens,
            )
        )


def latency(args: argparse.Namespace) -> dict[str, Any]:
    """One request at a time."""
    with (
        running_router() as router,
        running_workers(router, kind="sim", decode=1, step_ms=5),
    ):
        return asyncio.run(
            run_latency(router, requests=args.latency_requests, prompt_tokens=16, new_tokens=32)
        )


CELLS = {
    "bare_grpc": bare_grpc,
    "one_token": lambda args: one_token(args, pair=False),
    "one_token_pair": lambda args: one_token(args, pair=True),
    "streams_paced": lambda args: streams(args, step_ms=args.step_ms),
    "streams_full": lambda args: streams(args, step_ms=0),
    "latency": latency,
}


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=[*CELLS], default=[*CELLS])
    parser.add_argument("--workers", choices=["sim", "fake"], default="sim")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=3000, help="of one token")
    parser.add_argument("--concurrency", type=int, default=32, help="of requests of one token")
    parser.add_argument("--stream-tokens", type=int, default=400)
    parser.add_argument("--step-ms", type=float, default=20.0, help="of the paced streams")
    parser.add_argument("--latency-requests", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/router_cost.json"))
    args = parser.parse_args()
    raw: dict[str, list[dict[str, Any]]] = {cell: [] for cell in args.cells}
    for _ in range(args.rounds):
        for cell in args.cells:
            raw[cell].append(CELLS[cell](args))
            print(cell, raw[cell][-1], flush=True)
    summary = {
        cell: {
            name: statistics.median(run[name] for run in runs)
            for name, value in runs[0].items()
            if isinstance(value, int | float)
        }
        for cell, runs in raw.items()
    }
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    write_report(args.out, settings=settings, raw=raw, summary=summary)


if __name__ == "__main__":
    main()
