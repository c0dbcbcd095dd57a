"""Baton's own API over gRPC. Calls are made on bare stubs with the client's messages: the client's recovery would hide what is measured."""

import asyncio
import time
from itertools import count
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from baton.bench.prompts import Planned
from baton.bench.records import OK, Record
from baton.bench.target import Described, Options
from baton.client.aio import AsyncClient
from baton.client.recovery import split_targets
from baton.client.types import ConnectionOptions, SamplingOptions
from baton.client.wire import (
    call_metadata,
    channel_options,
    credentials,
    generate_request,
    timings,
)
from baton.codec import finish_reason_from_proto
from baton.errors import UnavailableError
from baton.service.status import error_from_rpc, said_by_peer
from baton.v1 import inference_pb2 as pb
from baton.v1 import inference_pb2_grpc

DESCRIBE_S = 15.0


class GrpcTarget:
    """A router, or several of one fleet, which take requests in turn."""

    def __init__(
        self,
        address: str,
        options: Options,
        *,
        api_key: str = "",
        connection: ConnectionOptions | None = None,
        connections: int = 1,
    ) -> None:
        """`connections` to each address. Raises `InvalidRequestError` for unusable certificates."""
        self._address = address
        self._options = options
        self._api_key = api_key
        self._connection = connection or ConnectionOptions()
        self._metadata = call_metadata(api_key)
        self._credentials = credentials(self._connection)
        self._targets = split_targets(address) * connections
        self._sampling = SamplingOptions(
            ignore_eos=options.ignore_eos, temperature=options.temperature
        )
        self._run = f"bench-{time.time_ns():x}"
        self._numbers = count()

    async def __aenter__(self) -> Self:
        async with AsyncClient(
            self._address, api_key=self._api_key, connection=self._connection
        ) as client:
            info = await client.model(self._options.model, timeout_s=DESCRIBE_S)
        self.described = Described(
            name=f"{self._address} (gRPC)",
            model=info.model,
            vocab_size=info.vocab_size,
            max_context_tokens=info.max_context_tokens,
            eos_token_ids=info.eos_token_ids,
        )
        self._channels = [self._open(target) for target in self._targets]
        stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self._calls: list[Any] = [stub.Generate for stub in stubs]
        try:
            async with asyncio.timeout(DESCRIBE_S):
                for channel in self._channels:
                    await channel.channel_ready()
        except TimeoutError:
            await self._close()
            raise UnavailableError(f"no connection to {self._address}") from None
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for channel in self._channels:
            await channel.close(None)

    def _open(self, target: str) -> grpc.aio.Channel:
        options = channel_options(self._connection)
        if self._credentials is None:
            return grpc.aio.insecure_channel(target, options=options)
        return grpc.aio.secure_channel(target, self._credentials, options=options)

    def prepare(self, planned: Planned) -> pb.GenerateRequest:
        request = generate_request(
            planned.prompt,
            request_id=f"{self._run}-{next(self._numbers)}",
            model=self._options.model,
            sampling=self._sampling,
        )
        if planned.output_tokens is not None:
            request.sampling.max_tokens = planned.output_tokens
        return request

    async def send(self, payload: pb.GenerateRequest, record: Record) -> None:
        generate = self._calls[record.index % len(self._calls)]
        record.request_id = payload.request_id
        record.begin()
        try:
            call = generate(payload, timeout=self._options.timeout_s, metadata=self._metadata)
            async for response in call:
                event = response.WhichOneof("event")
                if event == "chunk":
                    tokens = len(response.chunk.tokens.token_ids)
                    if tokens:
                        record.arrived(time.perf_counter(), tokens)
                elif event == "finished":
                    _finish(record, response.finished)
            if record.status != OK:
                record.failed("INCOMPLETE", "the stream ended before the answer did")
        except grpc.RpcError as error:
            _fail(record, error)


def _finish(record: Record, finished: pb.Finished) -> None:
    record.status = OK
    reason = finish_reason_from_proto(finished.reason)
    record.finish_reason = "" if reason is None else reason.value
    record.prompt_tokens = finished.usage.prompt_tokens
    record.cached_tokens = finished.usage.cached_tokens
    record.completion_tokens = finished.usage.completion_tokens
    record.timings = timings(finished.timings)
    record.workers = [f"{a.prefill_worker}>{a.decode_worker}" for a in finished.attempts]


def _fail(record: Record, error: grpc.RpcError) -> None:
    typed = error_from_rpc(error)
    code = error.code().name if isinstance(error, grpc.aio.AioRpcError) else "UNKNOWN"
    lost = code == grpc.StatusCode.UNAVAILABLE.name and not said_by_peer(error)
    record.failed(code, typed.message, lost=lost)
