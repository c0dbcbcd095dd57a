"""A request's account as it is told to who watches. Pure."""

from baton.errors import CancelledError
from baton.lifecycle import Event
from router.account import Account
from router.generation import Generation, Report
from router.status.snapshot import (
    AttemptStatus,
    RequestState,
    RequestStatus,
    StageName,
    StageStatus,
)

MAX_ATTEMPTS = 16
"""Of a request, the last ones: what drains or fails again and again makes many."""


def request_status(
    account: Account, serial: int, now_s: float, now_unix_s: float, *, ended: bool = False
) -> RequestStatus:
    """`now_s` is the monotonic clock, on which the account is kept."""
    timeline, request = account.timeline, account.request
    received_s = timeline.received_s
    attempts = [] if account.answer is None else _attempts(account.answer.generations)
    return RequestStatus(
        serial=serial,
        request_id=account.refused_id if request is None else request.request_id,
        tenant=account.tenant,
        state=state_of(account, ended=ended),
        waits_for="" if ended else account.waits_for,
        session_id="" if account.turn is None else account.turn.key.session_id,
        priority=0 if request is None else request.priority,
        received_unix_s=now_unix_s - (now_s - received_s),
        age_s=now_s - received_s,
        admitted_s=timeline.at_s(Event.ADMITTED),
        placed_s=min((r.stages[0][1] - received_s for _, r in attempts), default=None),
        first_token_s=timeline.at_s(Event.FIRST_TOKEN),
        last_token_s=timeline.at_s(Event.LAST_TOKEN),
        prompt_tokens=account.prompt_tokens,
        cached_tokens=account.cached_tokens,
        completion_tokens=account.completion_tokens,
        max_tokens=0 if request is None else request.sampling.max_tokens,
        choices=1 if request is None else request.sampling.n,
        attempts=tuple(
            _attempt(choice, report, received_s, now_s if ended else None)
            for choice, report in attempts[-MAX_ATTEMPTS:]
        ),
        error="" if account.error is None else account.error.reason,
    )


def state_of(account: Account, *, ended: bool) -> RequestState:
    """What has become of a request."""
    if not ended:
        return RequestState.RUNNING if account.is_admitted else RequestState.QUEUED
    if account.error is None:
        return RequestState.FINISHED
    cancelled = isinstance(account.error, CancelledError)
    return RequestState.CANCELLED if cancelled else RequestState.FAILED


def _attempts(generations: list[Generation]) -> list[tuple[int, Report]]:
    """Those of all completions, in order of their beginning."""
    attempts = [
        (choice, report)
        for choice, generation in enumerate(generations)
        for report in generation.attempts
    ]
    return sorted(attempts, key=lambda attempt: attempt[1].stages[0][1])


def _attempt(
    choice: int, report: Report, received_s: float, latest_s: float | None
) -> AttemptStatus:
    """`latest_s` is when the request ended, and with it what ran."""
    ends = [began_s for _, began_s in report.stages[1:]]
    last_s = latest_s if report.ended_at_s is None else report.ended_at_s
    return AttemptStatus(
        choice=choice,
        prefill_worker=report.prefill_worker,
        decode_worker=report.decode_worker,
        stages=tuple(
            StageStatus(
                stage=StageName(stage.value),
                start_s=began_s - received_s,
                end_s=None if end_s is None else end_s - received_s,
            )
            for (stage, began_s), end_s in zip(report.stages, [*ends, last_s], strict=True)
        ),
        failure=report.failure,
        resumed_tokens=report.resumed_tokens,
        handoff_s=report.stats.handoff_s,
        handoff_bytes=report.stats.handoff_bytes,
    )
