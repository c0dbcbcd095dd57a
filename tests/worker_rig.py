"""A prefill and a decode worker in this process, with simulated engines, the memory transport and real gRPC on loopback."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from baton.codec import (
    chunk_from_proto,
    finish_reason_from_proto,
    key_to_proto,
    sequence_to_proto,
)
from baton.engine.aio import AsyncEngine
from baton.engine.sim import SimConfig, build_sim_engine
from baton.errors import BatonError
from baton.service.settings import WorkerSettings
from baton.service.status import error_from_rpc
from baton.transfer.base import KVTransport
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.types import AttemptKey, RequestId, SamplingParams, Sequence, WorkerInfo, WorkerLoad
from baton.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker

PREFILL_ADDRESS = "prefill-0"
SIM = SimConfig(num_blocks=64, max_batch_tokens=32)


def sequence(length: int = 40, *, max_tokens: int = 8, start: int = 1) -> Sequence:
    """A prompt that other starts do not share a prefix with."""
    prompt = tuple((start * 31 + i * 7) % 255 + 1 for i in range(length))
    return Sequence(
        prompt, (), SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    )


def key(name: str, attempt: int = 0) -> AttemptKey:
    return AttemptKey(RequestId(name), attempt)


@dataclass
class Answer:
    """What a pair of workers said."""

    tokens: list[int] = field(default_factory=list)
    finish: object = None
    prefill_events: list[str] = field(default_factory=list)
    decode_events: list[str] = field(default_factory=list)
    kv_bytes: int = 0
    cached_tokens: int = 0


class Rig:
    """See the module docstring."""

    def __init__(self, prefill: PrefillWorker, decode: DecodeWorker) -> None:
        self.prefill = prefill
        self.decode = decode
        self.sources = MemorySources()

    async def connect(self, prefill: WorkerInfo, decode: WorkerInfo) -> None:
        self.digest = prefill.spec.digest
        self.prefill_channel = grpc.aio.insecure_channel(prefill.address)
        self.decode_channel = grpc.aio.insecure_channel(decode.address)
        self.prefill_stub = prefill_pb2_grpc.PrefillServiceStub(self.prefill_channel)
        self.decode_stub = decode_pb2_grpc.DecodeServiceStub(self.decode_channel)

    def prefill_call(
        self, attempt: AttemptKey, seq: Sequence, *, skip: int = 0, timeout: float | None = 20
    ) -> Any:
        request = prefill_pb2.PrefillRequest(
            key=key_to_proto(attempt),
            sequence=sequence_to_proto(seq),
            skip_tokens=skip,
            kv_digest=self.digest,
        )
        return self.prefill_stub.Prefill(request, timeout=timeout)

    def decode_call(
        self,
        attempt: AttemptKey,
        seq: Sequence,
        *,
        local: bool = False,
        timeout: float | None = 20,
        grace_s: float = 0.0,
    ) -> Any:
        request = decode_pb2.DecodeRequest(
            key=key_to_proto(attempt),
            sequence=sequence_to_proto(seq),
            kv_digest=self.digest,
            grace_seconds=grace_s,
        )
        if not local:
            request.source.transfer_address = PREFILL_ADDRESS
        return self.decode_stub.Decode(request, timeout=timeout)

    async def generate(self, attempt: AttemptKey, seq: Sequence) -> Answer:
        """What the router does for one attempt. Raises the workers' typed errors."""
        answer = Answer()
        reserved: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def decode() -> None:
            try:
                await self._read_decode(self.decode_call(attempt, seq), answer, reserved)
            finally:
                reserved.cancel()

        async def prefill() -> list[int]:
            answer.cached_tokens = await reserved
            call = self.prefill_call(attempt, seq, skip=answer.cached_tokens)
            return await self._read_prefill(call, answer)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(decode())
                first = group.create_task(prefill())
        except ExceptionGroup as failures:
            rpc = next(e for e in failures.exceptions if isinstance(e, grpc.RpcError))
            raise error_from_rpc(rpc) from None
        answer.tokens[:0] = first.result()
        return answer

    async def generate_locally(self, attempt: AttemptKey, seq: Sequence) -> Answer:
        answer = Answer()
        reserved: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        await self._read_decode(self.decode_call(attempt, seq, local=True), answer, reserved)
        return answer

    async def _read_decode(self, call: Any, answer: Answer, reserved: asyncio.Future[int]) -> None:
        try:
            async for response in call:
                kind = response.WhichOneof("event")
                answer.decode_events.append(kind)
                if kind == "reserved":
                    reserved.set_result(response.reserved.cached_tokens)
                elif kind == "kv_received":
                    answer.kv_bytes = response.kv_received.kv_bytes
                elif kind == "tokens":
                    answer.tokens += chunk_from_proto(response.tokens).token_ids
                else:
                    answer.finish = finish_reason_from_proto(response.finished.reason)
        finally:
            call.cancel()

    async def _read_prefill(self, call: Any, answer: Answer) -> list[int]:
        tokens: list[int] = []
        try:
            async for response in call:
                kind = response.WhichOneof("event")
                answer.prefill_events.append(kind)
                if kind == "first_token":
                    tokens += chunk_from_proto(response.first_token.token).token_ids
        finally:
            call.cancel()
        return tokens

    async def settled(self, timeout_s: float = 5.0) -> None:
        """Returns once neither worker holds anything for any request; fails after the timeout."""
        end_s = time.monotonic() + timeout_s
        while True:
            busy = [
                (host.num_calls, load)
                for host in (self.prefill.host, self.decode.host)
                for load in [await host.engine.refresh_load()]
                if host.num_calls or not is_idle(load)
            ]
            if not busy:
                break
            assert time.monotonic() < end_s, f"still held: {busy}"
            await asyncio.sleep(0.01)
        await self.prefill.host.engine.check_integrity()
        await self.decode.host.engine.check_integrity()
        self.prefill.check_integrity()


async def error_of(call: Any) -> BatonError:
    """Reads a call to its end, which must be an error within two seconds."""
    async with asyncio.timeout(2):
        try:
            while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs lack it
                pass
        except grpc.RpcError as error:
            return error_from_rpc(error)
    raise AssertionError("the call succeeded")


def is_idle(load: WorkerLoad) -> bool:
    """Whether every block is free or cached and no request is known."""
    return load == replace(
        WorkerLoad(),
        free_blocks=load.free_blocks,
        cached_blocks=load.cached_blocks,
        prefill_tokens_per_s=load.prefill_tokens_per_s,
        decode_step_s=load.decode_step_s,
    )


@asynccontextmanager
async def worker_pair(
    *,
    prefill_sim: SimConfig = SIM,
    decode_sim: SimConfig = SIM,
    settings: WorkerSettings | None = None,
    wrap: Callable[[KVTransport], KVTransport] = lambda t: t,
) -> AsyncIterator[Rig]:
    """Both workers run inside; afterwards everything is stopped."""
    settings = settings or WorkerSettings(handoff_timeout_s=10.0)
    sources = MemorySources()
    transport = wrap(MemoryTransport(sources, ByteCredits(1 << 20)))
    prefill = PrefillWorker(
        replace(settings, transfer_address=PREFILL_ADDRESS),
        AsyncEngine(lambda: build_sim_engine(prefill_sim), name="prefill"),
    )
    decode = DecodeWorker(
        settings, AsyncEngine(lambda: build_sim_engine(decode_sim), name="decode"), transport
    )
    rig = Rig(prefill, decode)
    rig.sources = sources
    async with AsyncExitStack() as stack:
        prefill_info = await prefill.start()
        stack.push_async_callback(prefill.stop)
        stack.enter_context(sources.serving(PREFILL_ADDRESS, prefill))
        decode_info = await decode.start()
        stack.push_async_callback(decode.stop)
        await rig.connect(prefill_info, decode_info)
        stack.push_async_callback(rig.prefill_channel.close, None)
        stack.push_async_callback(rig.decode_channel.close, None)
        yield rig
