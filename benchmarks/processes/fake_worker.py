"""Prefill and decode workers that speak the protocol and compute nothing, for benchmarks of the router.

One clock steps every decode stream of the process. All on one event loop.
"""

import asyncio

from baton import codec
from baton.kv.spec import KVDtype, KVSpec
from baton.service.calls import Context
from baton.types import FinishReason
from baton.v1 import common_pb2, decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

SPEC = KVSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    dtype=KVDtype.FLOAT32,
    position_scheme="fake",
    model_fingerprint="fake",
)
_LENGTH = codec.finish_reason_to_proto(FinishReason.LENGTH)


class Handoffs:
    """Which prompts were computed, and taken."""

    def __init__(self) -> None:
        self._computed: dict[str, asyncio.Event] = {}
        self._taken: dict[str, asyncio.Event] = {}

    def computed(self, key: str) -> asyncio.Event:
        return self._computed.setdefault(key, asyncio.Event())

    def taken(self, key: str) -> asyncio.Event:
        return self._taken.setdefault(key, asyncio.Event())

    def forget(self, key: str) -> None:
        self._computed.pop(key, None)
        self._taken.pop(key, None)


class StepClock:
    """Wakes everybody who waits, once a step."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s
        self._tick: asyncio.Future[None] | None = None

    async def step(self) -> None:
        """Returns at the next step."""
        if self._step_s == 0:
            await asyncio.sleep(0)
            return
        if self._tick is None:
            loop = asyncio.get_running_loop()
            self._tick = loop.create_future()
            now_s = loop.time()
            loop.call_at(now_s + self._step_s - now_s % self._step_s, self._fire)
        await self._tick

    def _fire(self) -> None:
        tick, self._tick = self._tick, None
        if tick is not None:
            tick.set_result(None)


class FakePrefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Every prompt is computed at once."""

    def __init__(self, handoffs: Handoffs) -> None:
        self._handoffs = handoffs

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> None:
        response = prefill_pb2.PrefillResponse
        key = f"{request.key.request_id}#{request.key.attempt}"
        await context.write(response(started=response.Started()))
        index = len(request.sequence.generated)
        token = common_pb2.TokenChunk(first_index=index, token_ids=[97])
        if index + 1 >= request.sequence.sampling.max_tokens:
            first = response.FirstToken(token=token, finish_reason=_LENGTH)
            await context.write(response(first_token=first))
            return
        await context.write(response(first_token=response.FirstToken(token=token)))
        self._handoffs.computed(key).set()
        await self._handoffs.taken(key).wait()
        self._handoffs.forget(key)
        await context.write(response(handed=response.Handed(kv_bytes=64)))


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    """A token a step for every stream."""

    def __init__(self, handoffs: Handoffs, clock: StepClock) -> None:
        self._handoffs = handoffs
        self._clock = clock

    async def Decode(  # noqa: N802
        self, request: decode_pb2.DecodeRequest, context: Context
    ) -> None:
        response = decode_pb2.DecodeResponse
        key = f"{request.key.request_id}#{request.key.attempt}"
        index = len(request.sequence.generated)
        await context.write(response(reserved=response.Reserved()))
        if request.HasField("source"):
            await self._handoffs.computed(key).wait()
            self._handoffs.taken(key).set()
            index += 1
        await context.write(response(kv_received=response.KvReceived(kv_bytes=64)))
        for at in range(index, request.sequence.sampling.max_tokens):
            await self._clock.step()
            chunk = common_pb2.TokenChunk(first_index=at, token_ids=[97 + at % 26])
            await context.write(response(tokens=chunk))
        await context.write(response(finished=response.Finished(reason=_LENGTH)))

    async def Release(  # noqa: N802
        self,
        request: decode_pb2.DecodeServiceReleaseRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> decode_pb2.DecodeServiceReleaseResponse:
        return decode_pb2.DecodeServiceReleaseResponse(released=True)
