"""The sessions of which a router served a turn lately, as people watch them. Not their contents: those are in the store only.

Bounded, for everybody together and for each tenant. Used on the router's event loop.
"""

from collections import OrderedDict
from dataclasses import dataclass

from baton.service.access import Caller
from router.scoped import Scoped
from router.sessions.record import Session, SessionKey
from router.sessions.store import Counts

MAX_RECENT = 50


@dataclass(frozen=True, slots=True)
class Recent:
    """A session as it was last seen."""

    session: Session
    generating: bool


class RecentSessions:
    """See the module docstring."""

    def __init__(self) -> None:
        self._parts: Scoped[OrderedDict[SessionKey, Recent]] = Scoped(OrderedDict)
        self.counts = Counts(idle=0, generating=0)
        """What the store held a moment ago."""

    def saw(self, session: Session, *, generating: bool = False) -> None:
        """A session was made, or its turn began or ended."""
        for part in self._parts.of(session.key.tenant):
            part[session.key] = Recent(session, generating)
            part.move_to_end(session.key)
            if len(part) > MAX_RECENT:
                part.popitem(last=False)

    def rest(self, key: SessionKey) -> None:
        """No turn of it runs here any more. No effect where it is not here."""
        for part in self._parts.of(key.tenant):
            recent = part.get(key)
            if recent is not None:
                part[key] = Recent(recent.session, generating=False)

    def forget(self, key: SessionKey) -> None:
        """It is gone. No effect where it is not here."""
        for part in self._parts.of(key.tenant):
            part.pop(key, None)

    def seen_by(self, caller: Caller, now_s: float) -> list[Recent]:
        """The latest first; `now_s` is seconds since the Unix epoch."""
        part = self._parts.seen_by(caller)
        return [
            recent
            for recent in reversed(part.values())
            if recent.generating or recent.session.expires_s > now_s
        ]
