"""A worker's part in a trace, and in the log: each call is a span of the router's attempt, with its stages below it. Torch-free, Ray-free.

Runs on the worker's event loop. A stage is what lies between two events of the call's timeline; one that has begun and not ended when
the call fails is where it failed.
"""

import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.errors import BatonError, CancelledError, DrainingError, PreconditionError
from baton.kv.spec import WireKV
from baton.lifecycle import Event, Timeline
from baton.service.logging import bind
from baton.service.metrics import OK, outcome_of
from baton.service.running_calls import CallOutcome
from baton.service.tracing import Kind, Span, rpc_attributes
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVMeta, PullRequest, Refused
from baton.types import AttemptKey, TraceContext

_log = logging.getLogger(__name__)

ENDED = frozenset({PreconditionError.reason, CancelledError.reason})
"""Why there is no KV of an attempt that has ended."""
CANCELLED = outcome_of(CancelledError(""))


Pulled = tuple[KVMeta | Refused, WireKV | None]


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a call."""

    name: str
    begins: Event
    ends: Event


@dataclass(frozen=True, slots=True)
class Method:
    """What is called."""

    service: str
    name: str
    stages: tuple[Stage, ...]


@dataclass(slots=True)
class WorkerCall:
    """A call that runs: what is recorded of it, for whoever asks at its end."""

    key: AttemptKey
    span: Span
    timeline: Timeline
    outcome: CallOutcome = field(default_factory=CallOutcome)
    facts: dict[str, Any] = field(default_factory=dict)
    """Attributes of its span."""
    handoff: Span | None = None
    """Of a call that takes KV from another worker."""

    def record(self, event: Event) -> float:
        """An event happens now. Returns the monotonic clock."""
        now_s = time.monotonic()
        self.timeline.record(event, now_s)
        return now_s


def bind_attempt(key: AttemptKey) -> None:
    """The task's lines are about this attempt. Routers name attempts after the client's request."""
    bind(request=key.request_id.partition("/")[0], attempt=str(key))


@contextmanager
def one_call(
    host: WorkerHost, method: Method, key: AttemptKey, trace: TraceContext
) -> Iterator[WorkerCall]:
    """A call runs inside; see `WorkerHost.call`. Its FINISHED is recorded when it ends."""
    timeline = Timeline(received_s=time.monotonic())
    call = WorkerCall(key, host.tracing.begin(trace), timeline)
    bind_attempt(key)
    bind(trace_id=call.span.trace_id)
    error: BatonError | None = None
    try:
        with host.call() as call.outcome:
            yield call
    except BatonError as failure:
        error = failure
        raise
    finally:
        label = call.outcome.label if error is None else outcome_of(error)
        seconds = call.record(Event.FINISHED) - timeline.received_s
        level = logging.DEBUG if label in {OK, CANCELLED} else logging.INFO
        _log.log(level, "%s ended: %s after %.3f s", method.name, label, seconds)
        if call.span.recording:
            _end(call, host, method, error, label)


async def exported(
    host: WorkerHost,
    request: PullRequest,
    pull: Callable[[PullRequest], Awaitable[Pulled]],
) -> Pulled:
    """What `pull` answers; as a span below the puller's handoff, where there is one."""
    if not request.trace.traceparent:
        return await pull(request)
    span, begun_s = host.tracing.begin(request.trace), time.monotonic()
    meta, kv = await pull(request)
    if span.recording:
        facts: dict[str, str | int] = {
            "baton.worker.id": host.worker_id,
            "baton.attempt.key": str(request.key),
            "baton.tokens": request.last - request.first,
        }
        failure = ""
        if isinstance(meta, Refused):
            facts["error.type"] = meta.reason.lower()
            # What has ended meanwhile is no failure of this worker's: the attempt's own spans say why it ended.
            failure = "" if meta.reason in ENDED else f"{meta.reason}: {meta.message}"
        span.end(
            "export",
            begun_s,
            time.monotonic(),
            kind=Kind.SERVER,
            attributes=facts,
            failure=failure,
        )
    return meta, kv


def _end(
    call: WorkerCall,
    host: WorkerHost,
    method: Method,
    error: BatonError | None,
    label: str,
) -> None:
    failure = _failure(error, label)
    timeline, first_s = call.timeline, call.timeline.received_s
    over_s = timeline.at_s(Event.FINISHED) or 0.0
    for stage in method.stages:
        began_s, ended_s = timeline.at_s(stage.begins), timeline.at_s(stage.ends)
        if began_s is None:
            continue
        handoff = call.handoff if stage.ends is Event.KV_RECEIVED else None
        (handoff or call.span.child()).end(
            stage.name,
            first_s + began_s,
            first_s + (over_s if ended_s is None else ended_s),
            kind=Kind.INTERNAL if handoff is None else Kind.CLIENT,
            failure=failure if ended_s is None else "",
        )
    facts = call.facts | {
        **rpc_attributes(method.service, method.name),
        "server.address": host.settings.advertise_host or host.settings.host,
        "server.port": host.port,
        "baton.worker.id": host.worker_id,
        "baton.attempt.key": str(call.key),
        "gen_ai.request.model": host.engine.info.model,
    }
    if label != OK:
        facts["error.type"] = label
    call.span.end(
        method.name.lower(),
        first_s,
        first_s + over_s,
        kind=Kind.SERVER,
        attributes=facts,
        failure=failure,
    )


def _failure(error: BatonError | None, label: str) -> str:
    if error is None:
        # The exception's own text may quote the request.
        return "a bug" if label == "internal" else ""
    # A worker whose peer heard first that the attempt is over has not failed either.
    peaceful = isinstance(error, DrainingError) or error.reason in ENDED
    return "" if peaceful else f"{error.reason}: {error.message}"
