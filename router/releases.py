"""What a worker is still to be told to let go of.

A worker that froze, or was cut off, wakes up with what it ran then, while its requests have gone on elsewhere, or ended. So whatever this
router gives up is owed to the worker until it has answered, over all its memberships: a release that does not reach it now is sent again
when it joins again. A router that dies owes nothing: what it left behind goes on for its grace, for another router to go on with.

Owned by `router.fleet`, one for each worker id; used on the router's event loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

from baton.types import AttemptKey, Role

MAX_OWED = 4096
"""Of one worker; the oldest beyond are left to the worker's own grace."""


@dataclass(frozen=True, slots=True)
class Release:
    """One side of an attempt."""

    role: Role
    key: AttemptKey
    holder: str = ""
    """Who gives it up; of decode's only."""


Send = Callable[[Release], None]
"""Begins to tell the worker. Never blocks or raises."""


class Releases:
    """See the module docstring."""

    def __init__(self) -> None:
        self._owed: dict[Release, None] = {}
        self._send: Send | None = None

    def owe(self, release: Release) -> None:
        """Tells the worker, as soon as it can be told."""
        self._owed[release] = None
        if len(self._owed) > MAX_OWED:
            del self._owed[next(iter(self._owed))]
        if self._send is not None:
            self._send(release)

    def settle(self, release: Release) -> None:
        """The worker has let go. Idempotent."""
        self._owed.pop(release, None)

    def connect(self, send: Send) -> None:
        """The worker is a member: sends all that is owed, and from now on whatever comes."""
        self._send = send
        for release in tuple(self._owed):
            send(release)

    def disconnect(self) -> None:
        """It is none any more."""
        self._send = None
