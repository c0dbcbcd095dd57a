"""The bound on bytes in flight."""

import asyncio
import random

import pytest

from baton.transfer.credits import ByteCredits


async def holding(credits_: ByteCredits, num_bytes: int, until: asyncio.Event) -> None:
    async with credits_.lease(num_bytes):
        await until.wait()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="positive"):
        ByteCredits(0)


async def test_a_lease_counts_while_it_is_held() -> None:
    credits_ = ByteCredits(100)
    async with credits_.lease(30), credits_.lease(70):
        assert credits_.in_use_bytes == 100
        credits_.check_integrity()
    assert credits_.in_use_bytes == 0


async def test_an_error_in_the_lease_returns_it() -> None:
    credits_ = ByteCredits(100)
    with pytest.raises(KeyError):
        async with credits_.lease(30):
            raise KeyError
    assert credits_.in_use_bytes == 0


async def test_a_small_request_does_not_overtake_a_large_one() -> None:
    """First come, first served: else a stream of small pulls starves a large one."""
    credits_, end = ByteCredits(100), [asyncio.Event() for _ in range(3)]
    tasks = [
        asyncio.create_task(holding(credits_, num_bytes, event))
        for num_bytes, event in zip((60, 50, 10), end, strict=True)
    ]
    await settle()
    assert (credits_.in_use_bytes, credits_.waiting) == (60, 2)
    credits_.check_integrity()
    end[0].set()
    await settle()
    assert (credits_.in_use_bytes, credits_.waiting) == (60, 0)
    end[1].set()
    end[2].set()
    await asyncio.gather(*tasks)
    assert credits_.in_use_bytes == 0


async def test_a_request_larger_than_the_budget_runs_alone() -> None:
    credits_, end = ByteCredits(100), asyncio.Event()
    async with credits_.lease(1):
        huge = asyncio.create_task(holding(credits_, 1000, end))
        await settle()
        assert credits_.in_use_bytes == 1
    await settle()
    assert credits_.in_use_bytes == 100
    small = asyncio.create_task(holding(credits_, 1, end))
    await settle()
    assert credits_.waiting == 1
    end.set()
    await asyncio.gather(huge, small)
    assert credits_.in_use_bytes == 0


async def test_cancelling_the_head_of_the_queue_lets_the_next_one_in() -> None:
    credits_, end = ByteCredits(100), asyncio.Event()
    async with credits_.lease(60):
        head = asyncio.create_task(holding(credits_, 90, end))
        await settle()
        following = asyncio.create_task(holding(credits_, 40, end))
        await settle()
        head.cancel()
        await settle()
        assert (credits_.in_use_bytes, credits_.waiting) == (100, 0)
        credits_.check_integrity()
        end.set()
        await following
    assert credits_.in_use_bytes == 0


async def test_a_grant_that_meets_a_cancellation_is_given_back() -> None:
    credits_, end = ByteCredits(100), asyncio.Event()
    holder = asyncio.create_task(holding(credits_, 100, end))
    await settle()
    waiter = asyncio.create_task(holding(credits_, 100, asyncio.Event()))
    await settle()
    end.set()
    await holder  # grants the waiter, which has not run since
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert (credits_.in_use_bytes, credits_.waiting) == (0, 0)


async def test_a_cancelled_waiter_is_passed_over_by_a_grant_in_the_same_turn() -> None:
    credits_, end = ByteCredits(100), asyncio.Event()
    holder = asyncio.create_task(holding(credits_, 100, end))
    await settle()
    waiters = [asyncio.create_task(holding(credits_, 100, end)) for _ in range(2)]
    await settle()
    end.set()
    waiters[0].cancel()
    await asyncio.gather(holder, waiters[1])
    assert waiters[0].cancelled()
    assert (credits_.in_use_bytes, credits_.waiting) == (0, 0)


@pytest.mark.parametrize("seed", range(8))
async def test_any_order_of_leases_and_cancellations_balances(seed: int) -> None:
    dice, credits_ = random.Random(seed), ByteCredits(100)

    async def one() -> None:
        async with credits_.lease(dice.choice([0, 1, 30, 99, 100, 500])):
            credits_.check_integrity()
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)

    tasks = []
    for _ in range(300):
        tasks.append(asyncio.create_task(one()))
        if dice.random() < 0.5:
            dice.choice(tasks).cancel()
        if dice.random() < 0.7:
            await asyncio.sleep(0)
        credits_.check_integrity()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert any(not task.cancelled() for task in tasks)
    assert (credits_.in_use_bytes, credits_.waiting) == (0, 0)
    credits_.check_integrity()
