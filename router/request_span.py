"""The span of a request, below its caller's: within it one for its admission, and one for each attempt (`router.attempt_span`). Made from
the timeline, in the request's own task, when the request has ended.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from baton.errors import BatonError
from baton.lifecycle import Event, Timeline
from baton.service.logging import bind
from baton.service.metrics import outcome_of
from baton.service.settings import RouterSettings
from baton.service.tracing import Kind, Origin, Span, Tracing
from router.account import Account
from router.attempt_span import events_of, failure_of

Facts = dict[str, Any]


@contextmanager
def request_traced(
    tracing: Tracing, origin: Origin, account: Account, settings: RouterSettings
) -> Iterator[None]:
    """Traces a request inside the context, which ends after `account.counted`."""
    span = account.span = tracing.begin(origin.trace)
    bind(trace_id=span.trace_id)
    try:
        yield
    finally:
        if span.recording:
            _end_request(span, origin, account, settings)


def _end_request(span: Span, origin: Origin, account: Account, settings: RouterSettings) -> None:
    timeline, error = account.timeline, account.error
    admitted_s = timeline.at_s(Event.ADMITTED)
    if admitted_s is not None:
        begun_s = timeline.received_s
        span.child().end("admission", begun_s, begun_s + admitted_s)
    facts = _request_facts(account) | dict(origin.attributes)
    facts["server.address"] = settings.host
    if settings.port:
        facts["server.port"] = settings.port
    if error is not None:
        facts["error.type"] = outcome_of(error)
    operation = facts["gen_ai.operation.name"]
    span.end(
        f"{operation} {account.model}" if account.model else operation,
        timeline.received_s,
        _ended_s(timeline, error),
        kind=Kind.SERVER,
        attributes=facts,
        events=events_of(timeline, (Event.FIRST_TOKEN, Event.LAST_TOKEN)),
        failure=failure_of(error),
    )


def _request_facts(account: Account) -> Facts:
    """By OpenTelemetry's conventions for generative models where these have a name; never what was said."""
    facts: Facts = {
        "gen_ai.operation.name": account.operation,
        "gen_ai.provider.name": "baton",
    }
    if account.model:
        facts["gen_ai.request.model"] = facts["gen_ai.response.model"] = account.model
    valid, answer = account.request, account.answer
    if valid is not None:
        sampling = valid.sampling
        facts |= {
            "gen_ai.response.id": valid.request_id,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.request.top_k": sampling.top_k,
            "gen_ai.usage.input_tokens": account.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": account.cached_tokens,
            "gen_ai.usage.output_tokens": account.completion_tokens,
        }
        if sampling.n > 1:
            facts["gen_ai.request.choice.count"] = sampling.n
        if valid.tenant:
            facts["baton.tenant"] = valid.tenant
    if answer is not None:
        facts["baton.attempts"] = sum(len(each.reports) for each in answer.generations)
        if answer.reasons:
            facts["gen_ai.response.finish_reasons"] = [reason.value for reason in answer.reasons]
    return facts


def _ended_s(timeline: Timeline, error: BatonError | None) -> float:
    finished_s = timeline.at_s(Event.FINISHED)
    if error is None and finished_s is not None:
        return timeline.received_s + finished_s
    return time.monotonic()
