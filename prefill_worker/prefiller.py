"""Computes prompts and holds their KV until decode has pulled it.

Runs on the worker's event loop; the engine has a thread of its own. A Prefill call is the lease on its attempt's blocks: whatever
ends it (the last pull, an error, a cancellation, the handoff timeout) frees them. Pulls come from decode through the transfer
layer and find the attempt by its key.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from baton.codec import chunk_of_tokens
from baton.engine.base import (
    EngineEvent,
    EngineRequest,
    Exported,
    Mode,
    Preempted,
    Progress,
    Started,
    Token,
)
from baton.errors import (
    BatonError,
    CancelledError,
    DeadlineError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
)
from baton.kv.spec import WireKV
from baton.lifecycle import Event
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.layout import handoff_pieces, meta_of
from baton.types import (
    NO_TRACE,
    AttemptKey,
    FinishReason,
    Sequence,
    TokenChunk,
    TraceContext,
)
from baton.worker.calls import Method, Stage, WorkerCall, one_call
from prefill_worker.handoffs import Handoff, Handoffs

PREFILL = Method(
    "baton.v1.PrefillService",
    "Prefill",
    (
        Stage("queue", Event.RECEIVED, Event.PREFILL_STARTED),
        Stage("compute", Event.PREFILL_STARTED, Event.FIRST_TOKEN),
        Stage("hold", Event.FIRST_TOKEN, Event.KV_RECEIVED),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillJob:
    """One Prefill call."""

    key: AttemptKey
    sequence: Sequence
    skip_tokens: int
    """Leading tokens whose KV decode already holds."""
    digest: str
    trace: TraceContext = NO_TRACE
    """The router's attempt."""
    hold_s: float | None = None
    """How long the KV waits to be pulled; None: as the setting has it."""


@dataclass(frozen=True, slots=True)
class JobStarted:
    """The engine began to compute."""

    queue_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class JobProgress:
    """A chunk is done, and more remain."""

    computed_tokens: int


@dataclass(frozen=True, slots=True)
class JobFirstToken:
    """The prompt is done. With a finish reason, this is the last event."""

    token: TokenChunk
    finish: FinishReason | None
    prefill_s: float


@dataclass(frozen=True, slots=True)
class JobHanded:
    """Decode has the KV."""

    kv_bytes: int


JobEvent = JobStarted | JobProgress | JobFirstToken | JobHanded


@dataclass(slots=True)
class _Progress:
    """How far a job has come."""

    call: WorkerCall
    cached_tokens: int = 0
    computed: bool = False
    """Whether the first token is out."""
    finished: bool = False
    """Whether it was the last."""


class Prefiller:
    """See the module docstring. Implements `baton.transfer.base.KVSource`."""

    def __init__(self, host: WorkerHost) -> None:
        self._host = host
        self._engine = host.engine
        self._handoffs = Handoffs()
        self._kept_bytes = 0
        """Of KV copied out for attempts that are here."""

    async def run(self, job: PrefillJob) -> AsyncGenerator[JobEvent, None]:
        """Yields what happens to a job. The caller closes the iterator, which releases everything that the job holds."""
        with one_call(self._host, PREFILL, job.key, job.trace) as call:
            self._check(job)
            progress = _Progress(call)
            with (
                self._copies(job) as copies,
                self._handoffs.attempt(job.key, len(job.sequence), copies) as handoff,
            ):
                request = EngineRequest(job.key, job.sequence, Mode.PREFILL, copies)
                async with self._engine.open(request) as batches:
                    try:
                        async for batch in batches:
                            handoff.raise_if_ended()
                            told = [self._tell(e, job, progress, handoff) for e in batch]
                            del batch  # it holds copies, which a pull frees
                            if progress.finished:
                                call.outcome.done()
                            for event in told:
                                if event is not None:
                                    yield event
                            if progress.computed and not handoff.copying:
                                break
                    except InternalError:
                        # Where the attempt was released, that is the reason, not what the engine makes of it.
                        handoff.raise_if_ended()
                        raise
                    if not progress.finished:
                        handed = await self._hand_over(job, handoff, call)
                        call.outcome.done()
                        yield handed

    async def release(self, key: AttemptKey) -> bool:
        """Ends the attempt's call, if it is here, and whatever waits for it. Idempotent."""
        error = CancelledError(f"attempt {key} was released")
        self._handoffs.refuse_expected(error, key)
        handoff = self._handoffs.find(key)
        if handoff is not None:
            handoff.end(error)
        return await self._engine.release(key)

    def refuse_new(self) -> None:
        """The worker drains: decode need not wait for attempts that will not be taken."""
        self._handoffs.refuse_expected(UnavailableError("the prefill worker is draining"))

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        try:
            if self._host.draining and self._handoffs.find(key) is None:
                raise UnavailableError("the prefill worker is draining")
            async with asyncio.timeout(timeout_s):
                handoff = await self._arrival(key, piece)
                return await handoff.outcome(None if piece is None else piece.last)
        except TimeoutError:
            error: BatonError = DeadlineError("prefill")
        except BatonError as refusal:
            error = refusal
        return Refused(error.reason, error.message)

    async def _arrival(self, key: AttemptKey, piece: Piece | None) -> Handoff:
        if piece is None or not piece.has_begun:
            return await self._handoffs.arrival(key)
        handoff = self._handoffs.find(key)
        if handoff is None:
            raise PreconditionError(f"attempt {key} ended")
        return handoff

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        try:
            handoff = self._handoffs.find(request.key)
            if handoff is None:
                raise PreconditionError(f"no KV is held for attempt {request.key}")
            self._check_digest(request.digest)
            with handoff.pulling(request.first, request.last):
                kv = await handoff.take(request.first, request.last)
                if kv is None:
                    kv = await self._engine.export_kv(request.key, request.first, request.last)
                meta = meta_of(request, self._engine.info.spec, kv)
                handoff.kv_bytes += kv.data.nbytes
                return meta, kv.data
        except BatonError as error:
            self._host.metrics.record_handoff_failure(error.reason)
            return Refused(error.reason, error.message), None

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        self._handoffs.check_integrity()

    def _check(self, job: PrefillJob) -> None:
        self._check_digest(job.digest)
        if job.skip_tokens > len(job.sequence):
            raise InvalidRequestError(
                FieldViolation(
                    "skip_tokens", f"is more than the {len(job.sequence)} tokens there are"
                )
            )

    @contextmanager
    def _copies(self, job: PrefillJob) -> Iterator[tuple[tuple[int, int], ...]]:
        """What decode will pull, where its settings are this worker's: each piece is copied out right after the step that computes its last
        token, so that no pull waits for what is computed next. Empty where the copies kept for all attempts would be too large.
        """
        token_bytes = self._engine.info.spec.token_bytes
        kv_bytes = (len(job.sequence) - job.skip_tokens) * token_bytes
        if not kv_bytes or self._kept_bytes + kv_bytes > self._host.settings.kept_kv_bytes:
            yield ()
            return
        self._kept_bytes += kv_bytes
        try:
            settings = self._host.settings
            pieces = handoff_pieces(
                job.skip_tokens,
                len(job.sequence),
                token_bytes,
                max_bytes=settings.max_pull_bytes,
                # Nobody comes for KV that is held for a foreign router before its prompt is computed.
                overlap_tokens=settings.overlap_tokens if job.hold_s is None else len(job.sequence),
            )
            yield tuple(pieces)
        finally:
            self._kept_bytes -= kv_bytes

    def _check_digest(self, digest: str) -> None:
        own = self._engine.info.spec.digest
        if digest != own:
            raise PreconditionError(f"this worker's KV digest is {own}, not {digest}")

    def _tell(
        self, event: EngineEvent, job: PrefillJob, progress: _Progress, handoff: Handoff
    ) -> JobEvent | None:
        call = progress.call
        if isinstance(event, Started):
            progress.cached_tokens = event.cached_tokens
            queue_s = call.record(Event.PREFILL_STARTED) - call.timeline.received_s
            self._host.metrics.record_queue(
                queue_s, prompt_tokens=len(job.sequence), hit_tokens=event.cached_tokens
            )
            return JobStarted(queue_s, event.cached_tokens)
        if isinstance(event, Progress):
            return JobProgress(event.computed_tokens)
        if isinstance(event, Exported):
            handoff.keep(event.first, event.last, event.kv)
        if isinstance(event, Token):
            progress.computed = True
            call.record(Event.FIRST_TOKEN)
            prefill_s = call.timeline.between_s(Event.PREFILL_STARTED, Event.FIRST_TOKEN) or 0.0
            computed = len(job.sequence) - progress.cached_tokens
            call.facts["baton.computed_tokens"] = computed
            call.facts["baton.cached_tokens"] = progress.cached_tokens
            self._host.metrics.record_prefill(prefill_s, computed_tokens=computed)
            progress.finished = event.finish is not None
            if progress.finished:
                handoff.end(PreconditionError("the first token ended the request"))
            else:
                handoff.computed(Ready(event.token_id, time.time(), event.logprobs))
            return JobFirstToken(chunk_of_tokens([event]), event.finish, prefill_s)
        if isinstance(event, Preempted):
            self._host.metrics.record_preemption()
        return None

    async def _hand_over(self, job: PrefillJob, handoff: Handoff, call: WorkerCall) -> JobHanded:
        """Holds the blocks until decode has pulled what it lacks."""
        since_s = time.monotonic()
        hold_s = self._host.settings.handoff_timeout_s if job.hold_s is None else job.hold_s
        try:
            if job.skip_tokens < len(job.sequence):
                async with asyncio.timeout(hold_s):
                    await handoff.wait_handed()
        except TimeoutError:
            self._host.metrics.record_handoff_failure(DeadlineError.reason)
            raise DeadlineError("handoff") from None
        except (asyncio.CancelledError, CancelledError):
            self._host.metrics.record_handoff_failure(CancelledError.reason)
            raise
        call.facts["baton.handoff.bytes"] = handoff.kv_bytes
        handed_s = call.record(Event.KV_RECEIVED)
        self._host.metrics.record_handoff(handed_s - since_s, handoff.kv_bytes)
        return JobHanded(handoff.kv_bytes)
