"""Measures the KV handoff between two Ray actors on this machine against the least that a handoff could cost, two plain copies of
the same bytes, out of one pool and into the other, and against what Ray alone costs: a call whose answer is an array that
lies ready, copied once where it arrives.

    python -m benchmarks.handoff [--runs 21] [--piece-mib 128] [--out benchmarks/results/handoff.json]

One handoff lasts from the end of prefill to the KV in decode's pool: decode, which waits for that end, is told, and pulls piece by
piece; meanwhile prefill copies the pieces out of its pool with their checksums, Ray carries them, and decode imports them into
its pool and verifies them. The pools are `baton.kv.pool.KVPool` with scattered blocks; copies to and from them run on one thread
a side, as engines do. The three measures alternate, and rotate through pools or buffers larger than the cache, so that none finds
its bytes warm.
"""

import argparse
import asyncio
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from baton.kv.pool import KVPool
from baton.kv.spec import KVDtype, KVSpec, SealedKV, WireKV
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.credits import ByteCredits
from baton.transfer.endpoint import SourceEndpoint
from baton.transfer.layout import meta_of, split_range
from baton.transfer.ray_runtime import LocalRaySettings, start_local
from baton.transfer.ray_store import RayTransport
from baton.types import AttemptKey, RequestId
from benchmarks.report import write_report

MIB = 1 << 20
BLOCK_TOKENS = 16
NAMESPACE = "handoff-benchmark"
SPEC = KVSpec(
    num_layers=16,
    num_kv_heads=8,
    head_dim=64,
    dtype=KVDtype.BFLOAT16,
    position_scheme="rope:theta=500000",
    model_fingerprint="benchmark",
)
"""The cache of a one-billion-parameter model: 32 KiB a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is measured."""

    payload_bytes: tuple[int, ...]
    runs: int
    piece_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Medians in milliseconds, and every run behind them."""

    payload_bytes: int
    handoff_ms: float
    ray_alone_ms: float
    two_memcpys_ms: float
    ratio: float
    """Of the handoff to two copies."""
    ray_alone_ratio: float
    handoff_runs_ms: tuple[float, ...]
    ray_alone_runs_ms: tuple[float, ...]
    two_memcpys_runs_ms: tuple[float, ...]


class Pools:
    """A worker's pool, larger than the cache, and block tables that take turns in it."""

    def __init__(self, payload_bytes: int) -> None:
        blocks = -(-payload_bytes // (SPEC.token_bytes * BLOCK_TOKENS))
        self.tables = [
            list(range(i * blocks, (i + 1) * blocks)) for i in range(turns(payload_bytes))
        ]
        for table in self.tables:
            random.Random(7).shuffle(table)
        num_blocks = blocks * len(self.tables)
        self.pool = KVPool(
            SPEC, num_blocks=num_blocks, block_size_tokens=BLOCK_TOKENS, device="cpu"
        )
        self.pool.data.fill_(0.5)
        self.thread = ThreadPoolExecutor(1)


def turns(payload_bytes: int) -> int:
    """Enough buffers that one's turn comes after the cache has forgotten it."""
    return min(64, max(2, 256 * MIB // payload_bytes))


class PoolSource:
    """A `KVSource` whose prompt is computed 5 ms after decode asks for it; then its engine copies the KV out, piece by piece."""

    def __init__(self, payload_bytes: int, settings: Settings) -> None:
        self._pools = Pools(payload_bytes)
        num_tokens = payload_bytes // SPEC.token_bytes
        self._pieces = split_range(0, num_tokens, SPEC.token_bytes, settings.piece_bytes)
        self._copies: dict[tuple[int, int], asyncio.Future[SealedKV]] = {}

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        del timeout_s, piece
        await asyncio.sleep(0.005)  # decode asks before prefill is done
        done_unix_s = time.time()
        loop, pools = asyncio.get_running_loop(), self._pools
        table = pools.tables[key.attempt % len(pools.tables)]
        for first, last in self._pieces:
            copy = loop.run_in_executor(pools.thread, pools.pool.read_kv, table, first, last)
            self._copies[first, last] = copy
        return Ready(first_token=0, done_unix_s=done_unix_s)

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        kv = await self._copies.pop((request.first, request.last))
        return meta_of(request, SPEC, kv), kv.data


class Prefill:
    """The prefill worker's side."""

    def __init__(self, payload_bytes: int, settings: Settings) -> None:
        self._endpoint = SourceEndpoint(PoolSource(payload_bytes, settings))
        self._arrays = [np.ones(payload_bytes, np.uint8) for _ in range(turns(payload_bytes))]

    async def kv_ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        return await self._endpoint.ready(key, timeout_s, piece)

    async def kv_pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        return await self._endpoint.pull(request)

    async def array(self, run: int) -> tuple[int, npt.NDArray[np.uint8]]:
        """An array that lies ready."""
        return run, self._arrays[run % len(self._arrays)]


class Decode:
    """The decode worker's side, which holds the clock."""

    def __init__(self, payload_bytes: int, settings: Settings) -> None:
        self._payload_bytes = payload_bytes
        self._piece_bytes = settings.piece_bytes
        self._pools = Pools(payload_bytes)
        self._transport = RayTransport(ByteCredits(512 * MIB), NAMESPACE)
        count = turns(payload_bytes)
        self._buffers = [np.ones(payload_bytes, np.uint8) for _ in range(count + 2)]

    async def measure(self, address: str, runs: int) -> list[tuple[float, float, float]]:
        """Milliseconds of (handoff, Ray alone, two copies), run by run, after runs that touch every page."""
        figures = []
        prefill: Any = ray.get_actor(address, NAMESPACE)
        warmup = len(self._pools.tables) + 2
        for run in range(warmup + runs):
            copies_ms = self._two_copies_ms(run)
            ray_ms = await self._ray_alone_ms(prefill, run)
            handoff_ms = await self._handoff_ms(address, run)
            if run >= warmup:
                figures.append((handoff_ms, ray_ms, copies_ms))
        return figures

    async def _handoff_ms(self, address: str, run: int) -> float:
        key = AttemptKey(RequestId("benchmark"), run)
        table = self._pools.tables[run % len(self._pools.tables)]
        loop = asyncio.get_running_loop()
        ready = await self._transport.ready(address, key, 10.0)
        assert isinstance(ready, Ready)
        num_tokens = self._payload_bytes // SPEC.token_bytes
        write = self._pools.pool.write_kv
        for first, last in split_range(0, num_tokens, SPEC.token_bytes, self._piece_bytes):
            request = PullRequest(key=key, first=first, last=last, digest=SPEC.digest)
            async with self._transport.pull(address, request, spec=SPEC, timeout_s=30.0) as kv:
                await loop.run_in_executor(self._pools.thread, write, table, first, kv)
                del kv
        return (time.time() - ready.done_unix_s) * 1e3

    async def _ray_alone_ms(self, prefill: Any, run: int) -> float:
        start_s = time.perf_counter()
        _, array = await prefill.array.remote(run)
        np.copyto(self._buffers[run % len(self._buffers)], array)
        return (time.perf_counter() - start_s) * 1e3

    def _two_copies_ms(self, run: int) -> float:
        count = len(self._buffers)
        first, second, third = (self._buffers[(run + i) % count] for i in range(3))
        start_s = time.perf_counter()
        np.copyto(second, first)
        np.copyto(third, second)
        return (time.perf_counter() - start_s) * 1e3


def measure(payload_bytes: int, settings: Settings) -> Figures:
    """One payload size, with actors of its own."""
    name = f"prefill-{payload_bytes}"
    actor = ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
    prefill: Any = actor(Prefill).options(name=name).remote(payload_bytes, settings)
    decode: Any = actor(Decode).remote(payload_bytes, settings)
    runs = ray.get(decode.measure.remote(name, settings.runs))
    for each in (prefill, decode):
        ray.kill(each)
    handoffs, ray_alone, copies = (
        tuple(round(value, 3) for value in column) for column in zip(*runs, strict=True)
    )
    handoff_ms, ray_ms, copies_ms = map(statistics.median, (handoffs, ray_alone, copies))
    return Figures(
        payload_bytes=payload_bytes,
        handoff_ms=handoff_ms,
        ray_alone_ms=ray_ms,
        two_memcpys_ms=copies_ms,
        ratio=round(handoff_ms / copies_ms, 2),
        ray_alone_ratio=round(ray_ms / copies_ms, 2),
        handoff_runs_ms=handoffs,
        ray_alone_runs_ms=ray_alone,
        two_memcpys_runs_ms=copies,
    )


def main() -> None:
    """Measures, prints and writes every payload size."""
    parser = argparse.ArgumentParser(description="KV handoff between two Ray actors on one machine")
    parser.add_argument("--runs", type=int, default=21)
    parser.add_argument("--piece-mib", type=float, default=128)
    parser.add_argument("--payload-mib", type=float, nargs="+", default=[1 / 16, 1, 4, 16, 64, 128])
    parser.add_argument("--preallocate", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/handoff.json"))
    args = parser.parse_args()
    settings = Settings(
        payload_bytes=tuple(int(mib * MIB) for mib in args.payload_mib),
        runs=args.runs,
        piece_bytes=int(args.piece_mib * MIB),
    )
    cluster = LocalRaySettings(
        namespace=NAMESPACE,
        prestarted_workers=2,
        object_store_bytes=1024 * MIB,
        preallocate=args.preallocate,
    )
    results: list[Figures] = []
    with start_local(cluster):
        print(f"{'payload':>10} {'handoff':>10} {'Ray alone':>10} {'2 memcpys':>10} {'ratio':>6}")
        for payload_bytes in settings.payload_bytes:
            figures = measure(payload_bytes, settings)
            results.append(figures)
            print(
                f"{payload_bytes / MIB:>6.2f} MiB {figures.handoff_ms:>7.2f} ms "
                f"{figures.ray_alone_ms:>7.2f} ms "
                f"{figures.two_memcpys_ms:>7.2f} ms {figures.ratio:>6.2f}",
                flush=True,
            )
    write_report(
        args.out,
        settings=asdict(settings),
        raw={str(figures.payload_bytes): asdict(figures) for figures in results},
        summary={
            f"{figures.payload_bytes / MIB:g} MiB": {
                "handoff_ms": figures.handoff_ms,
                "ray_alone_ms": figures.ray_alone_ms,
                "two_memcpys_ms": figures.two_memcpys_ms,
                "ratio": figures.ratio,
            }
            for figures in results
        },
    )


if __name__ == "__main__":
    main()
