"""Traces: the seam between what happens to a request and whoever collects spans. Without the `otel` extra, or an endpoint, nothing
happens here.

A span begins as a name for what runs, which others are told as their parent, and is made at the end of its stage from the instants that
the lifecycle recorded: what runs meanwhile pays nothing. No span holds what a prompt or an answer said. Used on the event loop of
whoever opened it; spans leave the process from a thread of their own, and those that nobody takes are dropped.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from baton.errors import FieldViolation, InvalidRequestError
from baton.service.settings import ServerSettings
from baton.types import NO_TRACE, TraceContext

_log = logging.getLogger(__name__)

Headers = Iterable[tuple[str, str | bytes]]
"""A call's metadata, or an HTTP request's headers."""
Attributes = Mapping[str, str | bool | int | float | Sequence[str]]


class Kind(Enum):
    """Which end of a call a span is, if it is one."""

    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"


class Span(Protocol):
    """Something that runs. Until it has ended, nothing of it is kept anywhere."""

    @property
    def context(self) -> TraceContext:
        """What goes to other processes, for spans below this one."""
        ...

    @property
    def trace_id(self) -> str:
        """In hexadecimal; empty where nothing is traced."""
        ...

    @property
    def recording(self) -> bool:
        """Whether `end` makes a span: else its arguments need not be put together."""
        ...

    def child(self) -> "Span":
        """Something that runs within it, in this process."""
        ...

    def end(
        self,
        name: str,
        start_s: float,
        end_s: float,
        *,
        kind: Kind = Kind.INTERNAL,
        attributes: Attributes = ...,
        events: Iterable[tuple[str, float]] = (),
        failure: str = "",
    ) -> None:
        """Makes the span. Instants are on the monotonic clock. A failure says why; empty is no failure."""
        ...


class Tracing(Protocol):
    """Makes the spans of one component."""

    def begin(self, parent: TraceContext) -> Span:
        """The component's first span below `parent`, or of a new trace."""
        ...

    def close(self) -> None:
        """Blocks for a short while, in which what waits is sent. Idempotent."""
        ...


class NoSpan:
    """A `Span` of nothing."""

    __slots__ = ()

    context = NO_TRACE
    trace_id = ""
    recording = False

    def child(self) -> Span:
        return self

    def end(
        self,
        name: str,
        start_s: float,
        end_s: float,
        *,
        kind: Kind = Kind.INTERNAL,
        attributes: Attributes = {},  # noqa: B006 - never changed
        events: Iterable[tuple[str, float]] = (),
        failure: str = "",
    ) -> None:
        """Nothing."""


NO_SPAN = NoSpan()


class NoTracing:
    """A `Tracing` of nothing."""

    __slots__ = ()

    def begin(self, parent: TraceContext) -> Span:  # noqa: ARG002
        return NO_SPAN

    def close(self) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What a front tells of the call that brought a request."""

    trace: TraceContext = NO_TRACE
    attributes: Attributes = field(default_factory=dict)
    """Of its protocol; `rpc.system`, `http.route` and the like."""


def trace_of(headers: Headers) -> TraceContext:
    """What the headers of a call say of the caller's trace; names may be in any case."""
    found = {"traceparent": "", "tracestate": ""}
    for name, value in headers:
        known = name.lower()
        if known in found and isinstance(value, str):
            # A list may come in several headers.
            found[known] = f"{found[known]},{value}" if found[known] else value
    return TraceContext(**found) if found["traceparent"] else NO_TRACE


def rpc_attributes(service: str, method: str) -> Attributes:
    """Of a gRPC call."""
    return {"rpc.system": "grpc", "rpc.service": service, "rpc.method": method}


def rpc_origin(headers: Headers, service: str, method: str) -> Origin:
    """Of a request that came in a gRPC call."""
    return Origin(trace_of(headers), rpc_attributes(service, method))


def http_origin(headers: Headers, method: str, route: str) -> Origin:
    """Of a request that came over HTTP; the route is the path's pattern, not what a client put into it."""
    return Origin(trace_of(headers), {"http.request.method": method, "http.route": route})


def headers_of(trace: TraceContext) -> tuple[tuple[str, str], ...]:
    """What `trace_of` reads at the other end; nothing where there is no trace."""
    if not trace.traceparent:
        return ()
    parent = ("traceparent", trace.traceparent)
    return (parent, ("tracestate", trace.tracestate)) if trace.tracestate else (parent,)


def open_tracing(settings: ServerSettings, service: str, instance: str) -> Tracing:
    """What the settings ask for; `service` and `instance` name the component among others. Raises `InvalidRequestError` for settings
    that cannot be.
    """
    if not 0.0 <= settings.trace_sample_ratio <= 1.0:
        raise InvalidRequestError(FieldViolation("trace_sample_ratio", "must be in [0, 1]"))
    if not settings.otlp_endpoint:
        return NoTracing()
    try:
        from baton.service.otlp import OtlpTracing  # noqa: PLC0415 - an optional extra
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        _log.warning("no traces are sent, though there is an endpoint: pip install -e '.[otel]'")
        return NoTracing()
    return OtlpTracing(settings, service, instance)
