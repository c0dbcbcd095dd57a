"""The lines that a fleet logs about a request, on the router and on its workers: each names it, and its trace."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from baton.service import logging as service_logging
from baton.service.settings import LogFormat, LogLevel, ServerSettings
from baton.service.status_line import StatusLine
from prefill_worker.prefiller import Prefiller
from tests.integration.router_fakes import SETTINGS, request
from tests.integration.sim_house import LENGTH, WORKERS, house, prompt_of
from tests.otlp_collector import collector

SECRET = "swordfish"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What the process logs, as JSON, at DEBUG."""
    root, status = logging.getLogger(), logging.getLogger(service_logging.STATUS_LOGGER)
    kept = root.handlers[:], root.level, status.level
    stream = io.StringIO()
    settings = ServerSettings(log_format=LogFormat.JSON, log_level=LogLevel.DEBUG)
    service_logging.configure(settings, stream, {})
    yield stream
    root.handlers[:] = kept[0]
    root.setLevel(kept[1])
    status.setLevel(kept[2])


def lines_of(log: io.StringIO, *loggers: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in lines if line["logger"] in loggers]


async def test_every_line_of_a_request_names_it_and_its_trace(log: io.StringIO) -> None:
    """Promise: on the router and on every worker, of requests that run side by side, where one loses its worker."""
    with collector() as spans:
        settings = replace(SETTINGS, otlp_endpoint=spans.endpoint)
        workers = replace(WORKERS, otlp_endpoint=spans.endpoint)
        async with house(1, 2, settings=settings, workers=workers) as here:

            async def ask(number: int) -> None:
                message = request(
                    prompt=prompt_of(number),
                    request_id=f"r{number}",
                    max_tokens=300,
                    seed=number,
                    ignore_eos=True,
                )
                seen = 0
                async for response in here.inference.Generate(message, timeout=20):
                    seen += response.HasField("chunk")
                    if number == 0 and seen == 1:
                        busy = (
                            each
                            for each, worker in here.workers.items()
                            if "decode" in each and worker.host.num_calls
                        )
                        await here.kill(next(busy))

            await asyncio.gather(*(ask(number) for number in range(4)))
    lines = lines_of(log, "router.account", "router.generation", "baton.worker.calls")
    traces = {
        span.attributes["gen_ai.response.id"]: span.trace_id
        for span in spans.named("text_completion sim")
    }
    ended = lines_of(log, "router.account")
    assert sorted(line["request"] for line in ended) == [f"r{number}" for number in range(4)]
    assert any("attempt 0 ended" in line["message"] for line in lines)
    for line in lines:
        assert line["trace_id"] == traces[line["request"]]
    for line in lines_of(log, "baton.worker.calls"):
        name, _, unique = line["attempt"].partition("/")
        assert (name, unique[-2:-1]) == (line["request"], "#")


async def test_a_bugs_line_names_the_request_that_met_it(
    log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise: what a worker's bug is looked up by is in its line, whether the call came by itself or in the shared stream."""
    met: list[object] = []

    def fail(_self: Prefiller, job: object) -> None:
        met.append(job)
        raise RuntimeError(SECRET)  # the frames of a traceback are logged, and tell this line

    async with house(1, 1) as here:
        await here.generate(0)  # which opens the tunnels
        monkeypatch.setattr(Prefiller, "_check", fail)
        answer = await here.generate(1, request_id="r1")
        assert len(answer.tokens) == LENGTH  # decode computes the prompt, as after any failure
    told = lines_of(log, "baton.service.interceptors")
    assert len(told) == len(met) > 0
    assert {line["request"] for line in told} == {"r1"}
    assert SECRET not in log.getvalue()


async def test_the_status_line_of_a_router_tells_its_fleets_work(log: io.StringIO) -> None:
    """Promise: figures of what was done, from the metrics that are there anyway, then one idle line."""
    async with house(1, 1) as here:
        line = StatusLine(here.app._snapshot, 0.0)
        await line.tell()
        await here.generate(1)
        await here.generate(1)
        await line.tell()
        await line.tell()
        await line.tell()
    busy, idle = lines_of(log, service_logging.STATUS_LOGGER)
    assert idle["message"].startswith("idle")
    assert busy["running"] == busy["waiting"] == 0
    assert busy["prefix_hit_rate"] > 0
    for name in ("prompt_tokens_per_s", "generation_tokens_per_s", "handoff_bytes_per_s"):
        assert busy[name] > 0
    assert busy["ttft_p50_s"] > 0


async def test_what_runs_counts_as_generated_before_it_ends(log: io.StringIO) -> None:
    del log
    async with house(1, 1) as here:
        before = await here.app._snapshot()
        call = here.call(1, max_tokens=2000)
        async for response in call:
            if response.HasField("chunk"):
                during = await here.app._snapshot()
                assert during.running == 1
                assert during.generated_tokens > before.generated_tokens
                break
        call.cancel()
        assert await here.app.table.idle(5)
