"""Bad input against the real server: each gets a typed status with details, and no other request feels it."""

import asyncio
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from baton.cli.config import shipped_model
from baton.client import AsyncClient, ChatMessage, Client, Result, SamplingOptions
from baton.errors import BatonError, InvalidRequestError, NotFoundError
from baton.v1 import common_pb2, inference_pb2
from tests.served import Served, baton, served

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

POOL_TOKENS = 640
GREEDY = SamplingOptions(max_tokens=24, temperature=0.0, ignore_eos=True)
GENERATE = "/baton.v1.InferenceService/Generate"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ["--transport", "memory", "--kv-tokens", str(POOL_TOKENS)]
    with served(tmp_path_factory.mktemp("bad"), *flags) as running:
        yield running


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(7 * i + 31 * seed) % 1500 + 20 for i in range(length)]


def request(**fields: object) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(**fields)  # type: ignore[arg-type]


def with_sampling(**fields: object) -> inference_pb2.GenerateRequest:
    return request(text="Mara", sampling=common_pb2.SamplingParams(**fields))  # type: ignore[arg-type]


INVALID = {
    "empty prompt": (request(text=""), "prompt"),
    "no prompt": (request(), "prompt"),
    "no token": (request(tokens=common_pb2.TokenIds()), "prompt"),
    "prompt beyond the context": (
        request(tokens=common_pb2.TokenIds(ids=prompt_of(5000))),
        "prompt",
    ),
    "token id out of range": (request(tokens=common_pb2.TokenIds(ids=[4_000_000_000])), "prompt"),
    "NaN temperature": (with_sampling(temperature=math.nan), "sampling.temperature"),
    "infinite top_p": (with_sampling(top_p=math.inf), "sampling.top_p"),
    "negative temperature": (with_sampling(temperature=-1.0), "sampling.temperature"),
    "negative top_k": (with_sampling(top_k=-1), "sampling.top_k"),
    "zero max_tokens": (with_sampling(max_tokens=0), "sampling.max_tokens"),
    "min_tokens above max_tokens": (
        with_sampling(max_tokens=2, min_tokens=3),
        "sampling.min_tokens",
    ),
    "NaN logit bias": (with_sampling(logit_bias={5: math.nan}), "sampling.logit_bias"),
    "empty stop string": (with_sampling(stop=[""]), "sampling.stop"),
    "too many logprobs": (with_sampling(logprobs=1000), "sampling.logprobs"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_request_is_refused_by_field(server: Served, name: str) -> None:
    message, field = INVALID[name]
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(
            GENERATE,
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )
        with pytest.raises(grpc.RpcError) as caught:
            list(call(message, timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(caught.value, grpc.Call)
    status = rpc_status.from_call(caught.value)
    assert status is not None
    bad_request = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad_request) for detail in status.details)
    assert any(v.field.startswith(field) for v in bad_request.field_violations), bad_request


def test_bytes_that_are_no_utf8_are_an_invalid_argument(server: Served) -> None:
    with grpc.insecure_channel(server.address) as channel:
        call = channel.unary_stream(GENERATE, request_serializer=bytes, response_deserializer=bytes)
        with pytest.raises(grpc.RpcError) as caught:
            list(call(b"\x1a\x03a\xff\xfe", timeout=10))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_over_the_limit_gets_a_status(server: Served) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequestError, match="larger"):
        client.complete("x" * (5 * 2**20), sampling=GREEDY)


def test_an_unknown_model_is_not_found(server: Served) -> None:
    with Client(server.address) as client, pytest.raises(NotFoundError):
        client.model("gpt-17")


def test_a_conversation_with_an_unknown_role_is_refused(server: Served) -> None:
    with Client(server.address) as client, pytest.raises(InvalidRequestError, match="role"):
        client.complete([ChatMessage("wizard", "hello")], sampling=GREEDY)


def test_an_expired_deadline_is_a_typed_error(server: Served) -> None:
    with Client(server.address) as client, pytest.raises(BatonError) as caught:
        client.complete("Mara", sampling=GREEDY, timeout_s=0.0)
    assert caught.value.reason == "DEADLINE_EXCEEDED"


def test_a_prompt_larger_than_the_pool_is_refused_and_a_batch_larger_than_it_is_queued(
    server: Served,
) -> None:
    with Client(server.address) as client:
        with pytest.raises(InvalidRequestError, match=str(POOL_TOKENS)):
            client.complete(prompt_of(POOL_TOKENS), sampling=GREEDY)
        alone = [client.complete(prompt_of(300, n), sampling=GREEDY).token_ids for n in range(6)]

    async def together() -> list[Result]:
        async with AsyncClient(server.address) as client:
            calls = [client.complete(prompt_of(300, n), sampling=GREEDY) for n in range(6)]
            return await asyncio.gather(*calls)

    assert [r.token_ids for r in asyncio.run(together())] == alone


def test_a_stop_string_that_spans_tokens_ends_the_text_before_it(server: Served) -> None:
    with Client(server.address) as client:
        whole = client.complete("Mara has", sampling=GREEDY)
        middle = len(whole.text) // 2
        stop = whole.text[middle - 4 : middle + 4]
        cut = client.complete("Mara has", sampling=replace(GREEDY, stop=[stop]))
    assert cut.stop_string == stop
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]


def test_all_of_it_at_once_harms_no_good_request(server: Served) -> None:
    """Promise: bad input always gets a reply and harms no other request."""
    prompt = prompt_of(200, 3)

    async def bad(channel: grpc.aio.Channel, message: inference_pb2.GenerateRequest) -> None:
        serialize = inference_pb2.GenerateRequest.SerializeToString
        call = channel.unary_stream(GENERATE, serialize, bytes)(message, timeout=20)
        with pytest.raises(grpc.RpcError):
            async for _ in call:
                pass

    async def storm() -> list[Result]:
        async with (
            AsyncClient(server.address) as client,
            grpc.aio.insecure_channel(server.address) as channel,
        ):
            good = [asyncio.create_task(client.complete(prompt, sampling=GREEDY)) for _ in range(4)]
            for _ in range(10):
                await asyncio.gather(*(bad(channel, message) for message, _ in INVALID.values()))
            return await asyncio.gather(*good)

    with Client(server.address) as client:
        expected = client.complete(prompt, sampling=GREEDY).token_ids
    assert {r.token_ids for r in asyncio.run(storm())} == {expected}


def truncate(directory: Path) -> str:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    return "model.safetensors"


def garble_config(directory: Path) -> str:
    (directory / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]')
    return "config.json"


def garble_tokenizer(directory: Path) -> str:
    (directory / "tokenizer.json").write_text("{}")
    return "tokenizer.json"


@pytest.mark.parametrize("spoil", [truncate, garble_config, garble_tokenizer])
def test_a_corrupt_checkpoint_is_named_at_start_up(
    tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    """Promise: serve ends at once with an exit code and the file's name; nothing is left running."""
    directory = tmp_path / "model"
    shutil.copytree(shipped_model(), directory)
    culprit = spoil(directory)
    flags = ("--transport", "memory", "--port", "0", "--metrics-port", "0")
    ended = baton("serve", *flags, "--model", str(directory), timeout_s=60)
    assert ended.returncode != 0
    assert culprit in ended.stderr
    assert "Traceback" not in ended.stderr
