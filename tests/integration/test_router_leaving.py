"""A decode worker that drains hands its requests over: their KV moves, no token is lost, and none is computed twice."""

import asyncio

from baton.v1 import inference_pb2
from tests.integration.router_fakes import Answer
from tests.integration.sim_house import House, house

LONG = {"max_tokens": 400}
"""Still running when a test has done what it does meanwhile."""


def finished(answer: Answer) -> inference_pb2.Finished:
    assert answer.finished is not None
    return answer.finished


async def generating(here: House) -> str:
    """A decode worker that generates for somebody, once there is one: caches decide which it is."""
    async with asyncio.timeout(20):
        while True:
            for worker_id in decode_ids(here):
                engine = here.workers[worker_id].host.engine  # type: ignore[index]
                if (await engine.refresh_load()).used_blocks:
                    return worker_id
            await asyncio.sleep(0.002)


async def draining(here: House, worker_id: str) -> None:
    """The worker drains to its end and leaves, as SIGTERM has it do."""
    worker = here.workers[worker_id]  # type: ignore[index]
    assert await worker.drain(20), "everything that ran has gone elsewhere"
    await here.kill(worker_id)


def decode_ids(here: House) -> list[str]:
    return [worker_id for worker_id in here.workers if "decode" in worker_id]


async def test_requests_move_to_another_decode_worker_with_their_kv() -> None:
    """Promise: draining a decode worker costs a running request no token, and its KV is pulled, not computed again."""
    numbers = range(12)
    async with house(prefill=1, decode=2) as here:
        undisturbed = [await here.generate(number, **LONG) for number in numbers]
        calls = [asyncio.create_task(here.generate(number, **LONG)) for number in numbers]
        leaving = await generating(here)
        await draining(here, leaving)
        answers: list[Answer] = await asyncio.gather(*calls)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in undisturbed]
    moved = [a for a in answers if any("moves on" in r.failure for r in finished(a).attempts)]
    assert moved, "some requests ran on the worker that left"
    for answer in moved:
        first, second = finished(answer).attempts
        assert first.decode_worker == leaving
        assert second.decode_worker != leaving
        assert second.prefill_worker == "", "no prefill worker took part again"
        assert finished(answer).timings.handoff_bytes > 0, "the KV came over"


async def test_a_decode_worker_without_a_successor_finishes_what_it_runs() -> None:
    """Promise: where nobody can take a request over, it stays until its end."""
    async with house(prefill=1, decode=1) as here:
        undisturbed = await here.generate(1, **LONG)
        call = asyncio.create_task(here.generate(1, **LONG))
        await draining(here, await generating(here))
        assert (await call).tokens == undisturbed.tokens
        await here.add_decode()


async def test_a_successor_that_comes_while_a_worker_drains_takes_over() -> None:
    async with house(prefill=1, decode=1) as here:
        undisturbed = await here.generate(1, max_tokens=400)
        call = asyncio.create_task(here.generate(1, max_tokens=400))
        drain = asyncio.create_task(draining(here, await generating(here)))
        await here.add_decode()
        answer = await call
        await drain
    assert answer.tokens == undisturbed.tokens
    assert len(finished(answer).attempts) == 2


async def test_a_successor_that_dies_while_it_takes_over_costs_nothing() -> None:
    """Promise: a failed move is one more failed attempt; the request goes on after every token it has."""
    async with house(prefill=1, decode=3) as here:
        undisturbed = [await here.generate(number, **LONG) for number in range(9)]
        calls = [asyncio.create_task(here.generate(number, **LONG)) for number in range(9)]
        leaving = await generating(here)
        dying = next(worker_id for worker_id in decode_ids(here) if worker_id != leaving)
        drain = asyncio.create_task(draining(here, leaving))
        await asyncio.sleep(0.01)
        await here.kill(dying)
        answers = await asyncio.gather(*calls)
        await drain
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in undisturbed]


async def test_the_whole_fleet_is_replaced_under_load_and_nobody_notices() -> None:
    """Promise: a rolling restart of every worker fails no request and changes no token."""
    async with house(prefill=2, decode=2) as here:
        undisturbed = {number: (await here.generate(number, **LONG)).tokens for number in range(8)}
        ended = False

        async def client(number: int) -> None:
            while not ended:
                assert (await here.generate(number, **LONG)).tokens == undisturbed[number]

        async with asyncio.TaskGroup() as group:
            for number in undisturbed:
                group.create_task(client(number))
            for worker_id in list(here.workers):
                await (here.add_decode() if "decode" in worker_id else here.add_prefill())
                await draining(here, worker_id)
            ended = True
