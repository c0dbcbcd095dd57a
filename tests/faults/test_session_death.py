"""A router is killed while a session's turn runs: the turn goes on, and is part of the session, at another router or the same."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from baton.client import AsyncClient, SamplingOptions
from tests.faults.routers import fleet

pytestmark = pytest.mark.e2e

GREEDY = SamplingOptions(max_tokens=20, temperature=0.0, ignore_eos=True)
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
