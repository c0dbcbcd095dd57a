"""The router over tunnels: what holds for calls of their own holds for calls that share a stream."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from baton.types import Role
from router.tunnel import Tunnel
from tests.integration.router_fakes import PROMPT, Cluster, FakeWorker, cluster, expected

pytestmark = pytest.mark.usefixtures("tunnelled")


@pytest.fixture
def tunnelled(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts the calls that were made in tunnels."""
    calls: Counter[str] = Counter()
    start = Tunnel.start

    def counted(self: Tunnel, method: str, *args: Any) -> Any:
        call = start(self, method, *args)
        calls[method.rpartition("/")[2]] += call is not None
        return call

    monkeypatch.setattr(Tunnel, "start", counted)
    return calls


@asynccontextmanager
async def tunnels(*ids: str) -> AsyncIterator[tuple[Cluster, dict[str, FakeWorker]]]:
    """A cluster of one prefill worker and decode workers of those ids, all of whose tunnels are open."""
    async with cluster() as here:
        workers = {"p": await here.add(Role.PREFILL, "p", tunnels=True)}
        for worker_id in ids:
            workers[worker_id] = await here.add(Role.DECODE, worker_id, tunnels=True)
        open_ = [member.tunnel for member in here.app.fleet.members()]
        for tunnel in open_:
            tunnel.open()
        await here.until(lambda: all(tunnel.is_open for tunnel in open_))
        yield here, workers


async def test_requests_share_a_stream_and_get_their_own_answers(tunnelled: Counter[str]) -> None:
    async with tunnels("d") as (here, _):
        prompts = [tuple(range(n, n + 60)) for n in range(1, 33)]
        answers = await asyncio.gather(*(here.generate(prompt=prompt) for prompt in prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == expected(prompt, 10)
        assert answer.failures == []
    assert tunnelled == {"Decode": 32, "Prefill": 32}


async def test_a_worker_that_dies_takes_no_answer_with_it() -> None:
    async with tunnels("d1", "d2") as (here, workers):
        for worker_id in ("d1", "d2"):
            worker = workers[worker_id]

            async def die_once(stage: str, worker: FakeWorker = worker) -> None:
                if stage == "token:5" and not worker.resumed[-1]:
                    await worker.die()

            worker.script = die_once
        answer = await here.generate()
        assert answer.tokens == expected(PROMPT, 10)
        assert answer.failures == ["UNAVAILABLE"]


@pytest.mark.parametrize("stage", ["arrived", "reserved", "kv", "token:4"])
async def test_a_cancelled_request_frees_both_workers(stage: str) -> None:
    async with tunnels("d") as (here, workers):
        reached = asyncio.Event()

        async def hang(at: str) -> None:
            if at == stage:
                reached.set()
                await asyncio.Event().wait()

        workers["d"].script = hang
        call = here.call()
        reading = asyncio.create_task(call.read())
        await reached.wait()
        call.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        await here.until(lambda: not any(worker.running for worker in workers.values()))
