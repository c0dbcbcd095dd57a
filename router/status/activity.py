"""Which requests there are, which ended a moment ago, and what went through: for everybody, and for each tenant its own.

A live request is told from its `Account` when somebody asks, so that it costs nothing while nobody does. One that has ended leaves a
`RequestStatus`, and nothing of its prompt or output: it is made a second later at most, of those only that are still to be told of by
then. Used on the router's event loop; `follow` belongs to the request's task.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, islice

from baton.service.access import Caller
from router.account import Account
from router.scoped import Scoped
from router.status.requests import request_status, state_of
from router.status.snapshot import RequestsStatus, RequestState, RequestStatus, TrafficStatus
from router.status.traffic import Meter, Traffic

MAX_LIVE = 100
"""Requests that are told of at once."""
MAX_ENDED = 50
SETTLE_S = 1.0
"""How long an account is kept as it is after its end."""


class _Part:
    """Everybody's, or one tenant's."""

    def __init__(self) -> None:
        self.serials = count(1)
        """Of this part's own: a tenant does not learn from them how many requests others send."""
        self.live: dict[Account, int] = {}
        """With their serial numbers."""
        self.just_ended: deque[tuple[Account, int, float, float]] = deque(maxlen=MAX_ENDED)
        """With their serial numbers, and their end, on the monotonic clock and since the Unix epoch."""
        self._ended: deque[RequestStatus] = deque(maxlen=MAX_ENDED)
        self.traffic = Traffic()

    def ended(self) -> tuple[RequestStatus, ...]:
        """The latest first. No account of them is kept any more."""
        for account, serial, at_s, at_unix_s in self.just_ended:
            self._ended.appendleft(request_status(account, serial, at_s, at_unix_s, ended=True))
        self.just_ended.clear()
        return tuple(self._ended)


class Activity:
    """See the module docstring."""

    def __init__(self) -> None:
        self._parts = Scoped(_Part)
        self._unsettled: dict[_Part, None] = {}

    @contextmanager
    def follow(self, account: Account) -> Iterator[None]:
        """The request is live inside the context; `account.error` tells at its end how it went."""
        parts = self._parts.of(account.tenant)
        account.meter = Meter(part.traffic for part in parts)
        for part in parts:
            part.live[account] = next(part.serials)
        try:
            yield
        finally:
            now_s, now_unix_s = time.monotonic(), time.time()
            failed = state_of(account, ended=True) is RequestState.FAILED
            account.meter.ended(account.prompt_tokens, now_s, failed=failed)
            if not self._unsettled:
                asyncio.get_running_loop().call_later(SETTLE_S, self._settle)
            for part in parts:
                serial = part.live.pop(account)
                part.just_ended.append((account, serial, now_s, now_unix_s))
                self._unsettled[part] = None

    def _settle(self) -> None:
        unsettled, self._unsettled = self._unsettled, {}
        for part in unsettled:
            part.ended()

    def requests(self, caller: Caller) -> RequestsStatus:
        """Those that the caller may see."""
        part = self._parts.seen_by(caller)
        now_s, now_unix_s = time.monotonic(), time.time()
        running = sum(account.is_admitted for account in part.live)
        shown = islice(part.live.items(), MAX_LIVE)
        return RequestsStatus(
            running=running,
            queued=len(part.live) - running,
            live=tuple(
                request_status(account, serial, now_s, now_unix_s) for account, serial in shown
            ),
            ended=part.ended(),
        )

    def traffic(self, caller: Caller) -> TrafficStatus:
        """What went through of what the caller may see."""
        return self._parts.seen_by(caller).traffic.status(time.monotonic())
