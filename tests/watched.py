"""A loaded fleet to watch, in real processes: a router with an HTTP port, simulated workers that take their time, and clients.

    python -m tests.watched ROUTER PREFILL DECODE      the workers; "stop WORKER" on standard input kills one

Prompts share a beginning, so that prefix caches have something to hold; some requests are turns of sessions.
"""

import asyncio
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import IO

import httpx

from baton.client import AsyncClient, SamplingOptions
from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.errors import BatonError
from baton.service.settings import WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.types import Role
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from router.status.snapshot import SNAPSHOT, StatusSnapshot
from tests.faults.routers import RouterProcess
from tests.served import until

PREFILL_SIM = SimConfig(num_blocks=512, max_batch_tokens=128, step_s=0.01, token_s=0.0004)
DECODE_SIM = SimConfig(num_blocks=512, max_batch_tokens=128, step_s=0.03)
SHARED = tuple(7 * position % 255 + 1 for position in range(160))


@dataclass(frozen=True, slots=True)
class Watched:
    """See the module docstring."""

    router: RouterProcess
    url: str
    workers: "subprocess.Popen[bytes] | None" = None

    def status(self, key: str | None = None) -> StatusSnapshot:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        answer = httpx.get(f"{self.url}/status", headers=headers, timeout=10)
        answer.raise_for_status()
        return SNAPSHOT.validate_json(answer.content)

    def stop_busiest(self) -> str:
        """Kills the decode worker that has the most requests, which go on elsewhere; returns its id."""
        fleet = self.status().fleet
        assert fleet is not None
        decode = [worker for worker in fleet if worker.role is Role.DECODE]
        worker_id = max(decode, key=lambda worker: worker.running_requests).worker_id
        self.stop_worker(worker_id)
        return worker_id

    def stop_worker(self, worker_id: str) -> None:
        """Kills one."""
        assert self.workers is not None
        stdin: IO[bytes] | None = self.workers.stdin
        assert stdin is not None
        stdin.write(f"stop {worker_id}\n".encode())
        stdin.flush()


@contextmanager
def watched_router(scheme: str = "http", **environ: str) -> Iterator[Watched]:
    """A router without workers; `environ` sets more of it."""
    router = RouterProcess(environ, http=True).start()
    try:
        yield Watched(router, f"{scheme}://{router.http_address}")
    finally:
        router.end()


@contextmanager
def watched_fleet(prefill: int = 2, decode: int = 3) -> Iterator[Watched]:
    """The router and its workers, idle."""
    with watched_router() as watched, ExitStack() as stack:
        joined_at = watched.router.address
        command = [sys.executable, "-m", "tests.watched", joined_at, str(prefill), str(decode)]
        workers = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ)
        )
        stack.callback(workers.kill)
        stdout: IO[bytes] | None = workers.stdout
        assert stdout is not None
        assert stdout.readline() == b"ready\n"
        yield replace(watched, workers=workers)


@contextmanager
def loaded(address: str, width: int = 10, sessions: int = 3, key: str = "") -> Iterator[None]:
    """Keeps so many requests and sessions' turns running from another thread, inside the context."""
    stop = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(_load(address, width, sessions, key, stop))
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def until_busy(watched: Watched, live: int) -> None:
    """Returns once so many requests generate, with latencies and a session to be seen."""

    def is_busy() -> bool:
        status = watched.status()
        generating = [r for r in status.requests.live if r.completion_tokens > 1]
        seen = status.traffic.itl.count and status.sessions.recent
        return len(generating) >= live and bool(seen)

    until(is_busy, 20, f"{live} requests generate")


async def _load(address: str, width: int, sessions: int, key: str, stop: threading.Event) -> None:
    async with AsyncClient(address, api_key=key) as client:
        asking = [asyncio.create_task(_ask(client, n)) for n in range(width)]
        asking += [asyncio.create_task(_converse(client, n)) for n in range(sessions)]
        while not stop.is_set():  # noqa: ASYNC110 - another thread's event
            await asyncio.sleep(0.05)
        for task in asking:
            task.cancel()
        for outcome in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(outcome, Exception) and not isinstance(outcome, BatonError):
                raise outcome


def _sampling(rng: random.Random, most: int) -> SamplingOptions:
    n = 2 if rng.random() < 0.08 else 1
    tokens = rng.randrange(most // 4, most)
    return SamplingOptions(max_tokens=tokens, seed=rng.randrange(1 << 30), ignore_eos=True, n=n)


async def _ask(client: AsyncClient, number: int) -> None:
    rng = random.Random(number)
    await asyncio.sleep(number * 0.35)
    while True:
        length = rng.choice((60, 200, 450, 900))
        prompt = [*SHARED, *(rng.randrange(1, 256) for _ in range(length))]
        await client.complete(prompt, sampling=_sampling(rng, 320))
        await asyncio.sleep(rng.random() * 1.5)


async def _converse(client: AsyncClient, number: int) -> None:
    rng = random.Random(1000 + number)
    session = await client.sessions.create()
    while True:
        prompt = [rng.randrange(1, 256) for _ in range(120)]
        sampling = replace(_sampling(rng, 160), n=1)
        await client.complete(prompt, sampling=sampling, session=session)
        await asyncio.sleep(0.5 + rng.random() * 2)


async def _serve_workers(router: str, prefill: int, decode: int) -> None:
    sources = MemorySources()
    running: dict[str, PrefillWorker | DecodeWorker] = {}
    for role, count in (("prefill", prefill), ("decode", decode)):
        for name in (f"{role}-{index}" for index in range(count)):
            running[name] = _worker(role, name, router, sources)
    for name, worker in running.items():
        info = await worker.start()
        sources.add(info.transfer_address, worker)
        assert info.worker_id == name
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := await asyncio.to_thread(sys.stdin.readline):
        name = line.split()[1]
        sources.remove(name)
        await running.pop(name).stop()


def _worker(
    role: str, name: str, router: str, sources: MemorySources
) -> PrefillWorker | DecodeWorker:
    settings = WorkerSettings(
        reflection=False, routers=(router,), worker_id=name, transfer_address=name
    )
    sim = PREFILL_SIM if role == "prefill" else DECODE_SIM
    engine = AsyncEngine(lambda: build_sim_engine(sim), name=name)
    if role == "prefill":
        return PrefillWorker(settings, engine)
    return DecodeWorker(settings, engine, MemoryTransport(sources, ByteCredits(1 << 24)))


if __name__ == "__main__":
    router_address, num_prefill, num_decode = sys.argv[1:]
    asyncio.run(_serve_workers(router_address, int(num_prefill), int(num_decode)))
