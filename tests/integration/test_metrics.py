"""What routers and workers export of requests that went through them: router and workers as they are shipped, simulated engines."""

import asyncio
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from baton.lifecycle import STAGES
from baton.service.keys import TenantLimits, add_key, new_key
from baton.types import Role, WorkerId
from baton.v1 import inference_pb2
from tests.integration.router_fakes import SETTINGS, Answer, request
from tests.integration.sim_house import SIM, House, house
from tests.prometheus import promtool

TARGETS = replace(SETTINGS, ttft_target_s=30.0, tpot_target_s=30.0)


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    return registry.get_sample_value(f"baton_{name}", labels) or 0.0


async def test_stages_tell_where_the_time_to_the_first_token_went() -> None:
    """Promise: each stage of an undisturbed request is observed once, and those before the first token add up to no more than it."""
    async with house(1, 1) as here:
        await here.generate(1)
        read = here.app.metrics.registry
        counts = {stage: value(read, "stage_seconds_count", stage=stage) for stage in STAGES}
        assert counts == dict.fromkeys(STAGES, 1.0)
        before = [stage for stage in STAGES if stage not in {"handoff", "decode"}]
        spent_s = sum(value(read, "stage_seconds_sum", stage=stage) for stage in before)
        assert 0 < spent_s <= value(read, "time_to_first_token_seconds_sum")
        assert value(read, "placement_seconds_count") == 1


async def test_a_prompt_that_decode_computes_has_no_handoff() -> None:
    async with house(0, 1) as here:
        await here.generate(1)
        read = here.app.metrics.registry
        assert value(read, "stage_seconds_count", stage="prefill") == 1
        assert value(read, "stage_seconds_count", stage="handoff") == 0


async def test_a_killed_worker_is_counted_and_so_is_the_pause_after_it() -> None:
    """Promise: a recovery is one observation, from the failure to the next new token, and the failed attempt names its stage."""
    async with house(1, 2) as here:
        answer = await killed_while_generating(here)
        read = here.app.metrics.registry
        assert len(answer.tokens) == 200
        assert value(read, "recovery_seconds_count", cause="failure") == 1
        assert value(read, "recovery_seconds_count", cause="drain") == 0
        assert value(read, "recovery_seconds_sum", cause="failure") > 0
        labels = {"outcome": "failed", "reason": "unavailable", "stage": "decode"}
        assert value(read, "attempts_total", **labels) == 1


async def test_what_a_drain_moves_is_no_failure() -> None:
    async with house(1, 2) as here:
        answer = Answer()
        draining = None
        async for response in here.call(1, max_tokens=300):
            answer.add(response)
            if draining is None and len(answer.tokens) >= 20:
                draining = asyncio.create_task(here.workers[serving(here)].drain(10))
        assert draining is not None
        await draining
        read = here.app.metrics.registry
        assert value(read, "recovery_seconds_count", cause="drain") == 1
        assert value(read, "recovery_seconds_count", cause="failure") == 0


async def test_goodput_counts_what_was_in_time() -> None:
    """Promise: a request's own TTFT objective goes before the settings', and one that misses it is served, but not good."""
    async with house(1, 1, settings=TARGETS) as here:
        await here.generate(1)
        read = here.app.metrics.registry
        assert value(read, "slo_requests_total", objective="ttft", outcome="met") == 1
        assert value(read, "slo_requests_total", objective="tpot", outcome="met") == 1
        assert value(read, "goodput_requests_total") == 1
        assert value(read, "goodput_tokens_total") == 12
    async with house(1, 1, settings=replace(TARGETS, ttft_target_s=1e-6)) as here:
        await here.generate(1)
        read = here.app.metrics.registry
        assert value(read, "slo_requests_total", objective="ttft", outcome="missed") == 1
        assert value(read, "goodput_requests_total") == 0
        assert value(read, "requests_total", outcome="ok") == 1


async def test_requests_that_are_their_callers_fault_miss_nothing() -> None:
    async with house(1, 1, settings=TARGETS) as here:
        for fields in ({"temperature": -1.0}, {"top_p": 7.0}):
            with pytest.raises(grpc.aio.AioRpcError):
                await here.generate(1, **fields)
        read = here.app.metrics.registry
        assert value(read, "requests_total", outcome="invalid_request") == 2
        assert value(read, "slo_requests_total", objective="ttft", outcome="missed") == 0
        assert value(read, "goodput_requests_total") == 0


async def test_refusals_are_counted_by_reason(tmp_path: Path) -> None:
    """Promise: a call without a key, and a request that comes while the router drains, are seen."""
    keys = str(tmp_path / "keys.json")
    entry, key = new_key("acme", limits=TenantLimits())
    add_key(keys, entry)
    settings = replace(SETTINGS, api_keys_file=keys, fleet_listen="127.0.0.1:0")
    bearing = (("authorization", f"Bearer {key}"),)
    async with house(1, 1, settings=settings) as here:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await here.inference.GetModel(inference_pb2.GetModelRequest(), metadata=metadata)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        await here.inference.GetModel(inference_pb2.GetModelRequest(), metadata=bearing)
        read = here.app.metrics.registry
        assert value(read, "refused_calls_total", reason="unauthenticated") == 2
        here.app.table.refuse_new()
        message = request(prompt=(1, 2, 3))
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in here.inference.Generate(message, metadata=bearing):
                pass
        assert value(read, "rejected_requests_total", reason="draining") == 1


async def test_prometheus_finds_no_fault() -> None:
    """Promise: what router and workers export after requests, a recovery and a refusal is clean by `promtool check metrics`."""
    async with house(1, 2, settings=TARGETS) as here:
        await killed_while_generating(here)
        with pytest.raises(grpc.aio.AioRpcError):
            await here.generate(1, temperature=-1.0)
        workers = [worker.host.metrics.registry for worker in here.workers.values()]
        assert len(workers) == 2
        for registry in (here.app.metrics.registry, *workers):
            assert promtool_says(registry) == []


async def test_workers_speak_vllms_names_too() -> None:
    """Promise: what an endpoint picker asks a vLLM server for, with its labels, is a Baton worker's load."""
    async with house(1, 1) as here:
        await here.generate(1)
        decode = next(w for w in here.workers.values() if w.host.info.role is Role.DECODE)
        read = decode.host.metrics.vllm_registry.get_sample_value
        labels = {"model_name": SIM.model, "engine": "0"}
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
            assert read(f"vllm:{name}", labels) == 0
        shape = {"engine": "0", "block_size": "16", "num_gpu_blocks": "128"}
        assert read("vllm:cache_config_info", shape) == 1


async def test_kv_usage_is_the_share_that_requests_hold() -> None:
    """Promise: blocks that are only cached do not count: a worker is above 0 while it generates, and at 0 again at rest."""
    async with house(0, 1) as here:
        (worker,) = here.workers.values()

        async def usage() -> float:
            await worker.host.engine.refresh_load()
            labels = {"model_name": SIM.model, "engine": "0"}
            read = worker.host.metrics.vllm_registry.get_sample_value
            return read("vllm:kv_cache_usage_perc", labels) or 0.0

        seen = [await usage() async for _ in here.call(1, max_tokens=200)]
        assert 0 < max(seen) <= 1
        await here.settled()
        assert await usage() == 0
        registry = worker.host.metrics.registry
        assert value(registry, "worker_kv_blocks", role="decode", state="cached") > 0


def promtool_says(registry: CollectorRegistry) -> list[str]:
    checked = promtool("check", "metrics", stdin=generate_latest(registry).decode())
    return sorted((checked.stdout + checked.stderr).splitlines())


def serving(here: House) -> WorkerId:
    """The decode worker that generates."""
    infos = here.app.fleet.registry.infos()
    decodes = [info.worker_id for info in infos if info.role is Role.DECODE]
    return next(name for name in decodes if here.workers[name].host.num_calls)


async def killed_while_generating(here: House) -> Answer:
    answer, killing = Answer(), None
    async for response in here.call(1, max_tokens=200):
        answer.add(response)
        if killing is None and len(answer.tokens) >= 20:
            killing = asyncio.create_task(here.kill(serving(here)))
    assert killing is not None
    await killing
    return answer
