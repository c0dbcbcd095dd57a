"""A collector for tests: OTLP over gRPC, with everything that it was sent."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Condition
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as services
from opentelemetry.proto.trace.v1 import trace_pb2

WAIT_S = 20.0
ERROR = trace_pb2.Status.STATUS_CODE_ERROR


@dataclass(frozen=True, slots=True)
class SpanSeen:
    """A span, and the resource that made it."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    kind: int
    failed: bool
    attributes: dict[str, Any]
    events: list[str]
    resource: dict[str, Any]

    @property
    def service(self) -> str:
        return str(self.resource["service.name"])


@dataclass
class Collector(services.TraceServiceServicer):
    """Keeps what comes."""

    port: int = 0
    raw: bytes = b""
    """Every request's bytes."""
    spans: list[SpanSeen] = field(default_factory=list)
    _changed: Condition = field(default_factory=Condition)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def Export(  # noqa: N802
        self,
        request: pb.ExportTraceServiceRequest,
        context: grpc.ServicerContext,  # noqa: ARG002
    ) -> pb.ExportTraceServiceResponse:
        with self._changed:
            self.raw += request.SerializeToString()
            for group in request.resource_spans:
                resource = _values(group.resource.attributes)
                for scope in group.scope_spans:
                    self.spans += [_seen(span, resource) for span in scope.spans]
            self._changed.notify_all()
        return pb.ExportTraceServiceResponse()

    def named(self, name: str) -> list[SpanSeen]:
        return [span for span in self.spans if span.name == name]

    def trace(self, trace_id: str) -> list[SpanSeen]:
        return [span for span in self.spans if span.trace_id == trace_id]

    def wait(self, names: set[str]) -> list[SpanSeen]:
        """The spans, once there is one of each name. Blocks."""
        with self._changed:
            complete = self._changed.wait_for(lambda: names <= self.names(), WAIT_S)
            assert complete, f"never came: {names - self.names()}, of {self.names()}"
            return list(self.spans)

    def names(self) -> set[str]:
        return {span.name for span in self.spans}


@contextmanager
def collector() -> Iterator[Collector]:
    """Listens on the loopback inside the context."""
    here = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    services.add_TraceServiceServicer_to_server(here, server)  # type: ignore[no-untyped-call]
    here.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield here
    finally:
        server.stop(0).wait()


def tree(spans: list[SpanSeen], parent_id: str = "") -> list[tuple[str, Any]]:
    """Names and what is below them, in order of time; of spans whose parent is not among them where no parent is given."""
    ids = {span.span_id for span in spans}
    below = [
        span
        for span in spans
        if (span.parent_id == parent_id if parent_id else span.parent_id not in ids)
    ]
    below.sort(key=lambda span: (span.start_ns, span.name))
    return [(span.name, tree(spans, span.span_id)) for span in below]


def _seen(span: trace_pb2.Span, resource: dict[str, Any]) -> SpanSeen:
    return SpanSeen(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        kind=span.kind,
        failed=span.status.code == ERROR,
        attributes=_values(span.attributes),
        events=[event.name for event in span.events],
        resource=resource,
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: _value(each.value) for each in attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind)
