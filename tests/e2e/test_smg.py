"""smg, a router that nobody here wrote, in a process of its own before Baton's workers."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

import baton
from baton.client import AsyncClient, SamplingOptions
from baton.engine.sim import SimConfig
from baton.service.settings import LogLevel, WorkerSettings
from baton.transfer.ray_runtime import RayCluster
from baton.types import Role
from tests.faults.actors import TORCH, actor_fleet
from tests.foreign_router import answer_of, foreign_router, generate_request, smg
from tests.worker_rig import SIM, Rig, worker_pair

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

TALES = Path(baton.__file__).parent / "models" / "tales"
TEXTUAL = replace(
    SIM, model="tales", vocab_size=2336, num_blocks=256, directory=str(TALES), step_s=0.002
)
LONG = "Once upon a time there was a small dog who lived in a big house near the sea. " * 2


@asynccontextmanager
async def sim_pair(
    log: Path, *flags: str, sim: SimConfig = TEXTUAL, **settings: Any
) -> AsyncIterator[tuple[Rig, httpx.AsyncClient]]:
    """Both workers and smg; at the end nothing may be held."""
    chosen = WorkerSettings(handoff_timeout_s=5.0, **settings)
    async with worker_pair(prefill_sim=sim, decode_sim=sim, settings=chosen) as rig:
        prefill, decode = rig.prefill.host.info.address, rig.decode.host.info.address
        async with smg(log / "smg.log", sim.model, [prefill], [decode], *flags) as http:
            yield rig, http
            await rig.settled()


def question(prompt: str = LONG, **changes: Any) -> dict[str, Any]:
    asked = {"model": "tales", "prompt": prompt, "max_tokens": 12, "temperature": 0}
    return asked | {"ignore_eos": True} | changes


async def streamed(http: httpx.AsyncClient, path: str, asked: dict[str, Any]) -> list[Any]:
    """The events of a stream, which must end as it should."""
    async with http.stream("POST", path, json=asked | {"stream": True}) as response:
        assert response.status_code == httpx.codes.OK
        lines = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def handed_bytes(rig: Rig) -> float:
    metric = rig.decode.host.metrics.registry.get_sample_value
    return metric("baton_worker_handoff_bytes_total", {"role": "decode"}) or 0.0


async def test_smg_serves_completions_and_chats_from_a_prefill_and_a_decode_worker(
    tmp_path: Path,
) -> None:
    """Promise: whole and streamed, with usage, stop strings and several choices; the KV goes from worker to worker."""
    async with sim_pair(tmp_path, foreign_kv_ttl_s=0.5) as (rig, http):
        whole = (await http.post("/v1/completions", json=question())).json()
        assert whole["usage"]["completion_tokens"] == 12
        assert handed_bytes(rig) == whole["usage"]["prompt_tokens"] * 16
        text = whole["choices"][0]["text"]
        events = await streamed(http, "/v1/completions", question())
        assert "".join(event["choices"][0]["text"] for event in events) == text

        stop = text[len(text) // 2 :][:3]
        stopped = (await http.post("/v1/completions", json=question(stop=stop))).json()
        assert stopped["choices"][0]["finish_reason"] == "stop"
        assert stopped["choices"][0]["text"] == text[: text.index(stop)]

        several = (await http.post("/v1/completions", json=question(n=2, temperature=1))).json()
        assert [choice["index"] for choice in several["choices"]] == [0, 1]

        chat = question(messages=[{"role": "user", "content": LONG}], seed=4, temperature=0.9)
        del chat["prompt"]
        said = (await http.post("/v1/chat/completions", json=chat)).json()
        parts = await streamed(http, "/v1/chat/completions", chat)
        deltas = [part["choices"][0]["delta"].get("content") or "" for part in parts]
        assert "".join(deltas) == said["choices"][0]["message"]["content"]


async def test_a_client_that_leaves_smg_frees_both_pools(tmp_path: Path) -> None:
    """Promise: however far its request had come, and whether it was streamed or not."""
    slow = replace(TEXTUAL, step_s=0.01)
    async with sim_pair(tmp_path, sim=slow, foreign_kv_ttl_s=0.5) as (rig, http):
        for stream in (True, False):
            asked = question(max_tokens=3000, stream=stream)
            asking = asyncio.create_task(http.post("/v1/completions", json=asked))
            async with asyncio.timeout(10):
                while not (await rig.decode.host.engine.refresh_load()).used_blocks:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.wait({asking})
            await rig.settled(timeout_s=3.0)


async def test_what_workers_refuse_reaches_smgs_clients_as_the_http_status_that_it_is(
    tmp_path: Path,
) -> None:
    """Promise: a bad request is 400, a full pool is 429, a fleet that drains is 503."""
    small = replace(TEXTUAL, num_blocks=8, step_s=0.02)
    settings = {"foreign_max_waiting": 1, "foreign_kv_ttl_s": 60.0}
    async with sim_pair(tmp_path, "--disable-circuit-breaker", sim=small, **settings) as (
        rig,
        http,
    ):
        refused = await http.post("/v1/completions", json=question(regex="a+"))
        assert refused.status_code == httpx.codes.BAD_REQUEST
        assert "sampling_params.regex" in refused.text

        address = rig.prefill.host.info.address
        async with foreign_router(address, address) as router:
            fills = [generate_request(n, range(s, s + 112)) for s, n in ((1, "fill"), (9, "wait"))]
            await answer_of(router.prefill_call(fills[0]))
            waits = router.prefill_call(fills[1])
            async with asyncio.timeout(5):
                while not (await rig.prefill.host.engine.refresh_load()).waiting_requests:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            full = await http.post("/v1/completions", json=question("Another prompt"))
            assert full.status_code == httpx.codes.TOO_MANY_REQUESTS
            waits.cancel()
            rig.prefill._foreign.abort("fill")

        await rig.prefill.drain(5.0)
        drained = await http.post("/v1/completions", json=question())
        assert drained.status_code == httpx.codes.SERVICE_UNAVAILABLE


async def test_a_deadline_reaches_smgs_clients_as_504_and_frees_both_pools(tmp_path: Path) -> None:
    """Promise: what a worker gives up by its own time limit is a gateway timeout, and nothing of it stays."""
    slow = replace(TEXTUAL, step_s=0.01)
    async with sim_pair(
        tmp_path, "--disable-retries", sim=slow, foreign_kv_ttl_s=0.5, default_timeout_s=1.0
    ) as (rig, http):
        late = await http.post("/v1/completions", json=question(max_tokens=3000))
        assert late.status_code == httpx.codes.GATEWAY_TIMEOUT
        assert "text" not in late.json()
        await rig.settled(timeout_s=3.0)
        assert (await http.post("/v1/completions", json=question())).status_code == httpx.codes.OK


@pytest.mark.ray
async def test_a_real_models_answers_over_ray_are_those_of_batons_own_router(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """Promise: token for token, greedy and drawn, with the KV through the object store; and nothing is held afterwards."""
    settings = WorkerSettings(log_level=LogLevel.ERROR, foreign_kv_ttl_s=2.0)
    async with actor_fleet(
        ray_cluster,
        replace(TORCH, kv_pool_tokens=16384),
        prefill=1,
        decode=1,
        environ={"BATON_LOCAL_PREFILL_TOKENS": "0"},
        settings=settings,
    ) as fleet:
        (prefill,), (decode,) = fleet.of(Role.PREFILL), fleet.of(Role.DECODE)
        addresses = prefill.info.address, decode.info.address
        async with (
            AsyncClient(fleet.addresses) as client,
            foreign_router(*addresses) as router,
            smg(tmp_path / "smg.log", "tales", addresses[:1], addresses[1:]) as http,
        ):
            tokenizer = Tokenizer.from_file(str(TALES / "tokenizer.json"))
            greedy: dict[str, Any] = {"temperature": 0.0}
            drawn: dict[str, Any] = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 7}
            for number, sampling in enumerate((greedy, drawn)):
                text = f"Story {number}. {LONG}"
                options = SamplingOptions(max_tokens=40, **sampling)
                own = await client.complete(text, sampling=options)
                before = await fleet.total(Role.DECODE, "baton_worker_handoff_bytes_total")
                said = (
                    await http.post(
                        "/v1/completions",
                        json=question(text, max_tokens=40, ignore_eos=False) | sampling,
                    )
                ).json()
                after = await fleet.total(Role.DECODE, "baton_worker_handoff_bytes_total")
                assert after > before
                assert said["choices"][0]["text"] == own.text
                assert said["usage"]["completion_tokens"] == own.usage.completion_tokens
                assert said["choices"][0]["finish_reason"] == own.finish_reason.value
                prompt = tokenizer.encode(text).ids
                ids = await router.generate(f"{number}", prompt, max_tokens=40, **sampling)
                assert ids.tokens == list(own.token_ids)
        await fleet.at_rest(10.0)
