"""A prefill worker dies or freezes in every stage of its work: real processes over Ray, and the shipped model.

Prefill workers that halt in the stage that a request names (`tests.faults.halting`) hold requests in all stages at once.
"""

import asyncio
import random
import signal

import pytest
import ray

from baton.client import AsyncClient, Result
from baton.transfer.ray_runtime import RayCluster
from baton.types import Role
from decode_worker.actor import DecodeActor
from tests.faults import halting
from tests.faults.actors import TORCH, ActorFleet, actor_fleet
from tests.faults.halting import PrefillStage
from tests.faults.test_every_token import KINDS, assert_same

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(300)]


async def num_halted(fleet: ActorFleet) -> int:
    asked = [worker._handle.num_halted.remote() for worker in fleet.of(Role.PREFILL)]
    return sum(await asyncio.gather(*asked))


async def test_prefill_killed_or_frozen_in_any_stage_changes_nothing(
    ray_cluster: RayCluster,
) -> None:
    """Promise: SIGKILL or SIGSTOP of the prefill worker in every stage: every stream equals the undisturbed one, for every way of
    choosing tokens. One that was frozen and wakes up lets go of all that it held, and is a member again.
    """
    ray.cloudpickle.register_pickle_by_value(halting)  # type: ignore[no-untyped-call]  # workers cannot import the tests
    actors = {Role.PREFILL: halting.HaltingPrefillActor, Role.DECODE: DecodeActor}
    rng = random.Random(6)
    async with (
        actor_fleet(ray_cluster, TORCH, prefill=2, decode=1, actors=actors) as fleet,
        AsyncClient(fleet.addresses) as client,
    ):
        vocab_size = (await client.model()).vocab_size
        cases = [
            (stage, kind, [rng.randrange(10, vocab_size) for _ in range(120)])
            for stage in PrefillStage
            for kind in KINDS
            for _ in range(2)
        ]
        frozen = None

        async def ask(number: int) -> Result:
            stage, kind, prompt = cases[number]
            return await client.complete(
                prompt,
                sampling=KINDS[kind],
                request_id=f"{stage.value}.{number}",
                timeout_s=200,
            )

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(ask(number)) for number in range(len(cases))]
            async with asyncio.timeout(100):
                while await num_halted(fleet) < len(cases):  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.05)
            killed, frozen = fleet.of(Role.PREFILL)
            fleet.signal(killed, signal.SIGKILL)
            await fleet.add(Role.PREFILL)
            fleet.signal(frozen, signal.SIGSTOP)
            await fleet.joined(frozen, joined=False)
            # Far less than any timeout of the workers' own.
            async with asyncio.timeout(20):
                await asyncio.wait(tasks)
        for task, (stage, kind, prompt) in zip(tasks, cases, strict=True):
            result = task.result()
            expected = await client.complete(prompt, sampling=KINDS[kind])
            assert_same(result, expected)
            victims = {killed.info.worker_id, frozen.info.worker_id}
            failed = [each for each in result.attempts if each.failure]
            assert bool(failed) == (stage is not PrefillStage.HANDED)
            assert {each.prefill_worker for each in failed} <= victims
        fleet.signal(frozen, signal.SIGCONT)
        async with asyncio.timeout(60):
            await fleet.joined(frozen)
        await fleet.at_rest(30)
