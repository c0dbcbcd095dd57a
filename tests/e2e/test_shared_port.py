"""Several router processes at one port: clients need not know, workers join each, and sessions are everybody's."""

import asyncio
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from baton.client import AsyncClient, SamplingOptions
from baton.client.types import Result
from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.settings import WorkerSettings
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from decode_worker.worker import DecodeWorker

pytestmark = pytest.mark.e2e

SAMPLING = SamplingOptions(max_tokens=8, temperature=0.0, ignore_eos=True)
SIM = SimConfig(num_blocks=256)
CONNECTIONS = 24
"""The chance that one process gets all of them is one in eight million."""


@asynccontextmanager
async def router(port: int, store: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """A router process at a shared port, and where workers join it."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "router", "--listen", f"127.0.0.1:{port}"),
        env=os.environ
        | {
            "BATON_SHARE_PORT": "true",
            "BATON_FLEET_LISTEN": "127.0.0.1:0",
            "BATON_SESSION_STORE": f"sqlite://{store}",
        },
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        found = None
        while found is None:
            line = (await process.stderr.readline()).decode()
            assert line, "the router ended before it served"
            found = re.search(r"workers join on port (\d+)", line)
        yield process, f"127.0.0.1:{found[1]}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


@asynccontextmanager
async def routers(
    store: Path, sim: SimConfig = SIM
) -> AsyncIterator[tuple[str, list[asyncio.subprocess.Process]]]:
    """The address of two, with a worker that is a member of both."""
    async with AsyncExitStack() as stack:
        holder = stack.enter_context(socket.socket())
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))  # and does not listen: it keeps the port for them
        port = holder.getsockname()[1]
        started = [await stack.enter_async_context(router(port, store)) for _ in range(2)]
        settings = WorkerSettings(routers=tuple(address for _, address in started))
        engine = AsyncEngine(partial(build_sim_engine, sim), name="decode")
        transport = MemoryTransport(MemorySources(), ByteCredits(1 << 20))
        worker = DecodeWorker(settings, engine, transport)
        await worker.start()
        stack.push_async_callback(worker.stop)
        for _, fleet in started:
            async with asyncio.timeout(20), AsyncClient(fleet) as client:
                while not (await client.model()).workers:  # noqa: ASYNC110 - clients are told no other way
                    await asyncio.sleep(0.05)
        yield f"127.0.0.1:{port}", [process for process, _ in started]


async def test_two_processes_at_one_port_serve_one_fleet_and_one_set_of_sessions(
    tmp_path: Path,
) -> None:
    """Whichever process a connection comes to, the answer is the same, and a turn follows the turns of all."""
    async with routers(tmp_path / "sessions.db") as (address, _), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(AsyncClient(address)) for _ in range(CONNECTIONS)
        ]
        prompt = list(range(1, 40))
        answers = await asyncio.gather(
            *(client.complete(prompt, sampling=SAMPLING) for client in clients)
        )
        assert len({tuple(answer.token_ids) for answer in answers}) == 1

        session = await clients[0].sessions.create()
        whole: list[int] = []
        for client in clients:
            turn = [7, 8, 9]
            answer = await client.complete(turn, sampling=SAMPLING, session=session.session_id)
            whole += turn
            alone = await client.complete(whole, sampling=SAMPLING)
            assert answer.token_ids == alone.token_ids
            whole += answer.token_ids


async def test_a_process_that_dies_leaves_the_port_to_the_other(tmp_path: Path) -> None:
    """Clients of the dead one come to the living one, at the same address."""
    async with routers(tmp_path / "sessions.db") as (address, processes):
        processes[0].kill()
        await processes[0].wait()
        for _ in range(CONNECTIONS):
            async with AsyncClient(address) as client:
                answer = await client.complete([1, 2, 3], sampling=SAMPLING)
                assert len(answer.token_ids) == 8


async def test_streams_of_a_process_that_dies_go_on_at_the_same_address(tmp_path: Path) -> None:
    """Promise: no token is lost or told twice, though the clients know one address only."""
    sampling = SamplingOptions(max_tokens=60, seed=3, ignore_eos=True)
    begun = asyncio.Barrier(CONNECTIONS + 1)

    async def stream(address: str) -> Result:
        seen = 0
        async with (
            AsyncClient(address) as client,
            client.generate([1, 2, 3], sampling=sampling) as stream,
        ):
            async for chunk in stream:
                seen += len(chunk.token_ids)
                if seen == len(chunk.token_ids):
                    await begun.wait()
            return stream.result

    slow = replace(SIM, step_s=0.02)
    async with (
        asyncio.timeout(60),
        routers(tmp_path / "sessions.db", slow) as (address, processes),
    ):
        async with AsyncClient(address) as client:
            undisturbed = await client.complete([1, 2, 3], sampling=sampling)
        streams = [asyncio.create_task(stream(address)) for _ in range(CONNECTIONS)]
        await begun.wait()
        processes[0].kill()
        for result in await asyncio.gather(*streams):
            assert result.token_ids == undisturbed.token_ids
            assert result.finish_reason == undisturbed.finish_reason
