"""Which requests there are, which ended a moment ago, and what went through: for everybody, and for each tenant its own.

A live request is told from its `Account` when somebody asks, so that it costs nothing while nobody does; one that has ended leaves a
`RequestStatus`, and nothing of its prompt or output. Used on the router's event loop; `follow` belongs to the request's task.
"""

import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from baton.service.access import Caller
from router.account import Account
from router.scoped import Scoped
from router.status.requests import request_status
from router.status.snapshot import RequestsStatus, RequestState, RequestStatus, TrafficStatus
from router.status.traffic import Meter, Traffic

MAX_LIVE = 100
"""Requests that are told of at once."""
MAX_ENDED = 50


class _Part:
    """Everybody's, or one tenant's."""

    def __init__(self) -> None:
        self.live: dict[Account, None] = {}
        self.ended: deque[RequestStatus] = deque(maxlen=MAX_ENDED)
        self.traffic = Traffic()


class Activity:
    """See the module docstring."""

    def __init__(self) -> None:
        self._parts = Scoped(_Part)

    @asynccontextmanager
    async def follow(self, account: Account) -> AsyncIterator[None]:
        """The request is live inside the context; `account.error` tells at its end how it went."""
        parts = self._parts.of(account.tenant)
        account.meter = Meter(part.traffic for part in parts)
        for part in parts:
            part.live[account] = None
        try:
            yield
        finally:
            now_s = time.monotonic()
            ended = request_status(account, now_s, time.time(), ended=True)
            account.meter.ended(
                account.prompt_tokens, now_s, failed=ended.state is RequestState.FAILED
            )
            for part in parts:
                del part.live[account]
                part.ended.appendleft(ended)

    def requests(self, caller: Caller) -> RequestsStatus:
        """Those that the caller may see."""
        part = self._parts.seen_by(caller)
        now_s, now_unix_s = time.monotonic(), time.time()
        running = sum(account.is_admitted for account in part.live)
        shown = [account for _, account in zip(range(MAX_LIVE), part.live, strict=False)]
        return RequestsStatus(
            running=running,
            queued=len(part.live) - running,
            live=tuple(request_status(account, now_s, now_unix_s) for account in shown),
            ended=tuple(part.ended),
        )

    def traffic(self, caller: Caller) -> TrafficStatus:
        """What went through of what the caller may see."""
        return self._parts.seen_by(caller).traffic.status(time.monotonic())
