"""Clients give up at any instant, and networks are cut: real processes over Ray, with simulated engines."""

import asyncio
import random
import time
from contextlib import AsyncExitStack, suppress

import pytest

from baton.client import AsyncClient, SamplingOptions
from baton.engine.sim import SimConfig
from baton.errors import CapacityError, DeadlineError
from baton.transfer.ray_runtime import RayCluster
from baton.types import Role
from tests.faults.actors import actor_fleet
from tests.faults.links import add_linked
from tests.faults.soak_load import answer_of

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(240)]

SIM = SimConfig(num_blocks=4096, max_batch_tokens=512, step_s=0.005)
TIMES = 1000
AT_ONCE = 50
SAMPLING = SamplingOptions(max_tokens=100, temperature=0.0, ignore_eos=True)
REST_S = 1.0
"""From the last one to give up. It takes some 20 ms, on busy cores too."""


async def test_giving_up_at_a_thousand_instants_strands_nothing(ray_cluster: RayCluster) -> None:
    """Promise: after cancellations at 1,000 random instants, and as many deadlines, both pools are back at their baseline within a
    second, and no block is held that belongs to no call.
    """
    rng = random.Random(8)
    async with (
        actor_fleet(ray_cluster, SIM, prefill=1, decode=1) as fleet,
        AsyncClient(fleet.addresses) as client,
    ):

        async def cancelled() -> None:
            prompt = [rng.randrange(1, 256) for _ in range(rng.randrange(1, 400))]
            asking = asyncio.create_task(client.complete(prompt, sampling=SAMPLING))
            await asyncio.sleep(rng.random())
            asking.cancel()
            with suppress(asyncio.CancelledError):
                await asking

        async def expired() -> None:
            prompt = [rng.randrange(1, 256) for _ in range(rng.randrange(1, 400))]
            # A deadline that cannot be kept is refused at once.
            with suppress(DeadlineError, CapacityError):
                await client.complete(prompt, sampling=SAMPLING, timeout_s=rng.random())

        for give_up in (cancelled, expired):

            async def one_after_another(times: int, give_up: object = give_up) -> None:
                assert callable(give_up)
                for _ in range(times):
                    await give_up()

            async with asyncio.TaskGroup() as group:
                for _ in range(AT_ONCE):
                    group.create_task(one_after_another(TIMES // AT_ONCE))
            await fleet.at_rest(REST_S)


@pytest.mark.parametrize("role", [Role.PREFILL, Role.DECODE])
async def test_a_worker_that_is_cut_off_is_left_for_another(
    ray_cluster: RayCluster, role: Role
) -> None:
    """Promise: a network between router and worker that swallows everything costs no token, and two heartbeats and a second; once it
    is back, so is the worker, and what was left on it is freed.
    """
    prompts = [[(i * 7 + start) % 255 + 1 for i in range(90)] for start in range(8)]
    sampling = SamplingOptions(max_tokens=300, temperature=0.0, ignore_eos=True)
    async with (
        AsyncExitStack() as stack,
        actor_fleet(ray_cluster, SIM, prefill=0, decode=0) as fleet,
        AsyncClient(fleet.addresses) as client,
    ):
        for each in (*Role, next(other for other in Role if other is not role)):
            worker, link = await add_linked(fleet, each, stack)
            if each is role:
                victim, its_link = worker, link
        calm = [await client.complete(prompt, sampling=sampling) for prompt in prompts]
        await add_linked(fleet, role, stack)
        asking = [
            asyncio.create_task(client.complete(prompt, sampling=sampling, timeout_s=60))
            for prompt in prompts * 3
        ]
        await asyncio.sleep(0.3)
        its_link.cut()
        began_s = time.monotonic()
        await fleet.joined(victim, joined=False)
        assert time.monotonic() - began_s < 15
        results = await asyncio.gather(*asking)
        its_link.heal()
        await fleet.joined(victim)
        for result, expected in zip(results, calm * 3, strict=True):
            assert answer_of(result) == answer_of(expected)
        await fleet.at_rest(30)
