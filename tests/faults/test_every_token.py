"""A decode worker is killed after token k of 64, for every k and every way of choosing tokens: real processes over Ray, and the
shipped model.

Decode workers that tell each stream exactly its k tokens (`tests.faults.halting`) run all of them at once: one SIGKILL is a death
at every k.
"""

import asyncio
import math
import random
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pytest
import ray

from baton.client import AsyncClient, Result, SamplingOptions
from baton.client.types import Completion
from baton.transfer.ray_runtime import RayCluster
from baton.types import PositionLogprobs, Role
from prefill_worker.actor import PrefillActor
from tests.faults import halting
from tests.faults.actors import TORCH, actor_fleet

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(400)]

TOKENS = 64
BASE = SamplingOptions(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
KINDS: Mapping[str, SamplingOptions] = {
    "greedy": BASE,
    "top_p": replace(BASE, temperature=0.9, top_p=0.9, seed=1),
    "penalties": replace(
        BASE,
        temperature=0.8,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        frequency_penalty=0.3,
        seed=2,
    ),
    "logit_bias": replace(BASE, logit_bias={40: 4.0, 41: 4.0, 42: -100.0}),
    "logprobs": replace(BASE, temperature=0.7, logprobs=3, seed=3),
    "n": replace(BASE, temperature=1.0, n=4, seed=4),
}


@dataclass(frozen=True, slots=True)
class Case:
    """A request, and what an undisturbed fleet answers."""

    prompt: Sequence[int]
    sampling: SamplingOptions
    undisturbed: Result


async def undisturbed(client: AsyncClient) -> dict[str, Case]:
    """Each kind's case; the stop string is the end of an answer of 64 tokens."""
    rng = random.Random(5)
    vocab_size = (await client.model()).vocab_size
    cases = {}
    for kind, sampling in KINDS.items():
        prompt = [rng.randrange(10, vocab_size) for _ in range(75)]
        result = await client.complete(prompt, sampling=sampling)
        assert all(len(each.token_ids) == TOKENS for each in result.completions)
        cases[kind] = Case(prompt, sampling, result)
    calm = cases["greedy"]
    text = calm.undisturbed.text
    length = next(i for i in range(3, len(text)) if text.find(text[-i:]) == len(text) - i)
    stopped = replace(BASE, max_tokens=2 * TOKENS, stop=(text[-length:],))
    result = await client.complete(calm.prompt, sampling=stopped)
    assert result.stop_string == text[-length:]
    assert len(result.token_ids) == TOKENS
    cases["stop"] = Case(calm.prompt, stopped, result)
    return cases


async def halted(
    client: AsyncClient, name: str, case: Case, k: int, there: asyncio.Event
) -> Result:
    """The answer; `there` is set once each of its completions has come to k tokens."""
    counts = dict.fromkeys(range(case.sampling.n), 0)
    async with client.generate(
        case.prompt, sampling=case.sampling, request_id=f"k{k}.{name}", timeout_s=300
    ) as stream:
        async for chunk in stream:
            counts[chunk.choice] += len(chunk.token_ids)
            if min(counts.values()) >= k:
                there.set()
        return stream.result


def assert_same(result: Result, expected: Result) -> None:
    for one, other in zip(result.completions, expected.completions, strict=True):
        assert answer(one) == answer(other)
        for mine, its in zip(one.logprobs, other.logprobs, strict=True):
            assert_close(mine, its)


def answer(completion: Completion) -> tuple[object, ...]:
    c = completion
    return c.token_ids, c.text, c.finish_reason, c.stop_string, c.stop_token_id


def assert_close(one: PositionLogprobs, other: PositionLogprobs) -> None:
    for mine, its in zip((one.chosen, *one.top), (other.chosen, *other.top), strict=True):
        assert mine.token_id == its.token_id
        assert math.isclose(mine.logprob, its.logprob, abs_tol=1e-4)


async def test_decode_killed_after_any_token_changes_nothing(ray_cluster: RayCluster) -> None:
    """Promise: SIGKILL of the decode worker after token k, for every k of a 64-token answer: the stream equals the undisturbed one, for
    greedy, seeded top-p, penalties, logit bias, logprobs, stop strings, and n = 4. The prompt's KV is not computed again by the
    prefill worker that still holds it.
    """
    ray.cloudpickle.register_pickle_by_value(halting)  # type: ignore[no-untyped-call]  # workers cannot import the tests
    actors = {Role.PREFILL: PrefillActor, Role.DECODE: halting.HaltingDecodeActor}
    environ = {
        "BATON_MAX_RUNNING": "1000",
        # Every attempt is split, the one after a death too.
        "BATON_LOCAL_PREFILL_TOKENS": "0",
    }
    async with (
        actor_fleet(
            ray_cluster, TORCH, prefill=1, decode=2, environ=environ, actors=actors
        ) as fleet,
        AsyncClient(fleet.addresses) as client,
    ):
        cases = await undisturbed(client)
        names = [(name, k) for name in cases for k in range(1, TOKENS)]
        events = {each: asyncio.Event() for each in names}
        async with asyncio.TaskGroup() as group:
            tasks = {
                (name, k): group.create_task(halted(client, name, cases[name], k, events[name, k]))
                for name, k in names
            }
            await asyncio.gather(*(event.wait() for event in events.values()))
            computed = await fleet.total(Role.PREFILL, "baton_worker_prefill_tokens_total")
            first, second = fleet.of(Role.DECODE)
            fleet.signal(first, signal.SIGKILL)
            await fleet.add(Role.DECODE)
            fleet.signal(second, signal.SIGKILL)
        recomputed = await fleet.total(Role.PREFILL, "baton_worker_prefill_tokens_total") - computed
        allowed = 0
        for (name, k), task in tasks.items():
            result, case = task.result(), cases[name]
            assert_same(result, case.undisturbed)
            resumed = [each for each in result.attempts if each.resumed_tokens == k]
            assert len(resumed) >= case.sampling.n, "each completion went on after its k tokens"
            allowed += len([a for a in result.attempts if a.resumed_tokens]) * (k + 16)
            assert result.usage.cached_tokens >= 64, "the prompt's full blocks"
        assert recomputed <= allowed, "of each prompt, only its last, partial block"
        await fleet.at_rest(30)
