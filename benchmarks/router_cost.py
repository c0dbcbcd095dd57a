"""What the router costs, by the CPU time of its own process; load, router and workers are three processes.

one_token           requests of one token, so many at once: requests per CPU-second; decode computes the prompt
one_token_pair      the same with a prefill and a decode worker for each request: the first token is prefill's
streams             256 streams of many tokens: tokens per CPU-second, and tokens per message to the clients
latency             one request at a time, in turn through the router and straight to the decode worker: added TTFT and ITL
bare_grpc           the measure of all this: a process that forwards streaming calls, a call for each, and does nothing else

python -m benchmarks.router_cost
"""

import argparse
import asyncio
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc

from baton import codec
from baton.types import AttemptKey, RequestId, RequestRecord, SamplingParams
from baton.types import Sequence as TokenSequence
from baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, inference_pb2, inference_pb2_grpc
from benchmarks.report import write_report

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
def running_workers(router: Measured, **flags: object) -> Iterator[None]:
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
            yield
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


async def run_latency(
    router: Measured, *, requests: int, prompt_tokens: int, new_tokens: int
) -> dict[str, Any]:
    """In turn through the router and to the decode worker itself."""
    rng = random.Random(2)
    ttft: dict[str, list[float]] = {"router": [], "direct": []}
    itl: dict[str, list[float]] = {"router": [], "direct": []}
    async with grpc.aio.insecure_channel(router.address) as front:
        inference = inference_pb2_grpc.InferenceServiceStub(front)
        model = await inference.GetModel(inference_pb2.GetModelRequest())
        worker = next(w for w in model.workers if w.role == common_pb2.WORKER_ROLE_DECODE)
        async with grpc.aio.insecure_channel(worker.address) as back:
            decode = decode_pb2_grpc.DecodeServiceStub(back)
            for turn in range(requests + 5):
                request = generate_request(rng, prompt_tokens=prompt_tokens, new_tokens=new_tokens)
                direct = _decode_request(request, worker.kv_spec.digest, turn)
                calls = {
                    "router": lambda r=request: inference.Generate(r, timeout=60),
                    "direct": lambda r=direct: decode.Decode(r, timeout=60),
                }
                for name in sorted(calls, reverse=bool(turn % 2)):
                    first_s, gaps = await _time_tokens(calls[name], name)
                    if turn >= 5:
                        ttft[name].append(first_s)
                        itl[name] += gaps
    summary: dict[str, Any] = {}
    for share in (0.5, 0.99):
        label = f"p{share * 100:.0f}"
        for kind, samples in (("ttft", ttft), ("itl", itl)):
            through, straight = (quantile(samples[n], share) * 1e3 for n in ("router", "direct"))
            summary[f"{kind}_{label}_ms"] = round(through, 3)
            summary[f"direct_{kind}_{label}_ms"] = round(straight, 3)
            summary[f"added_{kind}_{label}_ms"] = round(through - straight, 3)
    summary["requests"] = requests
    return summary


def _decode_request(
    request: inference_pb2.GenerateRequest, digest: str, turn: int
) -> decode_pb2.DecodeRequest:
    sampling = SamplingParams(
        max_tokens=request.sampling.max_tokens, temperature=0.0, seed=1, ignore_eos=True
    )
    # Another prompt of the same length: what the router's request left in the prefix cache must not help.
    sequence = TokenSequence(tuple(255 - t or 1 for t in request.tokens.ids), (), sampling)
    name = f"direct-{turn}"
    return decode_pb2.DecodeRequest(
        key=codec.key_to_proto(AttemptKey(RequestId(name))),
        sequence=codec.sequence_to_proto(sequence),
        kv_digest=digest,
        record=codec.record_to_proto(
            RequestRecord(request_id=RequestId(name), tenant="", stop=(), n=1, deadline_unix_s=0.0)
        ),
    )


async def _time_tokens(start: Any, name: str) -> tuple[float, list[float]]:
    """Seconds to the first token, and between messages with tokens, per token."""
    started_s = time.perf_counter()
    arrivals: list[float] = []
    async for response in start():
        tokens = response.chunk.tokens if name == "router" else response.tokens
        arrivals += [time.perf_counter()] * len(tokens.token_ids)
    gaps = [after - before for before, after in pairwise(arrivals)]
    return arrivals[0] - started_s, gaps


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
        running_forwarder("backend") as (_, port),
        running_forwarder("forward", port) as (forwarder, _),
    ):
        asyncio.run(run_bare(forwarder, concurrency=32, requests=300, messages=3))
        short_s, _ = asyncio.run(
            run_bare(forwarder, concurrency=args.concurrency, requests=args.requests, messages=3)
        )
        long_s, wall_s = asyncio.run(
            run_bare(forwarder, concurrency=256, requests=256, messages=200)
        )
    return {
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
