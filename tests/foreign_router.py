"""Foreign routers over Baton's workers: one in this process that does by gRPC what such a router does, and `smg`, a real one."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
from smg_grpc_proto.generated import vllm_engine_pb2 as pb
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from tests.ports import free_port

READY_S = 30.0
SMG = Path(sys.executable).with_name("smg")


def generate_request(
    request_id: str, prompt: Sequence[int] | str, *, stream: bool = False, **sampling: Any
) -> pb.GenerateRequest:
    """As routers send it: what is not said is left to the worker."""
    request = pb.GenerateRequest(
        request_id=request_id, sampling_params=pb.SamplingParams(**sampling), stream=stream
    )
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.tokenized.input_ids.extend(prompt)
    return request


@dataclass
class ForeignAnswer:
    """What a `Generate` call said."""

    chunks: list[pb.GenerateStreamChunk] = field(default_factory=list)
    completes: dict[int, pb.GenerateComplete] = field(default_factory=dict)

    @property
    def complete(self) -> pb.GenerateComplete:
        """Of the only choice."""
        (complete,) = self.completes.values()
        return complete

    @property
    def tokens(self) -> list[int]:
        """Of the only choice; those that were streamed must be the same."""
        streamed = [token for chunk in self.chunks for token in chunk.token_ids]
        assert not self.chunks or streamed == list(self.complete.output_ids)
        return list(self.complete.output_ids)


async def answer_of(call: Any) -> ForeignAnswer:
    """Reads a call to its end."""
    answer = ForeignAnswer()
    async for response in call:
        if response.HasField("chunk"):
            assert response.chunk.index not in answer.completes
            answer.chunks.append(response.chunk)
        else:
            answer.completes[response.complete.index] = response.complete
    return answer


class ForeignRouter:
    """Sends both legs of a request, one after the other, and passes on what the first one says."""

    def __init__(self, prefill: grpc.aio.Channel, decode: grpc.aio.Channel) -> None:
        self.prefill = vllm_engine_pb2_grpc.VllmEngineStub(prefill)
        self.decode = vllm_engine_pb2_grpc.VllmEngineStub(decode)

    def prefill_call(self, request: pb.GenerateRequest) -> Any:
        """Without what may end an output, as smg sends it, and without a hint."""
        leg = pb.GenerateRequest()
        leg.CopyFrom(request)
        leg.stream = False
        params = leg.sampling_params
        params.max_tokens, params.n, params.ignore_eos = 1, 1, True
        for name in ("min_tokens", "stop", "stop_token_ids"):
            params.ClearField(name)
        return self.prefill.Generate(leg, timeout=20)

    async def generate(
        self, request_id: str, prompt: Sequence[int] | str, *, stream: bool = False, **sampling: Any
    ) -> ForeignAnswer:
        request = generate_request(request_id, prompt, stream=stream, **sampling)
        first = await answer_of(self.prefill_call(request))
        request.kv_transfer_params_json = first.complete.kv_transfer_params_json
        return await answer_of(self.decode.Generate(request, timeout=20))


@asynccontextmanager
async def foreign_router(prefill: str, decode: str) -> AsyncIterator[ForeignRouter]:
    """To two workers' addresses."""
    async with (
        grpc.aio.insecure_channel(prefill) as to_prefill,
        grpc.aio.insecure_channel(decode) as to_decode,
    ):
        yield ForeignRouter(to_prefill, to_decode)


@asynccontextmanager
async def smg(
    log: Path, model: str, prefill: Sequence[str], decode: Sequence[str], *flags: str
) -> AsyncIterator[httpx.AsyncClient]:
    """The real one in a process of its own, on a free port; it tries nothing twice. Ready to serve the model, by workers at these
    addresses, without being told where its tokenizer is.
    """
    workers = [flag for address in prefill for flag in ("--prefill", f"grpc://{address}")]
    workers += [flag for address in decode for flag in ("--decode", f"grpc://{address}")]
    port, metrics_port = free_port(), free_port()
    listen = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port)]
    command = [str(SMG), "launch", "--pd-disaggregation", *workers, *listen, "--disable-retries"]
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(*command, *flags, stdout=out, stderr=out)
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            async with asyncio.timeout(READY_S):
                while not await _serves(client, model):
                    assert process.returncode is None, f"see {log}"
                    await asyncio.sleep(0.05)
            yield client
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _serves(client: httpx.AsyncClient, model: str) -> bool:
    question = {"model": model, "prompt": "a", "max_tokens": 1}
    try:
        return (await client.post("/v1/completions", json=question)).is_success
    except httpx.TransportError:
        return False
