"""A fleet whose decode workers compute in another format than its prefill workers: whatever happens, clients get what one rule says.

Simulated engines, whose KV and tokens carry the format that computed them. The rule is told in `test_mixed_formats`, which has it for
real arithmetic; here are the router, the workers and their faults.
"""

import asyncio
import random
from dataclasses import replace

import pytest

from baton.client import AsyncClient, ConnectionOptions, SamplingOptions
from baton.engine.batch import BatchRow, SampleInput
from baton.engine.sim import SimConfig, SimRunner
from baton.errors import UnavailableError
from baton.kv.spec import WeightFormat
from baton.types import SamplingParams, WorkerId
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker
from tests.integration.router_fakes import SETTINGS, Answer
from tests.integration.sim_house import LENGTH, SIM, House, house, prompt_of

INT8 = replace(SIM, weights=WeightFormat.INT8, imports_prompts=True)
BFLOAT16 = replace(INT8, weights=WeightFormat.BFLOAT16)


def expected(
    prompt: tuple[int, ...], params: SamplingParams, answers: SimConfig = INT8
) -> list[int]:
    """The rule, word by word, for one sequence."""
    first, later = (SimRunner(replace(config, step_s=0.0)) for config in (SIM, answers))
    table = range((len(prompt) + params.max_tokens) // SIM.block_size_tokens + 1)
    (chosen,) = first.run([BatchRow(prompt, 0, table, SampleInput(params, prompt, []))])
    assert chosen is not None
    output = [chosen.token_id]
    later.write_kv(table, 0, first.read_kv(table, 0, len(prompt)))
    while len(output) < params.max_tokens:
        start = len(prompt) + len(output) - 1
        sample = SampleInput(params, prompt, output)
        (chosen,) = later.run([BatchRow(output[-1:], start, table, sample)])
        assert chosen is not None
        output.append(chosen.token_id)
    return output


def answer_to(number: int, length: int = LENGTH) -> list[int]:
    params = SamplingParams(max_tokens=length, seed=number, ignore_eos=True)
    return expected(prompt_of(number), params)


async def test_the_answer_is_the_rules_also_with_hits_in_both_caches() -> None:
    numbers = range(20)
    async with house(1, 2, decode_sim=INT8) as here:
        for _ in range(2):
            answers = await asyncio.gather(*(here.generate(number) for number in numbers))
            assert [answer.tokens for answer in answers] == [answer_to(n) for n in numbers]
            assert all(answer.failures == [] for answer in answers)
        assert answers[0].end.usage.cached_tokens >= 80
    async with house(1, 1) as here:
        assert (await here.generate(3)).tokens != answer_to(3), "the formats do differ"


async def test_a_short_prompt_is_left_to_prefill() -> None:
    """Promise: decode computes no prompt in its own format, however short."""
    async with house(1, 1, decode_sim=INT8) as here, AsyncClient(here.app_address) as client:
        prompt = prompt_of(7, length=5)
        result = await client.complete(prompt, sampling=SamplingOptions(max_tokens=9, seed=4))
        params = SamplingParams(max_tokens=9, seed=4)
        assert list(result.token_ids) == expected(prompt, params)[: len(result.token_ids)]
        assert result.attempts[0].prefill_worker


async def test_decode_is_killed_at_every_token_and_nobody_can_tell() -> None:
    async with house(1, 2, decode_sim=INT8) as here:
        for k in range(1, LENGTH):
            answer = Answer()
            killed = None
            async for response in here.call(k):
                answer.add(response)
                if killed is None and len(answer.tokens) >= k and answer.finished is None:
                    killed = asyncio.create_task(_kill_serving(here))
            assert answer.tokens == answer_to(k)
            if killed is not None:
                await killed
            await here.add_decode()


async def test_prefill_is_killed_at_random_instants_and_nobody_can_tell() -> None:
    rng = random.Random(3)
    async with house(2, 2, decode_sim=INT8) as here:
        for round_ in range(4):
            numbers = range(round_ * 6, round_ * 6 + 6)
            running = asyncio.gather(*(here.generate(number) for number in numbers))
            await asyncio.sleep(rng.random() * 0.05)
            victim = next(w for w in here.workers if isinstance(here.workers[w], PrefillWorker))
            await here.kill(victim)
            answers = await running
            assert [answer.tokens for answer in answers] == [answer_to(n) for n in numbers]
            await here.add_prefill()


async def test_a_decode_worker_that_drains_hands_its_requests_over() -> None:
    numbers, length = range(6), 300
    async with house(1, 2, decode_sim=INT8) as here:
        calls = [
            asyncio.create_task(here.generate(number, max_tokens=length)) for number in numbers
        ]
        leaving = next(w for w in here.workers if isinstance(here.workers[w], DecodeWorker))
        async with asyncio.timeout(10):
            while not (await here.workers[leaving].host.engine.refresh_load()).used_blocks:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        assert await here.workers[leaving].drain(20)
        await here.kill(leaving)
        answers: list[Answer] = await asyncio.gather(*calls)
    assert [answer.tokens for answer in answers] == [answer_to(n, length) for n in numbers]
    assert any("moves on" in each.failure for answer in answers for each in answer.end.attempts)


async def test_a_full_pool_costs_attempts_and_no_token() -> None:
    """Promise: a request that loses its blocks goes on with a prompt that prefill computes."""
    numbers, length = range(4), 120
    small = replace(INT8, num_blocks=30)
    async with house(1, 1, decode_sim=small) as here:
        answers = await asyncio.gather(*(here.generate(n, max_tokens=length) for n in numbers))
    assert [answer.tokens for answer in answers] == [answer_to(n, length) for n in numbers]
    assert any("NO_CAPACITY" in each.failure for answer in answers for each in answer.end.attempts)


async def test_a_sessions_next_turn_has_its_history_computed_by_prefill() -> None:
    """Promise: what the last answer left on decode is no part of the next prompt, in any order of turns and faults."""
    sampling = SamplingOptions(max_tokens=20, temperature=0.0, ignore_eos=True)
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    async with house(1, 2, decode_sim=INT8) as here, AsyncClient(here.app_address) as client:
        session = await client.sessions.create()
        history: tuple[int, ...] = ()
        for turn in range(3):
            new = prompt_of(turn, length=40)
            result = await client.complete(new, sampling=sampling, session=session.session_id)
            history += new
            assert list(result.token_ids) == expected(history, params)
            history += result.token_ids


async def test_without_a_prefill_worker_a_request_waits_and_is_never_computed_otherwise() -> None:
    """Promise: the client gives up, too, once it has asked again for a while."""
    brief = replace(SETTINGS, worker_wait_s=0.2)
    connection = ConnectionOptions(reconnect_s=0.5)
    async with (
        house(0, 1, decode_sim=INT8, settings=brief) as here,
        AsyncClient(here.app_address, connection=connection) as client,
    ):
        with pytest.raises(UnavailableError, match="prefill"):
            await client.complete(prompt_of(1), sampling=SamplingOptions(max_tokens=4))
    patient = replace(SETTINGS, worker_wait_s=20.0)
    async with house(0, 1, decode_sim=INT8, settings=patient) as here:
        waiting = asyncio.create_task(here.generate(2))
        await asyncio.sleep(0.1)
        await here.add_prefill()
        assert (await waiting).tokens == answer_to(2)


async def test_what_one_format_began_no_other_goes_on_with() -> None:
    """Promise: where a worker dies, its requests wait for another of its format, though one of another format is free."""
    # Long enough that it still runs when the other worker has joined.
    length = 400
    async with house(1, 1, decode_sim=INT8) as here:
        answer = Answer()
        others: set[WorkerId] = set()
        async for response in here.call(5, max_tokens=length):
            answer.add(response)
            if answer.tokens and not others:
                here.decode_sim, before = BFLOAT16, set(here.workers)
                await here.add_decode()
                others = here.workers.keys() - before
                await _kill_serving(here)
                here.decode_sim = INT8
                await here.add_decode()
        assert answer.tokens == answer_to(5, length)
        # While the one that dies is a member still, there may be an attempt at it.
        assert answer.failures
        assert set(answer.failures) == {"UNAVAILABLE"}
        assert not others & {attempt.decode_worker for attempt in answer.end.attempts}


async def _kill_serving(here: House) -> None:
    serving = [w for w, each in here.workers.items() if each.host.num_calls]
    decodes = [w for w in serving if isinstance(here.workers[w], DecodeWorker)]
    if decodes:
        await here.kill(decodes[0])
