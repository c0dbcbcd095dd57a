"""Workers under a foreign router, by vLLM's engine API: what they answer, and what they hold afterwards."""

import asyncio
import hashlib
import io
import json
import random
import threading
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from tokenizers import Tokenizer

import baton
from baton.engine.sim import SimConfig
from baton.errors import (
    CapacityError,
    FieldViolation,
    InvalidRequestError,
    PreconditionError,
    UnavailableError,
)
from baton.service.channel import open_channel
from baton.service.settings import WorkerSettings
from baton.types import SamplingParams, Sequence
from baton.vllm.legs import ForeignRequest, Held, Tokens
from baton.vllm.servicer import SERVICE
from baton.vllm.text import WorkerText
from tests.certificates import Authority
from tests.foreign_router import ForeignRouter, answer_of, foreign_router, generate_request
from tests.worker_rig import SIM, Rig, error_of, is_idle, key, worker_pair

TALES = Path(baton.__file__).parent / "models" / "tales"
TEXTUAL = replace(SIM, vocab_size=2336, directory=str(TALES))
"""With a tokenizer."""
PROMPT = tuple(range(1, 46))
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
DRAWN: dict[str, Any] = {
    "temperature": 0.8,
    "top_p": 0.9,
    "top_k": 40,
    "max_tokens": 12,
    "seed": 11,
    "repetition_penalty": 1.1,
    "ignore_eos": True,
}


@asynccontextmanager
async def pair(sim: SimConfig = SIM, **settings: Any) -> AsyncIterator[tuple[Rig, ForeignRouter]]:
    """Both workers, and a foreign router; at the end nothing may be held."""
    chosen = WorkerSettings(handoff_timeout_s=5.0, **settings)
    async with worker_pair(prefill_sim=sim, decode_sim=sim, settings=chosen) as rig:
        prefill, decode = rig.prefill.host.info.address, rig.decode.host.info.address
        async with foreign_router(prefill, decode) as router:
            yield rig, router
            await rig.settled()


async def native(rig: Rig, **sampling: Any) -> list[int]:
    """What the pair says to Baton's own router."""
    params = SamplingParams(**sampling)
    generate = rig.generate if params.max_tokens > 1 else rig.generate_locally
    return (await generate(key(f"native-{params}"), Sequence(PROMPT, (), params))).tokens


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("stream", [False, True])
async def test_tokens_are_those_of_the_native_path_and_the_kv_is_handed_over(
    sampling: dict[str, Any], *, stream: bool
) -> None:
    async with pair() as (rig, router):
        answer = await router.generate("a", PROMPT, stream=stream, **sampling)
        assert handed_bytes(rig) == len(PROMPT) * 16
        assert answer.tokens == await native(rig, **sampling)
        complete = answer.complete
        assert (complete.prompt_tokens, complete.completion_tokens) == (len(PROMPT), 12)
        assert complete.finish_reason == "length"
        assert bool(answer.chunks) == stream
        counts = [chunk.completion_tokens for chunk in answer.chunks]
        assert counts == sorted(set(counts))


def handed_bytes(rig: Rig) -> float:
    """KV that decode took from elsewhere."""
    metric = rig.decode.host.metrics.registry.get_sample_value
    return metric("baton_worker_handoff_bytes_total", {"role": "decode"}) or 0.0


async def test_a_prefix_that_decode_has_is_not_shipped_again_and_is_told() -> None:
    async with pair() as (rig, router):
        first = await router.generate("a", PROMPT, **GREEDY)
        again = await router.generate("b", PROMPT, **GREEDY)
        assert (first.complete.cached_tokens, again.complete.cached_tokens) == (0, 32)
        assert again.tokens == first.tokens
        assert handed_bytes(rig) == (45 + 13) * 16


@pytest.mark.parametrize(
    ("params", "is_pulled"),
    [
        (None, False),
        ("", False),
        ("[1]", False),
        ('{"do_remote_prefill": true}', False),
        ("nobody", False),
        ("another prompt", False),
        ("another model", False),
    ],
)
async def test_decode_computes_a_prompt_whose_kv_it_cannot_have(
    params: str | None, *, is_pulled: bool
) -> None:
    """Promise: whatever the router brings, a request that can be served is, with the same tokens."""
    async with pair() as (rig, router):
        request = generate_request("a", PROMPT, **GREEDY)
        handed = json.loads(
            (await answer_of(router.prefill_call(request))).complete.kv_transfer_params_json
        )
        changes = {
            "nobody": {"address": "nobody"},
            "another prompt": {"fingerprint": "0" * 32},
            "another model": {"digest": "another"},
        }
        if params in changes:
            params = json.dumps(handed | changes[params])
        if params is not None:
            request.kv_transfer_params_json = params
        answer = await answer_of(router.decode.Generate(request, timeout=20))
        assert bool(handed_bytes(rig)) == is_pulled
        await router.prefill.Abort(pb.AbortRequest(request_ids=["a"]))
        assert answer.tokens == await native(rig, **GREEDY)


async def test_kv_that_is_gone_is_computed_again_and_the_first_token_stands() -> None:
    """Promise: a prefill leg whose KV was freed costs time only."""
    async with pair(foreign_kv_ttl_s=0.05) as (rig, router):
        request = generate_request("a", PROMPT, stream=True, **DRAWN)
        first = await answer_of(router.prefill_call(request))
        await rig.settled()
        request.kv_transfer_params_json = first.complete.kv_transfer_params_json
        answer = await answer_of(router.decode.Generate(request, timeout=20))
        assert answer.chunks[0].token_ids == first.tokens
        assert handed_bytes(rig) == 0
        assert answer.tokens == await native(rig, **DRAWN)


async def test_kv_that_nobody_comes_for_is_freed_after_its_time_to_live() -> None:
    """Promise: a router that never sends the second leg costs prefill its blocks for `foreign_kv_ttl_s`."""
    async with pair(foreign_kv_ttl_s=0.3) as (rig, router):
        await answer_of(router.prefill_call(generate_request("a", PROMPT, **GREEDY)))
        load = await rig.prefill.host.engine.refresh_load()
        assert load.in_flight_blocks == 3
        assert rig.prefill.host.num_calls == 1


async def test_an_abort_frees_held_kv_at_once_and_any_number_of_times() -> None:
    async with pair(foreign_kv_ttl_s=60.0) as (rig, router):
        for request_id in ("a", "a", "b"):
            request = generate_request(request_id, PROMPT, **GREEDY)
            await answer_of(router.prefill_call(request))
        for ids in (["a", "unknown"], ["a", "b"], []):
            await router.prefill.Abort(pb.AbortRequest(request_ids=ids))
        await rig.settled()


async def test_an_abort_ends_a_call_with_what_it_has_said() -> None:
    async with pair(replace(SIM, step_s=0.02)) as (_, router):
        forever = GREEDY | {"max_tokens": 500}
        call = router.decode.Generate(generate_request("a", PROMPT, stream=True, **forever))
        responses = aiter(call)
        await anext(responses)
        await router.decode.Abort(pb.AbortRequest(request_ids=["a"]))
        answer = await answer_of(responses)
        assert answer.complete.finish_reason == "abort"
        assert 1 <= len(answer.complete.output_ids) < 500
        assert answer.complete.completion_tokens == len(answer.complete.output_ids)


async def test_an_abort_that_comes_before_its_job_runs_ends_the_call_at_once() -> None:
    """Promise: an error in bounded time, however early the abort."""
    async with pair(foreign_kv_ttl_s=60.0) as (rig, _):
        request = ForeignRequest(request_id="a", prompt=PROMPT, sampling=SamplingParams(**GREEDY))
        leg = rig.prefill._foreign
        call = asyncio.create_task(anext(leg.run(request.as_prefill())))
        await asyncio.sleep(0)
        leg.abort("a")
        with pytest.raises(UnavailableError, match="released"):
            await asyncio.wait_for(call, 5)
        await rig.settled()


async def test_whatever_ends_many_requests_nothing_stays_held() -> None:
    """Promise: callers that leave, aborts, KV that nobody takes, small pools, and several choices, all at once."""
    sim = replace(SIM, num_blocks=40, step_s=0.002)
    async with pair(sim, foreign_kv_ttl_s=0.2) as (rig, router):
        rng = random.Random(5)

        async def one(number: int) -> None:
            start, length = rng.randrange(100), rng.randrange(1, 80)
            request = generate_request(
                f"r{number % 20}",
                range(start, start + length),
                stream=rng.random() < 0.5,
                n=rng.choice((1, 1, 3)),
                max_tokens=rng.randrange(1, 30),
                temperature=1.0,
            )
            fate = rng.choice(("served", "served", "stranded", "left", "aborted"))
            first = await answer_of(router.prefill_call(request))
            if fate == "stranded":
                return
            request.kv_transfer_params_json = first.complete.kv_transfer_params_json
            call = router.decode.Generate(request, timeout=30)
            if fate == "left":
                await asyncio.sleep(rng.random() * 0.05)
                call.cancel()
                return
            if fate == "aborted":
                await router.decode.Abort(pb.AbortRequest(request_ids=[request.request_id]))
            answer = await answer_of(call)
            assert len(answer.completes) == request.sampling_params.n

        async with asyncio.timeout(30):
            await asyncio.gather(*(one(number) for number in range(60)))
        await rig.settled()


@pytest.mark.parametrize("leg", ["prefill", "decode"])
async def test_a_caller_that_leaves_frees_what_its_call_held(leg: str) -> None:
    async with pair(replace(SIM, step_s=0.05), foreign_kv_ttl_s=60.0) as (rig, router):
        host = rig.prefill.host if leg == "prefill" else rig.decode.host
        stub = router.prefill if leg == "prefill" else router.decode
        request = generate_request("a", range(1, 200), temperature=0, max_tokens=1)
        call = stub.Generate(request)
        async with asyncio.timeout(5):
            while is_idle(await host.engine.refresh_load()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        call.cancel()
        await rig.settled()


async def test_a_caller_that_leaves_at_the_first_token_frees_the_kv_behind_it() -> None:
    """Promise: what prefill handed over is given back at whatever token a call ends, the first one included."""
    async with pair(foreign_kv_ttl_s=60.0) as (rig, _):
        request = ForeignRequest(request_id="a", prompt=PROMPT, sampling=SamplingParams(**GREEDY))
        leg = rig.prefill._foreign.run(request.as_prefill())
        (held,) = [event async for event in leg if isinstance(event, Held)]
        events = rig.decode._foreign.run(replace(request, handed=held.handed), 5.0)
        assert await anext(events) == Tokens(0, held.handed.first)
        await events.aclose()
        await rig.settled()


async def test_kv_that_a_request_has_no_use_for_is_given_back() -> None:
    """Promise: a request of one token, which prefill's is, costs no transfer and leaves nothing held."""
    async with pair(foreign_kv_ttl_s=60.0) as (rig, router):
        one = await router.generate("a", PROMPT, **(GREEDY | {"max_tokens": 1}))
        assert one.tokens == await native(rig, **(GREEDY | {"max_tokens": 1}))
        ended = await router.generate(
            "b", PROMPT, temperature=0, max_tokens=9, stop_token_ids=one.tokens
        )
        assert ended.tokens == one.tokens
        assert ended.complete.finish_reason == "stop"
        assert ended.complete.matched_token_id == one.tokens[0]
        await rig.settled()
        assert handed_bytes(rig) == 0


async def test_ends_that_are_forbidden_at_the_begin_are_not_said_there() -> None:
    """Promise: prefill, which knows no `min_tokens`, cannot make decode break it."""
    async with pair(foreign_kv_ttl_s=60.0) as (rig, router):
        (first,) = await native(rig, **(GREEDY | {"max_tokens": 1}))
        for name, drawn in (("greedy", GREEDY), ("drawn", DRAWN)):
            ends = {"min_tokens": 4, "stop_token_ids": (first,)}
            answer = await router.generate(name, PROMPT, **(drawn | ends))
            assert answer.tokens == await native(rig, **(drawn | ends))


async def test_several_choices_share_one_prompt_and_are_those_of_the_native_path() -> None:
    async with pair() as (rig, router):
        answer = await router.generate("a", PROMPT, stream=True, n=3, **DRAWN)
        assert handed_bytes(rig) == len(PROMPT) * 16
        for choice, complete in answer.completes.items():
            assert list(complete.output_ids) == await native(rig, choice=choice, **DRAWN)
            streamed = [t for c in answer.chunks if c.index == choice for t in c.token_ids]
            assert streamed == list(complete.output_ids)
        assert sorted(answer.completes) == [0, 1, 2]


async def test_logprobs_are_told_for_every_token_the_first_one_included() -> None:
    async with pair() as (_, router):
        answer = await router.generate("a", PROMPT, stream=True, logprobs=1, **GREEDY)
        told = answer.complete.output_logprobs
        assert list(told.token_ids) == answer.tokens
        assert len(told.token_logprobs) == len(told.top_logprobs) == 12
        streamed = [p for chunk in answer.chunks for p in chunk.output_logprobs.token_logprobs]
        assert streamed == list(told.token_logprobs)


async def test_text_is_taken_where_the_worker_has_a_tokenizer_and_refused_by_name_elsewhere() -> (
    None
):
    text = "Once upon a time there was a dog"
    async with pair(TEXTUAL) as (_, router):
        ids = Tokenizer.from_file(str(TALES / "tokenizer.json")).encode(text).ids
        by_text = router.decode.Generate(generate_request("a", text, **GREEDY))
        by_ids = router.decode.Generate(generate_request("b", ids, **GREEDY))
        assert (await answer_of(by_text)).tokens == (await answer_of(by_ids)).tokens
    async with pair() as (_, router):
        for refused in (
            generate_request("a", text),
            generate_request("b", PROMPT, stop=["dog"]),
        ):
            error = await error_of(router.decode.Generate(refused))
            assert isinstance(error, InvalidRequestError)
            assert "this worker has no tokenizer" in error.message


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_output_after_the_token_that_completes_it(
    *, stream: bool
) -> None:
    tokenizer = Tokenizer.from_file(str(TALES / "tokenizer.json"))
    async with pair(TEXTUAL) as (_, router):
        whole = await router.generate("a", PROMPT, **GREEDY)
        text = tokenizer.decode(whole.tokens)
        stop = text[len(text) // 2 :][:4]
        count = next(n for n in range(13) if stop in tokenizer.decode(whole.tokens[:n]))
        answer = await router.generate("b", PROMPT, stream=stream, stop=[stop, "never"], **GREEDY)
        assert answer.tokens == whole.tokens[:count]
        assert answer.complete.finish_reason == "stop"
        assert answer.complete.matched_stop_str == stop


@pytest.mark.parametrize(
    ("field", "sampling"),
    [
        ("temperature", {"temperature": -1.0}),
        ("top_p", {"top_p": 1.5}),
        ("min_p", {"min_p": float("nan")}),
        ("n", {"n": 99}),
        ("max_tokens", {"max_tokens": 0}),
        ("min_tokens", {"min_tokens": 5, "max_tokens": 2}),
        ("logprobs", {"logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": 1}),
        ("truncate_prompt_tokens", {"truncate_prompt_tokens": 5}),
        ("json_object", {"json_object": True}),
        ("regex", {"regex": "a+"}),
        ("logit_bias", {"logit_bias": {-1: 1.0}}),
        ("stop_token_ids", {"stop_token_ids": [9999]}),
    ],
)
async def test_what_is_wrong_or_unsupported_is_refused_by_name(
    field: str, sampling: dict[str, Any]
) -> None:
    async with pair() as (_, router):
        for stub in (router.prefill, router.decode):
            error = await error_of(stub.Generate(generate_request("a", PROMPT, **sampling)))
            assert isinstance(error, InvalidRequestError)
            assert error.violations[0].field == f"sampling_params.{field}"


async def test_prompts_that_cannot_be_served_are_refused() -> None:
    async with pair() as (_, router):
        for prompt in ((), (1, 256), range(5000)):
            error = await error_of(router.decode.Generate(generate_request("a", prompt)))
            assert isinstance(error, InvalidRequestError)
            assert error.violations[0].field == "tokenized.input_ids"
        anonymous = await error_of(router.decode.Generate(generate_request("", PROMPT)))
        assert isinstance(anonymous, InvalidRequestError)
        request = generate_request("a", PROMPT, max_tokens=2)
        wrong_leg = await error_of(router.prefill.Generate(request))
        assert isinstance(wrong_leg, PreconditionError)


async def test_one_call_too_many_that_waits_for_blocks_is_refused() -> None:
    """Promise: a full pool is RESOURCE_EXHAUSTED for whoever would wait behind `foreign_max_waiting`; the others are served."""
    sim = replace(SIM, num_blocks=8, step_s=0.02)
    async with pair(sim, foreign_max_waiting=1, foreign_kv_ttl_s=60.0) as (rig, router):
        # Seven of eight blocks each, and no common prefix.
        first, second, third = (
            generate_request(name, range(start, start + 112), **GREEDY)
            for start, name in enumerate(("first", "second", "third"), start=1)
        )
        await answer_of(router.prefill_call(first))
        waits = router.prefill_call(second)
        async with asyncio.timeout(5):
            while not (await rig.prefill.host.engine.refresh_load()).waiting_requests:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert isinstance(await error_of(router.prefill_call(third)), CapacityError)
        await router.prefill.Abort(pb.AbortRequest(request_ids=["first"]))
        assert len((await answer_of(waits)).tokens) == 1
        await router.prefill.Abort(pb.AbortRequest(request_ids=["second"]))


async def test_a_worker_that_drains_refuses_calls_and_waits_for_the_kv_that_it_holds() -> None:
    """Promise: KV that was promised to a decode worker can still be pulled."""
    async with pair(foreign_kv_ttl_s=60.0) as (rig, router):
        request = generate_request("a", PROMPT, **GREEDY)
        first = await answer_of(router.prefill_call(request))
        draining = asyncio.create_task(rig.prefill.drain(20.0))
        async with asyncio.timeout(5):
            while (await router.prefill.HealthCheck(pb.HealthCheckRequest())).healthy:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        refused = await error_of(router.prefill_call(generate_request("b", PROMPT, **GREEDY)))
        assert isinstance(refused, UnavailableError)
        assert not draining.done()
        request.kv_transfer_params_json = first.complete.kv_transfer_params_json
        answer = await answer_of(router.decode.Generate(request, timeout=20))
        assert len(answer.tokens) == 12
        assert handed_bytes(rig) > 0
        async with asyncio.timeout(5):
            assert await draining


async def test_workers_tell_what_they_are_how_they_are_and_what_they_cannot() -> None:
    async with pair(TEXTUAL) as (rig, router):
        for role, stub, channel in (
            ("kv_producer", router.prefill, rig.prefill_channel),
            ("kv_consumer", router.decode, rig.decode_channel),
        ):
            model = await stub.GetModelInfo(pb.GetModelInfoRequest())
            assert (model.served_model_name, model.vocab_size) == ("sim", 2336)
            assert model.model_path == model.tokenizer_path == str(TALES)
            server = await stub.GetServerInfo(pb.GetServerInfoRequest())
            assert (server.kv_role, server.pairing_protocol) == (role, rig.digest)
            (load,) = (await stub.GetLoads(pb.GetLoadsRequest())).loads
            assert (load.num_used_tokens, load.max_total_num_tokens) == (0, 64 * 16)
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            for call in (
                stub.Embed(pb.EmbedRequest()),
                stub.FlushCache(common_pb2.FlushCacheRequest()),
                stub.StartProfile(common_pb2.StartProfileRequest()),
                stub.StopProfile(common_pb2.StopProfileRequest()),
                stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest()).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_tokenizer_can_be_fetched_and_is_the_checkpoints() -> None:
    async with pair(TEXTUAL) as (_, router):
        chunks = [
            chunk async for chunk in router.decode.GetTokenizer(common_pb2.GetTokenizerRequest())
        ]
        data = b"".join(chunk.data for chunk in chunks)
        assert [bool(chunk.sha256) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
        assert chunks[-1].sha256 == hashlib.sha256(data).hexdigest()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            assert archive.read("tokenizer.json") == (TALES / "tokenizer.json").read_bytes()
            assert "tokenizer_config.json" in archive.namelist()
    async with pair() as (_, router):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await router.decode.GetTokenizer(common_pb2.GetTokenizerRequest()).read()
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_who_has_no_certificate_of_the_fleet_gets_no_answer(tmp_path: Path) -> None:
    """Promise: the API is as closed as the worker's others."""
    fleet, stranger = Authority.make(tmp_path / "fleet"), Authority.make(tmp_path / "stranger")

    def settings(authority: Authority) -> WorkerSettings:
        files = authority.issue("worker")
        return WorkerSettings(
            keepalive_s=1.0,
            fleet_cert_file=files.cert,
            fleet_key_file=files.key,
            fleet_ca_file=str(fleet.ca_file),
        )

    own = settings(fleet)
    async with worker_pair(settings=own) as rig:
        address = rig.decode.host.info.address
        async with open_channel(address, own) as channel:
            router = ForeignRouter(channel, channel)
            answer = await answer_of(
                router.decode.Generate(generate_request("a", PROMPT, **GREEDY))
            )
            assert len(answer.tokens) == 12
        async with open_channel(address, settings(stranger)) as channel:
            router = ForeignRouter(channel, channel)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await router.decode.GetModelInfo(pb.GetModelInfoRequest(), timeout=5)
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_long_text_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise: while a worker tokenizes one request's text, it answers others, and its heartbeats go out."""
    begun, others_answered = threading.Event(), threading.Event()

    def encode(_: WorkerText, text: str) -> tuple[int, ...]:
        begun.set()
        assert others_answered.wait(20)
        raise InvalidRequestError(FieldViolation("text", f"of {len(text)} characters"))

    monkeypatch.setattr(WorkerText, "encode", encode)
    async with pair(TEXTUAL) as (rig, router):
        asking = asyncio.create_task(router.generate("a", "x" * 100_000, **GREEDY))
        assert await asyncio.to_thread(begun.wait, 20)
        async with open_channel(rig.decode.host.info.address, WorkerSettings()) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            await health.Check(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        others_answered.set()
        with pytest.raises(grpc.aio.AioRpcError, match="of 100000 characters"):
            await asking
