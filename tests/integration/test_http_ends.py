"""However a request over HTTP ends, nothing of it is left on any worker; and what an end looks like before and after the first token."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from baton.errors import CancelledError
from baton.types import Role
from tests.integration.router_fakes import Cluster, CutError, cluster
from tests.integration.test_router_ends import STAGES, hanging

LISTEN: Any = {"http_listen": "127.0.0.1:0"}
BODY: dict[str, Any] = {"prompt": list(range(1, 101)), "max_tokens": 10, "seed": 1}


def url(here: Cluster) -> str:
    assert here.app.http is not None
    return f"http://127.0.0.1:{here.app.http.port}/v1/completions"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(("role", "stage"), STAGES)
async def test_a_client_that_goes_in_any_stage_leaves_nothing_behind(
    role: Role, stage: str, *, stream: bool
) -> None:
    async with cluster(**LISTEN) as here, httpx.AsyncClient() as client:
        hangs = await hanging(here, role, stage)
        asking = asyncio.create_task(client.post(url(here), json=BODY | {"stream": stream}))
        await hangs.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await here.settled()


async def test_a_timeout_of_any_length_is_no_workers_fault() -> None:
    """Promise: no number that a client can say fails an attempt, or brings a worker under suspicion."""
    async with cluster(**LISTEN) as here, httpx.AsyncClient() as client:
        await here.prefill("p")
        await here.decode("d")
        for timeout_s in ("1e300", "1e18", "1e12"):
            headers = {"x-request-timeout-s": timeout_s}
            answer = await client.post(url(here), json=BODY, headers=headers)
            assert answer.status_code == 200, answer.text
        ended = {"outcome": "ok", "reason": "ok", "stage": "decode"}
        count = here.app.metrics.registry.get_sample_value
        assert count("baton_attempts_total", ended) == 3
        assert not any(report.suspect for report in here.app.fleet.reports())


async def test_a_client_that_goes_while_it_waits_for_its_turn_leaves_nothing_behind() -> None:
    async with cluster(max_running=1, **LISTEN) as here, httpx.AsyncClient() as client:
        hangs = await hanging(here, Role.DECODE, "token:4")
        running = asyncio.create_task(client.post(url(here), json=BODY))
        await hangs.wait()
        waiting = asyncio.create_task(client.post(url(here), json=BODY))
        await here.until(lambda: len(here.app.table) == 2)
        waiting.cancel()
        await here.until(lambda: len(here.app.table) == 1)
        running.cancel()
        await asyncio.gather(running, waiting, return_exceptions=True)
        await here.settled()


async def test_what_fails_after_the_first_token_is_the_streams_last_event() -> None:
    """In OpenAI's form, and no `[DONE]` follows; the HTTP stream itself ends in order."""
    async with cluster(max_attempts=1, worker_wait_s=0.1, **LISTEN) as here:

        async def breaks(stage: str) -> None:
            if stage == "token:4":
                raise CutError

        await here.prefill("p")
        await here.add(Role.DECODE, "d", breaks)
        async with httpx.AsyncClient(timeout=20) as client:
            answer = await client.post(url(here), json=BODY | {"stream": True})
            assert answer.status_code == 200
            events = [line for line in answer.text.split("\n\n") if line]
            last = json.loads(events[-1].removeprefix("data: "))
            assert set(last["error"]) == {"message", "type", "param", "code"}
            assert "[DONE]" not in answer.text
            assert len(events) > 1
            whole = await client.post(url(here), json=BODY)
            assert whole.status_code in (500, 503)
            assert whole.json()["error"]["type"] in ("server_error", "unavailable_error")


async def test_a_deadline_that_passes_before_the_first_token_is_504_also_for_a_stream() -> None:
    async with cluster(**LISTEN) as here, httpx.AsyncClient() as client:
        await hanging(here, Role.PREFILL, "arrived")
        for stream in (True, False):
            answer = await client.post(
                url(here), json=BODY | {"stream": stream}, headers={"x-request-timeout-s": "0.3"}
            )
            assert (answer.status_code, answer.json()["error"]["code"]) == (
                504,
                "deadline_exceeded",
            )
        await here.settled()


async def test_a_stop_ends_what_runs_in_order() -> None:
    """A stream that the router's stop cuts is told so by its last event."""
    async with cluster(**LISTEN) as here, httpx.AsyncClient(timeout=20) as client:
        hangs = await hanging(here, Role.DECODE, "token:4")
        asking = asyncio.create_task(client.post(url(here), json=BODY | {"stream": True}))
        await hangs.wait()
        await here.app.stop()
        answer = await asking
        assert '"code": "draining"' in answer.text
        assert "[DONE]" not in answer.text


async def test_a_request_that_is_cancelled_by_id_is_told_so() -> None:
    async with cluster(**LISTEN) as here, httpx.AsyncClient() as client:
        hangs = await hanging(here, Role.PREFILL, "arrived")
        asking = asyncio.create_task(client.post(url(here), json=BODY))
        await hangs.wait()
        here.app.table.abort_all(CancelledError("cancelled"))
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (499, "cancelled")
        await here.settled()
