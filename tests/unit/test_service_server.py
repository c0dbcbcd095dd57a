"""The gRPC harness: limits, malformed bytes, exceptions, health, reflection, keepalive, stop."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from baton.errors import (
    BatonError,
    CapacityError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    UnavailableError,
)
from baton.service.channel import open_channel
from baton.service.server import GrpcServer
from baton.service.settings import ServerSettings
from baton.service.status import error_from_rpc
from baton.v1 import decode_pb2, decode_pb2_grpc, fleet_pb2, fleet_pb2_grpc
from tests.certificates import Authority

DECODE = "baton.v1.DecodeService"
FLEET = "baton.v1.FleetService"
INVALID_UTF8 = b"\x0a\x03\x0a\x01\xff"


class FakeDecode(decode_pb2_grpc.DecodeServiceServicer):
    """Answers once, then does as told."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.hang = False
        self.closed = asyncio.Event()

    async def Decode(  # noqa: N802
        self, _request: decode_pb2.DecodeRequest, _context: object
    ) -> AsyncIterator[decode_pb2.DecodeResponse]:
        try:
            yield decode_pb2.DecodeResponse()
            if self.hang:
                await asyncio.Event().wait()
            if self.error is not None:
                raise self.error
        finally:
            self.closed.set()

    async def GetInfo(  # noqa: N802
        self, _request: decode_pb2.DecodeServiceGetInfoRequest, _context: object
    ) -> decode_pb2.DecodeServiceGetInfoResponse:
        if self.error is not None:
            raise self.error
        return decode_pb2.DecodeServiceGetInfoResponse()


class FakeFleet(fleet_pb2_grpc.FleetServiceServicer):
    """Answers every message."""

    async def Join(  # noqa: N802
        self, requests: AsyncIterator[fleet_pb2.JoinRequest], _context: object
    ) -> AsyncIterator[fleet_pb2.JoinResponse]:
        async for _ in requests:
            yield fleet_pb2.JoinResponse()


class Harness:
    """A server and a channel to it."""

    def __init__(self, server: GrpcServer, decode: FakeDecode, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.decode = decode
        self.channel = channel
        self.stub = decode_pb2_grpc.DecodeServiceStub(channel)

    async def get_info(self) -> Any:
        return await self.stub.GetInfo(decode_pb2.DecodeServiceGetInfoRequest(), timeout=5)

    async def raw(self, method: str, data: bytes) -> list[bytes]:
        call = self.channel.unary_stream(
            method, request_serializer=bytes, response_deserializer=bytes
        )
        return [each async for each in call(data, timeout=5)]

    async def health(self, service: str) -> int:
        stub = health_pb2_grpc.HealthStub(self.channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)


@asynccontextmanager
async def running(settings: ServerSettings | None = None) -> AsyncIterator[Harness]:
    settings = settings or ServerSettings()
    server = GrpcServer(settings, [DECODE, FLEET])
    decode = FakeDecode()
    server.register(lambda s: decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, s))
    server.register(lambda s: fleet_pb2_grpc.add_FleetServiceServicer_to_server(FakeFleet(), s))
    port = await server.start()
    try:
        async with open_channel(f"127.0.0.1:{port}", settings) as channel:
            yield Harness(server, decode, channel)
    finally:
        await server.stop(0)


async def test_a_typed_error_reaches_the_client_as_itself() -> None:
    async with running() as harness:
        harness.decode.error = NotFoundError("model", "m")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await harness.get_info()
        error = error_from_rpc(failed.value)
        assert isinstance(error, NotFoundError)
        assert (error.resource_type, error.name) == ("model", "m")


async def test_an_error_within_a_task_group_counts_as_the_typed_one_in_it() -> None:
    async with running() as harness:
        harness.decode.error = ExceptionGroup("g", [ValueError("x"), CapacityError("full")])
        call = harness.stub.Decode(decode_pb2.DecodeRequest(), timeout=5)
        assert await call.read() is not None
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert isinstance(error_from_rpc(failed.value), CapacityError)


async def test_a_bug_becomes_internal_without_what_it_quotes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A prompt that an exception quotes is neither logged nor sent back."""
    async with running() as harness:
        harness.decode.error = ValueError("secret prompt")
        with (
            caplog.at_level(logging.ERROR, "baton"),
            pytest.raises(grpc.aio.AioRpcError) as failed,
        ):
            await harness.get_info()
        assert isinstance(error_from_rpc(failed.value), InternalError)
        assert "secret" not in (failed.value.details() or "")
        assert "ValueError" in caplog.text
        assert "GetInfo" in caplog.text
        assert "secret" not in caplog.text


async def test_a_cancelled_error_that_nobody_caused_by_cancelling_becomes_a_status() -> None:
    """Promise: an error in bounded time instead of a hang."""
    async with running() as harness:
        harness.decode.error = asyncio.CancelledError()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await harness.get_info()
        assert isinstance(error_from_rpc(failed.value), InternalError)
        call = harness.stub.Decode(decode_pb2.DecodeRequest(), timeout=5)
        assert await call.read() is not None
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert isinstance(error_from_rpc(failed.value), InternalError)


@pytest.mark.parametrize("data", [INVALID_UTF8, b"\xff\xff\xff", b"\x0a\x50"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(data: bytes) -> None:
    async with running() as harness:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await harness.raw(f"/{DECODE}/Decode", data)
        assert isinstance(error_from_rpc(failed.value), InvalidRequestError)
        assert not harness.decode.closed.is_set()
        await harness.get_info()


async def test_malformed_bytes_within_a_request_stream_are_an_invalid_argument() -> None:
    async with running() as harness:
        join: Any = harness.channel.stream_stream(
            f"/{FLEET}/Join", request_serializer=bytes, response_deserializer=bytes
        )
        call = join(timeout=5)
        await call.write(b"")
        assert await call.read() == b""
        await call.write(b"\xff\xff\xff")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert isinstance(error_from_rpc(failed.value), InvalidRequestError)


async def test_an_unknown_method_is_unimplemented() -> None:
    async with running() as harness:
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await harness.raw(f"/{DECODE}/Nothing", b"")
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_message_over_the_limit_is_refused_and_the_server_goes_on() -> None:
    async with running(ServerSettings(max_message_bytes=10_000)) as harness:
        request = decode_pb2.DecodeRequest(kv_digest="x" * 20_000)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await harness.stub.Decode(request, timeout=5).read()
        assert failed.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert isinstance(error_from_rpc(failed.value), InvalidRequestError)
        await harness.get_info()


async def test_metadata_over_the_limit_is_refused_and_the_server_goes_on() -> None:
    async with running(ServerSettings(max_metadata_bytes=4096)) as harness:
        for size, refused in ((2000, False), (6000, True), (2000, False)):
            request = decode_pb2.DecodeServiceGetInfoRequest()
            call = harness.stub.GetInfo(request, timeout=5, metadata=(("x-note", "x" * size),))
            code = await call.code()
            assert (code is grpc.StatusCode.RESOURCE_EXHAUSTED) is refused


async def test_calls_over_the_limit_of_a_connection_wait_their_turn() -> None:
    """Promise: one connection cannot take more of the server than its share, and nothing is lost."""
    async with running(ServerSettings(max_streams=2)) as harness:
        harness.decode.hang = True
        held = [harness.stub.Decode(decode_pb2.DecodeRequest()) for _ in range(2)]
        for call in held:
            await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as waited:
            await harness.stub.GetInfo(decode_pb2.DecodeServiceGetInfoRequest(), timeout=0.3)
        assert waited.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        held[0].cancel()
        await harness.get_info()
        held[1].cancel()


async def test_a_handlers_cleanup_runs_when_the_caller_cancels() -> None:
    """Generators end with the call, not when garbage is collected."""
    async with running() as harness:
        harness.decode.hang = True
        call = harness.stub.Decode(decode_pb2.DecodeRequest())
        await call.read()
        call.cancel()
        async with asyncio.timeout(2):
            await harness.decode.closed.wait()


async def test_a_handlers_cleanup_runs_when_the_deadline_passes() -> None:
    async with running() as harness:
        harness.decode.hang = True
        call = harness.stub.Decode(decode_pb2.DecodeRequest(), timeout=0.2)
        await call.read()
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert isinstance(error_from_rpc(failed.value), DeadlineError)
        async with asyncio.timeout(2):
            await harness.decode.closed.wait()


async def test_health_speaks_for_the_process_and_for_each_service() -> None:
    async with running() as harness:
        assert await harness.health("") == health_pb2.HealthCheckResponse.SERVING
        assert await harness.health(DECODE) == health_pb2.HealthCheckResponse.NOT_SERVING
        await harness.server.set_serving(serving=True)
        assert await harness.health(DECODE) == health_pb2.HealthCheckResponse.SERVING
        await harness.server.set_serving(serving=False, alive=False)
        assert await harness.health("") == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await harness.health("unknown")
        assert failed.value.code() is grpc.StatusCode.NOT_FOUND


async def test_every_watcher_of_health_learns_of_every_change() -> None:
    """Another watcher's leaving does not silence the ones that stay."""
    async with running() as harness:
        await harness.server.set_serving(serving=True)
        stub = health_pb2_grpc.HealthStub(harness.channel)
        leaving, staying = (
            stub.Watch(health_pb2.HealthCheckRequest(service=DECODE)) for _ in range(2)
        )
        for call in (leaving, staying):
            assert (await call.read()).status == health_pb2.HealthCheckResponse.SERVING
        leaving.cancel()
        await asyncio.sleep(0.05)
        await harness.server.set_serving(serving=False)
        async with asyncio.timeout(2):
            answer = await staying.read()
        assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        staying.cancel()


async def test_reflection_lists_the_services() -> None:
    async with running() as harness:
        stub = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
        call = stub.ServerReflectionInfo(timeout=5)
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        names = {each.name for each in answer.list_services_response.service}
        assert {DECODE, FLEET, "grpc.health.v1.Health"} <= names
        call.cancel()


async def test_reflection_can_be_turned_off() -> None:
    async with running(ServerSettings(reflection=False)) as harness:
        stub = reflection_pb2_grpc.ServerReflectionStub(harness.channel)
        call = stub.ServerReflectionInfo(timeout=5)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
        assert failed.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_second_server_on_the_port_is_refused() -> None:
    """Two processes never share a port's connections at random."""
    async with running() as harness:
        other = GrpcServer(ServerSettings(port=harness.server.port), [DECODE])
        with pytest.raises(UnavailableError, match="port"):
            await other.start()
        await other.stop(0)


async def test_stop_turns_health_off_refuses_new_calls_and_ends_running_ones() -> None:
    async with running() as harness:
        await harness.server.set_serving(serving=True)
        harness.decode.hang = True
        call = harness.stub.Decode(decode_pb2.DecodeRequest())
        await call.read()
        stopping = asyncio.create_task(harness.server.stop(0.3))
        await asyncio.sleep(0.1)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await harness.get_info()
        assert isinstance(error_from_rpc(refused.value), UnavailableError)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await call.read()
        assert isinstance(error_from_rpc(ended.value), UnavailableError)
        await stopping
        await harness.server.set_serving(serving=True)
        await harness.server.stop(0)


async def test_a_silent_call_survives_a_client_that_pings_often() -> None:
    """A long generation with nothing to say is not cut off for its client's keepalive pings."""
    settings = ServerSettings(min_client_ping_s=0.05)
    eager = replace(settings, keepalive_s=0.1)
    async with running(settings) as harness:
        harness.decode.hang = True
        target = f"127.0.0.1:{harness.server.port}"
        async with open_channel(target, eager) as channel:
            call = decode_pb2_grpc.DecodeServiceStub(channel).Decode(decode_pb2.DecodeRequest())
            await call.read()
            reading = asyncio.create_task(call.read())
            done, _ = await asyncio.wait({reading}, timeout=4.5)
            assert not done
            call.cancel()
            await asyncio.wait({reading})


async def test_any_error_of_the_tree_crosses_a_stream() -> None:
    async with running() as harness:
        for error in (CapacityError("full", retry_after_s=0.5), UnavailableError("drain")):
            harness.decode.error = error
            call = harness.stub.Decode(decode_pb2.DecodeRequest(), timeout=5)
            await call.read()
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await call.read()
            back: BatonError = error_from_rpc(failed.value)
            assert (type(back), vars(back)) == (type(error), vars(error))


async def test_a_burst_of_calls_is_not_turned_away() -> None:
    """GRPC would cancel calls, without a reason, beyond the first thousand that wait for the event loop."""
    server = GrpcServer(ServerSettings(reflection=False), [])
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        calls = [check(health_pb2.HealthCheckRequest(), timeout=30) for _ in range(4000)]
        answers = await asyncio.gather(*calls)
    await server.stop(0)
    assert {answer.status for answer in answers} == {health_pb2.HealthCheckResponse.SERVING}


async def test_a_server_waits_for_calls_once_however_many_methods_it_has() -> None:
    """Promise: a call costs no more for the services that are served beside its own."""
    others = len(asyncio.all_tasks())
    smallest = GrpcServer(ServerSettings(reflection=False), [])
    await smallest.start()
    await asyncio.sleep(0)
    tasks_of_smallest = len(asyncio.all_tasks()) - others
    await smallest.stop(0)
    others = len(asyncio.all_tasks())
    async with running():
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) - others == tasks_of_smallest


async def test_probes_without_a_certificate_see_the_health_and_nothing_else(tmp_path: Path) -> None:
    """Promise: where callers must show certificates, whoever has none still learns whether the process is well."""
    files = Authority.make(tmp_path).issue("server")
    settings = ServerSettings(health_listen="127.0.0.1:0")
    server = GrpcServer(settings, [DECODE], tls=files)
    decode = FakeDecode()
    server.register(lambda s: decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, s))
    await server.start()
    try:
        await server.set_serving(serving=True)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.health_port}") as channel:
            harness = Harness(server, decode, channel)
            assert await harness.health(DECODE) == health_pb2.HealthCheckResponse.SERVING
            await server.set_serving(serving=False)
            assert await harness.health(DECODE) == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await harness.health("") == health_pb2.HealthCheckResponse.SERVING
            for unknown in (harness.health("other"), harness.get_info()):
                with pytest.raises(grpc.aio.AioRpcError) as failed:
                    await unknown
                assert failed.value.code() in {
                    grpc.StatusCode.NOT_FOUND,
                    grpc.StatusCode.UNIMPLEMENTED,
                }
    finally:
        await server.stop(0)


async def test_a_port_for_probes_that_is_taken_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = GrpcServer(ServerSettings(health_listen=address), [DECODE])
        with pytest.raises(UnavailableError, match=address):
            await server.start()
