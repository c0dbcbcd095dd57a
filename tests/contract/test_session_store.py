"""What every session store promises, checked on SQLite in a file, on SQLite in memory and on a real Redis server."""

import asyncio
import random
import sqlite3
import string
import subprocess
import sys
from array import array
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from redis import Redis

from baton.errors import SessionBusyError, UnavailableError
from baton.types import FinishReason, PositionLogprobs, TokenChunk, TokenLogprob
from router.chat import ChatTurn
from router.sessions.location import open_store
from router.sessions.record import (
    Answered,
    History,
    Lease,
    Session,
    SessionId,
    SessionKey,
    new_lease_id,
    new_session_id,
)
from router.sessions.store import Counts, Query, SessionStore

NOW_S = 1_800_000_000.25
MANY = 1000


@pytest.fixture(params=["file", "memory", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "redis":
        address: str = request.getfixturevalue("redis_url")
        with Redis.from_url(address) as server:
            server.flushall()
        return address
    return "sqlite://" if request.param == "memory" else f"sqlite://{tmp_path}/s/sessions.db"


@pytest.fixture
async def store(url: str) -> AsyncIterator[SessionStore]:
    opened = open_store(url, 0)
    yield opened
    await opened.close()


@pytest.fixture
async def pair(url: str) -> AsyncIterator[tuple[SessionStore, SessionStore]]:
    """Two routers' views of one store."""
    first = open_store(url, 0)
    second = first if url == "sqlite://" else open_store(url, 0)
    yield first, second
    await first.close()
    await second.close()


def session(tenant: str = "", *, at_s: float = NOW_S, ttl_s: float = 100.0) -> Session:
    return Session(
        key=SessionKey(tenant, new_session_id(at_s)),
        model="m",
        created_s=at_s,
        updated_s=at_s,
        ttl_s=ttl_s,
        idle_s=50.0,
    )


async def created(store: SessionStore, tenant: str = "", **times: float) -> Session:
    made = session(tenant, **times)
    assert await store.create(made, max_sessions=MANY)
    return made


def lease(name: str = "a", until_s: float = NOW_S + 10, holder: str = "h") -> Lease:
    return Lease(name, until_s, holder)


LOGPROBS = PositionLogprobs(TokenLogprob(7, -2.25), (TokenLogprob(2**31, -0.5),))
ANSWERS = [
    Answered(2**64 - 1, FinishReason.STOP, TokenChunk(0, (2**31, 7), (LOGPROBS, LOGPROBS))),
    Answered(0, FinishReason.LENGTH, TokenChunk(0, (1,))),
    None,
]


@pytest.mark.parametrize("answered", ANSWERS)
async def test_what_was_written_is_read_back(
    store: SessionStore, answered: Answered | None
) -> None:
    """Every field, and every kind of token, text and answer."""
    made = await created(store, "tenant:with colons ü")
    assert await store.get(made.key, NOW_S) == made
    begun = await store.begin_turn(made.key, lease(), NOW_S)
    assert begun == (replace(made, leased_until_s=NOW_S + 10), History())
    history = History(
        array("I", [0, 1, 255, 2**31, 2**32 - 1]),
        (ChatTurn("user", "snow ☃\n\0"), ChatTurn("assistant", "\ud800")),
        answer_in_tokens=False,
        answered=answered,
    )
    changed = replace(
        made,
        turns=1,
        history_tokens=5,
        prompt_tokens=3,
        cached_tokens=2,
        completion_tokens=2,
        last_cached_tokens=2,
        prefill_worker="p",
        decode_worker="d",
        last_lease_id="b-1",
        earlier_marks=("c", "a"),
        failed_turns=1,
        last_failure="why",
        updated_s=NOW_S + 1.5,
    )
    assert await store.end_turn(changed, history, lease())
    assert await store.get(made.key, NOW_S + 2) == changed
    assert await store.begin_turn(made.key, lease("b"), NOW_S + 2) == (
        replace(changed, leased_until_s=NOW_S + 10),
        history,
    )


async def test_a_turn_that_leaves_no_history_keeps_the_one_before(store: SessionStore) -> None:
    made = await created(store)
    await store.begin_turn(made.key, lease(), NOW_S)
    history = History(array("I", [1, 2, 3]), answered=ANSWERS[0])
    await store.end_turn(made, history, lease())
    await store.begin_turn(made.key, lease("b"), NOW_S)
    assert await store.end_turn(replace(made, failed_turns=1), None, lease("b"))
    begun = await store.begin_turn(made.key, lease("c"), NOW_S)
    assert begun is not None
    assert (begun[0].failed_turns, begun[1]) == (1, history)


async def test_another_tenant_sees_nothing_and_changes_nothing(store: SessionStore) -> None:
    made = await created(store, "mine")
    for tenant in ("", "yours", "mine:"):
        key = SessionKey(tenant, made.key.session_id)
        assert await store.get(key, NOW_S) is None
        assert await store.begin_turn(key, lease(), NOW_S) is None
        assert not await store.remove(key)
        query = Query(tenant=tenant, after=SessionId(""), limit=10)
        assert await store.list(query, NOW_S) == []
    assert await store.get(made.key, NOW_S) == made


async def test_one_of_many_takes_the_lease(pair: tuple[SessionStore, SessionStore]) -> None:
    """However many turns begin at once, on two routers, one runs and the others know at once."""
    made = await created(pair[0])
    turns = [
        pair[number % 2].begin_turn(made.key, lease(str(number)), NOW_S) for number in range(20)
    ]
    begun = await asyncio.gather(*turns, return_exceptions=True)
    assert sum(isinstance(each, tuple) for each in begun) == 1
    assert sum(isinstance(each, SessionBusyError) for each in begun) == 19


async def test_a_turn_goes_on_at_another_router_under_its_own_lease(
    pair: tuple[SessionStore, SessionStore],
) -> None:
    made = await created(pair[0])
    await pair[0].begin_turn(made.key, lease("mine"), NOW_S)
    with pytest.raises(SessionBusyError):
        await pair[1].begin_turn(made.key, lease("other"), NOW_S + 1)
    assert await pair[1].begin_turn(made.key, lease("mine"), NOW_S + 1) is not None
    assert await pair[1].end_turn(replace(made, turns=1), None, lease("mine"))


async def test_a_request_that_is_asked_once_more_goes_on_with_its_own_turn(
    pair: tuple[SessionStore, SessionStore],
) -> None:
    """Promise: a client whose router died before it said a word does not wait for that router's lease."""
    one, other = pair
    key = (await created(one)).key
    first, again = lease(new_lease_id("mark")), lease(new_lease_id("mark"))
    assert await one.begin_turn(key, first, NOW_S)
    for stranger in (new_lease_id("mar"), new_lease_id("mark2"), new_lease_id("")):
        with pytest.raises(SessionBusyError):
            await other.begin_turn(key, lease(stranger), NOW_S)
    assert await other.begin_turn(key, again, NOW_S)
    assert not await one.renew(key, first)
    assert await other.renew(key, again)


async def test_two_routers_can_begin_a_new_file_at_once(tmp_path: Path) -> None:
    def opened(name: str) -> SessionStore:
        return open_store(f"sqlite://{tmp_path}/{name}.db", 0)

    for number in range(20):
        pair = (asyncio.to_thread(opened, str(number)) for _ in range(2))
        for store in await asyncio.gather(*pair):
            await store.close()


async def test_a_turn_that_another_goes_on_with_is_not_given_up_by_who_had_it_before(
    pair: tuple[SessionStore, SessionStore],
) -> None:
    """A router that wakes up, or a stream that was replaced, ends nobody's turn; each of them may finish it, with the same words."""
    first, second = pair
    made = await created(first)
    late, now = lease("mine", holder="1"), lease("mine", holder="2")
    history = History(array("I", [9]))
    for finishing in (late, now):
        await first.begin_turn(made.key, late, NOW_S)
        await second.begin_turn(made.key, now, NOW_S)
        assert not await first.end_turn(replace(made, failed_turns=1), None, late)
        assert await first.get(made.key, NOW_S) == replace(made, leased_until_s=NOW_S + 10)
        assert await second.renew(made.key, now)
        assert await first.end_turn(made, history, finishing)
    await first.begin_turn(made.key, late, NOW_S)
    await second.begin_turn(made.key, now, NOW_S)
    assert await second.end_turn(replace(made, failed_turns=1), None, now)


@pytest.mark.parametrize("url", ["file", "redis"], indirect=True)
async def test_a_turn_that_knows_no_holder_is_gone_on_with_and_ended(
    url: str, tmp_path: Path
) -> None:
    """A store may be shared with a router that keeps none, and may be one that such a router made."""
    store = open_store(url, 0)
    made = await created(store)
    await store.begin_turn(made.key, lease("mine"), NOW_S)
    await store.close()
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(tmp_path / "s" / "sessions.db")) as db:
            db.execute("ALTER TABLE sessions DROP COLUMN holder")
    else:
        with Redis.from_url(url) as server:
            assert server.hdel(f"{{baton}}:session::{made.key.session_id}", "holder") == 1
    pair = open_store(url, 0), open_store(url, 0)
    renewed = lease("mine", NOW_S + 20, holder="2")
    assert await pair[0].renew(made.key, renewed)
    assert await pair[1].begin_turn(made.key, renewed, NOW_S) is not None
    assert await pair[0].end_turn(replace(made, failed_turns=1), None, renewed)
    for each in pair:
        await each.close()


async def test_a_lease_that_ran_out_is_taken_over(pair: tuple[SessionStore, SessionStore]) -> None:
    """A dead router's turn locks no session for ever, and cannot write any more."""
    first, second = pair
    made = await created(first)
    await first.begin_turn(made.key, lease("dead"), NOW_S)
    with pytest.raises(SessionBusyError):
        await second.begin_turn(made.key, lease("next"), NOW_S + 9.9)
    assert await second.begin_turn(made.key, lease("next", NOW_S + 20), NOW_S + 10) is not None
    assert not await first.renew(made.key, lease("dead", NOW_S + 30))
    assert not await first.end_turn(replace(made, turns=9), History(array("I", [9])), lease("dead"))
    assert await second.end_turn(replace(made, turns=1), None, lease("next"))
    kept = await first.get(made.key, NOW_S)
    assert kept is not None
    assert kept.turns == 1


async def test_a_lease_that_ran_out_still_writes_where_nobody_came(store: SessionStore) -> None:
    made = await created(store)
    await store.begin_turn(made.key, lease(), NOW_S)
    assert await store.end_turn(replace(made, turns=1, updated_s=NOW_S + 20), None, lease())


async def test_a_renewed_lease_holds(store: SessionStore) -> None:
    made = await created(store)
    await store.begin_turn(made.key, lease(), NOW_S)
    assert await store.renew(made.key, lease("a", NOW_S + 30))
    with pytest.raises(SessionBusyError):
        await store.begin_turn(made.key, lease("b"), NOW_S + 29)


async def test_a_removed_session_ends_its_turn(store: SessionStore) -> None:
    made = await created(store)
    await store.begin_turn(made.key, lease(), NOW_S)
    assert await store.remove(made.key)
    assert not await store.remove(made.key)
    assert not await store.renew(made.key, lease())
    assert not await store.end_turn(made, History(), lease())
    assert await store.get(made.key, NOW_S) is None
    assert await store.count(NOW_S) == Counts(0, 0)


async def test_sessions_are_gone_when_their_time_comes(store: SessionStore) -> None:
    """The pause between turns ends them, or their whole life, whether or not anybody swept."""
    idle = await created(store)
    brief = await created(store, ttl_s=5.0)
    used = await created(store)
    await store.begin_turn(used.key, lease(), NOW_S)
    await store.end_turn(replace(used, updated_s=NOW_S + 40), None, lease())
    assert await store.get(brief.key, NOW_S + 4.9) == brief
    assert await store.get(brief.key, NOW_S + 5) is None
    assert await store.sweep(NOW_S + 5) == 1
    assert await store.get(idle.key, NOW_S + 50) is None
    assert await store.begin_turn(idle.key, lease(), NOW_S + 50) is None
    query = Query(tenant="", after=SessionId(""), limit=10)
    assert [each.key for each in await store.list(query, NOW_S + 50)] == [used.key]
    assert await store.sweep(NOW_S + 50) == 1
    assert await store.sweep(NOW_S + 99) == 1
    assert await store.count(NOW_S) == Counts(0, 0)


async def test_a_session_does_not_expire_while_its_turn_runs(store: SessionStore) -> None:
    made = await created(store, ttl_s=5.0)
    await store.begin_turn(made.key, lease("a", NOW_S + 10), NOW_S)
    assert await store.sweep(NOW_S + 6) == 0
    assert await store.get(made.key, NOW_S + 6) is not None
    assert await store.count(NOW_S + 6) == Counts(idle=0, generating=1)
    with pytest.raises(SessionBusyError):
        await store.begin_turn(made.key, lease("b"), NOW_S + 6)
    again = lease("a", NOW_S + 10, holder="another")
    assert await store.begin_turn(made.key, again, NOW_S + 6) is not None
    assert await store.sweep(NOW_S + 10) == 1


async def test_the_sweep_removes_any_number(store: SessionStore) -> None:
    for _ in range(620):
        await created(store, ttl_s=1.0)
    running = await created(store, ttl_s=1.0)
    await store.begin_turn(running.key, lease(), NOW_S)
    assert await store.sweep(NOW_S + 2) == 620
    assert await store.count(NOW_S + 2) == Counts(idle=0, generating=1)


async def test_the_store_holds_no_more_than_its_limit(
    pair: tuple[SessionStore, SessionStore],
) -> None:
    tried = [pair[number % 2].create(session(), max_sessions=7) for number in range(20)]
    assert sum(await asyncio.gather(*tried)) == 7
    assert await pair[0].count(NOW_S) == Counts(idle=7, generating=0)


async def test_pages_hold_every_session_once(store: SessionStore) -> None:
    """In the order of creation, whatever the page size, and while others are made and removed."""
    made = [await created(store, "t", at_s=NOW_S + number / 100) for number in range(450)]
    await created(store, "other")
    for size in (1000, 450, 200, 7):
        seen: list[SessionKey] = []
        after = SessionId("")
        while page := await store.list(Query(tenant="t", after=after, limit=size), NOW_S + 9):
            assert len(page) <= size
            seen += [each.key for each in page]
            after = page[-1].key.session_id
        assert seen == [each.key for each in made]
    await store.remove(made[0].key)
    await created(store, "t", at_s=NOW_S + 20)
    page = await store.list(Query(tenant="t", after=made[0].key.session_id, limit=1000), NOW_S + 20)
    assert len(page) == 450


async def test_a_page_can_hold_only_what_runs_or_only_what_waits(store: SessionStore) -> None:
    made = [await created(store, at_s=NOW_S + number / 100) for number in range(300)]
    busy = made[::100]
    for each in busy:
        await store.begin_turn(each.key, lease("a", NOW_S + 30), NOW_S + 5)
    query = Query(tenant="", after=SessionId(""), limit=2, generating=True)
    page = await store.list(query, NOW_S + 6)
    assert [each.key for each in page] == [each.key for each in busy[:2]]
    query = replace(query, limit=1000, generating=False)
    assert len(await store.list(query, NOW_S + 6)) == 297
    assert len(await store.list(query, NOW_S + 30)) == 300


async def test_sessions_outlive_the_router(url: str) -> None:
    """All but those in memory."""
    store = open_store(url, 0)
    made = await created(store)
    await store.begin_turn(made.key, lease(), NOW_S)
    history = History(array("I", range(5000)))
    await store.end_turn(replace(made, turns=1), history, lease())
    await store.close()
    again = open_store(url, 0)
    begun = await again.begin_turn(made.key, lease("b"), NOW_S)
    await again.close()
    if url == "sqlite://":
        assert begun is None
    else:
        assert begun is not None
        assert (begun[0].turns, begun[1]) == (1, history)


async def test_broken_connections_are_replaced(redis_url: str) -> None:
    """Redis lost its clients and its scripts: as soon as the loop has noticed, operations succeed."""
    store = open_store(redis_url, 0)
    made = await created(store)
    with Redis.from_url(redis_url) as server:
        server.client_kill_filter(_type="normal", skipme=True)
        server.script_flush()
    async with asyncio.timeout(5):
        while True:
            try:
                await store.get(made.key, NOW_S)
            except UnavailableError:
                await asyncio.sleep(0)
            else:
                break
    assert await store.begin_turn(made.key, lease(), NOW_S) is not None
    await store.close()


async def test_a_locked_file_fails_all_operations_in_bounded_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: operations that wait for one another do not wait one another's time: each is UNAVAILABLE within its own limit, and changes
    nothing once the file is free.
    """
    path = tmp_path / "sessions.db"
    store = open_store(f"sqlite://{path}", 0)
    made = await created(store)
    many = [session() for _ in range(40)]
    with (
        closing(sqlite3.connect(path, isolation_level=None)) as other,
        monkeypatch.context() as patch,
    ):
        patch.setattr("router.sessions.sqlite.TIMEOUT_S", 0.5)
        other.execute("BEGIN IMMEDIATE")
        async with asyncio.timeout(10):
            results = await asyncio.gather(
                *(store.create(each, max_sessions=MANY) for each in many), return_exceptions=True
            )
    assert all(isinstance(result, UnavailableError) for result in results), results
    assert await store.get(made.key, NOW_S) == made
    assert await store.count(NOW_S) == Counts(idle=1, generating=0)
    await store.close()


HUNG = """
import asyncio, threading
from router.sessions import sqlite

async def main() -> None:
    store = sqlite.SqliteStore(None)
    store._thread.submit(threading.Event().wait)
    await store.close()
    await store.close()

sqlite.TIMEOUT_S = 0.1
asyncio.run(main())
"""


async def test_a_process_whose_file_hangs_ends_all_the_same() -> None:
    """Promise: neither the store's end nor the process's waits for an operation that never returns."""
    await asyncio.to_thread(subprocess.run, [sys.executable, "-c", HUNG], timeout=20, check=True)


async def test_the_event_loop_never_waits_for_the_store(store: SessionStore) -> None:
    """While large histories are written, the loop's own work goes on between the operations' ends."""
    made = await created(store)
    history = History(array("I", range(50_000)))
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    working = asyncio.create_task(work())
    for number in range(20):
        await store.begin_turn(made.key, lease(str(number)), NOW_S)
        before = turns
        await store.end_turn(made, history, lease(str(number)))
        assert turns > before
    working.cancel()


async def test_the_books_balance_after_any_operations(store: SessionStore) -> None:
    """A model of the store in a dictionary agrees with it after every step."""
    rng = random.Random(11)
    model: dict[SessionKey, tuple[Session, Lease | None]] = {}
    now_s = NOW_S
    for _ in range(400):
        now_s += rng.random() * 4
        live = {
            key: (made, held)
            for key, (made, held) in model.items()
            if made.expires_s > now_s or (held is not None and held.until_s > now_s)
        }
        key = rng.choice(list(model)) if model else None
        held = model[key][1] if key is not None else None
        match rng.choice(["create", "begin", "begin", "end", "sweep", "remove"]):
            case "begin" if key is not None:
                taken = lease(rng.choice(string.ascii_letters), now_s + 6, str(rng.random()))
                other = held if held is not None and held.lease_id != taken.lease_id else None
                busy = key in live and other is not None and other.until_s > now_s
                try:
                    begun = await store.begin_turn(key, taken, now_s)
                except SessionBusyError:
                    assert busy
                else:
                    assert (begun is not None, busy) == (key in live, False)
                    if begun is not None:
                        model[key] = (model[key][0], taken)
            case "end" if key is not None and held is not None:
                changed = replace(model[key][0], updated_s=now_s)
                assert await store.end_turn(changed, None, held)
                model[key] = (changed, None)
            case "sweep":
                assert await store.sweep(now_s) == len(model) - len(live)
                model = live
            case "remove" if key is not None:
                assert await store.remove(key)
                del model[key]
            case _:
                made = await created(store, rng.choice(["", "t"]), at_s=now_s)
                model[made.key] = (made, None)
        counts = await store.count(now_s)
        assert counts.idle + counts.generating == len(model)
