"""A gRPC server that stops: `python -m tests.faults.stopping_server SECONDS`.

It prints its port and answers `Generate` with a message and silence, `GetModel` with silence. Once its standard input has a line or
ends, it ends its calls with UNAVAILABLE and, so many seconds later, stops without a grace: as a router or a worker does that has to leave.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import Any, NoReturn

import grpc

from baton.v1 import inference_pb2 as pb
from baton.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    add_InferenceServiceServicer_to_server,
)

Context = grpc.aio.ServicerContext[Any, Any]


class _Router(InferenceServiceServicer):
    def __init__(self, stopping: asyncio.Event) -> None:
        self._stopping = stopping

    async def Generate(  # noqa: N802
        self, _: pb.GenerateRequest, context: Context
    ) -> AsyncIterator[pb.GenerateResponse]:
        yield pb.GenerateResponse()
        await self._end(context)

    async def GetModel(  # noqa: N802
        self, _: pb.GetModelRequest, context: Context
    ) -> pb.GetModelResponse:
        await self._end(context)

    async def _end(self, context: Context) -> NoReturn:
        await self._stopping.wait()
        await context.abort(grpc.StatusCode.UNAVAILABLE, "stopping")


async def main(pause_s: float) -> None:
    stopping = asyncio.Event()
    server = grpc.aio.server()
    add_InferenceServiceServicer_to_server(_Router(stopping), server)
    sys.stdout.write(f"{server.add_insecure_port('127.0.0.1:0')}\n")
    sys.stdout.flush()
    await server.start()
    await asyncio.to_thread(sys.stdin.readline)
    stopping.set()
    await asyncio.sleep(pause_s)
    await server.stop(0)
    os._exit(0)  # with no pause in which gRPC says good-bye


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1])))
