"""The life of one completion of an admitted request: attempt after attempt until its output is complete.

    place ─▶ attempt ─▶ complete
      ▲         └─ failed: exclude who is to blame, go on after every token that the output has
      └─────────────┘

One that another router began starts with the attempt that decode holds, where it does.

There is one recovery path: whatever fails, the next attempt's sequence is the prompt and all tokens so far, and since sampling
depends on position and seed only, the continuation is the one that the failed attempt would have given. A request fails for
good where no attempt could succeed, after too many attempts in a row without a new token, or where no worker comes.

Belongs to the request's task on the router's event loop.
"""

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, replace

from baton.errors import BatonError, CapacityError, DrainingError, UnavailableError
from baton.kv.prefix import SequenceHashes
from baton.lifecycle import Event, Timeline
from baton.service.metrics import RouterMetrics
from baton.service.settings import RouterSettings
from baton.service.tracing import NO_SPAN, Span
from baton.types import (
    AttemptKey,
    FinishReason,
    RequestId,
    RequestRecord,
    Sequence,
    TokenChunk,
    WorkerId,
    WorkerInfo,
)
from router.attach import HeldAttempt
from router.attempt import Attempt
from router.attempt_calls import Moved, Terms
from router.attempt_span import end_attempt_span
from router.fleet import Fleet, Held
from router.members import Pair
from router.outcome import AttemptStats, Failure, Stage
from router.output import Output
from router.placement import NoWorker, Placement
from router.status.traffic import Meter
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
    stages: tuple[tuple[Stage, float], ...]
    """Those that it came to, and when, on the monotonic clock."""
    ended_at_s: float | None
    """None for one that runs."""
    stats: AttemptStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Complete:
    """A completion that was generated before, and the attempt that gave its end."""

    tokens: TokenChunk
    reason: FinishReason
    cached_tokens: int
    prefill_worker: str
    decode_worker: str


class Generation:
    """Used once: `run`; the output, the timeline and the reports tell the rest. Of a request's completions, the first one brings the
    prompt's KV to decode; the others wait for it (`prompt_cached`), and find it in decode's prefix cache.
    """

    def __init__(
        self,
        request: ValidRequest,
        output: Output,
        timeline: Timeline,
        *,
        fleet: Fleet,
        settings: RouterSettings,
        metrics: RouterMetrics,
        meter: Meter,
        deadline_s: float,
        hashes: SequenceHashes,
        choice: int = 0,
        held: HeldAttempt | None = None,
        complete: Complete | None = None,
        span: Span = NO_SPAN,
    ) -> None:
        """`deadline_s` is on the monotonic clock; to keep it is the caller's part. `hashes` are the prompt's, and belong to the
        generation from now on. `held` is to be gone on with, `complete` to be told; the output is empty all the same. `span` is the
        request's.
        """
        self._request = request
        self.hashes = hashes
        self._sampling = replace(request.sampling, choice=choice) if choice else request.sampling
        self._held = held
        self._complete = complete
        self._span = span
        self._output = output
        self._timeline = timeline
        self._fleet = fleet
        self._settings = settings
        self._metrics = metrics
        self._meter = meter
        self._deadline_s = deadline_s
        # Workers know attempts by a name of their own: clients reuse ids, and may give one to two routers.
        self._name = RequestId(f"{request.request_id}/{secrets.token_hex(4)}")
        remaining_s = deadline_s - time.monotonic()
        self._terms = Terms(
            record=RequestRecord(
                request_id=request.request_id,
                tenant=request.tenant,
                stop=request.sampling.stop,
                n=request.sampling.n,
                turn=request.turn,
                deadline_unix_s=time.time() + remaining_s,
            ),
            grace_s=settings.orphan_grace_s,
            holder=self._name,
        )
        self._made_by: WorkerInfo | None = None
        """The decode worker of the tokens so far."""
        self._avoid: set[WorkerId] = set()
        self._moved: Moved | None = None
        """What a draining worker holds for the next attempt."""
        self._workers: Held | None = None
        """Of the next attempt, where they are known."""
        self._fruitless = 0
        """Failed attempts since the last new token."""
        self._lost: str | None = None
        """Why the last attempt was not the last, until there is a new token; a label of metrics."""
        self._waits_for = "placement"
        self.prompt_cached = asyncio.Event()
        """Set once a decode worker has the prompt's KV; and in any case at the end."""
        self.stats = AttemptStats()
        """Of the last attempt."""
        self.decode_worker = WorkerId("")
        """Of the current attempt, or the last one."""
        self.reports: list[Report] = []
        """Of the attempts that have ended."""
        self._current: tuple[Attempt, int] | None = None
        """The attempt that runs, and how many tokens the output had when it began."""

    @property
    def stage(self) -> str:
        """What the request waits for, for its deadline's error."""
        return self._waits_for if self._current is None else self._current[0].stage.value

    @property
    def rests(self) -> bool:
        """See `Attempt.rests`."""
        return self._current is not None and self._current[0].rests

    @property
    def attempts(self) -> list[Report]:
        """All attempts; the last one may run."""
        if self._current is None:
            return self.reports
        return [*self.reports, _report(*self._current)]

    def begin(self) -> None:
        """Takes workers for the first attempt where there are some, so that whoever is placed next finds their load. `run`, or `let_go`
        where that never ran, gives them back. No effect where the first attempt is known, or none is needed.
        """
        if self._held is not None or self._complete is not None:
            return
        self._timeline.record(Event.PLACING, time.monotonic())
        placed = self._choose(moves=False)
        if not isinstance(placed, NoWorker):
            self._workers = self._hold(placed)

    def let_go(self) -> None:
        """Takes its load off workers that it has not called. Idempotent."""
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.release()

    async def run(self) -> FinishReason:
        """Returns once the output is complete. Raises what the request fails with. Cancelling it is legal at any instant."""
        if self._complete is not None:
            return self._tell(self._complete)
        try:
            failure, reason = await self._next_attempt()
            while failure is not None:
                await self._recover(failure)
                failure, reason = await self._next_attempt()
        finally:
            self.prompt_cached.set()
            if self._moved is not None:
                self._moved.member.release_decode(self._moved.key, self._terms.holder)
        assert reason is not None
        return reason

    def _tell(self, complete: Complete) -> FinishReason:
        now_s = time.monotonic()
        self.stats.cached_tokens = complete.cached_tokens
        report = Report(
            prefill_worker=complete.prefill_worker,
            decode_worker=complete.decode_worker,
            failure="",
            resumed_tokens=0,
            stages=((Stage.DECODE, now_s),),
            ended_at_s=now_s,
            stats=self.stats,
        )
        self.reports.append(report)
        self._output.put(complete.tokens)
        return complete.reason

    async def _next_attempt(self) -> tuple[Failure | None, FinishReason | None]:
        """Exactly one of the two is None."""
        held, self._held = self._held, None
        if held is not None:
            return await self._attach(held)
        workers, self._workers = self._workers, None
        if workers is None:
            workers = self._hold(await self._place())
        try:
            return await self._attempt(workers)
        finally:
            workers.release()

    def _elsewhere(self) -> bool:
        """Whether a decode worker could go on with this request now."""
        return not isinstance(self._choose(moves=True), NoWorker)

    def _choose(self, *, moves: bool) -> Placement | NoWorker:
        hashed = len(self.hashes) - len(self._request.prompt)
        self.hashes.extend(self._output.generated[hashed:])
        return self._fleet.place(
            self.hashes,
            avoid=frozenset(self._avoid),
            digest=None if self._made_by is None else self._made_by.spec.digest,
            weights=None if self._made_by is None else self._made_by.weight_format,
            moves=moves,
            # Once an attempt has failed, only what workers say counts.
            resident=None if self.reports else self._request.resident,
        )

    def _hold(self, placement: Placement) -> Held:
        num_tokens = len(self._request.prompt) + len(self._output.generated)
        if self._moved is None:
            return self._fleet.hold(placement, num_tokens)
        # The KV of the last token is computed by whoever generates the next one.
        return self._fleet.hold(replace(placement, prefill=None), num_tokens - 1, moves=True)

    async def _place(self) -> Placement:
        """Waits, within limits, for workers that can take the request."""
        self._waits_for = "placement"
        self._timeline.record(Event.PLACING, time.monotonic())
        end_s = time.monotonic() + self._settings.worker_wait_s
        while True:
            placed = self._choose(moves=self._moved is not None)
            if not isinstance(placed, NoWorker):
                return placed
            if not await self._fleet.wait_for_change(end_s - time.monotonic()):
                raise UnavailableError(placed.reason)

    async def _attach(self, held: HeldAttempt) -> tuple[Failure | None, FinishReason | None]:
        """Takes in what an attempt of another router generated, and what it still will."""
        generated = held.sequence.generated
        if generated:
            self._output.put(TokenChunk(0, generated))
        attempt = Attempt(
            held.key,
            held.sequence,
            Pair(None, held.member),
            sink=self._output.put,
            on_finished=self._output.finish,
            timeline=self._timeline,
            deadline_s=self._deadline_s,
            terms=self._terms,
            on_kv_received=self._on_kv_received,
            attach=True,
            elsewhere=self._elsewhere,
            span=self._span.child(),
        )
        await self._run(attempt, len(generated))
        return self._outcome(attempt)

    async def _attempt(self, workers: Held) -> tuple[Failure | None, FinishReason | None]:
        moved, self._moved = self._moved, None
        generated = tuple(self._output.generated)
        known = generated if moved is None else generated[:-1]
        request = self._request
        attempt = Attempt(
            AttemptKey(self._name, len(self.reports)),
            Sequence(request.prompt, known, self._sampling, request.cache_salt),
            workers.pair,
            sink=self._output.put if self._lost is None else self._recovered,
            on_finished=self._output.finish,
            timeline=self._timeline,
            deadline_s=self._deadline_s,
            terms=self._terms,
            on_prefill_sent=workers.prefill_sent,
            on_kv_received=self._on_kv_received,
            moved=moved,
            elsewhere=self._elsewhere,
            span=self._span.child(),
        )
        workers.sent()
        await self._run(attempt, len(generated))
        if not generated and attempt.failure is None:
            self._compare(workers.placement.predicted_ttft_s)
        return self._outcome(attempt)

    async def _run(self, attempt: Attempt, resumed_tokens: int) -> None:
        self._current = (attempt, resumed_tokens)
        self.decode_worker = attempt.pair.decode.worker_id
        self._timeline.record(Event.PLACED, time.monotonic())
        self.stats = attempt.stats
        cancelled = True
        try:
            await attempt.run()
            cancelled = False
        finally:
            if attempt.span.recording:
                end_attempt_span(
                    attempt,
                    self._timeline,
                    number=len(self.reports),
                    choice=self._sampling.choice,
                    resumed_tokens=resumed_tokens,
                    cancelled=cancelled,
                )

    def _on_kv_received(self) -> None:
        self.prompt_cached.set()
        if self.stats.handoff_bytes:
            self._meter.handoff(self.stats.handoff_bytes, time.monotonic())

    def _compare(self, predicted_ttft_s: float | None) -> None:
        ttft_s = self._timeline.between_s(Event.PLACED, Event.FIRST_TOKEN)
        if predicted_ttft_s is not None and ttft_s is not None:
            self._metrics.record_ttft_error(ttft_s - predicted_ttft_s)

    def _outcome(self, attempt: Attempt) -> tuple[Failure | None, FinishReason | None]:
        assert self._current is not None
        resumed_tokens, decode = self._current[1], attempt.pair.decode
        reason = self._output.end or attempt.finish_reason
        # An output that has its last token is complete, even if its worker died before saying so.
        failure = None if reason is not None else attempt.failure
        if reason is None and self._output.overflowed:
            raise CapacityError("the client does not read its stream")
        if reason is None and attempt.left is not None:
            self._moved = attempt.left
            why = DrainingError("decode drains; its KV moves on")
            failure = Failure(why, decode.worker_id)
        if failure is not None and self._lost is None:
            self._lost = "failure" if self._moved is None else "drain"
            self._timeline.record(Event.LOST, time.monotonic())
        error: BatonError | None = None if failure is None else failure.error
        self._waits_for, self._current = attempt.stage.value, None
        self._record(_report(attempt, resumed_tokens, error, time.monotonic()), error, attempt)
        if len(self._output.generated) > resumed_tokens:
            self._avoid.clear()
            self._fruitless = 0
        if self._output.generated:
            self._made_by = decode.info
        return failure, reason

    async def _recover(self, failure: Failure) -> None:
        """Prepares the next attempt, or raises."""
        if self._moved is not None:
            return
        self._fruitless += 1
        if not failure.retryable or self._fruitless >= self._settings.max_attempts:
            raise failure.error
        self._avoid.add(failure.blame)
        if failure.suspicious:
            self._fleet.suspect(failure.blame)
        if self._fruitless > 1:
            self._waits_for = "recovery"
            pause_s = FIRST_BACKOFF_S * 2 ** (self._fruitless - 2)
            await asyncio.sleep(min(MAX_BACKOFF_S, pause_s))

    def _recovered(self, chunk: TokenChunk) -> bool:
        """The sink of an attempt after one that was lost."""
        if self._lost is not None:
            self._timeline.record(Event.RECOVERED, time.monotonic())
            pause_s = self._timeline.between_s(Event.LOST, Event.RECOVERED)
            assert pause_s is not None
            self._metrics.record_recovery(self._lost, pause_s)
            self._lost = None
        return self._output.put(chunk)

    def _record(self, report: Report, error: BatonError | None, attempt: Attempt) -> None:
        self.reports.append(report)
        self._metrics.record_attempt(error, attempt.stage.value)
        self._metrics.record_stages(self._timeline.durations(attempt.stages))
        if error is not None:
            level = logging.INFO if isinstance(error, DrainingError) else logging.WARNING
            _log.log(level, "attempt %d ended: %s", len(self.reports) - 1, report.failure)
        stats = attempt.stats
        if stats.handoff_bytes:
            self._metrics.record_handoff(stats.handoff_s, stats.handoff_bytes)


def _report(
    attempt: Attempt,
    resumed_tokens: int,
    error: BatonError | None = None,
    ended_at_s: float | None = None,
) -> Report:
    prefill = attempt.pair.prefill
    return Report(
        prefill_worker="" if prefill is None else prefill.worker_id,
        decode_worker=attempt.pair.decode.worker_id,
        failure="" if error is None else f"{error.reason}: {error.message}",
        resumed_tokens=resumed_tokens,
        stages=tuple(attempt.history),
        ended_at_s=ended_at_s,
        stats=attempt.stats,
    )
