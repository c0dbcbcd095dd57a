"""Sessions through real routers with simulated workers. The simulated engine's tokens depend on every KV entry before them, so that a
turn's answer is right only where its whole history was.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from baton.cli.config import shipped_model
from baton.client import AsyncClient, ChatMessage, Client, Result, SamplingOptions, SessionState
from baton.engine.sim import SimConfig
from baton.errors import (
    AbortedError,
    CancelledError,
    CapacityError,
    InvalidRequestError,
    NotFoundError,
    SessionBusyError,
    SessionLostError,
    UnavailableError,
)
from baton.service.settings import WorkerSettings
from router.app import RouterApp
from router.text import Tokenizer
from tests.integration.router_fakes import SETTINGS
from tests.ports import free_port
from tests.worker_rig import SIM, worker_pair

GREEDY = SamplingOptions(max_tokens=20, temperature=0.0, ignore_eos=True)
SLOW = SamplingOptions(max_tokens=400, temperature=0.0, ignore_eos=True)
FIRST = tuple(range(1, 101))
SECOND = tuple(range(101, 181))


class House:
    """Routers that share a store, and a pair of workers that joined them all."""

    def __init__(self, store: str, tokenizer: Tokenizer, **settings: Any) -> None:
        self.ports: list[int] = []
        self.apps: dict[int, RouterApp] = {}
        self.clients: list[AsyncClient] = []
        self._settings = replace(SETTINGS, session_store=store, **settings)
        self._tokenizer = tokenizer

    async def start_router(self, port: int) -> None:
        """Returns once both workers are its members, where there are any."""
        app = RouterApp(replace(self._settings, port=port), self._tokenizer)
        await app.start()
        self.apps[port] = app

    async def joined(self) -> None:
        async with asyncio.timeout(10):
            for app in self.apps.values():
                while len(app.fleet.registry.infos()) < 2:  # noqa: ASYNC110 - workers dial
                    await asyncio.sleep(0.01)

    async def announced(self, history_tokens: int) -> None:
        """Returns once each router knows that decode holds as many blocks as that history fills."""
        async with asyncio.timeout(5):
            for app in self.apps.values():
                while not any(  # noqa: ASYNC110 - workers report
                    len(held) >= (history_tokens - 1) // 16
                    for worker_id, held in app.fleet.registry._prefixes[16]._held.items()
                    if worker_id.startswith("decode")
                ):
                    await asyncio.sleep(0.01)


@asynccontextmanager
async def house(
    store: str = "sqlite://",
    *,
    routers: int = 1,
    sim: SimConfig = SIM,
    tokenizer: Tokenizer | None = None,
    **settings: Any,
) -> AsyncIterator[House]:
    here = House(store, tokenizer or Tokenizer.of_bytes(), **settings)
    async with AsyncExitStack() as stack:
        for port in [free_port() for _ in range(routers)]:
            await here.start_router(port)
            here.ports.append(port)
        addresses = tuple(f"127.0.0.1:{port}" for port in here.ports)
        try:
            workers = WorkerSettings(routers=addresses, handoff_timeout_s=10.0, reflection=False)
            await stack.enter_async_context(
                worker_pair(prefill_sim=sim, decode_sim=sim, settings=workers)
            )
            await here.joined()
            for address in addresses:
                here.clients.append(await stack.enter_async_context(AsyncClient(address)))
            yield here
        finally:
            await stack.aclose()
            for app in here.apps.values():
                await app.stop()


async def expected(client: AsyncClient, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """What the model answers to the whole at once."""
    return (await client.complete(prompt, sampling=GREEDY)).token_ids


async def test_a_turn_sends_only_what_is_new_and_answers_to_all() -> None:
    """The second turn's answer is the one that the whole conversation would have got, and decode still held the KV of the first."""
    async with house() as here:
        client = here.clients[0]
        session = await client.sessions.create()
        assert (session.turns, session.state) == (0, SessionState.IDLE)
        first = await client.complete(FIRST, sampling=GREEDY, session=session)
        assert first.session is not None
        assert first.session.turn == 1
        await here.announced(120)
        second = await client.complete(SECOND, sampling=GREEDY, session=session.session_id)
        assert second.usage.prompt_tokens == 200
        assert second.usage.cached_tokens >= 112
        assert second.attempts[0].prefill_worker
        # [2, layers, heads, 2] float32 of the tokens that decode lacked, no more
        assert second.timings.handoff_bytes <= (200 - 112) * 16
        now = await client.sessions.get(session)
        assert (now.turns, now.history_tokens, now.model) == (2, 220, "sim")
        assert now.usage.prompt_tokens == 300
        assert now.usage.completion_tokens == 40
        assert now.last_cached_tokens == second.usage.cached_tokens
        assert now.usage.cached_tokens == first.usage.cached_tokens + second.usage.cached_tokens
        assert now.decode_worker == second.attempts[0].decode_worker
        assert now.created_unix_s < now.updated_unix_s < now.expires_unix_s
        whole = FIRST + first.token_ids + SECOND
        assert second.token_ids == await expected(client, whole)


async def test_a_short_turn_is_computed_where_the_conversation_is() -> None:
    """Of a short suffix, decode computes the prompt itself, and nothing is shipped."""
    async with house() as here:
        client = here.clients[0]
        session = await client.sessions.create()
        await client.complete(FIRST, sampling=GREEDY, session=session)
        await here.announced(120)
        second = await client.complete((5, 6, 7), sampling=GREEDY, session=session)
        assert second.attempts[0].prefill_worker == ""
        assert second.timings.handoff_bytes == 0
        assert second.usage.cached_tokens >= 112


async def test_a_turn_right_after_another_goes_where_that_one_was() -> None:
    """Before the decode worker has reported what it holds."""
    async with house(heartbeat_s=30.0, lease_s=90.0) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        await client.complete(FIRST, sampling=GREEDY, session=session)
        second = await client.complete((5, 6, 7), sampling=GREEDY, session=session)
        assert second.attempts[0].prefill_worker == ""
        assert second.usage.cached_tokens >= 112


async def test_turns_share_kv_under_the_same_salt_only() -> None:
    """Promise: a salt hides a turn's KV from turns with another, at once and later, and changes no token."""
    async with house(heartbeat_s=30.0, lease_s=90.0) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        turns = [
            await client.complete(prompt, sampling=GREEDY, session=session, cache_salt=salt)
            for prompt, salt in ((FIRST, "a"), ((5, 6), "a"), ((7, 8), "b"), ((9,), ""))
        ]
        cached = [turn.usage.cached_tokens for turn in turns]
        assert cached[1] >= 112
        assert cached[2:] == [0, 0]
        assert [turn.attempts[0].prefill_worker == "" for turn in turns] == [
            False,
            True,
            False,
            False,
        ]
        whole = FIRST + turns[0].token_ids + (5, 6) + turns[1].token_ids + (7, 8)
        assert turns[2].token_ids == await expected(client, whole)


async def test_evicted_kv_costs_a_recompute_and_changes_nothing() -> None:
    async with house() as here:
        client = here.clients[0]
        session = await client.sessions.create()
        first = await client.complete(FIRST, sampling=GREEDY, session=session)
        for number in range(4):  # 64 blocks hold 1,024 tokens
            filler = tuple((number * 50 + each) % 255 + 1 for each in range(500))
            await client.complete(filler, sampling=GREEDY)
        second = await client.complete(SECOND, sampling=GREEDY, session=session)
        assert second.usage.cached_tokens < 112
        assert second.token_ids == await expected(client, FIRST + first.token_ids + SECOND)


async def test_text_follows_text_and_tokens() -> None:
    async with house() as here:
        client = here.clients[0]
        session = await client.sessions.create()
        first = await client.complete("Once upon", sampling=GREEDY, session=session)
        second = await client.complete(" a time", sampling=GREEDY, session=session)
        whole = tuple(b"Once upon") + first.token_ids + tuple(b" a time")
        assert second.usage.prompt_tokens == len(whole)
        assert second.token_ids == await expected(client, whole)


async def test_a_chat_turn_sends_one_message() -> None:
    """The prompt is the whole conversation, and its beginning is cached though the template was rendered anew."""
    tokenizer = Tokenizer.load(str(shipped_model()))
    sim = replace(SIM, vocab_size=2336, eos_token_ids=(1,))
    async with house(sim=sim, tokenizer=tokenizer) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        story = [ChatMessage("system", "Be brief."), ChatMessage("user", "Nora has a hat. " * 20)]
        first = await client.complete(story, sampling=GREEDY, session=session)
        before = first.usage.prompt_tokens + 20
        await here.announced(before)
        question = [ChatMessage("user", "Who has the hat?")]
        second = await client.complete(question, sampling=GREEDY, session=session)
        assert before < second.usage.prompt_tokens < before + 20
        assert second.usage.cached_tokens >= before - 16
        with pytest.raises(InvalidRequestError, match="takes chats"):
            await client.complete("text", session=session)


async def busy(client: AsyncClient, session: object, **options: Any) -> Any:
    """A turn that runs, and has begun to answer."""
    stream = client.generate(FIRST, sampling=SLOW, session=session, **options)  # type: ignore[arg-type]
    chunks = aiter(stream)
    await anext(chunks)
    return stream, chunks


async def finish(turn: Any) -> Result:
    stream, chunks = turn
    async for _ in chunks:
        pass
    result: Result = stream.result
    return result


async def test_of_two_turns_at_once_the_second_is_aborted_at_once() -> None:
    """And the first goes on unharmed."""
    async with house(sim=replace(SIM, step_s=0.002)) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        turn = await busy(client, session)
        assert (await client.sessions.get(session)).state is SessionState.GENERATING
        generating = client.sessions.list(state=SessionState.GENERATING)
        assert [each.session_id async for each in generating] == [session.session_id]
        with pytest.raises(SessionBusyError):
            await client.complete(SECOND, session=session)
        assert (await finish(turn)).finish_reason.value == "length"
        now = await client.sessions.get(session)
        assert (now.state, now.turns, now.failed_turns) == (SessionState.IDLE, 1, 0)


async def test_a_turn_that_fails_leaves_the_session_as_it_was() -> None:
    """Cancelled by id, dropped by its client, refused: the word of it is seen, the history is not touched."""
    async with house(sim=replace(SIM, step_s=0.002)) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        first = await client.complete(FIRST, sampling=GREEDY, session=session)
        turn = await busy(client, session, request_id="r1")
        await client.cancel("r1")
        with pytest.raises(CancelledError):
            await finish(turn)
        now = await client.sessions.get(session)
        assert (now.turns, now.failed_turns, now.history_tokens) == (1, 1, 120)
        assert now.last_failure.startswith("CANCELLED")
        stream, _ = await busy(client, session)
        stream.close()
        async with asyncio.timeout(5):
            while (await client.sessions.get(session)).failed_turns < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(InvalidRequestError, match="context"):
            await client.complete(FIRST * 11, session=session)
        now = await client.sessions.get(session)
        assert (now.failed_turns, now.state) == (3, SessionState.IDLE)
        second = await client.complete(SECOND, sampling=GREEDY, session=session)
        assert second.token_ids == await expected(client, FIRST + first.token_ids + SECOND)


async def test_a_turn_that_has_finished_may_be_read_again_and_counts_once() -> None:
    """Promise: whoever attaches after the end changes nothing, and is told the same; not once another turn followed."""
    tokenizer = Tokenizer.load(str(shipped_model()))
    sim = replace(SIM, vocab_size=2336, eos_token_ids=(1,))
    async with house(sim=sim, tokenizer=tokenizer) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        asked = [ChatMessage("user", "Who has the hat?")]
        first = await client.complete(asked, sampling=GREEDY, session=session)
        after = await client.sessions.get(session)
        for _ in range(2):
            async with client.attach(first.request_id) as stream:
                again = await stream.read()
            assert (again.token_ids, again.session) == (first.token_ids, first.session)
        assert await client.sessions.get(session) == after
        second = await client.complete(asked, sampling=GREEDY, session=session)
        assert second.session is not None
        assert second.session.turn == 2
        after = await client.sessions.get(session)
        with pytest.raises(SessionLostError):
            async with client.attach(first.request_id) as stream:
                await stream.read()
        assert await client.sessions.get(session) == after


SAID = {
    "greedy": GREEDY,
    "seeded, with logprobs": replace(GREEDY, temperature=1.0, seed=5, logprobs=2),
    "unseeded": replace(GREEDY, temperature=1.0),
    "one token": replace(GREEDY, max_tokens=1),
    "its own end": replace(GREEDY, max_tokens=200, stop_token_ids=tuple(range(200))),
}


@pytest.mark.parametrize("sampling", SAID.values(), ids=SAID)
async def test_a_turn_that_is_asked_for_again_is_told_again(sampling: SamplingOptions) -> None:
    """Promise: a request that repeats the id and the content of the session's last turn gets that turn's answer, whole, and the session
    has it once; even where no worker is left that could answer.
    """
    async with house(orphan_grace_s=0.0) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        await client.complete(FIRST, sampling=GREEDY, session=session)
        ask = partial(client.complete, SECOND, session=session, request_id="a")
        told = await ask(sampling=sampling)
        after = await client.sessions.get(session)
        for seed in (sampling.seed, told.seed):
            again = await ask(sampling=replace(sampling, seed=seed))
            assert replace(again, timings=told.timings) == told
            assert again.timings.placed_at_s is None, "nothing was computed"
            assert await client.sessions.get(session) == after


async def test_what_is_asked_for_again_is_known_by_its_id_and_content() -> None:
    """Promise: other content under a used id is another turn, and so is the same content without an id; a turn that others followed is
    refused rather than had twice.
    """
    async with house() as here:
        client = here.clients[0]
        session = await client.sessions.create()
        for number, prompt in enumerate((FIRST, SECOND, (1, 2)), start=1):
            turn = await client.complete(prompt, sampling=GREEDY, session=session, request_id="a")
            assert turn.session is not None
            assert turn.session.turn == number
        for number in (4, 5):
            turn = await client.complete((3,), sampling=GREEDY, session=session, request_id="")
            assert turn.session is not None
            assert turn.session.turn == number
        with pytest.raises(AbortedError, match="others followed"):
            await client.complete(SECOND, sampling=GREEDY, session=session, request_id="a")
        now = await client.sessions.get(session)
        assert (now.turns, now.state) == (5, SessionState.IDLE)


@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut by a stop"])
async def test_a_chat_turn_that_is_asked_for_again_is_told_again(cut: bool) -> None:  # noqa: FBT001
    """Promise: so is an answer that the history has as text only."""
    tokenizer = Tokenizer.load(str(shipped_model()))
    sim = replace(SIM, vocab_size=2336, eos_token_ids=(1,))
    async with house(sim=sim, tokenizer=tokenizer, orphan_grace_s=0.0) as here:
        client = here.clients[0]
        story = [ChatMessage("user", "Nora has a hat. Who has it?")]
        calm = await client.complete(story, sampling=GREEDY)
        stops = (calm.text[30:36],) if cut else ()
        sampling = replace(GREEDY, stop=stops)
        session = await client.sessions.create()
        told = await client.complete(story, sampling=sampling, session=session)
        assert (told.stop_string is not None) == cut
        again = await client.complete(
            story, sampling=sampling, session=session, request_id=told.request_id
        )
        assert replace(again, timings=told.timings) == told
        question = [ChatMessage("user", "Who has the other?")]
        assert (await client.complete(question, session=session, sampling=GREEDY)).session


async def test_closing_a_session_ends_its_turn() -> None:
    async with house(sim=replace(SIM, step_s=0.002)) as here:
        client = here.clients[0]
        session = await client.sessions.create()
        turn = await busy(client, session)
        assert (await client.sessions.close(session)).session_id == session.session_id
        with pytest.raises(SessionLostError):
            await finish(turn)
        for gone in (client.sessions.get(session), client.sessions.close(session)):
            with pytest.raises(NotFoundError):
                await gone


async def test_a_session_survives_a_restart_of_its_router(tmp_path: Path) -> None:
    async with house(f"sqlite://{tmp_path}/sessions.db") as here:
        client, port = here.clients[0], here.ports[0]
        session = await client.sessions.create()
        first = await client.complete(FIRST, sampling=GREEDY, session=session)
        await here.apps[port].stop()
        await here.start_router(port)
        await here.joined()
        async with AsyncClient(f"127.0.0.1:{port}") as anew:
            second = await anew.complete(SECOND, sampling=GREEDY, session=session)
            assert second.session is not None
            assert second.session.turn == 2
            assert second.token_ids == await expected(anew, FIRST + first.token_ids + SECOND)


async def test_two_routers_share_their_sessions(redis_url: str) -> None:
    """Turns alternate between them; at once, one is aborted; closed on one, the other's turn ends within a lease."""
    with Redis.from_url(redis_url) as server:
        server.flushall()
    sim = replace(SIM, step_s=0.002)
    async with house(redis_url, routers=2, sim=sim, session_lease_s=0.3) as here:
        one, two = here.clients
        session = await one.sessions.create()
        first = await one.complete(FIRST, sampling=GREEDY, session=session)
        second = await two.complete(SECOND, sampling=GREEDY, session=session)
        assert second.usage.cached_tokens >= 96
        assert second.token_ids == await expected(two, FIRST + first.token_ids + SECOND)
        turn = await busy(one, session)
        with pytest.raises(SessionBusyError):
            await two.complete((1, 2), session=session)
        await finish(turn)
        assert (await two.sessions.get(session)).turns == 3
        turn = await busy(two, await one.sessions.create())
        (generating,) = [each async for each in one.sessions.list(state=SessionState.GENERATING)]
        await one.sessions.close(generating)
        with pytest.raises(SessionLostError):
            await finish(turn)


@pytest.mark.parametrize("stops", [False, True], ids=["drains", "is gone"])
async def test_sessions_are_asked_for_at_the_next_router(
    redis_url: str,
    stops: bool,  # noqa: FBT001
) -> None:
    """Promise: of several addresses, a call is made where somebody answers; by the blocking client too."""
    with Redis.from_url(redis_url) as server:
        server.flushall()
    async with house(redis_url, routers=2) as here:
        both = ",".join(f"127.0.0.1:{port}" for port in here.ports)
        session = await here.clients[1].sessions.create()
        if stops:
            await here.apps[here.ports[0]].stop()
        else:
            await here.apps[here.ports[0]].drain(5.0)
        async with AsyncClient(both) as client:
            answer = await client.complete(FIRST, sampling=GREEDY, session=session)
        async with AsyncClient(both) as client:
            assert (await client.sessions.get(session)).turns == 1
            assert (await client.complete(SECOND, sampling=GREEDY, session=session)).session

        def blocking() -> list[str]:
            with Client(both) as client:
                client.sessions.create()
                return [each.session_id for each in client.sessions.list()]

        assert len(await asyncio.to_thread(blocking)) == 2
        async with AsyncClient(both) as client:
            await client.sessions.close(session)
            with pytest.raises(NotFoundError):
                await client.cancel(answer.request_id)


async def test_a_dead_routers_turn_locks_no_session_for_ever(redis_url: str) -> None:
    """Its lease runs out, and another router goes on with the session as it was before that turn."""
    with Redis.from_url(redis_url) as server:
        server.flushall()
    sim = replace(SIM, step_s=0.002)
    async with house(redis_url, routers=2, sim=sim, session_lease_s=0.5) as here:
        one, two = here.clients
        session = await one.sessions.create()
        turn = await busy(one, session)
        # What is left of a router that was killed: nobody renews, nobody gives back.
        manager = here.apps[here.ports[0]]._sessions
        assert manager is not None
        for task in asyncio.all_tasks():
            if task.get_name().startswith("renew"):
                task.cancel()
        manager._abandon = _never  # type: ignore[method-assign, assignment]
        turn[0].close()
        async with asyncio.timeout(5):
            while True:
                try:
                    answer = await two.complete((1, 2, 3), sampling=GREEDY, session=session)
                except SessionBusyError:
                    await asyncio.sleep(0.05)
                else:
                    break
        assert answer.session is not None
        assert answer.session.turn == 1


async def _never(*_arguments: object) -> None:
    """Does nothing."""


async def test_lists_are_paged_and_limits_hold() -> None:
    async with house(max_sessions=25, session_max_turns=1) as here:
        client = here.clients[0]
        made = [(await client.sessions.create()).session_id for _ in range(25)]
        with pytest.raises(CapacityError):
            await client.sessions.create()
        for size in (0, 7, 25):
            listed = [each.session_id async for each in client.sessions.list(page_size=size)]
            assert listed == sorted(made)
        await client.complete(FIRST, sampling=GREEDY, session=made[0])
        with pytest.raises(InvalidRequestError, match="turns"):
            await client.complete(SECOND, session=made[0])
        await client.sessions.close(made[0])
        brief = await client.sessions.create(ttl_s=0.05)
        async with asyncio.timeout(5):
            while brief.session_id in [each.session_id async for each in client.sessions.list()]:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        with pytest.raises(NotFoundError):
            await client.sessions.get(brief)
        await client.sessions.create()


@pytest.mark.parametrize("name", ["s1", "s" + "0" * 32, "x:s" + "0" * 32, "nobody's", "s\0"])
async def test_an_unknown_session_is_not_found(name: str) -> None:
    async with house() as here:
        client = here.clients[0]
        for call in (
            client.sessions.get(name),
            client.sessions.close(name),
            client.complete(FIRST, session=name),
        ):
            with pytest.raises(NotFoundError, match="session"):
                await call


async def test_without_its_store_a_router_still_answers(redis_url: str) -> None:
    """Sessions are UNAVAILABLE, what needs none is served."""
    async with house(redis_url + ".gone") as here:
        client = here.clients[0]
        with pytest.raises(UnavailableError, match="session store"):
            await client.sessions.create()
        assert (await client.complete(FIRST, sampling=GREEDY)).token_ids
