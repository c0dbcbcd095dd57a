"""The span of an attempt, below its request's; the workers' are below it. Made from the timeline, in the request's own task, when the
attempt has ended.
"""

import time
from typing import Any

from baton.errors import BatonError, CancelledError, DrainingError
from baton.lifecycle import Event, Timeline
from baton.service.metrics import outcome_of
from baton.types import WorkerId
from router.attempt import Attempt
from router.outcome import Failure

PEACEFUL = (CancelledError, DrainingError)
"""Ends that are no failures."""

Facts = dict[str, Any]


def end_attempt_span(
    attempt: Attempt,
    timeline: Timeline,
    *,
    number: int,
    choice: int,
    resumed_tokens: int,
    cancelled: bool,
) -> None:
    """Precondition: the span records."""
    failure = _given_up() if cancelled else attempt.failure
    error = None if failure is None else failure.error
    facts: Facts = {
        "baton.attempt": number,
        "baton.choice": choice,
        "baton.decode.worker_id": attempt.pair.decode.worker_id,
        "baton.resumed_tokens": resumed_tokens,
        "baton.cached_tokens": attempt.stats.cached_tokens,
        "baton.handoff.bytes": attempt.stats.handoff_bytes,
        "baton.preemptions": attempt.stats.preemptions,
    }
    if attempt.pair.prefill is not None:
        facts["baton.prefill.worker_id"] = attempt.pair.prefill.worker_id
    if attempt.left is not None:
        facts["baton.moved_on"] = True
    if error is not None:
        facts["error.type"] = outcome_of(error)
    stages = (Event.RESERVED, Event.PREFILL_STARTED, Event.KV_RECEIVED)
    placed_s = timeline.at_s(Event.PLACED) or 0.0
    attempt.span.end(
        "attempt",
        timeline.received_s + placed_s,
        time.monotonic(),
        attributes=facts,
        events=events_of(timeline, stages),
        failure=failure_of(error),
    )


def _given_up() -> Failure:
    return Failure(CancelledError("the request ended"), WorkerId(""))


def failure_of(error: BatonError | None) -> str:
    """Why a span is marked as failed; empty where it is not."""
    return (
        "" if error is None or isinstance(error, PEACEFUL) else f"{error.reason}: {error.message}"
    )


def events_of(timeline: Timeline, events: tuple[Event, ...]) -> list[tuple[str, float]]:
    """Those that have happened, on the monotonic clock."""
    reached = [(event.value, timeline.at_s(event)) for event in events]
    return [(name, timeline.received_s + at_s) for name, at_s in reached if at_s is not None]
