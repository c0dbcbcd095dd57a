"""Calls that are made in the instant in which their server stops, over channels as Baton opens them."""

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import grpc
import pytest

from baton.client import ConnectionOptions, wire
from baton.service import channel
from baton.service.settings import ServerSettings
from baton.v1 import inference_pb2 as pb
from baton.v1.inference_pb2_grpc import InferenceServiceStub
from tests.served import until

pytestmark = pytest.mark.e2e

CALLS = 24
"""At once, each on a connection of its own. Where gRPC may send calls again, about every tenth of them never ends."""
PAUSES_S = (0.0, 0.001, 0.002, 0.004) * 2
"""Between the last word of the running calls and the end of the server."""
LATE_S = [0.0002 * (i // 2) * (i % 2) for i in range(CALLS)]
"""Between the end of a call and the next one on that connection."""
AFTERWARDS = 3
"""Calls on each connection from then on."""
END_S = 4.0

CLIENTS = wire.channel_options(ConnectionOptions())
FLEETS = channel.channel_options(ServerSettings())


LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
"""What a client takes for a server that is gone."""


Options = list[tuple[str, int]] | list[tuple[str, int | str]]


def assert_all_end(ended: list[grpc.StatusCode]) -> None:
    """Waits for how all calls on all connections end."""
    calls = CALLS * (1 + AFTERWARDS)
    until(lambda: len(ended) == calls, END_S, "every call ends", lambda: f"{len(ended)} of {calls}")
    assert set(ended) <= LOST


@contextmanager
def stopping_server(pause_s: float) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.faults.stopping_server", str(pause_s)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def port(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    return int(server.stdout.readline())


def stop(server: subprocess.Popen[str]) -> None:
    assert server.stdin is not None
    server.stdin.write("\n")
    server.stdin.flush()


@pytest.mark.parametrize("options", [CLIENTS, FLEETS], ids=["clients", "fleets"])
def test_every_blocking_call_ends_though_its_server_stops(options: Options) -> None:
    """Promise: whatever the instant, the caller hears that the server is gone."""

    def call_on(
        target: str, running: threading.Barrier, ended: list[grpc.StatusCode], late_s: float
    ) -> None:
        with grpc.insecure_channel(target, options=options) as opened:
            generate = InferenceServiceStub(opened).Generate
            call = generate(pb.GenerateRequest())
            next(call)
            running.wait()
            for _ in range(1 + AFTERWARDS):
                with suppress(grpc.RpcError):
                    list(call)
                ended.append(call.code())
                time.sleep(late_s)
                call = generate(pb.GenerateRequest())

    for pause_s in PAUSES_S:
        with stopping_server(pause_s) as server:
            running, ended = threading.Barrier(CALLS + 1), list[grpc.StatusCode]()
            target = f"127.0.0.1:{port(server)}"
            for late_s in LATE_S:
                arguments = (target, running, ended, late_s)
                # A thread whose call never ends can not be joined.
                threading.Thread(target=call_on, args=arguments, daemon=True).start()
            running.wait(20)
            stop(server)
            assert_all_end(ended)


@pytest.mark.parametrize("options", [CLIENTS, FLEETS], ids=["clients", "fleets"])
async def test_every_async_call_ends_though_its_server_stops(options: Options) -> None:
    """Promise: the same on an event loop."""

    async def call_on(
        target: str, running: asyncio.Barrier, ended: list[grpc.StatusCode], late_s: float
    ) -> None:
        async with grpc.aio.insecure_channel(target, options=options) as opened:
            generate = InferenceServiceStub(opened).Generate
            for afterwards in range(1 + AFTERWARDS):
                call = generate(pb.GenerateRequest())
                with suppress(grpc.aio.AioRpcError):
                    async for _ in call:
                        if not afterwards:
                            await running.wait()
                ended.append(await call.code())
                await asyncio.sleep(late_s)

    for pause_s in PAUSES_S:
        with stopping_server(pause_s) as server:
            running, ended = asyncio.Barrier(CALLS + 1), list[grpc.StatusCode]()
            target = f"127.0.0.1:{await asyncio.to_thread(port, server)}"
            callers = [
                asyncio.create_task(call_on(target, running, ended, late_s)) for late_s in LATE_S
            ]
            await asyncio.wait_for(running.wait(), 20)
            stop(server)
            await asyncio.to_thread(assert_all_end, ended)
            await asyncio.gather(*callers)
