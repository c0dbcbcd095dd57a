"""What the soak's clients ask, and what an undisturbed fleet answers.

Requests are greedy, seeded, with log-probabilities, with several completions, with penalties, with biased tokens, and with stop
strings; prompts are of several lengths. A session's turns go through all of that but several completions; what each of them must
answer is told by a request without a session, of all that was said before.
"""

import asyncio
import random
from dataclasses import replace

from baton.client import AsyncClient, Result, SamplingOptions
from tests.faults.soak_load import Asked, Case, answer_of

TOKENS = 60
PROMPTS = (20, 90, 200, 600)
"""Lengths of prompts in tokens."""
TURNS = 3
EACH = 6
"""Cases of each kind."""
SEEDED = SamplingOptions(max_tokens=TOKENS, seed=5, ignore_eos=True)
GREEDY = replace(SEEDED, temperature=0.0)
PENALISED = replace(SEEDED, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.15)
BIASED = replace(GREEDY, logit_bias={66: 0.6, 70: -0.4, 200: 0.9})
LOGPROBS = replace(SEEDED, logprobs=1)
SEVERAL = replace(SEEDED, n=2)
TURN_WAYS = (GREEDY, PENALISED, BIASED, LOGPROBS, SEEDED)


async def undisturbed(address: str) -> list[Case]:
    """The cases with their answers."""
    rng = random.Random(11)
    single = [
        (_tokens(rng, rng.choice(PROMPTS)), way)
        for way in (GREEDY, SEEDED, LOGPROBS, SEVERAL, PENALISED, BIASED)
        for _ in range(EACH)
    ]
    cut = [_tokens(rng, rng.choice(PROMPTS)) for _ in range(EACH)]
    said = [[_tokens(rng, rng.choice((20, 90))) for _ in range(TURNS)] for _ in range(EACH)]
    async with AsyncClient(address) as client, asyncio.TaskGroup() as group:
        tasks = [
            *(group.create_task(_single(client, *each)) for each in single),
            *(group.create_task(_stopped(client, prompt)) for prompt in cut),
            *(
                group.create_task(_session(client, turns, number))
                for number, turns in enumerate(said)
            ),
        ]
        cases = [await task for task in tasks]
    rng.shuffle(cases)
    return cases


async def _single(client: AsyncClient, prompt: tuple[int, ...], sampling: SamplingOptions) -> Case:
    result = await client.complete(prompt, sampling=sampling)
    return (Asked(prompt, sampling, answer_of(result)),)


async def _stopped(client: AsyncClient, prompt: tuple[int, ...]) -> Case:
    """Ends at a string that the answer has somewhere after its middle."""
    whole = await client.complete(prompt, sampling=SEEDED)
    case = await _single(client, prompt, replace(SEEDED, stop=(_new_after_middle(whole.text),)))
    assert case[0].answer != answer_of(whole)
    return case


async def _session(client: AsyncClient, said: list[tuple[int, ...]], number: int) -> Case:
    history: tuple[int, ...] = ()
    case = []
    for turn, prompt in enumerate(said):
        sampling = TURN_WAYS[(number + turn) % len(TURN_WAYS)]
        result: Result = await client.complete(history + prompt, sampling=sampling)
        case.append(Asked(prompt, sampling, answer_of(result)))
        history += prompt + result.token_ids
    return tuple(case)


def _new_after_middle(text: str) -> str:
    """Two letters."""
    for at in range(len(text) // 2, len(text) - 2):
        pair = text[at : at + 2]
        if pair.isascii() and pair.isprintable() and text.find(pair) == at:
            return pair
    raise AssertionError(f"nothing to stop at in {text!r}")


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, 256) for _ in range(count))
