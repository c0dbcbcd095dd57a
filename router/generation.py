"""The life of one admitted request: attempt after attempt until its output is complete.

    place ─▶ attempt ─▶ complete
      ▲         └─ failed: exclude who is to blame, go on after every token that the output has
      └─────────────┘

There is one recovery path: whatever fails, the next attempt's sequence is the prompt and all tokens so far, and since sampling
depends on position and seed only, the continuation is the one that the failed attempt would have given. A request fails for
good where no attempt could succeed, after too many attempts in a row without a new token, or where no worker comes.

Belongs to the request's task on the router's event loop.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from baton.errors import BatonError, UnavailableError
from baton.lifecycle import Event, Timeline
from baton.service.logging import for_request
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.types import AttemptKey, FinishReason, RequestId, Sequence, WorkerId
from router.attempt import Attempt
from router.fleet import Fleet
from router.outcome import AttemptStats, Failure
from router.output import Output
from router.placement import NoWorker, Placement
from router.validation import ValidRequest

_log = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
MAX_BACKOFF_S = 1.0


@dataclass(frozen=True, slots=True)
class Report:
    """How one attempt went."""

    prefill_worker: str
    """Empty where decode computed the prompt itself."""
    decode_worker: str
    failure: str
    """Empty for the attempt that succeeded."""
    resumed_tokens: int
    """Tokens that the output had when it began."""


class Generation:
    """Used once: `run`; the output, the timeline and the reports tell the rest."""

    def __init__(
        self,
        request: ValidRequest,
        output: Output,
        timeline: Timeline,
        *,
        fleet: Fleet,
        settings: RouterSettings,
        metrics: RouterMetrics,
        deadline_s: float,
    ) -> None:
        """`deadline_s` is on the monotonic clock; to keep it is the caller's part."""
        self._request = request
        self._output = output
        self._timeline = timeline
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._deadline_s = deadline_s
        # Workers know attempts by a name of their own: clients reuse ids, and may give one to two routers.
        self._name = RequestId(f"{request.request_id}/{secrets.token_hex(4)}")
        self._digest: str | None = None
        """KV digest of the workers that generated the tokens so far."""
        self._avoid: set[WorkerId] = set()
        self._fruitless = 0
        """Failed attempts since the last new token."""
        self._stage: Callable[[], str] = lambda: "placement"
        self.stats = AttemptStats()
        """Of the last attempt."""
        self.reports: list[Report] = []

    @property
    def stage(self) -> str:
        """What the request waits for, for its deadline's error."""
        return self._stage()

    async def run(self) -> FinishReason:
        """Returns once the output is complete. Raises what the request fails with. Cancelling it is legal at any instant."""
        while True:
            placement = await self._place()
            failure, reason = await self._attempt(placement)
            if failure is None:
                assert reason is not None
                return reason
            await self._recover(failure)

    async def _place(self) -> Placement:
        """Waits, within limits, for workers that can take the request."""
        self._stage = lambda: "placement"
        tokens = self._request.prompt + tuple(self._output.generated)
        end_s = time.monotonic() + self._settings.worker_wait_s
        while True:
            placed = self._fleet.place(tokens, avoid=frozenset(self._avoid), digest=self._digest)
            if not isinstance(placed, NoWorker):
                return placed
            if not await self._fleet.wait_for_change(end_s - time.monotonic()):
                raise UnavailableError(placed.reason)

    async def _attempt(self, placement: Placement) -> tuple[Failure | None, FinishReason | None]:
        """Exactly one of the two is None."""
        generated = tuple(self._output.generated)
        sequence = Sequence(self._request.prompt, generated, self._request.sampling)
        with self._fleet.hold(placement, len(sequence)) as held:
            attempt = Attempt(
                AttemptKey(self._name, len(self.reports)),
                sequence,
                held.pair,
                sink=self._output.put,
                timeline=self._timeline,
                deadline_s=self._deadline_s,
                on_prefill_sent=held.prefill_sent,
            )
            self._timeline.record(Event.PLACED, time.monotonic())
            self._stage = lambda: attempt.stage.value
            self.stats = attempt.stats
            await attempt.run()
        reason = self._output.end or attempt.finish_reason
        # An output that has its last token is complete, even if its worker died before saying so.
        failure = None if reason is not None else attempt.failure
        self._record(placement, failure, len(generated), attempt.stats)
        if len(self._output.generated) > len(generated):
            self._digest = placement.decode.digest
            self._avoid.clear()
            self._fruitless = 0
        return failure, reason

    async def _recover(self, failure: Failure) -> None:
        """Prepares the next attempt, or raises."""
        self._fruitless += 1
        if not failure.retryable or self._fruitless >= self._settings.max_attempts:
            raise failure.error
        self._avoid.add(failure.blame)
        if failure.suspicious:
            self._fleet.suspect(failure.blame)
        if self._fruitless > 1:
            self._stage = lambda: "recovery"
            pause_s = FIRST_BACKOFF_S * 2 ** (self._fruitless - 2)
            await asyncio.sleep(min(MAX_BACKOFF_S, pause_s))

    def _record(
        self,
        placement: Placement,
        failure: Failure | None,
        resumed_tokens: int,
        stats: AttemptStats,
    ) -> None:
        error: BatonError | None = None if failure is None else failure.error
        prefill = placement.prefill
        self.reports.append(
            Report(
                prefill_worker="" if prefill is None else prefill.info.worker_id,
                decode_worker=placement.decode.info.worker_id,
                failure="" if error is None else f"{error.reason}: {error.message}",
                resumed_tokens=resumed_tokens,
            )
        )
        self._metrics.record_attempt(error)
        if error is not None:
            log = for_request(_log, self._request.request_id)
            log.warning("attempt %d failed: %s", len(self.reports) - 1, self.reports[-1].failure)
        if stats.prefill_s:
            self._metrics.record_prefill(stats.prefill_s)
        if stats.handoff_bytes:
            self._metrics.record_handoff(stats.handoff_s, stats.handoff_bytes)
