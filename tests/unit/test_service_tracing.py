"""The seam of tracing: what is asked for, by which variables, and that nothing is there where it is not."""

import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

from baton.client.tracing import active_trace
from baton.errors import InvalidRequestError
from baton.service.settings import RouterSettings, ServerSettings
from baton.service.tracing import (
    NO_SPAN,
    NoTracing,
    Tracing,
    headers_of,
    http_origin,
    open_tracing,
    rpc_origin,
    trace_of,
)
from baton.types import NO_TRACE, TraceContext
from tests.otlp_collector import collector

ROOT = Path(__file__).parents[2]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
OTEL = "OTEL_EXPORTER_OTLP_"
HERE = "http://collector:4317"


@pytest.mark.parametrize(
    ("environ", "endpoint"),
    [
        ({}, ""),
        ({f"{OTEL}ENDPOINT": HERE}, HERE),
        ({f"{OTEL}ENDPOINT": "http://all:4317", f"{OTEL}TRACES_ENDPOINT": HERE}, HERE),
        ({f"{OTEL}ENDPOINT": "http://all:4317", "BATON_OTLP_ENDPOINT": HERE}, HERE),
        ({f"{OTEL}ENDPOINT": HERE, "BATON_OTLP_ENDPOINT": ""}, ""),
        ({f"{OTEL}ENDPOINT": HERE, "OTEL_SDK_DISABLED": "TRUE"}, ""),
        ({f"{OTEL}ENDPOINT": HERE, "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({f"{OTEL}ENDPOINT": HERE, "OTEL_TRACES_EXPORTER": "otlp"}, HERE),
        ({f"{OTEL}ENDPOINT": HERE, f"{OTEL}PROTOCOL": "http/protobuf"}, ""),
        ({f"{OTEL}ENDPOINT": HERE, f"{OTEL}PROTOCOL": "grpc"}, HERE),
    ],
)
def test_where_spans_go_is_read_from_the_standard_variables_and_from_batons(
    environ: dict[str, str], endpoint: str
) -> None:
    assert RouterSettings.from_env(environ).otlp_endpoint == endpoint


def test_what_is_sampled_is_read_from_the_standard_variables() -> None:
    standard = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    settings = ServerSettings.from_env(standard)
    assert (settings.trace_sampler, settings.trace_sample_ratio) == ("traceidratio", 0.25)
    foreign = {"OTEL_TRACES_SAMPLER": "jaeger_remote", "OTEL_TRACES_SAMPLER_ARG": "endpoint=x"}
    assert ServerSettings.from_env(foreign).trace_sample_ratio == 1.0
    own = ServerSettings.from_env(standard | {"BATON_TRACE_SAMPLE_RATIO": "0.5"})
    assert own.trace_sample_ratio == 0.5
    with pytest.raises(InvalidRequestError, match="OTEL_TRACES_SAMPLER_ARG"):
        ServerSettings.from_env(standard | {"OTEL_TRACES_SAMPLER_ARG": "much"})


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(InvalidRequestError, match="trace_sample_ratio"):
        open_tracing(ServerSettings(trace_sample_ratio=ratio), "baton-router", "r")


def test_without_an_endpoint_nothing_is_traced() -> None:
    tracing = open_tracing(ServerSettings(), "baton-router", "r")
    span = tracing.begin(TraceContext(PARENT))
    assert isinstance(tracing, NoTracing)
    assert (span.context, span.child(), span.recording) == (NO_TRACE, NO_SPAN, False)
    span.end("nothing", 0.0, 1.0)
    tracing.close()


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        ([], NO_TRACE),
        ([("traceparent", PARENT)], TraceContext(PARENT)),
        ([("Traceparent", PARENT), ("TraceState", "a=1")], TraceContext(PARENT, "a=1")),
        (
            [("tracestate", "a=1"), ("traceparent", PARENT), ("tracestate", "b=2")],
            TraceContext(PARENT, "a=1,b=2"),
        ),
        ([("tracestate", "a=1")], NO_TRACE),
        ([("traceparent", PARENT.encode())], NO_TRACE),
    ],
)
def test_a_callers_trace_is_in_its_headers(
    headers: list[tuple[str, str | bytes]], trace: TraceContext
) -> None:
    assert trace_of(headers) == trace
    assert trace_of(headers_of(trace)) == trace


def test_a_front_of_any_protocol_tells_where_a_request_comes_from() -> None:
    headers = [("traceparent", PARENT)]
    over_http = http_origin(headers, "POST", "/v1/chat/completions")
    over_grpc = rpc_origin(headers, "baton.v1.InferenceService", "Generate")
    assert over_http.trace == over_grpc.trace == TraceContext(PARENT)
    assert over_http.attributes["http.route"] == "/v1/chat/completions"
    assert over_grpc.attributes["rpc.method"] == "Generate"


def test_without_the_extra_everything_imports_and_nothing_is_traced() -> None:
    """Promise: an environment that names a collector does no harm to who has not installed the extra. (The API alone comes with the web
    framework.)
    """
    told = run(
        """
import sys
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
import router.app, prefill_worker.worker, decode_worker.worker, flex_worker.worker
from baton.service.settings import RouterSettings
from baton.service.tracing import NoTracing, open_tracing
settings = RouterSettings.from_env({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"})
assert isinstance(open_tracing(settings, "baton-router", "r"), NoTracing)
"""
    )
    assert "pip install -e '.[otel]'" in told


def test_a_client_needs_nothing_of_opentelemetry() -> None:
    run(
        """
import sys
sys.modules["opentelemetry"] = None
import baton.client
from baton.client.tracing import active_trace
assert active_trace() == ()
"""
    )


def run(script: str) -> str:
    """In a process of its own, which must succeed; returns what it told."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_process_that_traces_nothing_loads_no_exporter() -> None:
    run(
        """
import sys
import router.app, prefill_worker.worker, decode_worker.worker, baton.client
from baton.client.tracing import active_trace
from baton.service.settings import ServerSettings
from baton.service.tracing import open_tracing
open_tracing(ServerSettings(), "baton-router", "r").close()
active_trace()
# The web framework has uses of its own for the API and the SDK's metrics.
loaded = [name for name in sys.modules if name.startswith(("baton.service.otlp", "opentelemetry.exporter"))]
assert not loaded, loaded
"""
    )


def opened(**settings: object) -> Tracing:
    return open_tracing(ServerSettings(**settings), "baton-router", "r")  # type: ignore[arg-type]


def test_an_operators_names_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llm")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with collector() as spans:
        tracing = opened(otlp_endpoint=spans.endpoint)
        tracing.begin(NO_TRACE).end("work", 1.0, 2.5, events=[("half", 1.75)], failure="why")
        tracing.close()
        tracing.close()
    (span,) = spans.spans
    assert span.service == "llm"
    assert span.resource["deployment.environment.name"] == "test"
    assert span.resource["service.instance.id"] == "r"
    assert (span.end_ns - span.start_ns, span.events, span.failed) == (1.5e9, ["half"], True)


@pytest.mark.parametrize(
    ("sampler", "parent", "sampled"),
    [
        ("always_off", "", False),
        ("always_on", PARENT[:-1] + "0", True),
        ("traceidratio", PARENT, False),
        ("parentbased_traceidratio", PARENT, True),
        ("parentbased_always_off", "", False),
        ("parentbased_always_off", PARENT, True),
        ("parentbased_always_on", "", True),
        ("jaeger_remote", PARENT, True),
    ],
)
def test_samplers_are_those_of_the_standard(sampler: str, parent: str, *, sampled: bool) -> None:
    with collector() as spans:
        tracing = opened(
            otlp_endpoint=spans.endpoint, trace_sampler=sampler, trace_sample_ratio=0.0
        )
        span = tracing.begin(TraceContext(parent))
        child = span.child()
        for each in (span, child):
            assert each.recording is sampled
            assert each.context.traceparent.endswith(f"-0{int(sampled)}")
        child.end("child", 1.0, 2.0)
        span.end("span", 1.0, 2.0)
        tracing.close()
    assert spans.names() == ({"span", "child"} if sampled else set())


def test_an_unusable_variable_of_the_sdk_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "0")
    with pytest.raises(InvalidRequestError, match="otlp_endpoint"):
        opened(otlp_endpoint="http://127.0.0.1:1")


def test_a_clients_call_goes_below_the_span_that_is_active_where_it_is_made() -> None:
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("application")
    assert active_trace() == ()
    with tracer.start_as_current_span("asks") as asking:
        (header,) = active_trace()
    own = asking.get_span_context()
    assert header == (
        "traceparent",
        f"00-{own.trace_id:032x}-{own.span_id:016x}-{own.trace_flags:02x}",
    )
    assert active_trace() == ()
