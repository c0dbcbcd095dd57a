"""VllmEngine over gRPC: protobuf in, protobuf out; the work is the legs'. Runs on the worker's event loop.

Which leg serves a call: the prefill leg where the parameters ask for it, or where a prefill worker is asked for one token that is not
streamed, which is how routers ask that do not know the connector; else the decode leg, which computes the prompt itself where nothing
was handed over.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import NoReturn

import grpc
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from baton import __version__
from baton.errors import PreconditionError
from baton.service.calls import Context, bounded
from baton.service.tracing import trace_of
from baton.service.worker_host import WorkerHost
from baton.types import Role
from baton.vllm.answers import ABORTED, ChoiceAnswer
from baton.vllm.calls import ForeignCall, ForeignCalls
from baton.vllm.handoff import CONNECTOR, wants_prefill
from baton.vllm.legs import (
    DecodeLeg,
    Finished,
    ForeignRequest,
    Held,
    LegEvent,
    Placed,
    PrefillLeg,
    Tokens,
)
from baton.vllm.parsing import parse
from baton.vllm.text import WorkerText

SERVICE = "vllm.grpc.engine.VllmEngine"
INLINE_BYTES = 8192
"""Requests up to this size are parsed on the event loop: tokenizing megabytes takes longer than a lease."""
_PIECE_BYTES = 512 * 1024
"""Of a tokenizer's archive, in a message."""
_KV_ROLES = {
    (True, False): "kv_producer",
    (False, True): "kv_consumer",
    (True, True): "kv_both",
}


class VllmServicer(vllm_engine_pb2_grpc.VllmEngineServicer):  # type: ignore[misc]  # the stubs are untyped
    """See the module docstring. Errors become statuses in `baton.service.interceptors`."""

    def __init__(
        self,
        host: WorkerHost,
        *,
        prefill: PrefillLeg | None = None,
        decode: DecodeLeg | None = None,
    ) -> None:
        """At least one leg."""
        self._host = host
        self._prefill = prefill
        self._decode = decode
        self._calls = ForeignCalls(host.settings.foreign_max_waiting)
        self._started_s = time.monotonic()
        self._text: WorkerText | None = None
        self._loading = asyncio.Lock()

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:  # noqa: N802
        info = self._host.info  # of a worker that runs
        text = await self._tokenizer() if _needs_text(request) else None
        trace = trace_of(context.invocation_metadata() or ())
        inline, engine = request.ByteSize() <= INLINE_BYTES, self._host.engine.info
        valid = (
            parse(request, engine, text)
            if inline
            else await asyncio.to_thread(parse, request, engine, text)
        )
        parsed = replace(valid, trace=trace)
        is_prefill = self._is_prefill(request, parsed, info.role)
        if is_prefill:
            parsed = parsed.as_prefill()
        answers = [
            ChoiceAnswer(parsed, choice, text, stream=request.stream)
            for choice in range(parsed.sampling.n)
        ]
        async with bounded(context, self._host.settings.default_timeout_s) as left_s:
            async with (
                self._calls.one(request.request_id) as call,
                aclosing(self._leg(parsed, left_s, is_prefill=is_prefill)) as events,
            ):
                async for event in events:
                    with call.telling() as wanted:
                        for message in _told(event, call, answers) if wanted else ():
                            await context.write(message)
                    stopped = parsed.sampling.stop and all(answer.ended for answer in answers)
                    if call.aborted or stopped:
                        break
            if call.aborted:
                for answer in answers:
                    if not answer.ended:
                        await context.write(answer.finish(ABORTED))

    async def Abort(  # noqa: N802
        self,
        request: pb.AbortRequest,
        context: Context,  # noqa: ARG002
    ) -> pb.AbortResponse:
        for request_id in request.request_ids:
            self._calls.abort(request_id)
            if self._prefill is not None:
                self._prefill.abort(request_id)
        return pb.AbortResponse()

    async def HealthCheck(  # noqa: N802
        self,
        request: pb.HealthCheckRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> pb.HealthCheckResponse:
        problem = self._host.unready
        return pb.HealthCheckResponse(healthy=not problem, message=problem or "ok")

    async def GetModelInfo(  # noqa: N802
        self,
        request: pb.GetModelInfoRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> pb.GetModelInfoResponse:
        info, directory = self._host.info, self._host.engine.info.directory
        return pb.GetModelInfoResponse(
            model_path=directory or info.model,
            tokenizer_path=directory,
            served_model_name=info.model,
            is_generation=True,
            vocab_size=info.vocab_size,
            max_context_length=info.max_context_tokens,
            max_req_input_len=info.max_context_tokens - 1,
            eos_token_ids=info.eos_token_ids,
        )

    async def GetServerInfo(  # noqa: N802
        self,
        request: pb.GetServerInfoRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> pb.GetServerInfoResponse:
        info = self._host.info
        return pb.GetServerInfoResponse(
            active_requests=self._host.num_calls,
            uptime_seconds=time.monotonic() - self._started_s,
            server_type="baton",
            kv_connector=CONNECTOR,
            kv_role=_KV_ROLES[self._prefill is not None, self._decode is not None],
            kv_engine_id=info.worker_id,
            data_parallel_size=1,
            model_dtype=info.spec.dtype.value,
            block_size=info.block_size_tokens,
            # All that two workers must agree on; their block sizes may differ.
            pairing_protocol=info.spec.digest,
        )

    async def GetLoads(  # noqa: N802
        self,
        request: pb.GetLoadsRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> pb.GetLoadsResponse:
        info, load = self._host.info, self._host.load
        held = load.used_blocks + load.reserved_blocks + load.in_flight_blocks
        return pb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(timespec="milliseconds"),
            version=__version__,
            dp_rank_count=1,
            loads=[
                pb.SchedulerLoad(
                    num_running_reqs=load.running_requests,
                    num_waiting_reqs=load.waiting_requests,
                    num_total_reqs=load.running_requests + load.waiting_requests,
                    num_used_tokens=held * info.block_size_tokens,
                    max_total_num_tokens=info.num_blocks * info.block_size_tokens,
                    token_usage=held / info.num_blocks,
                    num_waiting_uncached_tokens=load.queued_prefill_tokens,
                )
            ],
        )

    async def GetTokenizer(  # noqa: N802
        self,
        request: common_pb2.GetTokenizerRequest,  # noqa: ARG002
        context: Context,
    ) -> None:
        text = await self._tokenizer()
        if text is None:
            await _unimplemented(context, "this worker has no tokenizer")
        archive = await asyncio.to_thread(text.archive)
        for at in range(0, len(archive.data), _PIECE_BYTES):
            piece = archive.data[at : at + _PIECE_BYTES]
            is_last = at + _PIECE_BYTES >= len(archive.data)
            sha256 = archive.sha256 if is_last else ""
            await context.write(common_pb2.GetTokenizerChunk(data=piece, sha256=sha256))

    async def Embed(self, request: pb.EmbedRequest, context: Context) -> NoReturn:  # noqa: ARG002, N802
        await _unimplemented(context, "Baton serves no embeddings")

    async def FlushCache(  # noqa: N802
        self,
        request: common_pb2.FlushCacheRequest,  # noqa: ARG002
        context: Context,
    ) -> NoReturn:
        await _unimplemented(context, "the prefix cache cannot be flushed")

    async def StartProfile(  # noqa: N802
        self,
        request: common_pb2.StartProfileRequest,  # noqa: ARG002
        context: Context,
    ) -> NoReturn:
        await _unimplemented(context, "there is no profiler")

    async def StopProfile(  # noqa: N802
        self,
        request: common_pb2.StopProfileRequest,  # noqa: ARG002
        context: Context,
    ) -> NoReturn:
        await _unimplemented(context, "there is no profiler")

    async def SubscribeKvEvents(  # noqa: N802
        self,
        request: common_pb2.SubscribeKvEventsRequest,  # noqa: ARG002
        context: Context,
    ) -> NoReturn:
        await _unimplemented(context, "KV events name tokens, which the prefix cache's do not")

    def _is_prefill(self, request: pb.GenerateRequest, parsed: ForeignRequest, role: Role) -> bool:
        if self._prefill is None or parsed.handed is not None:
            return False
        if wants_prefill(request.kv_transfer_params_json):
            return True
        one_token = parsed.sampling.max_tokens == 1 and not request.stream
        return one_token and role is Role.PREFILL

    def _leg(
        self, parsed: ForeignRequest, left_s: float, *, is_prefill: bool
    ) -> AsyncGenerator[LegEvent, None]:
        if is_prefill:
            assert self._prefill is not None
            return self._prefill.run(parsed)
        if self._decode is None:
            raise PreconditionError("a prefill worker takes calls of one token, without stream")
        return self._decode.run(parsed, left_s)

    async def _tokenizer(self) -> WorkerText | None:
        """Read where it is needed first."""
        async with self._loading:
            if self._text is None:
                directory = self._host.engine.info.directory
                self._text = await asyncio.to_thread(WorkerText.load, directory)
        return self._text


def _told(
    event: LegEvent, call: ForeignCall, answers: list[ChoiceAnswer]
) -> list[pb.GenerateResponse]:
    match event:
        case Placed(choice, cached_tokens):
            call.waits = False
            answers[choice].saw_cached(cached_tokens)
        case Tokens(choice, chunk) if not answers[choice].ended:
            return answers[choice].add(chunk)
        case Held(handed):
            answers[0].hold(handed)
        case Finished(choice, reason):
            return answers[choice].finished(reason)
    return []


def _needs_text(request: pb.GenerateRequest) -> bool:
    return request.WhichOneof("input") == "text" or bool(request.sampling_params.stop)


async def _unimplemented(context: Context, why: str) -> NoReturn:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)
