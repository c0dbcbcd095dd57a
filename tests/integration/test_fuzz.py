"""Whatever bytes a caller sends, router and workers answer in time with a status that says what was wrong, and go on.

Every method of every service is tried, so that a new one is too. `--fuzz-examples N` tries harder.
"""

import asyncio
import logging
import pkgutil
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from importlib import import_module
from threading import Thread
from typing import Any, TypeVar

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smg_grpc_proto.generated import vllm_engine_pb2

import baton.v1
import router.kserve.v2
from baton import codec
from baton.types import AttemptKey, RequestId, Role, TokenChunk
from baton.v1 import (
    common_pb2,
    decode_pb2,
    fleet_pb2,
    inference_pb2,
    prefill_pb2,
    session_pb2,
)
from baton.vllm.handoff import HandedOver, to_json
from router.kserve.v2 import inference_pb2 as kserve
from tests.foreign_router import generate_request
from tests.integration.router_fakes import SETTINGS, FakeWorker, Handoffs, request
from tests.integration.sim_house import LENGTH, House, house, prompt_of
from tests.protobuf_strategies import altered, messages, mutilated
from tests.worker_rig import sequence

T = TypeVar("T")

CALLS = 8
"""At once."""
CALL_S = 0.3
"""Deadline of a fuzzed call."""
BOUND_S = 5.0
"""Its answer must be there by then, however busy this machine is."""
BUGS = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS}


def _methods() -> list[MethodDescriptor]:
    modules = [
        import_module(f"{package.__name__}.{each.name}")
        for package in (baton.v1, router.kserve.v2)
        for each in pkgutil.iter_modules(package.__path__)
    ]
    files = {
        module.DESCRIPTOR.name: module.DESCRIPTOR
        for module in modules
        if hasattr(module, "DESCRIPTOR")
    }
    services = [service for file in files.values() for service in file.services_by_name.values()]
    foreign = vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"].methods_by_name
    own = [method for service in services for method in service.methods]
    # Its other methods are asked nothing, or refuse everything.
    return [*own, foreign["Generate"], foreign["Abort"]]


METHODS = _methods()
METADATA: st.SearchStrategy[Any] = st.lists(
    st.tuples(
        st.sampled_from(["authorization", "x-request-id", "a", "grpc-timeout", "traceparent"]),
        st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=40)
        | st.just("x" * 20_000),
    )
    | st.tuples(st.sampled_from(["a-bin", "grpc-trace-bin"]), st.binary(max_size=40)),
    max_size=4,
).map(tuple)


class Errors(logging.Handler):
    """What the house says of itself: a bug that shows after its call's deadline is in no status. (gRPC complains of callers.)"""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []
        self.addFilter(lambda record: not record.name.startswith("grpc"))

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Target:
    """A whole house on an event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="house", daemon=True)
        self._stack = AsyncExitStack()
        self.errors = Errors()

    def start(self) -> None:
        logging.getLogger().addHandler(self.errors)
        self._thread.start()
        self.run(self._start())

    def stop(self) -> None:
        """Fails where anything is still held."""
        try:
            self.run(self._stack.aclose())
        finally:
            logging.getLogger().removeHandler(self.errors)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5)
            self._loop.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        future: Future[T] = asyncio.run_coroutine_threadsafe(work, self._loop)
        return future.result(30)

    async def _start(self) -> None:
        calm = replace(SETTINGS, worker_wait_s=1.0, default_timeout_s=2.0, max_attempts=2)
        self.house: House = await self._stack.enter_async_context(house(1, 2, settings=calm))
        router = f"127.0.0.1:{self.house.app.port}"
        addresses = {"InferenceService": router, "FleetService": router}
        infos = self.house.app.fleet.registry.infos()
        for info in reversed(infos):
            addresses[f"{info.role.value.capitalize()}Service"] = info.address
        addresses["VllmEngine"] = next(i.address for i in infos if i.role is Role.DECODE)
        # Who is told to drain, drains: not the only one.
        addresses["WorkerService"] = infos[-1].address
        create = session_pb2.SessionServiceCreateRequest()
        session = (await self.house.sessions.Create(create)).session.session_id
        self._right = self._right_messages(session)
        self._channels = {
            service: self._stack.enter_context(grpc.insecure_channel(address))
            for service, address in addresses.items()
        }
        self.threads = self._stack.enter_context(ThreadPoolExecutor(CALLS))

    def has_right(self, name: str) -> bool:
        return name in self._right

    def right(self, name: str) -> Message:
        """A fresh one."""
        message = type(self._right[name])()
        message.CopyFrom(self._right[name])
        return message

    def _right_messages(self, session: str) -> dict[str, Message]:
        """By type, what an honest peer would send: what is nearly right gets further than what is not right at all."""
        infos = self.house.app.fleet.registry.infos()
        digest = infos[0].spec.digest
        key = common_pb2.AttemptKey(request_id="fuzz/1")
        whole = codec.sequence_to_proto(sequence())
        source = decode_pb2.KvSource(
            transfer_address=next(i.transfer_address for i in infos if i.role is Role.PREFILL)
        )
        kinds: list[Message] = [
            request(prompt=prompt_of(1), request_id="fuzz", session_id=session),
            decode_pb2.DecodeRequest(key=key, sequence=whole, kv_digest=digest, source=source),
            prefill_pb2.PrefillRequest(key=key, sequence=whole, kv_digest=digest),
            prefill_pb2.ReleaseRequest(key=key),
            _foreign(source.transfer_address),
            inference_pb2.CancelRequest(request_id="fuzz"),
            inference_pb2.AttachRequest(request_id="fuzz"),
            session_pb2.SessionServiceGetRequest(session_id=session),
            session_pb2.SessionServiceCloseRequest(session_id=session),
            _open_inference(),
        ]
        return {kind.DESCRIPTOR.full_name: kind for kind in kinds}

    async def probe(self) -> None:
        """An honest request is served."""
        answer = await self.house.generate(7)
        assert len(answer.tokens) == LENGTH

    def call(self, method: MethodDescriptor, data: list[bytes], metadata: Any) -> grpc.StatusCode:
        """The status that was sent, within the bound. (The blocking client, because the other one makes up an INTERNAL of its own
        where it writes to a call that has ended.)
        """
        service = method.containing_service
        channel = self._channels.get(service.name, self._channels["InferenceService"])
        path = f"/{service.full_name}/{method.name}"
        kinds: dict[tuple[bool, bool], Any] = {
            (False, False): channel.unary_unary,
            (False, True): channel.unary_stream,
            (True, False): channel.stream_unary,
            (True, True): channel.stream_stream,
        }
        # Bytes go and come as they are.
        stub = kinds[method.client_streaming, method.server_streaming](path)
        request = iter(data) if method.client_streaming else b"".join(data)
        if not method.server_streaming:
            stub = stub.future
        call = stub(request, timeout=CALL_S, metadata=metadata)
        began_s = time.monotonic()
        with suppress(grpc.RpcError):
            if method.server_streaming:
                for response in call:
                    # Where a stream outlives what a request fails with, a message tells it.
                    assert b"INTERNAL: " not in response
            else:
                call.result()
        assert time.monotonic() - began_s < BOUND_S
        code: grpc.StatusCode = call.code()
        return code


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    target = Target()
    target.start()
    try:
        yield target
    finally:
        target.stop()


@pytest.fixture
def examples(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--fuzz-examples"))


def _tried(examples: int, act: Any, *strategies: st.SearchStrategy[Any]) -> None:
    limits = settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    limits(given(*strategies)(act))()


def _inputs(method: MethodDescriptor, target: Target) -> st.SearchStrategy[list[bytes]]:
    whole = messages(method.input_type)
    if target.has_right(method.input_type.full_name):
        whole |= altered(target.right, method.input_type.full_name)
    one = whole.map(lambda message: message.SerializeToString()) | mutilated(whole)
    return st.lists(one, min_size=1, max_size=4 if method.client_streaming else 1)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.full_name.split(".", 2)[-1])
def test_no_bytes_make_a_method_fail_as_if_it_had_a_bug(
    target: Target, method: MethodDescriptor, examples: int
) -> None:
    """Promise: a status within the bound, never INTERNAL or UNKNOWN; and honest requests are served as before."""

    def attempt(batch: list[tuple[list[bytes], Any]]) -> None:
        calls = target.threads.map(lambda each: target.call(method, *each), batch)
        assert not BUGS & set(calls)
        assert not target.errors.said

    several = st.lists(st.tuples(_inputs(method, target), METADATA), min_size=1, max_size=CALLS)
    # Of a message without fields, there are not many kinds.
    _tried(examples if method.input_type.fields else max(5, examples // 4), attempt, several)
    target.run(target.probe())


@pytest.mark.timeout(3600)
def test_a_member_that_reports_nonsense_harms_nobody(target: Target, examples: int) -> None:
    """A worker that joined, and says anything of its size and its load: requests are served all the same. (Of the model, members are
    believed.)
    """
    join = next(method for method in METHODS if method.full_name.endswith("FleetService.Join"))
    beats = messages(join.input_type.nested_types_by_name["Heartbeat"])

    def attempt(reports: list[Any], num_blocks: int, block_size_tokens: int) -> None:
        info = _stranger()
        info.num_blocks, info.block_size_tokens = num_blocks, block_size_tokens
        honest = fleet_pb2.JoinRequest(announce=fleet_pb2.JoinRequest.Announce(info=info))
        said = [honest, *(fleet_pb2.JoinRequest(heartbeat=report) for report in reports)]
        data = [message.SerializeToString() for message in said]
        calling = target.threads.submit(target.call, join, data, ())
        target.run(target.probe())
        assert calling.result() not in BUGS
        assert not target.errors.said

    sizes = st.sampled_from([1, 16, 2**32 - 1])
    _tried(max(5, examples // 4), attempt, st.lists(beats, max_size=3), sizes, sizes)


def _open_inference() -> kserve.ModelInferRequest:
    message = kserve.ModelInferRequest(model_name="sim", id="fuzz")
    for name, datatype in (("text_input", "BYTES"), ("max_tokens", "INT32"), ("stream", "BOOL")):
        message.inputs.add(name=name, datatype=datatype, shape=[1])
    message.raw_input_contents.extend([b"\4\0\0\0fuzz", b"\4\0\0\0", b"\1"])
    message.parameters["temperature"].double_param = 0.7
    return message


def _foreign(address: str) -> vllm_engine_pb2.GenerateRequest:
    """The decode leg of a foreign router's request."""
    handed = HandedOver(
        address=address,
        key=AttemptKey(RequestId("fuzz")),
        digest="",
        fingerprint="",
        num_tokens=len(sequence()),
        kv_bytes=0,
        cached_tokens=0,
        first=TokenChunk(0, (1,)),
        done_unix_s=0.0,
    )
    request = generate_request("fuzz", sequence().prompt, max_tokens=4)
    request.kv_transfer_params_json = to_json(handed)
    return request


def _stranger() -> Any:
    """What a worker of the served model would announce, at an address where nobody listens."""
    worker = FakeWorker(Role.DECODE, "stranger", Handoffs())
    worker.port = 1
    info = codec.worker_info_to_proto(worker.info)
    info.model = "sim"
    return info
