"""A router with scripted workers on loopback gRPC, all on one event loop.

A fake worker speaks the protocol and computes nothing: the token at each output position is a function of the prompt. At every
stage it awaits its script, which may raise, hang, die or freeze. The KV handoff between fakes is one dict of futures.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Self

import grpc

from baton import codec
from baton.errors import PreconditionError, UnavailableError
from baton.kv.spec import KVDtype, KVSpec
from baton.service.calls import Context
from baton.service.server import GrpcServer
from baton.service.settings import RouterSettings, ServerSettings
from baton.service.status import error_from_rpc
from baton.service.tunnel import Method, TunnelServicer
from baton.types import FinishReason, PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from baton.v1 import (
    common_pb2,
    decode_pb2,
    decode_pb2_grpc,
    fleet_pb2,
    fleet_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    tunnel_pb2_grpc,
)
from router.app import RouterApp
from router.members import DECODE, PREFILL
from router.tenants import LimitsOf
from router.text import Tokenizer

SPEC = KVSpec(
    num_layers=1,
    num_kv_heads=1,
    head_dim=2,
    dtype=KVDtype.FLOAT32,
    position_scheme="fake",
    model_fingerprint="fake",
)
SETTINGS = RouterSettings(
    port=0, heartbeat_s=0.1, lease_s=1.5, worker_wait_s=2.0, reflection=False, write_stall_s=5.0
)
PROMPT = tuple(range(1, 101))
"""Long enough for a prefill worker."""


class CutError(Exception):
    """Raised by a script: the call breaks as if its connection did."""


Script = Callable[[str], Awaitable[None]]
"""Awaited with the name of each stage that a call reaches."""


async def behave(_stage: str) -> None:
    """The script of a worker that does its work."""


def token_at(prompt: Sequence[int], index: int) -> int:
    """A letter."""
    return 97 + (sum(prompt) + 7 * index + index * index) % 26


def expected(prompt: Sequence[int], count: int) -> list[int]:
    return [token_at(prompt, index) for index in range(count)]


def short(key: common_pb2.AttemptKey) -> str:
    """As the client named it."""
    name, _, _unique = key.request_id.partition("/")
    return f"{name}#{key.attempt}"


@dataclass
class Handoffs:
    """Which prompts are computed, and who took them."""

    computed: dict[str, asyncio.Event] = field(default_factory=dict)
    taken: dict[str, asyncio.Event] = field(default_factory=dict)
    deaths: dict[str, asyncio.Event] = field(default_factory=dict)

    def ready(self, key: str) -> asyncio.Event:
        return self.computed.setdefault(key, asyncio.Event())

    def pulled(self, key: str) -> asyncio.Event:
        return self.taken.setdefault(key, asyncio.Event())

    def death(self, worker_id: str) -> asyncio.Event:
        return self.deaths.setdefault(worker_id, asyncio.Event())

    async def pull(self, key: str, source: str) -> None:
        """What a transport does: brings the KV, or the news that its source died."""
        waits = [
            asyncio.ensure_future(event.wait()) for event in (self.ready(key), self.death(source))
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if not self.ready(key).is_set():
                raise UnavailableError("the KV source is gone")
        finally:
            for wait in waits:
                wait.cancel()
        self.pulled(key).set()


class FakeWorker:
    """Serves both services, and is a member in one role."""

    def __init__(
        self,
        role: Role,
        worker_id: str,
        handoffs: Handoffs,
        script: Script = behave,
        *,
        spec: KVSpec = SPEC,
        tunnels: bool = False,
    ) -> None:
        self._tunnels = tunnels
        self.role = role
        self.worker_id = WorkerId(worker_id)
        self.script = script
        self.draining = False
        self.frozen = False
        self.prefix = PrefixDelta()
        self.load = WorkerLoad(free_blocks=512)
        self.keys: list[str] = []
        """Every attempt that was called, in order."""
        self.resumed: list[int] = []
        """Tokens that each attempt came with."""
        self.released: list[str] = []
        self.running = 0
        self._spec = spec
        self.handoffs = handoffs
        self._joining: asyncio.Task[None] | None = None

    async def start(self, router: str) -> Self:
        services = ["baton.v1.PrefillService", "baton.v1.DecodeService"]
        self._server = GrpcServer(ServerSettings(reflection=False), services)
        prefill, decode = _Prefill(self), _Decode(self)
        self._server.register(
            lambda server: prefill_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server)
        )
        self._server.register(
            lambda server: decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server)
        )
        if self._tunnels:
            prefills = Method(prefill_pb2.PrefillRequest.FromString, prefill.Prefill)
            decodes = Method(decode_pb2.DecodeRequest.FromString, decode.Decode)
            tunnel = TunnelServicer({PREFILL: prefills, DECODE: decodes})
            self._server.register(
                lambda server: tunnel_pb2_grpc.add_TunnelServiceServicer_to_server(tunnel, server)
            )
        self.port = await self._server.start()
        self._joining = asyncio.create_task(self._join(router))
        return self

    @property
    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            role=self.role,
            address=f"127.0.0.1:{self.port}",
            transfer_address=self.worker_id,
            model="fake",
            spec=self._spec,
            vocab_size=256,
            max_context_tokens=4096,
            eos_token_ids=(0,),
            block_size_tokens=16,
            num_blocks=512,
            node="here",
            pid=1,
            device="fake",
            version="0",
        )

    async def stop(self) -> None:
        """Dies: membership and calls end at once. Idempotent."""
        self.handoffs.death(self.worker_id).set()
        if self._joining is not None:
            self._joining.cancel()
            await asyncio.gather(self._joining, return_exceptions=True)
        await self._server.stop(0)

    async def die(self) -> None:
        """For scripts: dies, and never returns."""
        task = asyncio.create_task(self.stop())
        await asyncio.Event().wait()
        await task

    async def freeze(self) -> None:
        """For scripts: like a process that is stopped, it keeps its connections and says no more."""
        self.frozen = True
        await asyncio.Event().wait()

    async def _join(self, router: str) -> None:
        async with grpc.aio.insecure_channel(router) as channel:
            call: Any = fleet_pb2_grpc.FleetServiceStub(channel).Join()
            announce = fleet_pb2.JoinRequest.Announce(info=codec.worker_info_to_proto(self.info))
            await call.write(fleet_pb2.JoinRequest(announce=announce))
            await call.read()
            while True:
                if not self.frozen:
                    beat = fleet_pb2.JoinRequest.Heartbeat(
                        load=codec.load_to_proto(self.load),
                        prefix=codec.prefix_delta_to_proto(self.prefix),
                        draining=self.draining,
                    )
                    await call.write(fleet_pb2.JoinRequest(heartbeat=beat))
                await asyncio.sleep(0.05)

    def check_digest(self, digest: str) -> None:
        if digest != self._spec.digest:
            raise PreconditionError(f"not {digest}")

    @contextmanager
    def called(self, key: common_pb2.AttemptKey, resumed: int) -> Iterator[str]:
        self.keys.append(short(key))
        self.resumed.append(resumed)
        self.running += 1
        try:
            yield f"{key.request_id}#{key.attempt}"
        finally:
            self.running -= 1


class _Prefill(prefill_pb2_grpc.PrefillServiceServicer):
    """Stages: arrived, started, token, computed, handed."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Prefill(  # noqa: N802
        self,
        request: prefill_pb2.PrefillRequest,
        context: Context,
    ) -> None:
        try:
            await self._prefill(request, context)
        except CutError:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    async def _prefill(self, request: prefill_pb2.PrefillRequest, context: Context) -> None:
        worker, response = self._worker, prefill_pb2.PrefillResponse
        with worker.called(request.key, len(request.sequence.generated)) as key:
            worker.check_digest(request.kv_digest)
            await worker.script("arrived")
            await context.write(response(started=response.Started(cached_tokens=16)))
            await worker.script("started")
            await context.write(response(progress=response.Progress(computed_tokens=8)))
            await worker.script("token")
            index = len(request.sequence.generated)
            last = index + 1 >= request.sequence.sampling.max_tokens
            token = common_pb2.TokenChunk(
                first_index=index, token_ids=[token_at(request.sequence.prompt, index)]
            )
            finish = codec.finish_reason_to_proto(FinishReason.LENGTH) if last else None
            await context.write(
                response(first_token=response.FirstToken(token=token, finish_reason=finish))
            )
            if last:
                return
            worker.handoffs.ready(key).set()
            await worker.script("computed")
            await worker.handoffs.pulled(key).wait()
            await worker.script("handed")
            await context.write(response(handed=response.Handed(kv_bytes=64)))
            await worker.script("over")

    async def Release(  # noqa: N802
        self,
        request: prefill_pb2.ReleaseRequest,
        context: Context,  # noqa: ARG002
    ) -> prefill_pb2.ReleaseResponse:
        self._worker.released.append(short(request.key))
        return prefill_pb2.ReleaseResponse(released=True)


class _Decode(decode_pb2_grpc.DecodeServiceServicer):
    """Stages: arrived, reserved, kv, token:N before the token at position N, finish."""

    def __init__(self, worker: FakeWorker) -> None:
        self._worker = worker

    async def Decode(  # noqa: N802
        self,
        request: decode_pb2.DecodeRequest,
        context: Context,
    ) -> None:
        worker, response = self._worker, decode_pb2.DecodeResponse
        first = len(request.sequence.generated)
        with worker.called(request.key, first) as key:
            worker.check_digest(request.kv_digest)
            await worker.script("arrived")
            await context.write(response(reserved=response.Reserved(cached_tokens=32)))
            await worker.script("reserved")
            if request.HasField("source"):
                await worker.handoffs.pull(key, request.source.worker_id)
                first += 1
            await worker.script("kv")
            await context.write(response(kv_received=response.KvReceived(kv_bytes=64)))
            for index in range(first, request.sequence.sampling.max_tokens):
                await worker.script(f"token:{index}")
                token = token_at(request.sequence.prompt, index)
                chunk = common_pb2.TokenChunk(first_index=index, token_ids=[token])
                if request.sequence.sampling.HasField("logprobs"):
                    chosen = common_pb2.TokenLogprob(token_id=token, logprob=-0.5)
                    top = [chosen] * request.sequence.sampling.logprobs
                    chunk.logprobs.add(chosen=chosen, top=top)
                await context.write(response(tokens=chunk))
            await worker.script("finish")
            reason = codec.finish_reason_to_proto(FinishReason.LENGTH)
            await context.write(response(finished=response.Finished(reason=reason)))


@dataclass
class Answer:
    """What a client got."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    accepted: inference_pb2.Accepted | None = None
    finished: inference_pb2.Finished | None = None

    def add(self, response: inference_pb2.GenerateResponse) -> None:
        """Checks the order of messages and the positions of tokens."""
        assert self.finished is None
        match response.WhichOneof("event"):
            case "accepted":
                assert self.accepted is None
                self.accepted = response.accepted
            case "chunk":
                assert self.accepted is not None
                self.text += response.chunk.text
                if response.chunk.HasField("tokens"):
                    assert response.chunk.tokens.first_index == len(self.tokens), "gap or repeat"
                    self.tokens.extend(response.chunk.tokens.token_ids)
            case "finished":
                self.finished = response.finished
            case other:
                raise AssertionError(other)

    @property
    def end(self) -> inference_pb2.Finished:
        assert self.finished is not None
        return self.finished

    @property
    def failures(self) -> list[str]:
        """Reasons of the attempts before the one that succeeded."""
        assert self.end.attempts[-1].failure == ""
        return [attempt.failure.split(":")[0] for attempt in self.end.attempts[:-1]]


class Cluster:
    """A router, its fake workers, and a client's channel."""

    def __init__(self, app: RouterApp, channel: grpc.aio.Channel) -> None:
        self.app = app
        self.handoffs = Handoffs()
        self.workers: list[FakeWorker] = []
        self.inference = inference_pb2_grpc.InferenceServiceStub(channel)
        self.fleet = fleet_pb2_grpc.FleetServiceStub(channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.app.port}"

    async def add(
        self,
        role: Role,
        worker_id: str,
        script: Script = behave,
        *,
        spec: KVSpec = SPEC,
        tunnels: bool = False,
    ) -> FakeWorker:
        """Starts a worker and waits until the router counts it as a member."""
        worker = FakeWorker(role, worker_id, self.handoffs, script, spec=spec, tunnels=tunnels)
        await worker.start(self.address)
        self.workers.append(worker)
        await self.until(lambda: worker_id in self.members)
        return worker

    async def prefill(self, worker_id: str, script: Script = behave) -> FakeWorker:
        return await self.add(Role.PREFILL, worker_id, script)

    async def decode(self, worker_id: str, script: Script = behave) -> FakeWorker:
        return await self.add(Role.DECODE, worker_id, script)

    @property
    def members(self) -> list[str]:
        return [info.worker_id for info in self.app.fleet.registry.infos()]

    async def until(self, condition: Callable[[], bool], timeout_s: float = 5.0) -> None:
        async with asyncio.timeout(timeout_s):
            while not condition():  # noqa: ASYNC110 - conditions are of every kind
                await asyncio.sleep(0.005)

    def call(self, timeout_s: float | None = 20.0, **changes: Any) -> Any:
        """Starts a Generate call with ten tokens of the usual prompt."""
        return self.inference.Generate(request(**changes), timeout=timeout_s)

    async def generate(self, timeout_s: float | None = 20.0, **changes: Any) -> Answer:
        """The whole answer. Raises the BatonError that the router meant."""
        answer = Answer()
        try:
            async for response in self.call(timeout_s, **changes):
                answer.add(response)
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return answer

    async def settled(self) -> None:
        """Waits until nothing of any request is left, and checks the books."""
        await self.until(lambda: len(self.app.table) == 0)
        await self.until(lambda: all(worker.running == 0 for worker in self.workers))
        registry = self.app.fleet.registry
        assert registry.claimed_tokens() == 0
        registry.check_integrity()


def request(**changes: Any) -> inference_pb2.GenerateRequest:
    """`changes` are fields of SamplingParams, or `prompt` for tokens, or other fields of GenerateRequest."""
    names = (
        "request_id",
        "model",
        "text",
        "session_id",
        "priority",
        "ttft_slo_seconds",
        "cache_salt",
    )
    whole: dict[str, Any] = {name: changes.pop(name) for name in names if name in changes}
    if "text" not in whole:
        whole["tokens"] = common_pb2.TokenIds(ids=changes.pop("prompt", PROMPT))
    sampling = common_pb2.SamplingParams(**({"max_tokens": 10, "seed": 1} | changes))
    return inference_pb2.GenerateRequest(sampling=sampling, **whole)


@asynccontextmanager
async def cluster(limits: LimitsOf | None = None, **settings: Any) -> AsyncIterator[Cluster]:
    """A router without workers. At the end nothing of it may be left."""
    app = RouterApp(replace(SETTINGS, **settings), Tokenizer.of_bytes(), limits=limits)
    await app.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{app.port}") as channel:
        here = Cluster(app, channel)
        try:
            yield here
            await here.settled()
        finally:
            for worker in here.workers:
                await worker.stop()
            await app.stop()
    await here.until(lambda: not _tasks_of_the_router())


def _tasks_of_the_router() -> list[str]:
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    return [str(task) for task in tasks if "router" in str(task.get_coro())]
