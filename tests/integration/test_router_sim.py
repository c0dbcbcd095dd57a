"""Router, prefill workers and decode workers as they are shipped, with simulated engines, in one process.

The simulated engine's tokens depend on every KV entry before them, so that equal streams mean that no KV was lost or misplaced.
"""

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import pytest

from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from tests.integration.router_fakes import SETTINGS, Answer
from tests.integration.sim_house import LENGTH, SIM, House, house


@pytest.fixture(scope="module")
def reference() -> dict[int, Sequence[int]]:
    """What one undisturbed decode worker without prefill workers answers."""

    async def collect() -> dict[int, Sequence[int]]:
        async with house(0, 1) as here:
            return {number: (await here.generate(number)).tokens for number in range(40)}

    return asyncio.run(collect())


async def test_the_split_answer_is_the_local_one(reference: dict[int, Sequence[int]]) -> None:
    async with house(1, 1) as here:
        answers = await asyncio.gather(*(here.generate(number) for number in range(40)))
        assert [answer.tokens for answer in answers] == list(reference.values())
        assert all(answer.failures == [] for answer in answers)
        assert all(answer.end.attempts[0].prefill_worker for answer in answers)
        for _ in range(2):
            again = await here.generate(3)
            assert again.tokens == reference[3]
        assert again.end.usage.cached_tokens >= 80


async def test_decode_is_killed_at_every_token_and_nobody_can_tell(
    reference: dict[int, Sequence[int]],
) -> None:
    """The worker that serves the request is stopped the moment that the client has k tokens."""
    async with house(1, 2) as here:
        for k in range(1, LENGTH):
            answer = Answer()
            killed = None
            async for response in here.call(k):
                answer.add(response)
                if killed is None and len(answer.tokens) >= k and answer.finished is None:
                    killed = asyncio.create_task(_kill_serving(here))
            assert answer.tokens == reference[k]
            if killed is not None:
                await killed
            await here.add_decode()


async def test_prefill_is_killed_at_random_instants_and_nobody_can_tell(
    reference: dict[int, Sequence[int]],
) -> None:
    rng = random.Random(3)
    async with house(2, 2) as here:
        for round_ in range(6):
            numbers = range(round_ * 6, round_ * 6 + 6)
            running = asyncio.gather(*(here.generate(number) for number in numbers))
            await asyncio.sleep(rng.random() * 0.05)
            victim = next(w for w in here.workers if isinstance(here.workers[w], PrefillWorker))
            await here.kill(victim)
            answers = await running
            assert [answer.tokens for answer in answers] == [reference[n] for n in numbers]
            await here.add_prefill()


async def test_a_single_token_takes_one_attempt_however_often_it_is_asked(
    reference: dict[int, Sequence[int]],
) -> None:
    """Prefill's token ends the request while decode waits for KV that never comes: that is no failure."""
    async with house(1, 1) as here:
        for number in range(25):
            answer = await here.generate(number, max_tokens=1)
            assert answer.tokens == list(reference[number][:1])
            assert answer.failures == []


async def test_cancelled_requests_free_every_block() -> None:
    rng = random.Random(5)
    async with house(1, 1) as here:

        async def cancel_soon(number: int) -> None:
            call = here.call(number % 40, max_tokens=200)
            await asyncio.sleep(rng.random() * 0.08)
            call.cancel()

        for start in range(0, 60, 20):
            await asyncio.gather(*(cancel_soon(number) for number in range(start, start + 20)))
        async with asyncio.timeout(5):
            while len(here.app.table):  # noqa: ASYNC110 - the handlers unwind
                await asyncio.sleep(0.01)


async def test_tokens_of_many_streams_come_joined_and_the_first_one_at_once() -> None:
    """Promise: where a message for each token would be too many, they rest where they are made; what is said is the same."""
    many, length = 20, 60
    settings = replace(SETTINGS, client_messages_per_s=many)
    slow = replace(SIM, step_s=0.02)

    async def pieces(here: House, number: int) -> list[list[int]]:
        call = here.call(number, max_tokens=length)
        return [
            list(response.chunk.tokens.token_ids)
            async for response in call
            if response.WhichOneof("event") == "chunk"
        ]

    async with house(1, 1) as here:
        alone = [(await here.generate(number, max_tokens=length)).tokens for number in range(many)]
    async with house(1, 1, settings=settings, decode_sim=slow) as here:
        await here.generate(0)
        tunnels = [member.tunnel for member in here.app.fleet.members()]
        async with asyncio.timeout(5):
            while not all(tunnel.is_open for tunnel in tunnels):  # noqa: ASYNC110 - tunnels have no event for it
                await asyncio.sleep(0.01)
        told = await asyncio.gather(*(pieces(here, number) for number in range(many)))
    assert [list(chain.from_iterable(of_stream)) for of_stream in told] == alone
    assert all(len(of_stream[0]) == 1 for of_stream in told)
    assert max(map(len, told)) <= length / 2


async def _kill_serving(here: House) -> None:
    serving = [w for w, each in here.workers.items() if each.host.num_calls]
    decodes = [w for w in serving if isinstance(here.workers[w], DecodeWorker)]
    if decodes:
        await here.kill(decodes[0])
