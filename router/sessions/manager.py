"""What clients can do with sessions, over whichever store: create, look, close, and run a turn under a lease.

A turn that fails or is cancelled leaves its session as it was before, but for the word of it; where another router or stream goes on
with it, that one says how it ends. The lease is renewed while the turn runs; a turn whose session was closed or taken over meanwhile
ends with `SessionLostError`. A router that dies holds no session for longer than its lease.

Used on the router's event loop; a turn belongs to the task that entered it. Nothing of a session stays in memory
between turns but what `RecentSessions` tells of it.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from baton.errors import (
    AbortedError,
    BatonError,
    CancelledError,
    CapacityError,
    DrainingError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from baton.service.settings import RouterSettings
from router.sessions.metrics import SessionMetrics
from router.sessions.recent import RecentSessions
from router.sessions.record import (
    History,
    Lease,
    Session,
    SessionId,
    SessionKey,
    bounded_s,
    mark_in,
    new_holder,
    new_lease_id,
    new_session_id,
)
from router.sessions.store import Query, SessionStore
from router.sessions.turn import Turn

_log = logging.getLogger(__name__)

SWEEP_INTERVAL_S = 5.0
RENEWALS_PER_LEASE = 3
SETTLE_S = 10.0
"""How long operations under way may take when the router stops."""
MAX_FAILURE_CHARS = 200
TAKEN = "it was closed, or another turn took over"

_SESSION_ID = re.compile(r"s[0-9a-f]{32}")
T = TypeVar("T")


class SessionManager:
    """See the module docstring."""

    def __init__(
        self,
        store: SessionStore,
        settings: RouterSettings,
        metrics: SessionMetrics,
        *,
        recent: RecentSessions | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Takes over the store. `recent` is told of every session that changes here. `clock` gives seconds since the Unix epoch."""
        self._store = store
        self._settings = settings
        self._metrics = metrics
        self._recent = recent or RecentSessions()
        self._clock = clock
        self._turns: dict[SessionKey, Turn] = {}
        self._settling: set[asyncio.Task[Any]] = set()
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on, sessions whose time has come are removed."""
        self._sweeping = asyncio.create_task(self._sweep_forever(), name="sweep sessions")

    async def close(self) -> None:
        """Precondition: no turn runs. Idempotent."""
        if self._sweeping is not None:
            self._sweeping.cancel()
            await asyncio.wait({self._sweeping})
        if self._settling:
            await asyncio.wait(self._settling, timeout=SETTLE_S)
        await self._store.close()

    async def create(
        self, tenant: str, *, model: str, ttl_s: float = 0.0, idle_s: float = 0.0
    ) -> Session:
        """A new session; 0 is the longest duration. Raises `CapacityError` where the store is full."""
        now_s = self._clock()
        session = Session(
            key=SessionKey(tenant, new_session_id(now_s)),
            model=model,
            created_s=now_s,
            updated_s=now_s,
            ttl_s=bounded_s(ttl_s, self._settings.session_ttl_s),
            idle_s=bounded_s(idle_s, self._settings.session_idle_s),
        )
        limit = self._settings.max_sessions
        for _ in range(2):
            if await self._do("create", self._store.create(session, max_sessions=limit)):
                self._recent.saw(session)
                return session
            if not await self._sweep():
                break
        raise CapacityError(f"{limit} sessions are kept already", retry_after_s=SWEEP_INTERVAL_S)

    async def get(self, tenant: str, session_id: str) -> Session:
        """Raises `NotFoundError`."""
        key = _key(tenant, session_id)
        session = await self._do("get", self._store.get(key, self._clock()))
        if session is None:
            raise NotFoundError("session", session_id)
        return session

    async def list(self, query: Query) -> list[Session]:
        """See `SessionStore.list`."""
        return await self._do("list", self._store.list(query, self._clock()))

    async def remove(self, tenant: str, session_id: str) -> Session:
        """Forgets a session, and returns what it was last. Its turn, if one runs, ends. Raises `NotFoundError`."""
        session = await self.get(tenant, session_id)
        if not await self._do("remove", self._store.remove(session.key)):
            raise NotFoundError("session", session_id)
        self._recent.forget(session.key)
        turn = self._turns.get(session.key)
        if turn is not None:
            turn.lose("it was closed")
        return session

    def is_generating(self, session: Session) -> bool:
        """Whether a turn runs now."""
        return session.is_generating(self._clock())

    @asynccontextmanager
    async def turn(
        self, tenant: str, session_id: str, *, model: str, mark: str = "", lease_id: str = ""
    ) -> AsyncIterator[Turn | None]:
        """Runs a turn inside the context, which must end it with `Turn.finish`; else, or where that fails, the session is as it was
        before. None without a session id. Where the request of that mark is the session's last turn already, the turn `is_past`, and
        its history has the answer. With the lease id of a turn that another router began, goes on with that turn, or reads it
        once more where it has finished. Raises `NotFoundError`, `SessionBusyError`, `AbortedError` for a request that is an earlier
        turn, and, in the turn's own task too, `SessionLostError`.
        """
        if not session_id:
            yield None
            return
        turn = await self._begin(_key(tenant, session_id), model, mark, lease_id)
        if turn.is_past:
            yield turn
            return
        self._turns[turn.key] = turn
        self._recent.saw(turn.session, generating=True)
        renewing = asyncio.create_task(self._renew(turn), name=f"renew {session_id}")
        error: BatonError | None = None
        try:
            with turn.losable():
                yield turn
        except BatonError as failure:
            error = failure
            raise
        except asyncio.CancelledError:
            error = CancelledError("the turn was cancelled")
            raise
        except Exception:
            error = InternalError("a bug")
            raise
        finally:
            renewing.cancel()
            # A later turn may have begun in its place.
            if self._turns.get(turn.key) is turn:
                del self._turns[turn.key]
                self._recent.rest(turn.key)
            self._metrics.record_turn(None if turn.finished else error)
            left = turn.outlives and isinstance(error, AbortedError | DrainingError)
            if not turn.finished and not left:
                await self._abandon(turn, error)

    async def _begin(self, key: SessionKey, model: str, mark: str, resumed_lease_id: str) -> Turn:
        now_s = self._clock()
        lease_id = resumed_lease_id or new_lease_id(mark)
        lease = Lease(lease_id, now_s + self._settings.session_lease_s, new_holder())
        if resumed_lease_id and not await self._do("renew", self._store.renew(key, lease)):
            session = await self.get(key.tenant, key.session_id)
            turn = self._turn(session, History(), lease, outlives=True)
            if not turn.is_past:
                raise turn.lost(TAKEN)
            return turn
        beginning = self._settle("begin", self._store.begin_turn(key, lease, now_s))
        try:
            begun = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            self._settle("abandon", self._undo(beginning, lease))
            raise
        if begun is None:
            raise NotFoundError("session", key.session_id)
        turn = self._turn(*begun, lease, outlives=bool(resumed_lease_id))
        if turn.is_past:
            ending = self._settle("abandon", self._store.end_turn(turn.session, None, lease))
            with suppress(UnavailableError):
                await asyncio.shield(ending)
            return turn
        refused = self._refusal(turn, model)
        if refused is not None:
            await self._abandon(turn, refused)
            raise refused
        return turn

    def _turn(self, session: Session, history: History, lease: Lease, *, outlives: bool) -> Turn:
        commit, clock = self._commit, self._clock
        return Turn(session, history, lease, commit=commit, clock=clock, outlives=outlives)

    def _refusal(self, turn: Turn, model: str) -> BatonError | None:
        """Why the session does not take this turn."""
        session = turn.session
        if mark_in(turn.lease.lease_id) in session.earlier_marks:
            return AbortedError("the request is a turn of the session already, and others followed")
        if model and session.model and session.model != model:
            problem = f"is a session of the model {session.model!r}"
            return InvalidRequestError(FieldViolation("session_id", problem))
        if session.turns >= self._settings.session_max_turns:
            problem = f"has had its {session.turns} turns"
            return InvalidRequestError(FieldViolation("session_id", problem))
        return None

    async def _commit(self, turn: Turn, session: Session) -> None:
        """Raises `SessionLostError` where the lease was lost."""
        ending = self._settle("commit", self._store.end_turn(session, turn.history, turn.lease))
        if not await asyncio.shield(ending):
            if not await self._is_written(turn):
                raise turn.lost(TAKEN)
            return
        self._recent.saw(session)
        self._metrics.record_tokens(
            prompt=session.prompt_tokens - turn.session.prompt_tokens,
            cached=session.last_cached_tokens,
        )

    async def _abandon(self, turn: Turn, error: BatonError | None) -> None:
        """Gives the lease back, unless another goes on with the turn. Where the store fails, the lease runs out by itself."""
        why = error or InternalError("the turn was not finished")
        session = replace(
            turn.session,
            updated_s=self._clock(),
            failed_turns=turn.session.failed_turns + 1,
            last_failure=f"{why.reason}: {why.message}"[:MAX_FAILURE_CHARS],
        )
        ending = self._settle("abandon", self._store.end_turn(session, None, turn.lease))
        with suppress(UnavailableError):
            if await asyncio.shield(ending):
                self._recent.saw(session)

    async def _undo(self, beginning: "asyncio.Task[Any]", lease: Lease) -> bool:
        """Gives back the lease of a turn that was cancelled while it began."""
        begun = await beginning
        return begun is not None and await self._store.end_turn(begun[0], None, lease)

    async def _renew(self, turn: Turn) -> None:
        lease_s = self._settings.session_lease_s
        while True:
            await asyncio.sleep(lease_s / RENEWALS_PER_LEASE)
            turn.lease = replace(turn.lease, until_s=self._clock() + lease_s)
            try:
                held = await self._do("renew", self._store.renew(turn.key, turn.lease))
                written = not held and await self._is_written(turn)
            except UnavailableError as error:
                _log.warning("a session's lease was not renewed: %s", error.message)
                continue
            if not held:
                if not written:
                    turn.lose(TAKEN)
                return

    async def _is_written(self, turn: Turn) -> bool:
        """Whether a turn whose lease is gone is the session's last: another router, which it was begun at or goes on at, finished it."""
        session = await self._do("get", self._store.get(turn.key, self._clock()))
        return session is not None and session.last_lease_id == turn.lease.lease_id

    async def _sweep_forever(self) -> None:
        while True:
            with suppress(UnavailableError):
                await self._sweep()
                counts = await self._do("count", self._store.count(self._clock()))
                self._metrics.set_sessions(counts)
                self._recent.counts = counts
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def _sweep(self) -> int:
        removed = await self._do("sweep", self._store.sweep(self._clock()))
        self._metrics.record_expired(removed)
        return removed

    def _settle(self, name: str, operation: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        """An operation that goes on though its caller is cancelled."""
        task = asyncio.create_task(self._do(name, operation), name=f"{name} session")
        self._settling.add(task)
        task.add_done_callback(self._settled)
        return task

    def _settled(self, task: "asyncio.Task[Any]") -> None:
        self._settling.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waits for it still gets it

    async def _do(self, name: str, operation: Coroutine[Any, Any, T]) -> T:
        with self._metrics.operation(name):
            return await operation


def _key(tenant: str, session_id: str) -> SessionKey:
    """Raises `NotFoundError` for what is no session's id: stores build names from it."""
    if not _SESSION_ID.fullmatch(session_id):
        raise NotFoundError("session", session_id)
    return SessionKey(tenant, SessionId(session_id))
