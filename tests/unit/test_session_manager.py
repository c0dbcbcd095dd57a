"""A turn's lease under disturbance: whatever happens, and whenever, the session ends up as before the turn or after it, and free."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from baton.errors import (
    AbortedError,
    CapacityError,
    InvalidRequestError,
    SessionBusyError,
    SessionLostError,
    UnavailableError,
)
from baton.service.settings import RouterSettings
from baton.types import FinishReason, TokenChunk
from router.sessions.manager import SessionManager
from router.sessions.metrics import SessionMetrics
from router.sessions.record import Answered, History, Lease, Session, SessionKey
from router.sessions.sqlite import SqliteStore
from router.sessions.turn import MAX_EARLIER, TurnResult

SETTINGS = RouterSettings(session_lease_s=0.15, max_sessions=3)
RESULT = TurnResult(
    model="m",
    prompt=(1, 2, 3),
    output=TokenChunk(0, (4, 5)),
    reason=FinishReason.LENGTH,
    seed=7,
    answer="",
    exact=True,
    cached_tokens=2,
    prefill_worker="p",
    decode_worker="d",
)


class Disturbed(SqliteStore):
    """A store whose operations wait for the test, or fail."""

    def __init__(self) -> None:
        super().__init__(None)
        self.gate = asyncio.Event()
        self.gate.set()
        self.began = asyncio.Event()
        self.ending = asyncio.Event()
        self.failing: set[str] = set()
        self.sweeps = 0
        self.unrenewed: asyncio.Event | None = None
        """Where there is one, `end_turn` returns only after a lease was found not to be held any more."""

    async def begin_turn(
        self, key: SessionKey, lease: Lease, now_s: float
    ) -> tuple[Session, History] | None:
        begun = await super().begin_turn(key, lease, now_s)
        self.began.set()
        await self.gate.wait()
        return begun

    async def sweep(self, now_s: float) -> int:
        self.sweeps += 1
        if "sweep" in self.failing:
            raise UnavailableError("gone")
        return await super().sweep(now_s)

    async def end_turn(self, session: Session, history: History | None, lease: Lease) -> bool:
        kind = "abandon" if history is None else "commit"
        self.ending.set()
        if kind in self.failing:
            raise UnavailableError("gone")
        await self.gate.wait()
        ended = await super().end_turn(session, history, lease)
        if self.unrenewed is not None:
            await self.unrenewed.wait()
        return ended

    async def renew(self, key: SessionKey, lease: Lease) -> bool:
        held = await super().renew(key, lease)
        if not held and self.unrenewed is not None:
            self.unrenewed.set()
        return held


class Now:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Rig:
    def __init__(self, settings: RouterSettings = SETTINGS) -> None:
        self.registry = CollectorRegistry()
        self.clock = Now()
        self.store = Disturbed()
        metrics = SessionMetrics(self.registry)
        self.manager = SessionManager(self.store, settings, metrics, clock=self.clock)

    async def take_turn(self, session: Session, **changes: Any) -> None:
        async with self.manager.turn("", session.key.session_id, model="m") as turn:
            assert turn is not None
            await turn.finish(replace(RESULT, **changes))

    async def fail_turn(self, session: Session, error: Exception) -> None:
        async with self.manager.turn("", session.key.session_id, model="m"):
            raise error

    async def told(self, session: Session) -> Session:
        return await self.manager.get("", session.key.session_id)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)


@asynccontextmanager
async def rigged(settings: RouterSettings = SETTINGS) -> AsyncIterator[Rig]:
    rig = Rig(settings)
    try:
        yield rig
    finally:
        await rig.manager.close()


async def test_a_turn_is_counted_in_the_session_and_in_the_metrics() -> None:
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        await rig.take_turn(session)
        rig.clock.now_s += 1
        await rig.take_turn(session, prompt=(1, 2, 3, 4, 5, 6), cached_tokens=5)
        told = await rig.told(session)
        assert told == replace(
            session,
            turns=2,
            history_tokens=8,
            prompt_tokens=9,
            cached_tokens=7,
            completion_tokens=4,
            last_cached_tokens=5,
            prefill_worker="p",
            decode_worker="d",
            last_lease_id=told.last_lease_id,
            updated_s=rig.clock.now_s,
        )
        assert rig.value("baton_session_turns_total", outcome="ok") == 2
        assert rig.value("baton_session_prompt_tokens_total") == 9
        assert rig.value("baton_session_cached_tokens_total") == 7
        assert rig.value("baton_session_store_seconds_count", operation="commit") == 2


async def test_a_caller_that_leaves_while_its_turn_begins_gives_the_lease_back() -> None:
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        rig.store.gate.clear()
        taking = asyncio.create_task(rig.take_turn(session))
        await rig.store.began.wait()
        taking.cancel()
        await asyncio.wait({taking})
        assert taking.cancelled()
        rig.store.gate.set()
        await _free(rig, session)
        assert (await rig.told(session)).failed_turns == 0


async def test_a_caller_that_leaves_in_its_turn_gives_the_lease_back() -> None:
    """However often it is cancelled while that goes on."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        inside = asyncio.Event()

        async def stay() -> None:
            async with rig.manager.turn("", session.key.session_id, model="m"):
                inside.set()
                await asyncio.Event().wait()

        staying = asyncio.create_task(stay())
        await inside.wait()
        rig.store.gate.clear()
        for _ in range(3):
            staying.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({staying})
        rig.store.gate.set()
        await _free(rig, session)
        told = await rig.told(session)
        assert (told.turns, told.failed_turns) == (0, 1)
        assert told.last_failure.startswith("CANCELLED")
        assert rig.value("baton_session_turns_total", outcome="cancelled") == 1


async def _free(rig: Rig, session: Session) -> None:
    """Returns once the session can take a turn, and takes none."""
    async with asyncio.timeout(5):
        while rig.manager.is_generating(await rig.told(session)):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def test_a_turn_that_was_not_written_did_not_happen() -> None:
    """The caller gets the store's error, and the session is as it was."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        rig.store.failing = {"commit"}
        with pytest.raises(UnavailableError, match="gone"):
            await rig.take_turn(session)
        rig.store.failing = set()
        told = await rig.told(session)
        assert (told.turns, told.failed_turns) == (0, 1)
        await rig.take_turn(session)
        assert rig.value("baton_session_store_failures_total", operation="commit") == 1


async def test_a_store_that_fails_hides_no_error_of_the_turn() -> None:
    """And the lease runs out by itself."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        rig.store.failing = {"abandon"}
        with pytest.raises(CapacityError, match="mine"):
            await rig.fail_turn(session, CapacityError("mine"))
        with pytest.raises(SessionBusyError):
            await rig.take_turn(session)
        rig.clock.now_s += SETTINGS.session_lease_s
        await rig.take_turn(session)


async def test_a_turn_outlives_its_first_lease() -> None:
    """It is renewed for as long as the turn runs."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        async with rig.manager.turn("", session.key.session_id, model="m") as turn:
            assert turn is not None
            async with asyncio.timeout(5):
                for _ in range(3):
                    held_s = (await rig.told(session)).leased_until_s
                    rig.clock.now_s += 0.1
                    while (await rig.told(session)).leased_until_s <= held_s:  # noqa: ASYNC110
                        await asyncio.sleep(0.005)
            with pytest.raises(SessionBusyError):
                await rig.take_turn(session)
            await turn.finish(RESULT)


async def test_a_renewal_that_comes_too_late_takes_nothing_from_a_turn_that_is_written() -> None:
    """Promise: a turn whose lease is due for renewal in the moment in which it is written has happened, and its client is told so."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        rig.store.unrenewed = asyncio.Event()
        async with asyncio.timeout(5):
            await rig.take_turn(session)
        assert rig.store.unrenewed.is_set()
        assert (await rig.told(session)).turns == 1


async def test_a_turn_that_two_routers_finish_is_told_by_both_and_had_once() -> None:
    """Promise: a client that attached elsewhere, in the moment in which its first router wrote the turn, is told of it too; not where
    what was written is another turn.
    """
    async with rigged(replace(SETTINGS, session_lease_s=60.0)) as rig:
        session = await rig.manager.create("", model="m")
        name = session.key.session_id
        async with rig.manager.turn("", name, model="m", mark="a") as first:
            assert first is not None
            lease_id = first.lease.lease_id
            async with rig.manager.turn("", name, model="m", lease_id=lease_id) as second:
                assert second is not None
                await first.finish(RESULT)
                await second.finish(RESULT)
                assert (second.finished, second.number) == (True, 1)
        assert (await rig.told(session)).turns == 1

        async def be_late() -> None:
            async with rig.manager.turn("", name, model="m", mark="b") as turn:
                assert turn is not None
                rig.clock.now_s += 60.0
                await rig.take_turn(session)
                await turn.finish(RESULT)

        with pytest.raises(SessionLostError):
            await be_late()
        assert (await rig.told(session)).turns == 2


@pytest.mark.parametrize(
    "end", [asyncio.CancelledError(), CapacityError("stalled"), AbortedError("replaced")]
)
async def test_a_stream_that_was_replaced_ends_no_turn(end: BaseException) -> None:
    """Promise: whatever the stream that a client left comes to, and before decode says that it was replaced, the turn is the one's that
    goes on with it; and where that one fails, the session is free.
    """
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        name, replaced, ended = session.key.session_id, asyncio.Event(), asyncio.Event()
        leases: list[str] = []

        async def be_replaced() -> None:
            with suppress(type(end)):
                async with rig.manager.turn("", name, model="m", mark="a") as turn:
                    assert turn is not None
                    leases.append(turn.lease.lease_id)
                    turn.outlives = True
                    began.set()
                    await replaced.wait()
                    raise end
            ended.set()

        for fails in (True, False):
            began = asyncio.Event()
            for event in (replaced, ended):
                event.clear()
            first = asyncio.create_task(be_replaced())
            await began.wait()
            with suppress(InvalidRequestError):
                async with rig.manager.turn("", name, model="m", lease_id=leases[-1]) as second:
                    assert second is not None
                    replaced.set()
                    await ended.wait()
                    told = await rig.told(session)
                    assert (rig.manager.is_generating(told), told.turns) == (True, 0)
                    if fails:
                        raise InvalidRequestError
                    await second.finish(RESULT)
            await first
            told = await rig.told(session)
            assert (rig.manager.is_generating(told), told.failed_turns) == (False, 1)
        assert told.turns == 1


async def test_a_turn_that_another_router_wrote_is_not_lost_at_its_next_renewal() -> None:
    """Promise: its client reads on to the end."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        name = session.key.session_id
        async with rig.manager.turn("", name, model="m", mark="a") as first:
            assert first is not None
            lease_id = first.lease.lease_id
            async with rig.manager.turn("", name, model="m", lease_id=lease_id) as second:
                assert second is not None
                rig.store.unrenewed = asyncio.Event()
                await first.finish(RESULT)
                assert rig.store.unrenewed.is_set()
                # The renewal looks what became of the turn.
                await rig.told(session)
                await rig.told(session)
                await second.finish(RESULT)
        assert (await rig.told(session)).turns == 1


@pytest.mark.parametrize("finishing", [False, True])
async def test_a_turn_whose_session_was_taken_over_ends(*, finishing: bool) -> None:
    """By its next renewal, or when it would be written."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")

        async def take() -> None:
            async with rig.manager.turn("", session.key.session_id, model="m") as turn:
                assert turn is not None
                await rig.store.remove(session.key)
                if finishing:
                    await turn.finish(RESULT)
                await asyncio.wait_for(asyncio.Event().wait(), 5)

        with pytest.raises(SessionLostError):
            await take()


async def test_a_session_knows_the_requests_of_its_latest_turns() -> None:
    """The last one is past, and its answer is there; earlier ones are refused, and cost the session nothing; no record grows for ever."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        marks = [f"{number:032x}" for number in range(MAX_EARLIER + 2)]
        for mark in marks:
            async with rig.manager.turn("", session.key.session_id, model="m", mark=mark) as turn:
                assert turn is not None
                assert not turn.is_past
                await turn.finish(RESULT)
        last = await rig.told(session)
        assert (last.turns, len(last.earlier_marks)) == (len(marks), MAX_EARLIER)
        async with rig.manager.turn("", session.key.session_id, model="m", mark=marks[-1]) as turn:
            assert turn is not None
            assert (turn.is_past, turn.number) == (True, len(marks))
            assert turn.history.answered == Answered(7, FinishReason.LENGTH, RESULT.output)
            assert list(turn.history.last_prompt) == [1, 2, 3]
            await turn.finish(RESULT)
        assert await rig.told(session) == last
        with pytest.raises(AbortedError):
            async with rig.manager.turn("", session.key.session_id, model="m", mark=marks[-2]):
                pass
        told = await rig.told(session)
        assert (told.turns, rig.manager.is_generating(told)) == (len(marks), False)


async def test_a_turn_that_is_asked_for_again_locks_nothing() -> None:
    """Promise: who leaves while the answer is looked up gives the lease back, and a store that fails then keeps no answer from anybody."""
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")

        async def ask() -> None:
            async with rig.manager.turn("", session.key.session_id, model="m", mark="a") as turn:
                assert turn is not None
                await turn.finish(RESULT)

        await ask()
        for event in (rig.store.began, rig.store.ending):
            event.clear()
        asking = asyncio.create_task(ask())
        await rig.store.began.wait()
        rig.store.gate.clear()
        await rig.store.ending.wait()
        asking.cancel()
        await asyncio.wait({asking})
        rig.store.gate.set()
        await _free(rig, session)
        rig.store.failing = {"abandon"}
        await ask()
        assert (await rig.told(session)).turns == 1


async def test_a_full_store_makes_room_of_what_has_expired() -> None:
    async with rigged() as rig:
        for _ in range(3):
            await rig.manager.create("", model="m", ttl_s=5)
        with pytest.raises(CapacityError):
            await rig.manager.create("", model="m")
        rig.clock.now_s += 5
        await rig.manager.create("", model="m")
        assert rig.value("baton_sessions_expired_total") == 3


@pytest.mark.parametrize(
    ("asked", "got"), [(0.0, 3600.0), (60.0, 60.0), (1e9, 3600.0), (float("inf"), 3600.0)]
)
async def test_a_client_may_shorten_its_sessions_life_only(asked: float, got: float) -> None:
    async with rigged() as rig:
        session = await rig.manager.create("", model="m", idle_s=asked)
        assert (session.idle_s, session.ttl_s) == (got, 86_400.0)


async def test_a_session_stays_with_its_model() -> None:
    async with rigged() as rig:
        session = await rig.manager.create("", model="other")
        with pytest.raises(InvalidRequestError, match="model 'other'"):
            await rig.take_turn(session)
        told = await rig.told(session)
        assert (told.failed_turns, rig.manager.is_generating(told)) == (1, False)


async def test_a_bug_in_a_turn_is_told_without_its_words() -> None:
    async with rigged() as rig:
        session = await rig.manager.create("", model="m")
        with pytest.raises(RuntimeError):
            await rig.fail_turn(session, RuntimeError("what the prompt said"))
        assert (await rig.told(session)).last_failure == "INTERNAL: a bug"


async def test_the_sweep_counts_and_outlives_a_store_that_fails() -> None:
    async with rigged() as rig:
        rig.store.failing = {"sweep"}
        rig.manager.start()
        async with asyncio.timeout(5):
            while not rig.store.sweeps:  # noqa: ASYNC110 - the first sweep comes at once
                await asyncio.sleep(0.005)
        await asyncio.sleep(0)
        assert rig.manager._sweeping is not None
        assert not rig.manager._sweeping.done()
