"""One attempt at one of a request's completions: one pair of workers, one TaskGroup.

    decode   Decode ─▶ Reserved ───────────────▶ KvReceived ─▶ TokenChunk… ─▶ Finished
    prefill              └─▶ Prefill(skip) ─▶ Started ─▶ FirstToken ─▶ Handed

Tokens reach the sink strictly by index: no gap, no repeat, the first one as soon as prefill has it. However an attempt ends, its calls
are cancelled, unless their workers have said their last, and the workers told to free what they hold; that is idempotent on their side.
A worker that is lost from the fleet fails the attempt at once, so that one that hangs is bounded by its lease.

Once decode holds the KV, prefill's fate does not matter; between the first token and that moment, decode is given
`HANDOFF_GRACE_S` to say so.

Where decode drains and another decode worker is there, the attempt leaves it: decode stops after the token it is at and holds the
KV, from which the next attempt goes on (`left`, `Moved`).

An attempt that another router began, and decode still holds, is joined instead: `attach` reads on where decode's memory of it
begins.

Belongs to the request's task on the router's event loop. What workers say is handled where it is read; that, and the attempt's
children, report through `_end`, and raise only for bugs.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any

from baton import codec
from baton.errors import (
    AbortedError,
    BatonError,
    CorruptKVError,
    DeadlineError,
    InternalError,
    PreconditionError,
    UnavailableError,
)
from baton.lifecycle import LOCAL_STAGES, MOVED_STAGES, SPLIT_STAGES, Event, Stages, Timeline
from baton.service.tracing import NO_SPAN, Span
from baton.types import (
    AttemptKey,
    FinishReason,
    Sequence,
    TokenChunk,
    WorkerId,
)
from baton.v1 import decode_pb2, prefill_pb2
from router.attempt_calls import Moved, Terms, attach_request, decode_request, prefill_request
from router.members import Member, Pair, Watch
from router.ordering import TokenOrder
from router.outcome import AttemptStats, Failure, Stage
from router.streams import Broken, Call, Follower

LEAVE_INTERVAL_S = 0.1
"""How often a draining worker is asked to hand an attempt over that it could not hand over before."""
HANDOFF_GRACE_S = 0.4
"""How long decode may take to tell that it has the KV of a prefill worker that broke. Where that one went silent, its lease has passed
before.
"""
SOURCE_GRACE_S = 0.2
"""How long prefill may take to tell why decode cannot have its KV."""
DEADLINE_SLACK_S = 0.25
"""A worker's DEADLINE_EXCEEDED this close to the deadline is the deadline; earlier, it is the worker's own limit."""


Sink = Callable[[TokenChunk], bool]
"""Takes the next tokens, in order; True where no more are wanted. Never blocks."""


class Attempt:
    """Used once: `run`, then `failure`, `finish_reason` and `stats` tell how it went."""

    def __init__(
        self,
        key: AttemptKey,
        sequence: Sequence,
        pair: Pair,
        *,
        sink: Sink,
        on_finished: Callable[[], None] = lambda: None,
        timeline: Timeline,
        deadline_s: float,
        terms: Terms,
        on_prefill_sent: Callable[[], None] = lambda: None,
        on_kv_received: Callable[[], None] = lambda: None,
        attach: bool = False,
        moved: Moved | None = None,
        elsewhere: Callable[[], bool] = lambda: False,
        span: Span = NO_SPAN,
    ) -> None:
        """`deadline_s` is on the monotonic clock; to keep it is the caller's part, the workers are told what is left of it. With `attach`,
        decode holds an attempt of that key and sequence; with `moved`, another one holds the KV of the sequence, and the token after it
        is known. The pair has no prefill worker then. `elsewhere` tells whether the attempt could go on at another decode worker.
        The workers' spans are below `span`, which the caller ends.
        """
        self._key = key
        self._sequence = sequence
        self.pair = pair
        self._sink = sink
        self._on_finished = on_finished
        self._timeline = timeline
        self._deadline_s = deadline_s
        self._terms = terms
        self._on_prefill_sent = on_prefill_sent
        self._on_kv_in_pool = on_kv_received
        self._attach = attach
        self._moved = moved
        self._elsewhere = elsewhere
        self.span = span
        self._leaves_at: int | None = None
        """Output position after decode's last token, once it has stopped."""
        self.left: Moved | None = None
        """Set where the attempt ended because decode drains."""
        self._computes_rest = bool(sequence.generated) and not pair.decode.info.computes_prompts
        """Prefill computes the prompt only: the KV of generated tokens is decode's, as it was before."""
        self._order = TokenOrder(len(sequence.generated) + (moved is not None))
        self._has_first_token = False
        self._handed = False
        self._has_kv = asyncio.Event()
        if attach:
            self._has_kv.set()
        self._decode_finish: FinishReason | None = None
        self._decode_has_ended = False
        """By its own word: there is nothing to release."""
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._decode_call: Call | None = None
        self._prefill_call: Call | None = None
        """Those that the worker does not end by itself, now that it has said its last."""
        self._tasks: list[asyncio.Task[None]] = []
        self.stages = _stages(pair, attach=attach, moved=moved is not None)
        """What it goes through, for its durations."""
        self.history = [(Stage.DECODE if attach else Stage.RESERVE, time.monotonic())]
        """What it has waited for, and since when, on the monotonic clock."""
        self.failure: Failure | None = None
        self.finish_reason: FinishReason | None = None
        """None after a success: the sink wanted no more."""
        self.stats = AttemptStats()

    @property
    def stage(self) -> Stage:
        """What it waits for."""
        return self.history[-1][0]

    @property
    def rests(self) -> bool:
        """Whether decode joins tokens as it was told; else they come one by one."""
        return self._decode_call is not None and self._decode_call.rests

    async def run(self) -> None:
        """Returns once the attempt succeeded or failed, with everything let go. Cancelling it is legal at any instant."""
        decode, prefill = self.pair.decode, self.pair.prefill
        of_decode = Watch(self._on_decode_lost, self._on_decode_drains)
        of_prefill = Watch(self._on_prefill_lost)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                decode.watch(of_decode)
                if prefill is not None:
                    prefill.watch(of_prefill)
                try:
                    self._decode_call = self._follow(
                        self._call_decode, self._on_decode, self._on_decode_broken
                    )
                    await self._over
                finally:
                    self._over.cancel()
                    for call in (self._decode_call, self._prefill_call):
                        if call is not None:
                            call.cancel()
                    for task in self._tasks:
                        task.cancel()
                    # A cancelled task holds its frames, and these the attempt: memory that only a full collection would find.
                    self._tasks.clear()
                    if self.left is None and not self._decode_has_ended:
                        self.pair.decode.release_decode(self._key, self._terms.holder)
                    self._let_go_of_source()
        except BaseException:
            if self.left is not None:
                # Nobody learns of what decode holds.
                self.pair.decode.release_decode(self._key, self._terms.holder)
            raise
        finally:
            decode.unwatch(of_decode)
            if prefill is not None:
                prefill.unwatch(of_prefill)

    def _follow(
        self,
        start: Callable[[], Call],
        handle: Callable[[Any], None],
        on_end: Callable[[Broken], None],
    ) -> Call | None:
        """Starts a call, unless nothing is to be done any more."""
        if self._over.done():
            return None
        try:
            call = start()
        except UnavailableError as error:
            on_end(Broken(error, from_worker=False))
            return None
        call.follow(Follower(handle, on_end, self._on_bug))
        return call

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(self._group.create_task(work))

    def _enter(self, stage: Stage) -> None:
        self.history.append((stage, time.monotonic()))

    def _end(self, failure: Failure | None) -> None:
        """The first call decides."""
        if not self._over.done():
            self.failure = failure
            self._over.set_result(None)

    def _on_bug(self, error: Exception) -> None:
        if not self._over.done():
            self._over.set_exception(error)

    # Decode's side.

    def _on_decode_broken(self, broken: Broken) -> None:
        member, source = self.pair.decode, self.pair.prefill
        self._decode_has_ended = broken.from_worker
        if self._decode_finish is not None:
            return  # It has said all; prefill's token, which comes another way, is still due.
        if self._attach and broken.from_worker and not isinstance(broken.error, AbortedError):
            # What ended it, the death of its router often, is no fault of this worker's.
            held_no_more = PreconditionError(f"the held attempt ended: {broken.error.message}")
            self._end(Failure(held_no_more, WorkerId("")))
            return
        failure = Failure(self._own_deadline(broken.error), self._blame_for(broken))
        token_is_due = self._has_kv.is_set() and source is not None and not self._has_first_token
        if failure.blame != member.worker_id or token_is_due:
            # Prefill's own word, about to come, says more: its token, that this was the last, or why it failed.
            self._spawn(self._end_soon(failure))
        else:
            self._end(failure)

    async def _end_soon(self, failure: Failure) -> None:
        await asyncio.sleep(SOURCE_GRACE_S)
        self._end(failure)

    def _call_decode(self) -> Call:
        member, source, terms = self.pair.decode, self.pair.prefill, self._terms
        if self._attach:
            attach = attach_request(self._key, self._order.next_index, terms)
            return member.call_attach(attach, self._remaining_s())
        request = decode_request(
            self._key, self._sequence, terms, member, source=source, moved=self._moved
        )
        return member.call_decode(request, self._remaining_s(), self.span.context)

    def _on_decode(self, response: decode_pb2.DecodeResponse) -> None:
        if self._over.done():
            return
        match response.WhichOneof("event"):
            case "reserved":
                if not self._attach:
                    self._on_reserved(response.reserved.cached_tokens)
            case "kv_received":
                self._on_kv_received(response.kv_received)
            case "tokens":
                self._deliver(codec.chunk_from_proto(response.tokens))
            case "finished":
                self.stats.preemptions = response.finished.preemptions
                self._decode_has_ended, self._decode_call = True, None
                self._decode_finish = codec.finish_reason_from_proto(response.finished.reason)
                if self._decode_finish is None:
                    raise InternalError("decode finished without a reason")
                self._finish_if_complete()
            case _:
                raise InternalError("decode sent an event that this router does not know")

    def _on_reserved(self, cached_tokens: int) -> None:
        if self.stage is not Stage.RESERVE:
            raise InternalError("decode reserved twice")
        self._timeline.record(Event.RESERVED, time.monotonic())
        self._saw_cached(cached_tokens)
        self._enter(Stage.PREFILL)
        if self.pair.prefill is not None:
            self._on_prefill_sent()
            self._prefill_call = self._follow(
                partial(self._call_prefill, self.pair.prefill, cached_tokens),
                self._on_prefill,
                self._on_prefill_broken,
            )

    def _on_kv_received(self, received: decode_pb2.DecodeResponse.KvReceived) -> None:
        self._timeline.record(Event.KV_RECEIVED, time.monotonic())
        self.stats.handoff_s = received.handoff_seconds
        self.stats.handoff_bytes = received.kv_bytes
        self._enter(Stage.DECODE)
        self._has_kv.set()
        self._on_kv_in_pool()
        self._let_go_of_source()

    def _let_go_of_source(self) -> None:
        if self._moved is not None:
            self._moved.member.release_decode(self._moved.key, self._terms.holder)
            self._moved = None

    def _on_decode_drains(self) -> None:
        if not self._over.done():
            self._spawn(self._leave())

    async def _leave(self) -> None:
        """Stops decode as soon as it generates and another could go on; nothing more once it takes requests again."""
        await self._has_kv.wait()
        while self._leaves_at is None and self.pair.decode.draining:
            if self._elsewhere():
                try:
                    self._leaves_at = await self.pair.decode.hand_over(
                        self._key, self._terms.holder
                    )
                    break
                except BatonError:
                    pass  # it has not begun to generate, has ended, or is busy: its call tells
            await asyncio.sleep(LEAVE_INTERVAL_S)
        self._leave_if_complete()

    def _leave_if_complete(self) -> None:
        if self._leaves_at is not None and self._order.next_index >= self._leaves_at:
            self.left = Moved(self.pair.decode, self._key)
            self._end(None)

    def _on_decode_lost(self, error: UnavailableError) -> None:
        self._end(Failure(error, self.pair.decode.worker_id))

    def _blame_for(self, broken: Broken) -> WorkerId:
        """Who failed where decode's call broke: of a handoff, decode only tells; its other side failed."""
        handing_off = self.stage in (Stage.PREFILL, Stage.HANDOFF)
        about_source = UnavailableError | PreconditionError | CorruptKVError | DeadlineError
        source = self.pair.prefill or (self._moved.member if self._moved else None)
        if (
            source is not None
            and handing_off
            and broken.from_worker
            and isinstance(broken.error, about_source)
        ):
            return source.worker_id
        return self.pair.decode.worker_id

    # Prefill's side.

    def _call_prefill(self, member: Member, skip_tokens: int) -> Call:
        sequence = self._sequence
        if self._computes_rest:
            sequence = replace(sequence, generated=())
        request = prefill_request(self._key, sequence, member, skip_tokens)
        return member.call_prefill(request, self._remaining_s(), self.span.context)

    def _on_prefill_broken(self, broken: Broken) -> None:
        member = self.pair.prefill
        assert member is not None
        if not broken.from_worker:
            member.release_prefill(self._key)
        if not self._handed:
            failure = Failure(self._own_deadline(broken.error), member.worker_id)
            self._spawn(self._outlive_prefill(failure))

    def _on_prefill(self, response: prefill_pb2.PrefillResponse) -> None:
        if self._over.done():
            return
        match response.WhichOneof("event"):
            case "started":
                self._timeline.record(Event.PREFILL_STARTED, time.monotonic())
                self.stats.prefill_queue_s = response.started.queue_seconds
                self._saw_cached(response.started.cached_tokens)
            case "first_token":
                self._on_first_token(response.first_token)
            case "handed":
                self._handed, self._prefill_call = True, None
            case "progress":
                pass
            case _:
                raise InternalError("prefill sent an event that this router does not know")

    def _on_first_token(self, first: prefill_pb2.PrefillResponse.FirstToken) -> None:
        chunk = codec.chunk_from_proto(first.token)
        index = 0 if self._computes_rest else len(self._sequence.generated)
        if chunk.first_index != index or len(chunk.token_ids) != 1:
            raise InternalError("prefill's first token is not the one token that was asked for")
        self.stats.prefill_s = first.prefill_seconds
        self._has_first_token = True
        self._timeline.record(Event.PREFILLED, time.monotonic())
        if self._has_kv.is_set():
            # The two workers' messages crossed on their way.
            self._timeline.record(Event.KV_RECEIVED, time.monotonic())
        if self.stage is Stage.PREFILL:
            self._enter(Stage.HANDOFF)
        if self._computes_rest:
            return  # it is the one that the output begins with
        finish = codec.finish_reason_from_proto(first.finish_reason)
        if finish is not None:
            self._decode_finish = finish
        self._deliver(chunk)

    def _on_prefill_lost(self, error: UnavailableError) -> None:
        assert self.pair.prefill is not None
        if not self._over.done():
            self._spawn(self._outlive_prefill(Failure(error, self.pair.prefill.worker_id)))

    async def _outlive_prefill(self, failure: Failure) -> None:
        """Prefill's call broke, or its worker was lost: whether that is a failure is for decode to tell, once there is a first token. (A
        worker can freeze after it said that it handed the KV over, and before that has left it.)
        """
        if self._has_first_token:
            try:
                async with asyncio.timeout(HANDOFF_GRACE_S):
                    await self._has_kv.wait()
            except TimeoutError:
                pass
            else:
                return
        self._end(failure)

    # Both.

    def _deliver(self, chunk: TokenChunk) -> None:
        for due in self._order.put(chunk):
            if self._sink(due):
                self._end(None)
                return
        if self._decode_finish is not None:
            self._finish_if_complete()
        if self._leaves_at is not None:
            self._leave_if_complete()

    def _finish_if_complete(self) -> None:
        if self._decode_finish is None:
            return
        if self.pair.prefill is not None and not self._has_first_token:
            return
        if self._order.holds_any:
            left_out = InternalError("decode left out a token")
            self._end(Failure(left_out, self.pair.decode.worker_id))
            return
        self.finish_reason = self._decode_finish
        # Before the stream's turn, which takes the last tokens: what is left of the text goes with them.
        self._on_finished()
        self._end(None)

    def _saw_cached(self, tokens: int) -> None:
        self.stats.cached_tokens = max(self.stats.cached_tokens, tokens)

    def _remaining_s(self) -> float:
        return max(0.001, self._deadline_s - time.monotonic())

    def _own_deadline(self, error: BatonError) -> BatonError:
        """Tells the request's deadline from a limit of the worker's."""
        if not isinstance(error, DeadlineError):
            return error
        if self._remaining_s() <= DEADLINE_SLACK_S:
            return DeadlineError(self.stage.value)
        return UnavailableError(f"the worker timed out in stage {error.stage!r}")


def _stages(pair: Pair, *, attach: bool, moved: bool) -> Stages:
    if attach:
        return {}
    if moved:
        return MOVED_STAGES
    return LOCAL_STAGES if pair.prefill is None else SPLIT_STAGES
