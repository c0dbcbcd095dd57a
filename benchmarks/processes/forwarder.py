"""What gRPC alone costs: a server that forwards a streaming call to another server and copies bytes, and does nothing else.

The router cannot cost less than this without sharing streams. Three processes, as in `benchmarks.router_cost`, which calls it.

    python -m benchmarks.processes.forwarder backend | forward PORT       prints the port; ends with its standard input
"""

import argparse
import asyncio
import sys
from collections.abc import Callable
from typing import Any

import grpc


def _handlers(behaviour: Callable[..., Any]) -> Any:
    method = grpc.unary_stream_rpc_method_handler(behaviour)
    return grpc.method_handlers_generic_handler("bare", {"Stream": method})


async def _answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    for _ in range(int(request)):
        await context.write(b"x" * 20)


async def _serve(args: argparse.Namespace) -> None:
    server = grpc.aio.server()
    behaviour: Callable[..., Any] = _answer
    if args.role == "forward":
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{args.port}")
        call = channel.unary_stream("/bare/Stream", None, None)

        async def forward(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            async for message in call(request):
                await context.write(message)

        behaviour = forward
    server.add_generic_rpc_handlers((_handlers(behaviour),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["backend", "forward"])
    parser.add_argument("port", type=int, nargs="?")
    asyncio.run(_serve(parser.parse_args()))


if __name__ == "__main__":
    main()
