"""Traces through OpenTelemetry's SDK, sent over OTLP/gRPC. Imported by `baton.service.tracing` only, where the `otel` extra is there.

Spans are made when they have ended, on the event loop, and put into the SDK's bounded queue, from which its thread sends them; a full
queue drops the oldest. What is sampled is decided where a trace begins, and holds for all of it. What has no setting of Baton's
(headers, certificates, compression, batch sizes, resource attributes) the SDK takes from the standard variables.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterable
from threading import Thread

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.trace.sampling import (
    ALWAYS_OFF,
    ALWAYS_ON,
    Decision,
    ParentBased,
    Sampler,
    TraceIdRatioBased,
)
from opentelemetry.trace import (
    INVALID_SPAN_ID,
    INVALID_TRACE_ID,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    get_current_span,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from baton import __version__
from baton.errors import FieldViolation, InvalidRequestError
from baton.service.settings import ServerSettings
from baton.service.tracing import Attributes, Kind, Span, headers_of, trace_of
from baton.types import TraceContext

_log = logging.getLogger(__name__)

CLOSE_S = 1.0
"""How long what is queued may take to be sent at the end; where nobody takes it, it is dropped."""

_PROPAGATOR = TraceContextTextMapPropagator()
_KINDS = {
    Kind.INTERNAL: SpanKind.INTERNAL,
    Kind.SERVER: SpanKind.SERVER,
    Kind.CLIENT: SpanKind.CLIENT,
}
_SAMPLERS: dict[str, Callable[[float], Sampler]] = {
    "always_on": lambda _: ALWAYS_ON,
    "always_off": lambda _: ALWAYS_OFF,
    "traceidratio": TraceIdRatioBased,
    "parentbased_always_on": lambda _: ParentBased(ALWAYS_ON),
    "parentbased_always_off": lambda _: ParentBased(ALWAYS_OFF),
    "parentbased_traceidratio": lambda ratio: ParentBased(TraceIdRatioBased(ratio)),
}
"""By the names that OTEL_TRACES_SAMPLER has for them."""


class _Ids(RandomIdGenerator):
    """Gives a span that is made at its end the ids under which its children know it."""

    def __init__(self) -> None:
        self.trace_id = INVALID_TRACE_ID
        self.span_id = INVALID_SPAN_ID

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id

    def new_trace_id(self) -> int:
        return super().generate_trace_id()

    def new_span_id(self) -> int:
        return super().generate_span_id()


class OtlpTracing:
    """A `baton.service.tracing.Tracing`."""

    def __init__(self, settings: ServerSettings, service: str, instance: str) -> None:
        """Raises `InvalidRequestError` where a variable that the SDK reads is unusable."""
        resource = Resource.create(
            {
                "service.name": service,
                "service.instance.id": instance,
                "service.version": __version__,
                "host.name": socket.gethostname(),
                "process.pid": os.getpid(),
            }
        ).merge(OTELResourceDetector().detect())  # what an operator says wins
        self.ids = _Ids()
        self.sampler = _sampler(settings)
        try:
            self._exporter = OTLPSpanExporter(endpoint=settings.otlp_endpoint)
            processor = BatchSpanProcessor(self._exporter)
        except (ValueError, RuntimeError) as error:
            violation = FieldViolation("otlp_endpoint", f"cannot be used: {error}")
            raise InvalidRequestError(violation) from error
        provider = TracerProvider(
            sampler=self.sampler,
            resource=resource,
            id_generator=self.ids,
            # `close` is bounded; an exit that waits for a collector is not.
            shutdown_on_exit=False,
        )
        provider.add_span_processor(processor)
        self._provider = provider
        self.tracer = provider.get_tracer("baton", __version__)
        self._closed = False

    def begin(self, parent: TraceContext) -> Span:
        within = Context()
        if parent.traceparent:
            within = _PROPAGATOR.extract(dict(headers_of(parent)), within)
        above = get_current_span(within).get_span_context()
        trace_id = above.trace_id if above.is_valid else self.ids.new_trace_id()
        # The SDK asks again when the span is made, with the same ids, and gets the same answer.
        sampling = self.sampler.should_sample(within, trace_id, "")
        sampled = sampling.decision is Decision.RECORD_AND_SAMPLE
        context = SpanContext(
            trace_id,
            self.ids.new_span_id(),
            is_remote=False,
            trace_flags=TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT),
            trace_state=sampling.trace_state,
        )
        return _Span(self, context, within, time.time_ns() - time.monotonic_ns())

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # The SDK waits for its exporter's retries for as long as half a minute, unless the exporter is told to stop.
        sending = Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(CLOSE_S)
        if sending.is_alive():
            _log.warning("the last spans could not be sent within %.0f s", CLOSE_S)
            self._exporter.shutdown()
            sending.join(CLOSE_S)


class _Span:
    """A `baton.service.tracing.Span`."""

    __slots__ = ("_context", "_epoch_ns", "_parent", "_tracing", "context")

    def __init__(
        self, tracing: OtlpTracing, context: SpanContext, parent: Context, epoch_ns: int
    ) -> None:
        """`epoch_ns` is the wall clock when the monotonic one was 0: the same for all spans of a request here, whatever is done to the
        wall clock meanwhile.
        """
        self._tracing = tracing
        self._context = context
        self._parent = parent
        self._epoch_ns = epoch_ns
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(NonRecordingSpan(context), Context()))
        self.context = trace_of(carrier.items())

    @property
    def trace_id(self) -> str:
        return f"{self._context.trace_id:032x}"

    @property
    def recording(self) -> bool:
        return self._context.trace_flags.sampled

    def child(self) -> Span:
        if not self.recording:
            return self
        own = self._context
        context = SpanContext(
            own.trace_id,
            self._tracing.ids.new_span_id(),
            is_remote=False,
            trace_flags=own.trace_flags,
            trace_state=own.trace_state,
        )
        within = set_span_in_context(NonRecordingSpan(own), Context())
        return _Span(self._tracing, context, within, self._epoch_ns)

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
        if not self.recording:
            return
        ids = self._tracing.ids
        ids.trace_id, ids.span_id = self._context.trace_id, self._context.span_id
        span = self._tracing.tracer.start_span(
            name, self._parent, _KINDS[kind], attributes, start_time=self._wall_ns(start_s)
        )
        for event, at_s in events:
            span.add_event(event, timestamp=self._wall_ns(at_s))
        if failure:
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end(self._wall_ns(end_s))

    def _wall_ns(self, at_s: float) -> int:
        return self._epoch_ns + int(at_s * 1e9)


def _sampler(settings: ServerSettings) -> Sampler:
    make = _SAMPLERS.get(settings.trace_sampler)
    if make is None:
        _log.warning("no trace sampler is called %r: parent-based", settings.trace_sampler)
        make = _SAMPLERS["parentbased_traceidratio"]
    return make(settings.trace_sample_ratio)
