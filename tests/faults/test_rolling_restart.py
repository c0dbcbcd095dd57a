"""The whole fleet is replaced under load, process by process: `python -m prefill_worker`, `decode_worker` and `router`, each ended by
SIGTERM; KV over Ray, and the shipped model.
"""

import asyncio
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from baton.client import AsyncClient, Result, SamplingOptions
from baton.transfer.ray_runtime import RayCluster
from baton.types import Role
from tests.faults.actors import TALES, members, until_true
from tests.faults.routers import RouterProcess
from tests.faults.soak_load import answer_of

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(300)]

WIDTH = 6
TOKENS = 200
LONGEST_WAIT_S = 5.0
"""Between two messages of a stream."""


class WorkerCommand:
    """`python -m prefill_worker` or `python -m decode_worker`."""

    def __init__(self, role: Role, cluster: RayCluster, routers: list[str], log: Path) -> None:
        self._log = log
        flags = {
            "--model": str(TALES),
            "--dtype": "float32",
            "--threads": "1",
            "--kv-pool-tokens": "16384",
            "--ray-address": cluster.address,
            "--namespace": cluster.namespace,
            "--routers": ",".join(routers),
        }
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", f"{role.value}_worker", *sum(flags.items(), ())],
                env=os.environ | {"RAY_AUTH_MODE": "token"},
                stdout=output,
                stderr=output,
            )

    async def joined(self, routers: list[str]) -> None:
        """Returns once every router has it as a member."""
        await until_true(lambda: bool(self._name), 90, "a worker serves")
        for address in routers:
            async with asyncio.timeout(30), AsyncClient(address) as client:
                while self._name not in await members(client):  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.05)

    async def retire(self) -> None:
        """SIGTERM, and a drain to its end."""
        self._process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(self._process.wait, 60) == 0, self._log.read_text()

    def end(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)

    @property
    def _name(self) -> str:
        text = self._log.read_text()
        assert self._process.poll() is None, text
        found = re.search(r"worker (\S+) serves", text)
        return "" if found is None else found[1]


@dataclass(slots=True)
class Load:
    """Requests without a pause."""

    undisturbed: list[tuple[list[int], Result]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """The longest wait between two messages of each request."""

    async def ask_until(self, stop: asyncio.Event, client: AsyncClient, number: int) -> None:
        while not stop.is_set():
            prompt, expected = self.undisturbed[number]
            gap_s, heard_s = 0.0, None
            async with client.generate(prompt, sampling=sampling(number)) as stream:
                async for _ in stream:
                    now_s = time.monotonic()
                    gap_s = max(gap_s, 0.0 if heard_s is None else now_s - heard_s)
                    heard_s = now_s
                result = stream.result
            assert answer_of(result) == answer_of(expected)
            self.results.append(result)
            self.gaps_s.append(gap_s)


def sampling(number: int) -> SamplingOptions:
    if number % 2:
        return SamplingOptions(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    return SamplingOptions(max_tokens=TOKENS, seed=number, top_p=0.9, ignore_eos=True)


@asynccontextmanager
async def running_load(routers: list[str]) -> AsyncIterator[Load]:
    """Inside the context, requests run without a pause; half of the clients know the routers in the other order."""
    rng = random.Random(3)
    async with (
        AsyncClient(",".join(routers)) as one,
        AsyncClient(",".join(reversed(routers))) as other,
    ):
        load, stop = Load(), asyncio.Event()
        for number in range(WIDTH):
            prompt = [rng.randrange(10, 2000) for _ in range(150)]
            result = await one.complete(prompt, sampling=sampling(number))
            load.undisturbed.append((prompt, result))
        async with asyncio.TaskGroup() as group:
            for number in range(WIDTH):
                client = other if number % 2 else one
                group.create_task(load.ask_until(stop, client, number))
            yield load
            stop.set()


async def test_a_rolling_restart_under_load_loses_and_changes_nothing(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """Promise: a prefill worker leaves after its last pull, a decode worker hands its running requests to others, which pull their KV
    and compute nothing again; so a rolling restart of the whole fleet fails no request, changes no token and keeps nobody waiting.
    """
    async with AsyncExitStack() as stack:
        routers = [RouterProcess({"BATON_MODEL": str(TALES)}) for _ in range(2)]
        for router in routers:
            stack.callback(router.end)
            await asyncio.to_thread(router.start)
        addresses = [router.address for router in routers]
        numbers = itertools.count()

        async def start(role: Role) -> WorkerCommand:
            log = tmp_path / f"{role.value}-{next(numbers)}"
            command = WorkerCommand(role, ray_cluster, addresses, log)
            stack.callback(command.end)
            await command.joined(addresses)
            return command

        fleet = {role: await start(role) for role in Role}
        async with running_load(addresses) as load:
            for role in Role:
                successor = await start(role)
                await fleet[role].retire()
                fleet[role] = successor
            for router in routers:
                router.signal(signal.SIGTERM)
                assert await asyncio.to_thread(router.wait) == 0
                await asyncio.to_thread(router.start)
                for command in fleet.values():
                    await command.joined(addresses)
    attempts = [each for result in load.results for each in result.attempts]
    assert {a.failure.partition(":")[0] for a in attempts} == {"", "DRAINING"}
    # Whoever came when the worker was about to leave had nothing there yet.
    moved = [result for result in load.results if any(a.resumed_tokens for a in result.attempts)]
    assert moved, "requests ran on the decode worker that left"
    for result in moved:
        assert [each.prefill_worker for each in result.attempts[1:]] == [""], result.attempts
        assert result.timings.handoff_bytes > 0, "the KV came over"
    # Far more than a move takes, on a busy machine too, and less than any timeout that would end a wait for who has left.
    assert max(load.gaps_s) < LONGEST_WAIT_S
