"""Readers that rest are woken together, and none later than it asked for."""

import asyncio

from baton.engine.pace import Pace

REST_S = 0.05


async def test_without_a_rest_readers_are_woken_at_once() -> None:
    reader = asyncio.Event()
    Pace().wake(reader)
    assert reader.is_set()


async def test_readers_rest_to_one_moment() -> None:
    """Promise: who came first is woken soon, whoever comes after that waits for the same end of the rest, also for more than once."""
    pace, loop = Pace(), asyncio.get_running_loop()
    pace.rest_s = REST_S
    early, late, later = asyncio.Event(), asyncio.Event(), asyncio.Event()
    pace.wake(early)
    pace.wake(late)
    assert not early.is_set()
    await asyncio.sleep(0)
    await early.wait()
    assert late.is_set()
    woken_s = loop.time()
    early.clear()
    for reader in (early, early, later):
        pace.wake(reader)
    assert not early.is_set()
    await early.wait()
    assert later.is_set()
    assert loop.time() - woken_s >= 0.9 * REST_S


async def test_a_rest_that_is_no_more_ends_as_it_began() -> None:
    pace = Pace()
    pace.rest_s = REST_S
    first, resting, awake = asyncio.Event(), asyncio.Event(), asyncio.Event()
    pace.wake(first)
    await first.wait()
    pace.wake(resting)
    pace.rest_s = 0.0
    pace.wake(awake)
    assert awake.is_set()
    assert not resting.is_set()
    async with asyncio.timeout(5):
        await resting.wait()
