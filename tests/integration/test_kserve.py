"""The Open Inference Protocol: with tritonclient in processes of its own, and with hand-made messages for what it does not send."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2

from baton.errors import (
    CapacityError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
)
from baton.service.keys import TenantLimits, add_key, new_key, remove_key
from baton.service.status import error_from_rpc
from router.kserve.options import INPUTS
from router.kserve.request import OUTPUTS
from router.kserve.v2 import inference_pb2 as kserve
from router.kserve.v2 import inference_pb2_grpc as kserve_grpc
from tests.integration.router_fakes import SETTINGS, Cluster, cluster, request
from tests.integration.sim_house import House, house

TEXT = "Once upon a time there was a girl who lived in a house at the edge of a wood."
"""The program's prompt."""
BOUND_S = 40


async def triton(scenario: str, port: int) -> Any:
    """What one of `tests.integration.triton_program`'s scenarios saw."""
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.triton_program", scenario, f"127.0.0.1:{port}"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(BOUND_S):
            out, err = await program.communicate()
    finally:
        if program.returncode is None:
            program.kill()
            await program.wait()
    assert program.returncode == 0, err.decode()
    return json.loads(out)


async def core_text(here: House, text: str, **sampling: Any) -> str:
    """What the router's own API answers."""
    answer = ""
    call: Any = here.inference.Generate(request(text=text, **sampling), timeout=20)
    async for response in call:
        answer += response.chunk.text
    return answer


@asynccontextmanager
async def stub_of(
    port: int, options: Iterable[tuple[str, int]] = ()
) -> AsyncIterator[kserve_grpc.GRPCInferenceServiceStub]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=[*options]) as channel:
        yield kserve_grpc.GRPCInferenceServiceStub(channel)


def asking(text: str = TEXT, *, name: str = "", **parameters: Any) -> kserve.ModelInferRequest:
    """A request whose prompt is in `contents`; everything else in its parameters."""
    message = kserve.ModelInferRequest(id=name)
    prompt = message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    prompt.contents.bytes_contents.append(text.encode())
    fields = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    for key, value in parameters.items():
        setattr(message.parameters[key], fields[type(value)], value)
    return message


def text_of(response: kserve.ModelInferResponse) -> str:
    (index,) = [i for i, out in enumerate(response.outputs) if out.name == "text_output"]
    return response.raw_output_contents[index][4:].decode()


async def refusal(call: Any) -> Any:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return error_from_rpc(failed.value)


async def test_the_proto_is_the_one_that_tritonclient_speaks() -> None:
    """Promise: each message, field and call that is written down here has tritonclient's name, number and type."""
    program = (
        "import sys\n"
        "from google.protobuf import descriptor_pb2 as d\n"
        "from tritonclient.grpc import model_config_pb2, service_pb2\n"
        "files = d.FileDescriptorSet()\n"
        "for module in (service_pb2, model_config_pb2):\n"
        "    module.DESCRIPTOR.CopyToProto(files.file.add())\n"
        "sys.stdout.buffer.write(files.SerializeToString())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, stdout=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(BOUND_S):
        out, _ = await process.communicate()
    theirs: dict[str, str] = {}
    for file in descriptor_pb2.FileDescriptorSet.FromString(out).file:
        theirs |= _declared(file)
    ours = descriptor_pb2.FileDescriptorProto()
    kserve.DESCRIPTOR.CopyToProto(ours)
    declared = _declared(ours)
    assert len(declared) > 80
    assert declared.items() <= theirs.items()


def _declared(file: Any) -> dict[str, str]:
    found: dict[str, str] = {}

    def visit(message: Any, path: str) -> None:
        for field in message.field:
            one_of = (
                message.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else ""
            )
            kind = (field.number, field.type, field.label, field.type_name, one_of)
            found[f"{path}.{message.name}.{field.name}"] = str(kind)
        for nested in message.nested_type:
            visit(nested, f"{path}.{message.name}")

    for message in file.message_type:
        visit(message, file.package)
    for enum in file.enum_type:
        found |= {f"{file.package}.{enum.name}.{v.name}": str(v.number) for v in enum.value}
    for service in file.service:
        for method in service.method:
            kind = (
                method.input_type,
                method.output_type,
                method.client_streaming,
                method.server_streaming,
            )
            found[f"{file.package}.{service.name}.{method.name}"] = str(kind)
    return found


async def test_tritonclient_learns_what_is_served_and_what_is_wrong_with_a_request() -> None:
    async with house(1, 1) as here:
        saw = await triton("describe", here.app.port)
    assert [saw["live"], saw["ready"], saw["model_ready"]] == [True] * 3
    for unknown in ("unknown_model", "unknown_version", "infer_other"):
        assert saw[unknown][0] == "StatusCode.NOT_FOUND"
    assert saw["server"]["name"] == "baton"
    assert [each["name"] for each in saw["metadata"]["inputs"]] == list(INPUTS)
    assert [each["name"] for each in saw["metadata"]["outputs"]] == list(OUTPUTS)
    config = saw["config"]["config"]
    assert config["model_transaction_policy"]["decoupled"]
    assert {each["name"]: each["data_type"] for each in config["input"]}[
        "text_input"
    ] == "TYPE_STRING"
    for wrong, words in {
        "unknown_input": ("'beams'", "text_input, input_ids", "max_tokens"),
        "stream": ("stream", "ModelStreamInfer"),
        "bad_value": ("top_p: must be in (0, 1]",),
    }.items():
        status, message = saw[wrong]
        assert not message.startswith("sampling.")
        assert status == "StatusCode.INVALID_ARGUMENT"
        assert all(word in message for word in words), message


async def test_sampling_parameters_mean_the_same_in_whichever_way_they_come() -> None:
    """Promise: as a JSON tensor of strings, as a tensor each, as request parameters; and the prompt as text or as tokens."""
    sampling = {"max_tokens": 12, "temperature": 0.7, "top_p": 0.9, "seed": 7, "ignore_eos": True}
    async with house(1, 1) as here:
        saw = await triton("ways", here.app.port)
        text = await core_text(here, TEXT, **sampling)
    for way in ("json", "tensors", "parameters"):
        assert saw[way]["text_output"] == [TEXT + text], "without stream, the input comes first"
    assert saw["ids"]["text_output"] == [text]
    assert saw["named"].keys() - {"id", "model", "final"} == {"finish_reason"}
    everything = saw["everything"]
    assert everything["id"] == "all"
    assert everything["text_output"][0] == text
    assert everything["finish_reason"] == ["length"] * 2
    assert everything["num_input_tokens"] == [len(TEXT)]
    assert everything["num_output_tokens"] == [12] * 2
    for logprobs, total in zip(
        everything["logprobs"], everything["cumulative_logprob"], strict=True
    ):
        chosen = [next(iter(position.values())) for position in json.loads(logprobs)]
        assert len(chosen) == 12
        assert sum(each["logprob"] for each in chosen) == pytest.approx(total, rel=1e-5)


async def test_requests_on_one_stream_are_answered_and_fail_each_for_itself() -> None:
    """Promise: answers carry their request's id, one is each request's last, and a bad one leaves the stream and the others be."""
    async with house(1, 2) as here:
        answers = await triton("stream", here.app.port)
        sampling = {
            "max_tokens": 12,
            "temperature": 0.7,
            "top_p": 0.9,
            "seed": 7,
            "ignore_eos": True,
        }
        texts = {
            str(n): await core_text(here, f"{n} {TEXT}", **sampling)
            for n in range(12)
            if n % 4 != 1
        }
    failed = [each for each in answers if isinstance(each, str)]
    assert sorted(each.split("]")[0] for each in failed) == [
        f"[request id: {number}" for number in (1, 5, 9)
    ]
    assert all("INVALID_ARGUMENT: temperature: must be" in each for each in failed)
    for number, text in texts.items():
        own = [each for each in answers if isinstance(each, dict) and each["id"] == number]
        assert "".join(each["text_output"][0] for each in own) == text
        assert [each["final"] for each in own] == [False] * (len(own) - 1) + [True]
        assert [each["finish_reason"] for each in own] == [["None"]] * (len(own) - 1) + [["length"]]
        assert (len(own) > 1) is bool(int(number) % 3)


async def hanging(here: Cluster) -> Any:
    """Workers of which decode never gets beyond its fourth token."""

    async def script(stage: str) -> None:
        if stage == "token:4":
            await asyncio.Event().wait()

    await here.prefill("p")
    return await here.decode("d", script)


async def test_a_cancelled_stream_frees_the_workers_of_all_its_requests() -> None:
    async with cluster(model_name="fake") as here:
        decode = await hanging(here)
        assert await triton("cancel", here.app.port) == ["StatusCode.CANCELLED"] * 2
        await here.settled()
        assert len(decode.keys) >= 3


async def test_deadlines_of_calls_and_timeouts_of_requests_end_them() -> None:
    async with cluster(model_name="fake") as here:
        await hanging(here)
        saw = await triton("deadline", here.app.port)
        assert saw["call"][0] == saw["timeout"][0] == "StatusCode.DEADLINE_EXCEEDED"
        assert saw["stream"].startswith("[request id: late] DEADLINE_EXCEEDED: ")
        await here.settled()


async def test_no_more_requests_of_a_stream_run_at_once_than_the_limit() -> None:
    limit, count, most = 3, 10, 0
    async with cluster(max_stream_requests=limit) as here, stub_of(here.app.port) as stub:
        full = asyncio.Event()

        async def script(stage: str) -> None:
            nonlocal most
            if stage == "kv":
                most = max(most, len(here.app.table))
                if most == limit:
                    full.set()
                await full.wait()

        await here.prefill("p")
        await here.decode("d", script)
        call: Any = stub.ModelStreamInfer(
            iter([asking(name=str(n), max_tokens=5) for n in range(count)]), timeout=BOUND_S
        )
        ids = {response.infer_response.id async for response in call}
    assert ids == {str(n) for n in range(count)}
    assert most == limit


async def test_any_id_comes_back_and_several_requests_may_have_the_same() -> None:
    """Promise: and it begins the request's id in the fleet, where that has such characters."""
    names = ["one", "one", "a b/\N{SNOWMAN}", ""]
    async with cluster() as here, stub_of(here.app.port) as stub:
        started = asyncio.Event()

        async def script(_stage: str) -> None:
            if len(here.app.table) == len(names):
                started.set()
            await started.wait()

        await here.prefill("p")
        decode = await here.decode("d", script)
        asked = [asking(name=name, max_tokens=2) for name in names]
        call: Any = stub.ModelStreamInfer(iter(asked), timeout=BOUND_S)
        answered = [response.infer_response.id async for response in call]
    assert sorted(answered) == sorted(names)
    assert sum(key.startswith("one.") for key in decode.keys) == 2


async def test_a_stream_that_is_not_read_is_lost_and_harms_no_other() -> None:
    """Promise: what is unread is bounded, so that the workers are freed; the call ends with RESOURCE_EXHAUSTED."""
    slow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]
    sampling: dict[str, Any] = {"logprobs": 20, "return_logprobs": True, "stream": True}
    async with (
        cluster(write_stall_s=0.6) as here,
        stub_of(here.app.port, slow) as stub,
        stub_of(here.app.port) as other,
    ):
        await here.prefill("p")
        decode = await here.decode("d")
        call: Any = stub.ModelStreamInfer(
            iter([asking(name=str(n), max_tokens=3900, **sampling) for n in range(2)])
        )
        await anext(aiter(call))
        await here.until(lambda: decode.running > 0)
        answer = await other.ModelInfer(asking(max_tokens=10), timeout=20)
        assert text_of(answer).startswith(TEXT)
        await here.until(lambda: len(here.app.table) == 0, 10)
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            async for _ in call:
                pass
        assert isinstance(error_from_rpc(lost.value), CapacityError)


async def test_both_forms_of_a_tensor_mean_the_same_in_both_shapes() -> None:
    """Promise: raw bytes and typed contents; [1] and [1, 1]."""
    async with house(1, 1) as here, stub_of(here.app.port) as stub:
        typed, raw = kserve.ModelInferRequest(), kserve.ModelInferRequest()
        for shape, message in (([1], typed), ([1, 1], raw)):
            for name, datatype in (
                ("text_input", "BYTES"),
                ("max_tokens", "INT32"),
                ("seed", "UINT64"),
            ):
                message.inputs.add(name=name, datatype=datatype, shape=shape)
        typed.inputs[0].contents.bytes_contents.append(TEXT.encode())
        typed.inputs[1].contents.int_contents.append(9)
        typed.inputs[2].contents.uint64_contents.append(2**64 - 1)
        text = TEXT.encode()
        raw.raw_input_contents.extend(
            [
                len(text).to_bytes(4, "little") + text,
                (9).to_bytes(4, "little"),
                (2**64 - 1).to_bytes(8, "little"),
            ]
        )
        answers = [await stub.ModelInfer(message, timeout=20) for message in (typed, raw)]
        assert answers[0] == answers[1]
        assert text_of(answers[0]) == TEXT + await core_text(
            here, TEXT, max_tokens=9, seed=2**64 - 1
        )


async def test_keys_guard_all_but_health_and_count_for_each_request_of_a_stream(
    tmp_path: Path,
) -> None:
    """Promise: whether the server lives and is ready needs no key; a key revoked while a stream is open ends what comes after."""
    file = str(tmp_path / "keys.json")
    entry, key = new_key("acme", limits=TenantLimits())
    add_key(file, entry)
    guarded = replace(SETTINGS, api_keys_file=file, fleet_listen="127.0.0.1:0")
    bearer = (("authorization", f"Bearer {key}"),)
    async with house(1, 1, settings=guarded) as here, stub_of(here.app.port) as stub:
        assert (await stub.ServerLive(kserve.ServerLiveRequest(), timeout=5)).live
        assert (await stub.ServerReady(kserve.ServerReadyRequest(), timeout=5)).ready
        closed: list[tuple[Any, Any]] = [
            (stub.ModelReady, kserve.ModelReadyRequest()),
            (stub.ServerMetadata, kserve.ServerMetadataRequest()),
            (stub.ModelMetadata, kserve.ModelMetadataRequest()),
            (stub.ModelConfig, kserve.ModelConfigRequest()),
            (stub.ModelInfer, asking(max_tokens=3)),
        ]
        for method, message in closed:
            assert isinstance(await refusal(method(message, timeout=5)), UnauthenticatedError)
            assert await method(message, timeout=20, metadata=bearer)
        assert isinstance(
            await refusal(stub.ModelStreamInfer(iter([asking()]), timeout=5).read()),
            UnauthenticatedError,
        )
        call: Any = stub.ModelStreamInfer(timeout=BOUND_S, metadata=bearer)
        await call.write(asking(name="before", max_tokens=3))
        assert not (await call.read()).error_message
        remove_key(file, entry.id)
        await call.write(asking(name="after", max_tokens=3))
        refused = await call.read()
        assert "UNAUTHENTICATED" in refused.error_message
        assert refused.infer_response.id == "after"
        await call.done_writing()


async def test_a_router_that_drains_is_live_and_not_ready_and_refuses_on_open_streams() -> None:
    async with house(1, 1) as here, stub_of(here.app.port) as stub:
        call: Any = stub.ModelStreamInfer(timeout=BOUND_S)
        await call.write(asking(name="before", max_tokens=3))
        assert not (await call.read()).error_message
        await here.app.drain(5)
        assert (await stub.ServerLive(kserve.ServerLiveRequest(), timeout=5)).live
        assert not (await stub.ServerReady(kserve.ServerReadyRequest(), timeout=5)).ready
        assert not (await stub.ModelReady(kserve.ModelReadyRequest(), timeout=5)).ready
        await call.write(asking(name="after", max_tokens=3))
        assert "[request id: after] UNAVAILABLE" in (await call.read()).error_message
        await call.done_writing()


async def test_the_metrics_count_these_requests_as_all_others() -> None:
    async with cluster() as here, stub_of(here.app.port) as stub:
        await here.prefill("p")
        await here.decode("d")
        await stub.ModelInfer(asking(max_tokens=10), timeout=20)
        for bad in (asking(beams=4), asking(top_p=7.0)):
            error = await refusal(stub.ModelInfer(bad, timeout=5))
            assert isinstance(error, InvalidRequestError)
        other = kserve.ModelReadyRequest(name="other")
        assert isinstance(await refusal(stub.ModelReady(other, timeout=5)), NotFoundError)
        read = here.app.metrics.registry.get_sample_value
        await here.until(lambda: read("baton_requests_total", {"outcome": "ok"}) == 1)
        assert read("baton_requests_total", {"outcome": "invalid_request"}) == 2
        assert read("baton_completion_tokens_total") == 10
