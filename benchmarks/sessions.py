"""What live sessions cost the router: its memory for each of many sessions, every one with a history, and the time of a turn.

A router process with its store in memory, the dearest for it, and one simulated decode worker. Each session has one turn of its
own; then some have a second one.

    python -m benchmarks.sessions --sessions 20000
"""

import argparse
import asyncio
import os
import random
import socket
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from baton.client import AsyncClient, SamplingOptions
from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.settings import WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from benchmarks.report import write_report
from decode_worker.worker import DecodeWorker

START_S = 30.0
CONCURRENT = 32
SAMPLING = SamplingOptions(max_tokens=1, temperature=0.0, ignore_eos=True)


@asynccontextmanager
async def router(store: str) -> AsyncIterator[tuple[int, str]]:
    """Process id and address of a router with a worker."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "--listen", address),
        env=os.environ | {"BATON_SESSION_STORE": store, "BATON_LOG_LEVEL": "warning"},
    )
    engine = AsyncEngine(partial(build_sim_engine, SimConfig(num_blocks=4096)), name="decode")
    transport = MemoryTransport(MemorySources(), ByteCredits(1 << 20))
    worker = DecodeWorker(WorkerSettings(routers=(address,)), engine, transport)
    try:
        await worker.start()
        yield process.pid, address
    finally:
        await worker.stop()
        process.terminate()
        await process.wait()


def resident_bytes(pid: int) -> int:
    """Memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


async def measure(
    count: int, history_tokens: int, store: str
) -> tuple[dict[str, float], list[float]]:
    """Figures, and the seconds of each second turn."""
    rng = random.Random(0)
    async with router(store) as (pid, address), AsyncClient(address) as client:
        async with asyncio.timeout(START_S):
            while not await _workers(client):  # noqa: ASYNC110 - the router starts, the worker dials
                await asyncio.sleep(0.1)

        async def converse() -> str:
            session = await client.sessions.create()
            prompt = rng.choices(range(1, 256), k=history_tokens - 1)
            await client.complete(prompt, sampling=SAMPLING, session=session)
            return session.session_id

        await asyncio.gather(*(converse() for _ in range(CONCURRENT)))
        before_bytes, began_s = resident_bytes(pid), time.perf_counter()
        ids: list[str] = []
        while len(ids) < count:
            ids += await asyncio.gather(*(converse() for _ in range(CONCURRENT)))
        elapsed_s = time.perf_counter() - began_s
        grown_bytes = resident_bytes(pid) - before_bytes
        turns_s = []
        for session in rng.sample(ids, 200):
            turn_began_s = time.perf_counter()
            await client.complete([1, 2, 3], sampling=SAMPLING, session=session)
            turns_s.append(time.perf_counter() - turn_began_s)
    return {
        "sessions": len(ids),
        "bytes_per_session": grown_bytes / len(ids),
        "sessions_per_second": len(ids) / elapsed_s,
        "second_turn_median_s": statistics.median(turns_s),
    }, turns_s


async def _workers(client: AsyncClient) -> bool:
    try:
        return bool((await client.model(timeout_s=2.0)).workers)
    except Exception:  # noqa: BLE001 - it is not there yet
        return False


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=20_000)
    parser.add_argument("--history-tokens", type=int, default=1024)
    parser.add_argument("--store", default="sqlite://")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sessions.json"))
    args = parser.parse_args()
    summary, turns_s = asyncio.run(measure(args.sessions, args.history_tokens, args.store))
    print(
        f"{summary['sessions']:.0f} sessions of {args.history_tokens} tokens: "
        f"{summary['bytes_per_session'] / 1000:.1f} kB each, "
        f"{summary['sessions_per_second']:.0f} made with a turn a second, "
        f"a second turn {summary['second_turn_median_s'] * 1e3:.1f} ms"
    )
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "store")}
    write_report(args.out, settings=settings, raw={"second_turn_s": turns_s}, summary=summary)


if __name__ == "__main__":
    main()
