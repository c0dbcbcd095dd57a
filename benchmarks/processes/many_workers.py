"""Workers for benchmarks of the router: many in one process, in one of two kinds.

    sim     the real workers with simulated engines, and the memory transport between them
    fake    speak the workers' protocol and compute nothing: one clock steps all of them, so that they cost little and the router is
            what is measured; each has an address of its own, hence a connection of its own

    python -m benchmarks.processes.many_workers --router 127.0.0.1:50051 --kind fake --prefill 1 --decode 4 --step-ms 10

Prints "ready" once every worker is a member, and the sims' addresses by role, as JSON; ends with its standard input.
"""

import argparse
import asyncio
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from baton.engine.aio import AsyncEngine
from baton.engine.config import load_model_config
from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.membership import FleetAgent
from baton.service.server import GrpcServer
from baton.service.settings import ServerSettings, WorkerSettings
from baton.service.tunnel import Method, TunnelServicer
from baton.transfer.credits import ByteCredits
from baton.transfer.memory import MemorySources, MemoryTransport
from baton.types import PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from baton.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    tunnel_pb2_grpc,
)
from benchmarks.processes.fake_worker import SPEC, FakeDecode, FakePrefill, Handoffs, StepClock
from decode_worker.worker import DecodeWorker
from prefill_worker.worker import PrefillWorker

WORKER_SETTINGS = WorkerSettings(reflection=False)
CONTEXT_TOKENS = 8192


class _IdleReporter:
    """What a fake worker reports to the router."""

    load = WorkerLoad(free_blocks=1 << 20)

    def prefix_feed(self) -> "_IdleReporter":
        return self

    def take(self) -> PrefixDelta:
        return PrefixDelta()

    def close(self) -> None:
        """Nothing to give back."""


def fake_info(role: Role, index: int, port: int) -> WorkerInfo:
    """A fake worker as it announces itself."""
    return WorkerInfo(
        worker_id=WorkerId(f"{role.value}-{index}"),
        role=role,
        address=f"127.0.{1 + index // 250}.{1 + index % 250}:{port}",
        transfer_address=f"fake-{index}",
        model="sim",
        spec=SPEC,
        vocab_size=256,
        max_context_tokens=CONTEXT_TOKENS,
        eos_token_ids=(0,),
        block_size_tokens=16,
        num_blocks=1 << 20,
        node="here",
        pid=0,
        device="fake",
        version="0",
    )


async def _start_fakes(
    args: argparse.Namespace, settings: WorkerSettings, stack: AsyncExitStack
) -> list[FleetAgent]:
    handoffs, clock = Handoffs(), StepClock(args.step_ms / 1e3)
    server = GrpcServer(ServerSettings(host="0.0.0.0", reflection=False), [])  # noqa: S104
    prefill, decode = FakePrefill(handoffs), FakeDecode(handoffs, clock)
    tunnel = TunnelServicer(
        {
            "/baton.v1.PrefillService/Prefill": Method(
                prefill_pb2.PrefillRequest.FromString, prefill.Prefill
            ),
            "/baton.v1.DecodeService/Decode": Method(
                decode_pb2.DecodeRequest.FromString, decode.Decode
            ),
        }
    )
    server.register(lambda s: prefill_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, s))
    server.register(lambda s: decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, s))
    server.register(lambda s: tunnel_pb2_grpc.add_TunnelServiceServicer_to_server(tunnel, s))
    port = await server.start()
    stack.push_async_callback(server.stop, 0)
    roles = [Role.PREFILL] * args.prefill + [Role.DECODE] * args.decode
    agents = []
    for index, role in enumerate(roles):
        info = fake_info(role, index, port)
        agent = FleetAgent(info, _IdleReporter(), settings)
        agent.start()
        stack.push_async_callback(agent.stop)
        agents.append(agent)
    return agents


async def _start_sims(
    args: argparse.Namespace, settings: WorkerSettings, stack: AsyncExitStack
) -> dict[str, list[str]]:
    """Their addresses."""
    sim = SimConfig(
        **_shape_of(args.model),
        step_s=args.step_ms / 1e3,
        num_blocks=32768,
        max_context_tokens=CONTEXT_TOKENS,
        max_running=1024,
        max_batch_tokens=8192,
    )
    prefill_sim, decode_sim = (replace(sim, **each) for each in (args.prefill_sim, args.decode_sim))
    sources = MemorySources()
    addresses: dict[str, list[str]] = {"prefill": [], "decode": []}
    for index in range(args.prefill):
        name = f"prefill-{index}"
        prefill = PrefillWorker(
            replace(settings, worker_id=name, transfer_address=name),
            AsyncEngine(lambda: build_sim_engine(prefill_sim), name=name),
        )
        addresses["prefill"].append((await prefill.start()).address)
        stack.push_async_callback(prefill.stop)
        stack.enter_context(sources.serving(name, prefill))
    for index in range(args.decode):
        name = f"decode-{index}"
        decode = DecodeWorker(
            replace(settings, worker_id=name),
            AsyncEngine(lambda: build_sim_engine(decode_sim), name=name),
            MemoryTransport(sources, ByteCredits(1 << 28)),
        )
        addresses["decode"].append((await decode.start()).address)
        stack.push_async_callback(decode.stop)
    return addresses


def _shape_of(model: str) -> dict[str, Any]:
    """A simulated engine's settings by which it stands for a checkpoint."""
    if not model:
        return {}
    directory = Path(model).resolve()
    config = load_model_config(directory)
    return {
        "model": directory.name,
        "directory": str(directory),
        "vocab_size": config.vocab_size,
        "eos_token_ids": config.eos_token_ids,
    }


async def _run(args: argparse.Namespace) -> None:
    settings = replace(WORKER_SETTINGS, routers=tuple(args.router))
    addresses: dict[str, list[str]] = {}
    async with AsyncExitStack() as stack:
        if args.kind == "fake":
            agents = await _start_fakes(args, settings, stack)
            while any(agent.num_joined < len(args.router) for agent in agents):  # noqa: ASYNC110 - the agents have no event for it
                await asyncio.sleep(0.05)
        else:
            addresses = await _start_sims(args, settings, stack)
        print("ready", flush=True)
        print(json.dumps(addresses), flush=True)
        await asyncio.to_thread(sys.stdin.read)


def main() -> None:
    """Runs until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--router", nargs="+", required=True)
    parser.add_argument("--kind", choices=["sim", "fake"], default="sim")
    parser.add_argument("--prefill", type=int, default=0)
    parser.add_argument("--decode", type=int, default=1)
    parser.add_argument("--model", default="", help="checkpoint that the sims stand for")
    parser.add_argument("--step-ms", type=float, default=0.0)
    for role in ("prefill", "decode"):
        told = f"settings of {role} workers' simulated engines, as JSON"
        parser.add_argument(f"--{role}-sim", type=json.loads, default={}, help=told)
    asyncio.run(_run(parser.parse_args()))


if __name__ == "__main__":
    main()
