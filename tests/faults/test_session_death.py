"""A router is killed while a session's turn runs, or has just become part of the session: the turn goes on, at another router or the same,
and the session has it once.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from baton.client import AsyncClient, ConnectionOptions, SamplingOptions
from tests.faults.routers import RouterProcess, fleet
from tests.faults.soak_load import answer_of

pytestmark = pytest.mark.e2e

GREEDY = SamplingOptions(max_tokens=20, temperature=0.0, ignore_eos=True)
MUTE = "tests.faults.mute_router"
FIRST, SECOND, THIRD = tuple(range(1, 101)), tuple(range(101, 181)), tuple(range(181, 201))


@pytest.mark.parametrize("routers", [1, 2])
async def test_a_turn_outlives_its_router(tmp_path: Path, routers: int) -> None:
    """Promise: SIGKILL of the router in the middle of a turn costs the session nothing: its answer continues, and the next turn builds
    on it.
    """
    store = f"sqlite://{tmp_path}/sessions.db"
    async with (
        fleet(routers=routers, environ={"BATON_SESSION_STORE": store}) as (processes, _),
        AsyncClient(",".join(each.address for each in processes)) as client,
    ):
        session = await client.sessions.create()
        first = await client.complete(FIRST, sampling=GREEDY, session=session)
        long = replace(GREEDY, max_tokens=60)
        async with client.generate(SECOND, sampling=long, session=session) as stream:
            seen, killed = 0, False
            async for chunk in stream:
                seen += len(chunk.token_ids)
                if seen >= 10 and not killed:
                    killed = True
                    await asyncio.to_thread(processes[0].end)
                    if routers == 1:
                        await asyncio.to_thread(processes[0].start)
            second = stream.result
        assert second.session is not None
        assert second.session.turn == 2
        third = await client.complete(THIRD, sampling=GREEDY, session=session)
        assert third.session is not None
        assert third.session.turn == 3
        whole = FIRST + first.token_ids + SECOND
        assert second.token_ids == (await client.complete(whole, sampling=long)).token_ids
        whole += second.token_ids + THIRD
        assert third.token_ids == (await client.complete(whole, sampling=GREEDY)).token_ids


async def joined(routers: list[RouterProcess]) -> None:
    """Returns once both workers are members of each."""
    for router in routers:
        async with AsyncClient(router.address) as client:
            while len((await client.model()).workers) < 2:  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.02)


def mute(store: str, grace_s: int) -> dict[str, str]:
    """Settings of routers that are killed before they tell that a session's second turn was written."""
    return {
        "BATON_SESSION_STORE": store,
        "BATON_ORPHAN_GRACE_S": str(grace_s),
        "BATON_WORKER_WAIT_S": "0.5",
    }


PATIENT = ConnectionOptions(reconnect_s=60.0)


@pytest.mark.parametrize("grace_s", [0, 10], ids=["nothing held", "held"])
async def test_a_turn_whose_last_word_was_lost_is_part_of_the_session_once(
    redis_url: str, grace_s: int
) -> None:
    """Promise: SIGKILL of the router after a turn was written, and before its client was told, appends it once: the client gets the
    answer to its end, whether a worker still holds it or only the session's record has it, and the next turn builds on it.
    """
    with Redis.from_url(redis_url) as server:
        server.flushall()
    sampling = replace(GREEDY, temperature=1.0, seed=5, logprobs=2)
    async with fleet(environ=mute(redis_url, grace_s), module=MUTE) as (routers, workers):
        await joined(routers)
        addresses = ",".join(router.address for router in routers)
        async with AsyncClient(addresses, connection=PATIENT) as client:
            session = await client.sessions.create()
            first = await client.complete(FIRST, sampling=GREEDY, session=session)
            second = await client.complete(SECOND, sampling=sampling, session=session)
            assert not routers[0].running
            assert second.session is not None
            assert second.session.turn == 2
            assert (await client.sessions.get(session)).turns == 2
            third = await client.complete(THIRD, sampling=GREEDY, session=session)
            whole = FIRST + first.token_ids + SECOND
            calm = await client.complete(whole, sampling=sampling)
            assert answer_of(second) == answer_of(calm)
            whole += second.token_ids + THIRD
            assert answer_of(third) == answer_of(await client.complete(whole, sampling=GREEDY))
        await workers.at_rest(5)


async def test_a_turn_whose_last_word_was_lost_is_read_at_the_same_router(tmp_path: Path) -> None:
    """Promise: so it is where the one router, with its file, comes back; for an answer that ended with its first token too."""
    store = f"sqlite://{tmp_path}/sessions.db"
    sampling = replace(GREEDY, max_tokens=1)
    async with (
        fleet(routers=1, environ=mute(store, 10), module=MUTE) as ([router], _),
        AsyncClient(router.address, connection=PATIENT) as client,
    ):
        await joined([router])
        session = await client.sessions.create()
        first = await client.complete(FIRST, sampling=GREEDY, session=session)
        asking = asyncio.create_task(client.complete(SECOND, sampling=sampling, session=session))
        await asyncio.to_thread(router.wait)
        await asyncio.to_thread(router.start)
        second = await asking
        assert (await client.sessions.get(session)).turns == 2
        calm = await client.complete(FIRST + first.token_ids + SECOND, sampling=sampling)
        assert answer_of(second) == answer_of(calm)
