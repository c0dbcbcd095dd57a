"""A worker is stopped (SIGSTOP) and goes on later: what it ran meanwhile belongs to nobody, and ends."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager

import pytest

from baton.client import AsyncClient, SamplingOptions
from baton.types import WorkerInfo
from tests.faults.probes import blocks_at_rest
from tests.faults.routers import RouterProcess

pytestmark = pytest.mark.e2e

LONG = SamplingOptions(max_tokens=3000, temperature=0.0, ignore_eos=True)
GRACE_S = 120.0
"""Longer than the test: whatever ends before, its router has ended."""
REST_S = 2.0
"""A second and a heartbeat."""


class Fleet:
    """A router and decode workers, each in a process of its own."""

    def __init__(self, address: str, processes: dict[str, subprocess.Popen[bytes]]) -> None:
        self.address = address
        self._processes = processes
        self._infos: dict[str, WorkerInfo] = {}

    def signal(self, worker_id: str, number: signal.Signals) -> None:
        self._processes[worker_id].send_signal(number)

    async def has(self, client: AsyncClient, *worker_ids: str) -> None:
        """Returns once those, and nobody else, are members."""
        async with asyncio.timeout(30):
            while True:
                workers = (await client.model()).workers
                self._infos |= {info.worker_id: info for info in workers}
                if {info.worker_id for info in workers} == set(worker_ids):
                    return
                await asyncio.sleep(0.02)

    async def rests(self, worker_id: str) -> bool:
        return await asyncio.to_thread(blocks_at_rest, self._infos[worker_id])

    async def at_rest(self, worker_id: str) -> None:
        async with asyncio.timeout(REST_S):
            while not await self.rests(worker_id):  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.01)


@asynccontextmanager
async def fleet() -> AsyncIterator[Fleet]:
    with ExitStack() as stack:
        router = RouterProcess({"BATON_ORPHAN_GRACE_S": str(GRACE_S)})
        stack.callback(router.end)
        await asyncio.to_thread(router.start)
        workers = {each: _worker(each, router, stack) for each in ("one", "two")}
        yield Fleet(router.address, workers)


def _worker(worker_id: str, router: RouterProcess, stack: ExitStack) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.faults.lone_decode", worker_id, router.address]
    process = stack.enter_context(subprocess.Popen(command))
    stack.callback(process.kill)
    return process


async def test_what_a_stopped_worker_ran_ends_when_it_wakes_up() -> None:
    """Promise: a worker that wakes up after its lease lets go of all that went on elsewhere, or was cancelled, while it was gone: once it
    has joined again, though it would go on for its grace with what a router left behind that died.
    """
    async with fleet() as here, AsyncClient(here.address) as client:
        await here.has(client, "one", "two")
        streams = [
            client.generate([number, *range(1, 60)], sampling=LONG) for number in range(1, 9)
        ]
        chunks = [aiter(stream) for stream in streams]
        for each in chunks:
            await anext(each)
        assert not await here.rests("one")
        here.signal("one", signal.SIGSTOP)
        streams[0].close()
        streams[1].close()
        await here.has(client, "two")
        for each in chunks[2:]:
            async with asyncio.timeout(10):
                for _ in range(20):  # more than was on its way from the other one
                    await anext(each)
        for stream in streams[2:]:
            stream.close()
        await here.at_rest("two")
        here.signal("one", signal.SIGCONT)
        await here.has(client, "one", "two")
        await here.at_rest("one")
