"""Admission as clients meet it: who is refused, with what, and that nobody else feels it."""

import asyncio
from typing import Any

import grpc
import pytest

from baton.client import AsyncClient, SamplingOptions
from baton.errors import BatonError, CapacityError, DeadlineError, InvalidRequestError
from baton.service.keys import TenantLimits
from baton.service.settings import PlacementPolicy
from baton.service.status import error_from_rpc
from baton.types import WorkerLoad
from baton.v1 import inference_pb2_grpc
from tests.integration.router_fakes import PROMPT, Cluster, FakeWorker, cluster, expected, request

SLOW = WorkerLoad(free_blocks=512, queued_prefill_tokens=5000, prefill_tokens_per_s=500.0)
"""Ten seconds of work are queued."""


def rejections(here: Cluster, reason: str) -> float:
    read = here.app.metrics.registry.get_sample_value
    return read("baton_rejected_requests_total", {"reason": reason}) or 0.0


async def slow_fleet(here: Cluster) -> FakeWorker:
    prefill = await here.prefill("p")
    await here.decode("d")
    prefill.load = SLOW
    await here.until(lambda: here.app.fleet.registry.view({}, 0).prefill[0].requests == 0)
    await here.until(
        lambda: here.app.fleet.registry.view({}, 0).prefill[0].queued_prefill_tokens == 5000
    )
    return prefill


async def hanging(here: Cluster) -> Any:
    """A call that is being served until it is cancelled."""
    here_it_is = asyncio.Event()
    await here.prefill("p")
    decode = await here.decode("d")

    async def script(stage: str) -> None:
        if stage == "token:4" and decode.keys[-1] == "running#0":
            here_it_is.set()
            await asyncio.Event().wait()

    decode.script = script
    call = here.call(request_id="running")
    await here_it_is.wait()
    return call


async def failure(here: Cluster, timeout_s: float = 20.0, **changes: object) -> BatonError:
    with pytest.raises(BatonError) as refused:
        await here.generate(timeout_s, **changes)
    return refused.value


async def test_a_first_token_that_cannot_come_in_time_is_refused_before_any_work() -> None:
    """By the objective or by the deadline, whichever is sooner; the reply says when to try again, and no worker was called."""
    async with cluster() as here:
        prefill = await slow_fleet(here)
        by_objective = await failure(here, ttft_slo_seconds=1.0)
        by_deadline = await failure(here, timeout_s=2.0)
        for error, most_s in ((by_objective, 10.0), (by_deadline, 9.0)):
            assert isinstance(error, CapacityError)
            assert 1.0 < error.retry_after_s < most_s
        assert prefill.keys == []
        assert rejections(here, "ttft") == 2
        answer = await here.generate(ttft_slo_seconds=15.0)
        assert answer.tokens == expected(PROMPT, 10)


async def test_a_default_objective_holds_for_requests_that_name_none() -> None:
    async with cluster(default_ttft_slo_s=1.0) as here:
        await slow_fleet(here)
        assert isinstance(await failure(here), CapacityError)
        assert (await here.generate(ttft_slo_seconds=15.0)).tokens == expected(PROMPT, 10)


async def test_a_request_that_waits_past_its_objective_is_refused_and_past_its_deadline_ends() -> (
    None
):
    async with cluster(max_running=1) as here:
        running = await hanging(here)
        late = await failure(here, ttft_slo_seconds=0.3)
        assert isinstance(late, CapacityError)
        assert "within the 0.3 s" in late.message
        assert late.retry_after_s < 1.0, "by nothing that is known"
        assert isinstance(await failure(here, timeout_s=0.3), DeadlineError)
        running.cancel()
        assert rejections(here, "ttft") == 1


async def test_more_urgent_requests_go_first_and_the_queue_is_counted_by_class() -> None:
    async with cluster(max_running=1) as here:
        running = await hanging(here)
        calls = []
        for number, priority in enumerate((0, -5, 7)):
            calls.append(here.call(request_id=f"r{number}", priority=priority, max_tokens=1))
            await here.until(lambda count=number + 2: len(here.app.table) == count)  # type: ignore[misc]
        read = here.app.metrics.registry.get_sample_value
        for name in ("low", "normal", "high"):
            assert read("baton_queued_requests", {"priority": name}) == 1
        running.cancel()
        await here.until(lambda: len(here.app.table) == 0)
        served = [key for key in here.workers[1].keys if key != "running#0"]
        assert served == ["r2#0", "r0#0", "r1#0"]
        assert read("baton_queue_wait_seconds_count", {"priority": "high"}) == 1


async def test_a_request_that_gives_way_in_a_full_queue_is_told_so() -> None:
    async with cluster(max_running=1, max_queued=1) as here:
        running = await hanging(here)
        waiting = asyncio.create_task(here.generate(max_tokens=1))
        await here.until(lambda: len(here.app.table) == 2)
        urgent = asyncio.create_task(here.generate(priority=50, max_tokens=1))
        with pytest.raises(CapacityError):
            await waiting
        running.cancel()
        assert (await urgent).tokens == expected(PROMPT, 1)
        assert rejections(here, "queue_full") == 1


async def test_a_tenants_limits_are_kept() -> None:
    """Concurrency makes its requests wait; a token rate refuses them, with the time after which to come again."""
    limits = TenantLimits(max_running=1, tokens_per_s=1.0, burst_tokens=2 * len(PROMPT) + 20)
    async with cluster(lambda _tenant: limits) as here:
        running = await hanging(here)
        second = asyncio.create_task(here.generate())
        await here.until(lambda: len(here.app.table) == 2)
        error = await failure(here)
        assert isinstance(error, CapacityError)
        assert error.retry_after_s == 60.0, "no more than a minute"
        running.cancel()
        assert (await second).tokens == expected(PROMPT, 10)
        assert rejections(here, "token_rate") == 1


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"priority": 101}, "priority"),
        ({"priority": -101}, "priority"),
        ({"ttft_slo_seconds": 0.0}, "ttft_slo_seconds"),
        ({"ttft_slo_seconds": float("nan")}, "ttft_slo_seconds"),
    ],
)
async def test_urgency_out_of_range_is_refused_by_field(
    changes: dict[str, float], field: str
) -> None:
    async with cluster() as here:
        await here.decode("d")
        error = await failure(here, **changes)
        assert isinstance(error, InvalidRequestError)
        assert [violation.field for violation in error.violations] == [field]


async def test_the_client_sends_priority_and_objective() -> None:
    async with cluster() as here:
        await slow_fleet(here)
        async with AsyncClient(here.address) as client:
            with pytest.raises(CapacityError):
                await client.complete(PROMPT, priority=3, ttft_slo_s=0.5)
            result = await client.complete(
                PROMPT, priority=3, ttft_slo_s=15.0, sampling=SamplingOptions(max_tokens=3)
            )
            assert list(result.token_ids) == expected(PROMPT, 3)


async def test_the_prediction_is_compared_with_what_came() -> None:
    async with cluster() as here:
        await slow_fleet(here)
        await here.generate()
        read = here.app.metrics.registry.get_sample_value
        await here.until(lambda: read("baton_ttft_prediction_error_seconds_count") == 1)
        assert read("baton_ttft_prediction_error_seconds_bucket", {"le": "-5.0"}) == 1


@pytest.mark.parametrize("placement", list(PlacementPolicy))
async def test_each_policy_serves(placement: PlacementPolicy) -> None:
    async with cluster(placement=placement) as here:
        for name in ("1", "2"):
            await here.prefill(f"p{name}")
            await here.decode(f"d{name}")
        answers = await asyncio.gather(*(here.generate() for _ in range(6)))
        assert all(answer.tokens == expected(PROMPT, 10) for answer in answers)


async def test_a_client_that_leaves_its_output_unread_loses_it_long_before_its_stream_stalls() -> (
    None
):
    """The buffer is bounded in bytes: the workers are freed when it is full, and others get their answers meanwhile."""
    async with cluster(max_unread_bytes=50_000, write_stall_s=3.0) as here:
        await here.prefill("p")
        decode = await here.decode("d")
        options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
        async with (
            AsyncClient(here.address) as other,
            grpc.aio.insecure_channel(here.address, options=options) as channel,
        ):
            stub = inference_pb2_grpc.InferenceServiceStub(channel)
            call: Any = stub.Generate(request(max_tokens=3900, logprobs=20))
            await anext(aiter(call))
            await here.until(lambda: decode.running == 1)
            result = await other.complete(PROMPT, sampling=SamplingOptions(max_tokens=10))
            assert list(result.token_ids) == expected(PROMPT, 10)
            # Freed by the bound on the buffer: the stream's own limit is yet to come.
            await here.until(lambda: decode.running == 0, 2.5)
            assert len(decode.keys) == 2
            with pytest.raises(grpc.aio.AioRpcError) as lost:
                async for _ in call:
                    pass
            assert isinstance(error_from_rpc(lost.value), CapacityError)
