"""A trace through the processes of `baton serve`, from a client's own span on; and what they tell their logs meanwhile."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from baton.client import Client, SamplingOptions
from tests.otlp_collector import collector, tree
from tests.served import Served, served, until

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(120)]

PROMPT = (
    "Once upon a time a swordfish swam to the sea, and there it met a small and very old boat. " * 3
)


def test_one_trace_leads_from_the_client_to_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: the spans of router, prefill and decode, each in a process of its own, are one tree below the client's span; with the real
    engine, KV over Ray, endpoint from the standard variable. No text leaves the processes.
    """
    with collector() as spans:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", spans.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        monkeypatch.setenv("BATON_STATUS_LINE_S", "0.2")
        sampling = SamplingOptions(max_tokens=12, seed=1, ignore_eos=True)
        with served(tmp_path, "--json-logs", "--log-level", "debug") as running:
            tracer = TracerProvider(shutdown_on_exit=False).get_tracer("application")
            with (
                Client(running.address) as client,
                tracer.start_as_current_span("asks") as asking,
            ):
                answer = client.complete(PROMPT, sampling=sampling, request_id="r1")
            root, processes = f"text_completion {answer.model}", {"decode", "prefill", "export"}
            spans.wait({root, "attempt", "admission", *processes})
            # Each at its own moment, so perhaps not in one line.
            for rate in ("prompt_tokens_per_s", "generation_tokens_per_s", "handoff_bytes_per_s"):
                until(partial(_tells, running, rate), 20, f"the status line tells of {rate}")
            assert running.stop() == 0
            lines = _lines(running)
    caller = asking.get_span_context()
    below = spans.trace(f"{caller.trace_id:032x}")
    (request,) = [span for span in below if span.name == root]
    assert request.parent_id == f"{caller.span_id:016x}"
    assert tree(below) == [
        (
            root,
            [
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
            ],
        )
    ]
    pids = {span.service: span.resource["process.pid"] for span in below}
    assert pids.keys() == {"baton-router", "baton-prefill", "baton-decode"}
    assert len(set(pids.values())) == 3
    assert request.attributes["gen_ai.usage.output_tokens"] == 12
    for said in ("swordfish", answer.text):
        assert said.encode() not in spans.raw
        assert said not in running.output()

    about = [line for line in lines if line.get("request") == "r1"]
    assert any(line["message"].startswith("request ended: ok") for line in about)
    assert {line["trace_id"] for line in about} == {f"{caller.trace_id:032x}"}


def _lines(running: Served) -> list[dict[str, Any]]:
    whole, _, _ = running.output().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def _tells(running: Served, rate: str) -> bool:
    told = (line for line in _lines(running) if line.get("logger") == "baton.status")
    return any(line[rate] for line in told)
