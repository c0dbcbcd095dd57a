"""What is known of one request while it is served: the source of its client's last message, its metrics, its span, its line in the log
and its deadline error.

Written by the request's own task on the router's event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from baton import codec
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
from baton.types import FinishReason
from baton.v1 import inference_pb2 as pb
from router.answer import Answer
from router.outcome import AttemptStats
from router.output import Output
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
    answer: Answer | None = None
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
    def objectives(self) -> Objectives:
        """What the request is wanted to keep to."""
        own_ttft_s = None if self.request is None else self.request.ttft_slo_s
        return self.targets if own_ttft_s is None else replace(self.targets, ttft_s=own_ttft_s)

    @asynccontextmanager
    async def counted(self, metrics: RouterMetrics) -> AsyncIterator[None]:
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
            metrics.record_request(
                self.timeline,
                self.error,
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
                completion_tokens=self.completion_tokens,
                objectives=self.objectives,
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

    @asynccontextmanager
    async def bounded(self, deadline_s: float) -> AsyncIterator[None]:
        """Ends the context at the deadline, on the monotonic clock, with a `DeadlineError` that names the stage."""
        timer = asyncio.timeout(max(0.0, deadline_s - time.monotonic()))
        try:
            async with timer:
                yield
        except TimeoutError:
            if timer.expired():
                raise DeadlineError(self.waits_for) from None
            raise

    def finished(self) -> pb.GenerateResponse:
        """The client's last message. Precondition: the answer is complete."""
        assert self.answer is not None
        ends = [
            _choice_end(choice, reason, output)
            for choice, (reason, output) in enumerate(
                zip(self.answer.reasons, self.answer.outputs, strict=True)
            )
        ]
        message = pb.Finished(
            reason=ends[0].reason,
            choices=ends,
            usage=pb.Usage(
                prompt_tokens=self.prompt_tokens,
                cached_tokens=self.cached_tokens,
                completion_tokens=self.completion_tokens,
            ),
            timings=_timings(self.timeline, self.answer.generations[0].stats),
            attempts=[
                pb.AttemptReport(
                    prefill_worker=report.prefill_worker,
                    decode_worker=report.decode_worker,
                    failure=report.failure,
                    resumed_tokens=report.resumed_tokens,
                )
                for generation in self.answer.generations
                for report in generation.reports
            ],
        )
        if self.turn is not None:
            message.session.session_id = self.turn.key.session_id
            message.session.turn = self.turn.number
        match ends[0].WhichOneof("stop_match"):
            case "stop_string":
                message.stop_string = ends[0].stop_string
            case "stop_token_id":
                message.stop_token_id = ends[0].stop_token_id
        return pb.GenerateResponse(finished=message)


def _choice_end(choice: int, reason: FinishReason, output: Output) -> pb.ChoiceEnd:
    end = pb.ChoiceEnd(choice=choice, reason=codec.finish_reason_to_proto(reason))
    if output.stop is not None:
        end.stop_string = output.stop
    elif output.stop_token_id is not None:
        end.stop_token_id = output.stop_token_id
    return end


def _timings(timeline: Timeline, stats: AttemptStats) -> pb.Timings:
    def at_s(event: Event) -> float:
        return timeline.at_s(event) or 0.0

    return pb.Timings(
        admitted_at_seconds=at_s(Event.ADMITTED),
        placed_at_seconds=at_s(Event.PLACED),
        reserved_at_seconds=at_s(Event.RESERVED),
        prefill_started_at_seconds=at_s(Event.PREFILL_STARTED),
        first_token_at_seconds=at_s(Event.FIRST_TOKEN),
        kv_received_at_seconds=at_s(Event.KV_RECEIVED),
        last_token_at_seconds=at_s(Event.LAST_TOKEN),
        finished_at_seconds=at_s(Event.FINISHED),
        prefill_queue_seconds=stats.prefill_queue_s,
        prefill_seconds=stats.prefill_s,
        handoff_seconds=stats.handoff_s,
        handoff_bytes=stats.handoff_bytes,
        preemptions=stats.preemptions,
    )
