"""Traces of a fleet with simulated engines, as a collector gets them: one for each request, from the caller's span to every worker's."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any

import grpc
import httpx
import pytest

from baton.v1 import inference_pb2
from router.kserve.v2 import inference_pb2 as kserve
from router.kserve.v2 import inference_pb2_grpc as kserve_grpc
from tests.integration.router_fakes import SETTINGS, Answer, request
from tests.integration.sim_house import LENGTH, WORKERS, House, house, prompt_of
from tests.otlp_collector import Collector, SpanSeen, collector, tree

SECRET = "swordfish"
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
SAMPLED = (("traceparent", f"00-{TRACE_ID}-{CALLER}-01"), ("tracestate", "vendor=1"))
UNSAMPLED = (("traceparent", f"00-{TRACE_ID}-{CALLER}-00"),)
WHOLE: list[tuple[str, Any]] = [
    ("admission", []),
    (
        "attempt",
        [
            (
                "decode",
                [("queue", []), ("handoff", [("export", [])]), ("generate", [])],
            ),
            ("prefill", [("queue", []), ("compute", []), ("hold", [])]),
        ],
    ),
]
"""What is below a request's span where nothing goes wrong."""


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    with collector() as here:
        yield here


def traced(
    spans: Collector, *, decode: int = 1, ratio: float = 1.0
) -> AbstractAsyncContextManager[House]:
    """A house whose workers trace everything, and whose router as much as the ratio says."""
    endpoint = spans.endpoint
    return house(
        1,
        decode,
        settings=replace(SETTINGS, otlp_endpoint=endpoint, trace_sample_ratio=ratio),
        workers=replace(WORKERS, otlp_endpoint=endpoint),
    )


async def ask(
    here: House, message: inference_pb2.GenerateRequest, metadata: tuple[tuple[str, str], ...] = ()
) -> Answer:
    answer = Answer()
    async for response in here.inference.Generate(message, timeout=20, metadata=metadata):
        answer.add(response)
    return answer


def message(number: int, **changes: object) -> inference_pb2.GenerateRequest:
    sampling = {"max_tokens": LENGTH, "seed": number, "ignore_eos": True}
    return request(prompt=prompt_of(number), **(sampling | changes))


def within(inner: SpanSeen, outer: SpanSeen) -> bool:
    return outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns


async def test_a_request_is_one_trace_from_its_caller_to_every_worker(spans: Collector) -> None:
    """Promise: below the caller's span, whether the router calls a worker by itself or in the shared stream."""
    async with traced(spans) as here:
        for number in range(3):
            await ask(here, message(number, request_id=f"r{number}"), SAMPLED)
        assert all(member.tunnel.is_open for member in here.app.fleet.members())
    roots = spans.named("text_completion sim")
    assert len(roots) == 3
    assert {span.trace_id for span in spans.spans} == {TRACE_ID}
    for root in roots:
        assert root.parent_id == CALLER
        assert tree(spans.spans, root.span_id) == WHOLE
    by_id = {span.span_id: span for span in spans.spans}
    for span in spans.spans:
        if span.parent_id != CALLER and span.name != "prefill":
            assert within(span, by_id[span.parent_id]), (span, by_id[span.parent_id])
    assert {(span.service, span.name) for span in spans.spans} == {
        *(("baton-router", name) for name in ("text_completion sim", "admission", "attempt")),
        *(("baton-prefill", name) for name in ("prefill", "queue", "compute", "hold", "export")),
        *(("baton-decode", name) for name in ("decode", "queue", "handoff", "generate")),
    }


async def test_spans_tell_what_the_conventions_name_and_nothing_that_was_said(
    spans: Collector,
) -> None:
    """Promise: the facts of a request by OpenTelemetry's names; neither prompt, stop string nor output in any exported byte."""
    text = f"{SECRET} " * 12
    async with traced(spans) as here:
        asked = request(
            text=text,
            request_id="r1",
            stop=[f"{SECRET}!"],
            cache_salt=SECRET,
            max_tokens=LENGTH,
            temperature=0.5,
            top_p=0.25,
            ignore_eos=True,
            seed=1,
        )
        answer = await ask(here, asked)
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(here, request(text=text, request_id=f"{SECRET}!"))
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(here, request(text=text, stop=[SECRET * 99]))
    root, *refused = spans.named("text_completion sim")
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "baton",
        "gen_ai.request.model": "sim",
        "gen_ai.response.model": "sim",
        "gen_ai.response.id": "r1",
        "gen_ai.request.max_tokens": LENGTH,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": len(text),
        "gen_ai.usage.output_tokens": LENGTH,
        "rpc.system": "grpc",
        "rpc.service": "baton.v1.InferenceService",
        "rpc.method": "Generate",
        "server.address": "127.0.0.1",
        "baton.attempts": 1,
    }
    assert root.attributes | expected == root.attributes
    assert root.events == ["first_token", "last_token"]
    assert [span.attributes["error.type"] for span in refused] == ["invalid_request"] * 2
    (handoff,), (export,) = spans.named("handoff"), spans.named("export")
    (attempt,), (decode,) = spans.named("attempt"), spans.named("decode")
    assert decode.attributes["baton.handoff.bytes"] > 0
    assert attempt.attributes["baton.handoff.bytes"] == decode.attributes["baton.handoff.bytes"]
    assert attempt.attributes["baton.decode.worker_id"] == decode.attributes["baton.worker.id"]
    assert export.attributes["baton.tokens"] == len(text)
    assert (handoff.kind, export.kind) == (3, 2)  # client and server
    assert answer.text
    for said in (SECRET, answer.text):
        assert said.encode() not in spans.raw


async def test_each_attempt_is_a_span_with_its_failure(spans: Collector) -> None:
    """Promise: where a worker dies, the trace shows the attempt that failed, why, and the one that went on."""
    async with traced(spans, decode=2) as here:
        call = here.inference.Generate(message(1, max_tokens=400), timeout=20, metadata=SAMPLED)
        killed = ""
        async for response in call:
            if not killed and response.HasField("chunk"):
                killed = next(
                    each
                    for each, worker in here.workers.items()
                    if "decode" in each and worker.host.num_calls
                )
                await here.kill(killed)
    first, second = sorted(spans.named("attempt"), key=lambda span: span.start_ns)
    assert (first.failed, second.failed) == (True, False)
    assert first.attributes["baton.decode.worker_id"] == killed
    assert first.attributes["error.type"] == "unavailable"
    assert second.attributes["baton.resumed_tokens"] > 0
    assert [span.attributes["baton.attempt"] for span in (first, second)] == [0, 1]
    (root,) = spans.named("text_completion sim")
    assert not root.failed
    assert root.attributes["baton.attempts"] == 2
    assert {span.parent_id for span in (first, second)} == {root.span_id}
    assert second.start_ns >= first.end_ns


async def test_a_request_that_is_cancelled_leaves_a_whole_trace(spans: Collector) -> None:
    """Promise: no span that others name as their parent is missing, and a client that goes away is no failure."""
    async with traced(spans) as here:
        call = here.inference.Generate(message(1, max_tokens=2000), timeout=20)
        async for response in call:
            if response.HasField("chunk"):
                call.cancel()
                break
        assert await here.app.table.idle(5)
    ids = {span.span_id for span in spans.spans}
    assert {span.parent_id for span in spans.spans} - ids == {""}
    (root,) = spans.named("text_completion sim")
    assert root.attributes["error.type"] == "cancelled"
    assert [(span.name, span.attributes) for span in spans.spans if span.failed] == []


@pytest.mark.parametrize(
    ("headers", "ratio", "sampled"),
    [
        (SAMPLED, 0.0, True),
        (UNSAMPLED, 1.0, False),
        ((), 0.0, False),
        ((), 1.0, True),
        ((("traceparent", "rubbish"),), 1.0, True),
    ],
    ids=["told to", "told not to", "none of its own", "all of its own", "told nonsense"],
)
async def test_what_is_traced_is_decided_where_a_trace_begins(
    spans: Collector,
    headers: tuple[tuple[str, str], ...],
    ratio: float,
    *,
    sampled: bool,
) -> None:
    """Promise: for all of a trace alike: workers, which would trace everything, follow the router."""
    async with traced(spans, ratio=ratio) as here:
        answer = await ask(here, message(1), headers)
        assert answer.tokens
    names = spans.names()
    assert names == ({"text_completion sim"} | _names(WHOLE) if sampled else set())
    assert len({span.trace_id for span in spans.spans}) == int(sampled)


async def test_a_dead_collector_costs_spans_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Promise: requests are served as ever, what waits for a collector is bounded, and the end is not held up by it."""
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))  # and never listens
        for name, value in {"MAX_QUEUE_SIZE": "8", "MAX_EXPORT_BATCH_SIZE": "4"}.items():
            monkeypatch.setenv(f"OTEL_BSP_{name}", value)
        nobody = Collector(port=dead.getsockname()[1])
        async with asyncio.timeout(40), traced(nobody) as here:
            answers = await asyncio.gather(*(ask(here, message(number)) for number in range(20)))
            assert all(len(answer.tokens) == LENGTH for answer in answers)
            processors = here.app._tracing._provider._active_span_processor  # type: ignore[attr-defined]
            (processor,) = processors._span_processors
            assert len(processor._batch_processor._queue) <= 8


async def test_n_completions_are_attempts_of_one_request(spans: Collector) -> None:
    async with traced(spans) as here:
        async for _ in here.inference.Generate(message(1, n=2), timeout=20):
            pass
    (root,) = spans.named("text_completion sim")
    attempts = spans.named("attempt")
    assert [span.parent_id for span in attempts] == [root.span_id] * 2
    assert sorted(span.attributes["baton.choice"] for span in attempts) == [0, 1]
    assert root.attributes["gen_ai.response.finish_reasons"] == ["length", "length"]


def _names(below: list[tuple[str, Any]]) -> set[str]:
    return {name for name, _ in below}.union(*(_names(inner) for _, inner in below))


async def test_a_request_in_another_protocol_is_traced_alike(spans: Collector) -> None:
    """Promise: also one that its front refuses."""
    text = kserve.ModelInferRequest.InferInputTensor(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"hello " * 12)
    asked = kserve.ModelInferRequest(model_name="sim", id="r1", inputs=[text])
    asked.parameters["max_tokens"].int64_param = LENGTH
    async with (
        traced(spans) as here,
        grpc.aio.insecure_channel(f"127.0.0.1:{here.app.port}") as channel,
    ):
        stub = kserve_grpc.GRPCInferenceServiceStub(channel)
        await stub.ModelInfer(asked, timeout=20, metadata=SAMPLED)
        text.name = "nonsense"
        refused = kserve.ModelInferRequest(model_name="sim", inputs=[text])
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.ModelInfer(refused, timeout=20, metadata=SAMPLED)
    (root,), (failed,) = spans.named("text_completion sim"), spans.named("text_completion")
    assert root.parent_id == failed.parent_id == CALLER
    assert tree(spans.spans, root.span_id) == WHOLE
    assert root.attributes["rpc.service"] == "inference.GRPCInferenceService"
    assert str(root.attributes["gen_ai.response.id"]).startswith("r1.")
    assert failed.attributes["error.type"] == "invalid_request"


async def test_a_request_over_http_is_traced_alike(spans: Collector) -> None:
    """Promise: below the span that its `traceparent` header names; also one that is refused."""
    settings = replace(SETTINGS, otlp_endpoint=spans.endpoint, http_listen="127.0.0.1:0")
    workers = replace(WORKERS, otlp_endpoint=spans.endpoint)
    async with house(1, 1, settings=settings, workers=workers) as here:
        assert here.app.http is not None
        url = f"http://127.0.0.1:{here.app.http.port}/v1/completions"
        async with httpx.AsyncClient(headers=dict(SAMPLED), trust_env=False) as client:
            asked = {"model": "sim", "prompt": "hello " * 12, "max_tokens": LENGTH}
            assert (await client.post(url, json=asked)).status_code == 200
            assert (await client.post(url, json=asked | {"max_tokens": -1})).status_code == 400
            assert (await client.post(url, content=b"{")).status_code == 400
    root, invalid = spans.named("text_completion sim")
    (unread,) = spans.named("text_completion")
    assert root.parent_id == invalid.parent_id == unread.parent_id == CALLER
    assert tree(spans.spans, root.span_id) == WHOLE
    assert root.attributes["http.route"] == "/v1/completions"
    for failed in (invalid, unread):
        assert failed.attributes["error.type"] == "invalid_request"
