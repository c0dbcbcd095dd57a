"""A router in a process of its own, workers in another, load from this one, and what the load cost the router."""

import asyncio
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import grpc

from baton.v1 import common_pb2, inference_pb2

GENERATE = "/baton.v1.InferenceService/Generate"
CHANNEL_OPTIONS = [("grpc.use_local_subchannel_pool", 1)]
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Measured:
    """A process whose cost is measured."""

    def __init__(self, process: "subprocess.Popen[str]", address: str) -> None:
        self._process = process
        self.address = address

    @property
    def cpu_s(self) -> float:
        """User and system time of all its threads."""
        stat = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(stat[11]) + int(stat[12])) * TICK_S

    @property
    def resident_bytes(self) -> int:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found[1]) * 1024


@contextmanager
def running_router(**settings: object) -> Iterator[Measured]:
    """A router with those settings."""
    environment = {f"BATON_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "router",
            "--listen",
            "127.0.0.1:0",
        ],
        env={**os.environ, **environment, "PYTHONUNBUFFERED": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    with process:
        try:
            for line in process.stderr:
                found = re.search(r"serving on port (\d+)", line)
                if found:
                    break
            else:
                raise RuntimeError("the router did not start")
            drain = subprocess.Popen(["cat"], stdin=process.stderr, stdout=sys.stderr)
            yield Measured(process, f"127.0.0.1:{found[1]}")
        finally:
            process.terminate()
            process.wait(20)
            drain.wait(5)


@contextmanager
def running_workers(router: Measured, **flags: object) -> Iterator[Measured]:
    """Workers in a process of their own; see `benchmarks.processes.many_workers`."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.processes.many_workers",
        "--router",
        router.address,
    ]
    for name, value in flags.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            time.sleep(1.5)  # the first heartbeats
            yield Measured(process, "")
        finally:
            process.stdin.close()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def generate_request(
    rng: random.Random, *, prompt_tokens: int, new_tokens: int, session_id: str = ""
) -> inference_pb2.GenerateRequest:
    """A prompt that no prefix cache holds."""
    prompt = [rng.randrange(1, 256) for _ in range(prompt_tokens)]
    return inference_pb2.GenerateRequest(
        tokens=common_pb2.TokenIds(ids=prompt),
        session_id=session_id,
        sampling=common_pb2.SamplingParams(
            max_tokens=new_tokens, temperature=0, seed=1, ignore_eos=True
        ),
    )


class Load:
    """Streams from one process, as cheap as they can be: messages are counted, and only the last one is parsed."""

    def __init__(self, channels: Sequence[grpc.aio.Channel]) -> None:
        self._calls = [
            channel.unary_stream(
                GENERATE,
                request_serializer=inference_pb2.GenerateRequest.SerializeToString,
                response_deserializer=None,
            )
            for channel in channels
        ]
        self.messages = 0
        self.tokens = 0
        self.requests = 0
        self.errors = 0
        self.place_s: list[float] = []

    async def request(self, request: inference_pb2.GenerateRequest, turn: int) -> None:
        call = self._calls[turn % len(self._calls)](request, timeout=300)
        last = b""
        try:
            async for message in call:
                self.messages += 1
                last = message
        except grpc.aio.AioRpcError as error:
            if not self.errors:
                print(f"first error: {error.code()} {error.details()}")
            self.errors += 1
            return
        finished = inference_pb2.GenerateResponse.FromString(last).finished
        self.tokens += finished.usage.completion_tokens
        self.requests += 1
        timings = finished.timings
        self.place_s.append(timings.placed_at_seconds - timings.admitted_at_seconds)


async def run_load(
    router: Measured,
    *,
    concurrency: int,
    requests: int,
    prompt_tokens: int,
    new_tokens: int,
    channels: int = 4,
    sessions: Sequence[str] = (),
) -> dict[str, float]:
    """So many requests, so many of them at once; what they cost the router. Each is a turn of another session, where there are any."""
    rng = random.Random(1)
    opened = [
        grpc.aio.insecure_channel(router.address, options=CHANNEL_OPTIONS) for _ in range(channels)
    ]
    load = Load(opened)
    left = iter(range(requests))

    async def stream() -> None:
        for turn in left:
            request = generate_request(
                rng,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                session_id=sessions[turn] if sessions else "",
            )
            await load.request(request, turn)

    cpu_s, wall_s = router.cpu_s, time.perf_counter()
    peak = router.resident_bytes
    streams = [asyncio.create_task(stream()) for _ in range(concurrency)]
    while not all(task.done() for task in streams):
        await asyncio.wait(streams, timeout=1.0)
        peak = max(peak, router.resident_bytes)
    await asyncio.gather(*streams)
    cpu_s, wall_s = router.cpu_s - cpu_s, time.perf_counter() - wall_s
    await asyncio.gather(*(channel.close(None) for channel in opened))
    return {
        "requests": load.requests,
        "errors": load.errors,
        "tokens": load.tokens,
        "router_cpu_s": round(cpu_s, 2),
        "wall_s": round(wall_s, 2),
        "router_utilisation": round(cpu_s / wall_s, 3),
        "requests_per_cpu_s": round(load.requests / cpu_s, 1),
        "tokens_per_cpu_s": round(load.tokens / cpu_s, 1),
        "tokens_per_wall_s": round(load.tokens / wall_s, 1),
        # All but the first and the last of each stream carry tokens.
        "tokens_per_message": round(load.tokens / (load.messages - 2 * load.requests), 3),
        "placed_p50_ms": round(quantile(load.place_s, 0.5) * 1e3, 3),
        "placed_p99_ms": round(quantile(load.place_s, 0.99) * 1e3, 3),
        "router_peak_rss_mb": round(peak / 1e6, 1),
    }


def quantile(values: Sequence[float], share: float) -> float:
    """0 of no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
