"""The seam between sessions and where they are kept: one protocol, and two stores that implement it, for one router (SQLite) and
for several that share one truth (Redis).

Every operation is atomic, also between processes. The caller brings the time: `now_s` is seconds since the Unix epoch, and routers
that share a store have clocks that agree to a small part of a lease. A session whose time has come is gone, whether or not a
`sweep` has been; while a leased turn runs, its time does not come.

Methods are called on the router's event loop and never block it. They raise `UnavailableError` where the store does not answer;
what was asked may then have happened or not. Cancelled, an operation may still happen.
"""

from dataclasses import dataclass
from typing import Protocol

from router.sessions.record import History, Lease, Session, SessionId, SessionKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """A page of one tenant's sessions, in the order of their ids."""

    tenant: str
    after: SessionId
    """The page begins after this one; empty for the first."""
    limit: int
    generating: bool | None = None
    """Only those of which a turn runs, or does not; None is all."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Sessions in the store."""

    idle: int
    generating: int


class SessionStore(Protocol):
    """See the module docstring."""

    async def create(self, session: Session, *, max_sessions: int) -> bool:
        """Adds a new session with an empty history. False, and nothing is changed: the store holds `max_sessions`."""
        ...

    async def get(self, key: SessionKey, now_s: float) -> Session | None:
        """None: there is no such session."""
        ...

    async def list(self, query: Query, now_s: float) -> list[Session]:
        """Fewer than the limit only at the end."""
        ...

    async def begin_turn(
        self, key: SessionKey, lease: Lease, now_s: float
    ) -> tuple[Session, History] | None:
        """Takes the lease. None: there is no such session. Raises `SessionBusyError` where another lease runs; one that has run out
        is taken over, and one of the same turn is gone on with, at another router or in another stream, or asked for once more by a client
        that was never told of it: its holder is this one from now on.
        """
        ...

    async def renew(self, key: SessionKey, lease: Lease) -> bool:
        """Prolongs a lease. False where it is not held any more: the session was closed, or another turn took over."""
        ...

    async def end_turn(self, session: Session, history: History | None, lease: Lease) -> bool:
        """Writes what the turn has made of the session, and gives the lease back; None leaves the history as it was, and is for its
        latest holder only. False, and nothing is changed: the lease is not held any more, or another goes on with the turn that this
        one gives up.
        """
        ...

    async def remove(self, key: SessionKey) -> bool:
        """Forgets a session, leased or not. False where there was none."""
        ...

    async def sweep(self, now_s: float) -> int:
        """Removes sessions whose time has come; returns how many."""
        ...

    async def count(self, now_s: float) -> Counts:
        """All tenants' sessions."""
        ...

    async def close(self) -> None:
        """Lets go of the store; nothing is called afterwards. Idempotent."""
        ...
