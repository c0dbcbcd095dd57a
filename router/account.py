"""What is known of one request while it is served: the source of its client's last message (`router.replies`), its metrics, its span,
its line in the log and its deadline error.

Written by the request's own task on the router's event loop.
"""

import asyncio
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType

from baton.errors import (
    BatonError,
    CancelledError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
)
from baton.lifecycle import Event, Timeline
from baton.service.metrics import NO_OBJECTIVES, Objectives, RouterMetrics, outcome_of
from baton.service.tracing import NO_SPAN, Span
from router.answer import NOTHING, Answer, Resumption
from router.sessions.turn import Turn
from router.status.traffic import Meter
from router.validation import ValidRequest

_log = logging.getLogger(__name__)

ORDINARY = (CancelledError, InvalidRequestError, NotFoundError)
"""Ends that are the client's doing: no operator asks about them."""


@dataclass(eq=False, slots=True)
class Account:
    """See the module docstring. What is None has not come to be."""

    timeline: Timeline
    tenant: str = ""
    targets: Objectives = NO_OBJECTIVES
    """Of requests that name none."""
    stage: str = "validation"
    """What the request waits for until it is generating."""
    operation: str = "text_completion"
    """As OpenTelemetry's conventions name what is asked for."""
    model: str = ""
    span: Span = NO_SPAN
    meter: Meter = field(default_factory=Meter)
    refused_id: str = ""
    """Of a request that its front could not read."""
    request: ValidRequest | None = None
    resumption: Resumption = NOTHING
    """What was there of the answer before."""
    answer: Answer | None = None
    heard_s: dict[int, float] = field(default_factory=dict)
    """When each completion's last message with tokens was written, since the request came."""
    turn: Turn | None = None
    """Set where the request is a session's turn."""
    error: BatonError | None = None
    """What the request failed with, once it has ended."""

    @property
    def is_admitted(self) -> bool:
        """Whether it has had its turn."""
        return self.timeline.at_s(Event.ADMITTED) is not None

    @property
    def waits_for(self) -> str:
        """The stage that a deadline would end."""
        return self.stage if self.answer is None else self.answer.stage

    @property
    def prompt_tokens(self) -> int:
        return 0 if self.request is None else len(self.request.prompt)

    @property
    def cached_tokens(self) -> int:
        cached = 0 if self.answer is None else self.answer.generations[0].stats.cached_tokens
        return min(self.prompt_tokens, cached)

    @property
    def completion_tokens(self) -> int:
        return 0 if self.answer is None else self.answer.completion_tokens

    @property
    def goes_on(self) -> bool:
        """Whether the answer was begun, or given, before: how long its client waited is not known."""
        return self.resumption is not NOTHING

    @property
    def objectives(self) -> Objectives:
        """What the request is wanted to keep to."""
        if self.goes_on:
            return NO_OBJECTIVES
        own_ttft_s = None if self.request is None else self.request.ttft_slo_s
        return self.targets if own_ttft_s is None else replace(self.targets, ttft_s=own_ttft_s)

    @contextmanager
    def counted(self, metrics: RouterMetrics) -> Iterator[None]:
        """Counts the request when the context ends, whatever became of it."""
        try:
            yield
        except BatonError as failure:
            self.error = failure
            raise
        except asyncio.CancelledError:
            self.error = CancelledError("the client went away")
            raise
        except Exception:
            self.error = InternalError("a bug")
            raise
        finally:
            new = not self.resumption.is_told_again
            metrics.record_request(
                self.timeline,
                self.error,
                prompt_tokens=self.prompt_tokens if new else 0,
                cached_tokens=self.cached_tokens if new else 0,
                completion_tokens=max(0, self.completion_tokens - self.resumption.earlier_tokens),
                longest_tokens=0 if self.answer is None else self.answer.longest_tokens,
                objectives=self.objectives,
                goes_on=self.goes_on,
            )
            self._log_end()

    def _log_end(self) -> None:
        quiet = self.error is None or isinstance(self.error, ORDINARY)
        level = logging.DEBUG if quiet else logging.INFO
        if _log.isEnabledFor(level):
            _log.log(
                level,
                "request ended: %s after %.3f s, %d prompt tokens, %d generated",
                outcome_of(self.error),
                time.monotonic() - self.timeline.received_s,
                self.prompt_tokens,
                self.completion_tokens,
            )

    def bounded(self, deadline_s: float) -> "Bound":
        """Ends the context at the deadline, on the monotonic clock, with a `DeadlineError` that names the stage."""
        return Bound(self, deadline_s)


class Bound:
    """See `Account.bounded`."""

    def __init__(self, account: Account, deadline_s: float) -> None:
        self._account = account
        self._timer = asyncio.timeout(max(0.0, deadline_s - time.monotonic()))

    async def __aenter__(self) -> None:
        await self._timer.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            await self._timer.__aexit__(kind, error, trace)
        except TimeoutError:
            raise DeadlineError(self._account.waits_for) from None
