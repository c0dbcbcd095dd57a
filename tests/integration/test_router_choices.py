"""n completions of one prompt: each is the one that its choice index names, and the prompt is computed and shipped once."""

import asyncio
from collections import defaultdict
from dataclasses import replace

import pytest

from baton.v1 import inference_pb2
from tests.integration.sim_house import LENGTH, SIM, House, house


async def completions(here: House, number: int, **changes: object) -> dict[int, list[int]]:
    """The tokens of each completion."""
    tokens: dict[int, list[int]] = defaultdict(list)
    finished: inference_pb2.Finished | None = None
    async for response in here.call(number, **changes):
        chunk = response.chunk.tokens
        if chunk.token_ids:
            assert chunk.first_index == len(tokens[response.chunk.choice])
            tokens[response.chunk.choice] += chunk.token_ids
        if response.HasField("finished"):
            finished = response.finished
    assert finished is not None
    assert [end.choice for end in finished.choices] == sorted(tokens)
    assert finished.usage.completion_tokens == sum(map(len, tokens.values()))
    return tokens


async def test_completions_differ_and_the_first_is_the_one_that_is_made_alone() -> None:
    async with house(prefill=1, decode=2) as here:
        alone = await here.generate(3)
        four = await completions(here, 3, n=4)
        again = await completions(here, 3, n=4)
    assert four[0] == alone.tokens
    assert len({tuple(tokens) for tokens in four.values()}) == 4
    assert all(len(tokens) == LENGTH for tokens in four.values())
    assert again == four, "a seed repeats every completion"


@pytest.mark.parametrize("salt", ["", "ours"])
async def test_the_prompt_is_computed_and_shipped_once(salt: str) -> None:
    """Promise: where a prompt is dear, the other completions find it in the prefix cache of the decode worker that has it."""
    dear = replace(SIM, token_s=0.002)
    async with house(prefill=1, decode=2, sim=dear) as here:
        responses = [response async for response in here.call(5, n=4, cache_salt=salt)]
        first, *others = responses[-1].finished.attempts
    assert first.prefill_worker
    assert [attempt.prefill_worker for attempt in others] == ["", "", ""]
    assert {attempt.decode_worker for attempt in others} == {first.decode_worker}


async def test_a_decode_worker_that_dies_costs_no_completion_a_token() -> None:
    """Promise: n = 4 continues with the same tokens when its decode worker is gone."""
    async with house(prefill=1, decode=2) as here:
        undisturbed = await completions(here, 7, n=4, max_tokens=300)
        call, tokens = here.call(7, n=4, max_tokens=300), defaultdict[int, list[int]](list)
        killed = False
        async for response in call:
            tokens[response.chunk.choice] += response.chunk.tokens.token_ids
            if not killed and len(tokens[2]) >= 4:
                busy = [w for w in here.workers if here.workers[w].host.num_calls]
                decodes = [w for w in busy if "decode" in w]
                assert decodes
                await here.kill(decodes[0])
                killed = True
        assert killed
        await asyncio.sleep(0)
    assert {choice: tokens[choice] for choice in undisturbed} == undisturbed


async def test_a_stop_string_ends_its_own_completion_only() -> None:
    async with house(prefill=1, decode=1) as here:
        whole = await completions(here, 9, n=3)
        character = chr(next(t for t in whole[1] if 33 <= t < 127))
        stopped = await completions(here, 9, n=3, stop=[character])
    for choice, tokens in whole.items():
        ends = [i for i, token in enumerate(tokens) if token == ord(character)]
        assert stopped[choice] == (tokens[: ends[0] + 1] if ends else tokens)
