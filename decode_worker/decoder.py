"""Takes prompts' KV from prefill workers, or computes it here, and generates.

Runs on the worker's event loop; the engine has a thread of its own. A Decode call is the lease on its blocks, on its byte credit
and on the buffer being pulled: leaving the call's contexts, in any way, gives all of them back.

    with a source      reserve ▶ Reserved ▶ (ready, pull, import)… ▶ KvReceived ▶ tokens ▶ Finished
    without            queue   ▶ Reserved ▶ compute the prompt     ▶ KvReceived ▶ tokens ▶ Finished
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from baton.codec import chunk_of_tokens
from baton.engine.base import (
    EngineEvent,
    EngineInfo,
    EngineRequest,
    Mode,
    Preempted,
    Reserved,
    Started,
    Token,
)
from baton.engine.pace import Pace
from baton.errors import BatonError, CancelledError, PreconditionError
from baton.lifecycle import Event
from baton.service.groups import first_error
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVTransport, Piece, PullRequest, Ready, Underway
from baton.transfer.layout import handoff_pieces
from baton.types import (
    NO_TRACE,
    AttemptKey,
    FinishReason,
    Sequence,
    TokenChunk,
    TraceContext,
)
from baton.worker.calls import Method, Stage, WorkerCall, one_call
from decode_worker.arrival import ready_unless_orphaned
from decode_worker.events import EventReader

SERVICE = "baton.v1.DecodeService"
_QUEUE = Stage("queue", Event.RECEIVED, Event.RESERVED)
_GENERATE = Stage("generate", Event.KV_RECEIVED, Event.FINISHED)
TAKES_KV = Method(
    SERVICE,
    "Decode",
    # Prefill's token, the first one, says that the KV is there to be taken.
    (_QUEUE, Stage("handoff", Event.FIRST_TOKEN, Event.KV_RECEIVED), _GENERATE),
)
COMPUTES_KV = Method(
    SERVICE,
    "Decode",
    (_QUEUE, Stage("compute", Event.RESERVED, Event.KV_RECEIVED), _GENERATE),
)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeJob:
    """One Decode call."""

    key: AttemptKey
    sequence: Sequence
    source: str | None
    """Transfer address of the worker that has the KV; None computes the prompt here."""
    source_key: AttemptKey | None = None
    """What the KV is held under there; None: this attempt's key."""
    ready: Ready | None = None
    """What the source would say, where that is known; None asks it, which waits until the KV is computed."""
    digest: str
    timeout_s: float
    """What is left of the caller's deadline."""
    trace: TraceContext = NO_TRACE
    """The router's attempt."""
    pace: Pace | None = None
    """At which its reader is told of tokens; None: as they come."""
    orphaned: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once the router that began it does not read it any more: it may never have called the source."""


@dataclass(frozen=True, slots=True)
class JobReserved:
    """Blocks are held."""

    queue_s: float
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class JobKvReceived:
    """The prompt's KV is in the pool."""

    kv_bytes: int
    handoff_s: float
    first: TokenChunk | None = None
    """Prefill's token, which the router has from prefill itself; None where decode chooses the next one."""


@dataclass(frozen=True, slots=True)
class JobTokens:
    """What the steps since the last event generated."""

    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class JobFinished:
    """The last event."""

    reason: FinishReason
    preemptions: int


JobEvent = JobReserved | JobKvReceived | JobTokens | JobFinished


@dataclass(slots=True)
class _Progress:
    """How far a job has come."""

    call: WorkerCall
    reserved: bool = False
    cached_tokens: int = 0
    preemptions: int = 0
    has_kv: bool = False


class Decoder:
    """See the module docstring."""

    def __init__(self, host: WorkerHost, transport: KVTransport) -> None:
        self._host = host
        self._engine = host.engine
        self._transport = transport

    async def run(self, job: DecodeJob) -> AsyncGenerator[JobEvent, None]:
        """Yields what happens to a job. The caller closes the iterator, which releases everything that the job holds."""
        method = COMPUTES_KV if job.source is None else TAKES_KV
        with one_call(self._host, method, job.key, job.trace) as call:
            own = self._engine.info.spec.digest
            if job.digest != own:
                raise PreconditionError(f"this worker's KV digest is {own}, not {job.digest}")
            progress = _Progress(call)
            mode = Mode.LOCAL if job.source is None else Mode.DECODE
            async with (
                self._engine.open(EngineRequest(job.key, job.sequence, mode), job.pace) as batches,
                EventReader(batches) as reader,
            ):
                async for batch in reader:
                    if not progress.reserved:
                        yield self._reserved(batch[0], job, progress)
                        if job.source is not None:
                            yield await self._take_kv(job, job.source, progress, reader)
                    for told in self._tell(batch, job, progress):
                        if isinstance(told, JobFinished):
                            call.facts["baton.preemptions"] = told.preemptions
                            call.outcome.done()
                        yield told

    def _reserved(self, event: EngineEvent, job: DecodeJob, progress: _Progress) -> JobReserved:
        assert isinstance(event, Reserved | Started), event
        call = progress.call
        progress.reserved = True
        progress.cached_tokens = event.cached_tokens
        call.facts["baton.cached_tokens"] = event.cached_tokens
        queue_s = call.record(Event.RESERVED) - call.timeline.received_s
        self._host.metrics.record_queue(
            queue_s, prompt_tokens=len(job.sequence), hit_tokens=event.cached_tokens
        )
        return JobReserved(queue_s, event.cached_tokens)

    def _tell(
        self, batch: tuple[EngineEvent, ...], job: DecodeJob, progress: _Progress
    ) -> Iterator[JobEvent]:
        for event in batch:
            if isinstance(event, Preempted):
                progress.preemptions += 1
                self._host.metrics.record_preemption()
        tokens = [event for event in batch if isinstance(event, Token)]
        if not tokens:
            return
        if not progress.has_kv:
            progress.has_kv = True
            progress.call.record(Event.KV_RECEIVED)
            timeline = progress.call.timeline
            self._host.metrics.record_prefill(
                timeline.between_s(Event.RESERVED, Event.KV_RECEIVED) or 0.0,
                computed_tokens=len(job.sequence) - progress.cached_tokens,
            )
            yield JobKvReceived(0, 0.0)
        self._host.metrics.record_decode_tokens(len(tokens))
        yield JobTokens(chunk_of_tokens(tokens))
        finish = tokens[-1].finish
        if finish is not None:
            yield JobFinished(finish, progress.preemptions)

    async def _take_kv(
        self, job: DecodeJob, address: str, progress: _Progress, reader: EventReader
    ) -> JobKvReceived:
        """Brings the KV here and starts to generate. Ends at once where the engine gives the request up meanwhile."""
        with self._failures_counted():
            received = await _watched(self._transfer(job, address, progress), reader)
        progress.has_kv = True
        progress.call.record(Event.KV_RECEIVED)
        progress.call.facts["baton.handoff.bytes"] = received.kv_bytes
        self._host.metrics.record_handoff(received.handoff_s, received.kv_bytes)
        return received

    @contextmanager
    def _failures_counted(self) -> Iterator[None]:
        reason = CancelledError.reason
        try:
            yield
            reason = ""
        except BatonError as error:
            reason = error.reason
            raise
        finally:
            if reason:
                self._host.metrics.record_handoff_failure(reason)

    async def _transfer(self, job: DecodeJob, address: str, progress: _Progress) -> JobKvReceived:
        """Pulls and imports what the prefix cache did not hold, and starts to generate: from prefill's token, or, where tokens were
        generated before and their KV is not prefill's to compute, after computing it here.
        """
        spec, call = self._engine.info.spec, progress.call
        ready, kv_bytes = job.ready, 0
        if ready is not None:
            self._begin_handoff(call)
        computes_rest = _computes_rest(job, self._engine.info)
        length = len(job.sequence.prompt if computes_rest else job.sequence)
        for first, last in self._pieces(job, progress.cached_tokens, length):
            if ready is None:
                piece = Piece(last, has_begun=bool(kv_bytes))
                ready = await self._ready(job, address, call, piece)
            if ready is None and last == length:
                raise PreconditionError(f"{address} has the KV of {job.key}, but not its token")
            request = PullRequest(
                key=job.source_key or job.key,
                first=first,
                last=last,
                digest=spec.digest,
                # A piece of a prompt that is still being computed is no part of the handoff, which comes after it.
                trace=(call.handoff or call.span).context,
            )
            timeout_s = min(_left_s(job, call), self._host.settings.handoff_timeout_s)
            async with self._transport.pull(address, request, spec=spec, timeout_s=timeout_s) as kv:
                kv_bytes += kv.data.nbytes
                work = [self._engine.import_kv(job.key, first, kv)]
                if ready is not None and last == length:
                    # Sent together, so that no step of the engine comes between them.
                    first_token = None if computes_rest else ready.first_token
                    work.append(self._engine.start_decode(job.key, first_token))
                try:
                    await asyncio.gather(*work)
                finally:
                    del kv, work  # a traceback would hold the buffer after its credit is returned
        assert ready is not None
        handoff_s = max(0.0, time.time() - ready.done_unix_s)
        if computes_rest:
            return JobKvReceived(kv_bytes, handoff_s)
        chunk = TokenChunk(
            first_index=len(job.sequence.generated),
            token_ids=(ready.first_token,),
            logprobs=() if ready.logprobs is None else (ready.logprobs,),
        )
        return JobKvReceived(kv_bytes, handoff_s, chunk)

    def _pieces(self, job: DecodeJob, first: int, last: int) -> list[tuple[int, int]]:
        """What to pull, in order: of a prompt that prefill computes, the pieces that it keeps as it goes."""
        settings = self._host.settings
        is_computed = job.ready is not None or job.source_key is not None
        return handoff_pieces(
            first,
            last,
            self._engine.info.spec.token_bytes,
            max_bytes=settings.max_pull_bytes,
            overlap_tokens=last if is_computed else settings.overlap_tokens,
        )

    async def _ready(
        self, job: DecodeJob, address: str, call: WorkerCall, piece: Piece
    ) -> Ready | None:
        """Returns once the piece can be pulled; None where the prompt is not done with it."""

        def ask(piece: Piece) -> Coroutine[Any, Any, Ready | Underway]:
            key = job.source_key or job.key
            return self._transport.ready(address, key, _left_s(job, call), piece)

        if piece.has_begun or job.source_key is not None:
            answer = await ask(piece)
        else:
            answer = await ready_unless_orphaned(ask, piece, job.orphaned)
        if isinstance(answer, Ready):
            self._begin_handoff(call)
            return answer
        return None

    @staticmethod
    def _begin_handoff(call: WorkerCall) -> None:
        """The prompt is done; from here on, whoever waits for the second token waits for what is left of the KV."""
        call.record(Event.FIRST_TOKEN)
        call.handoff = call.span.child()


def _computes_rest(job: DecodeJob, info: EngineInfo) -> bool:
    """Whether the source has the prompt's KV only. A decode worker that hands over has it all."""
    generated = bool(job.sequence.generated) and job.source_key is None
    return generated and not info.computes_prompts


def _left_s(job: DecodeJob, call: WorkerCall) -> float:
    return max(0.001, call.timeline.received_s + job.timeout_s - time.monotonic())


async def _watched(work: Coroutine[Any, Any, _T], reader: EventReader) -> _T:
    """The result of `work`, which is ended where the engine gives the request up first. No step runs for a request until its KV is
    there, so what the engine tells before is that end, and what it tells then comes at the end of the work.
    """
    try:
        async with asyncio.TaskGroup() as group:
            task = group.create_task(work)
            watch: asyncio.Future[Any] = reader.pending()
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if watch.done():
                watch.result()
    except ExceptionGroup as failures:
        raise first_error(failures) from None
    return task.result()
