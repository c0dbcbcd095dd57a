"""`python -m prefill_worker`, `decode_worker` and `flex_worker`: joins Ray, starts one worker on this node, and sees it to its end.

SIGTERM and SIGINT drain: new calls are refused, running ones finish within the grace, then the process exits with 0. A second
signal ends it at once. It exits with 1, and says why, where the worker cannot start, dies, or its engine fails.
"""

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

from baton.engine.config import KERNELS, EngineConfig, default_batch_tokens
from baton.engine.cores import usable_cores
from baton.engine.progress import in_words, paced
from baton.engine.sim import EngineKind, SimConfig, simulated
from baton.errors import BatonError
from baton.kv.spec import KVDtype, WeightFormat
from baton.service import logging as service_logging
from baton.service.settings import LogFormat, LogLevel, WorkerSettings
from baton.service.status_line import StatusLine
from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, join, start_local
from baton.types import Role, WorkerInfo
from baton.worker.actor import ActorConfig, RunningWorker, WorkerActor, launch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A parsed command line."""

    role: Role
    settings: WorkerSettings
    engine: EngineConfig | SimConfig
    ray_address: str
    namespace: str
    num_gpus: float
    ray_resource: str
    ray_node_ip: str | None


def main(role: Role | None, actor: type[WorkerActor]) -> int:
    """Returns the exit code. Without a role, the command line tells it."""
    # Until the event loop listens for it, SIGTERM ends the process by way of its cleanup.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        command = parse(role, sys.argv[1:], os.environ)
        service_logging.configure(command.settings, sys.stderr, os.environ)
        with _ray(command) as cluster:
            return asyncio.run(_run(actor, command, cluster))
    except BatonError as error:
        _say(f"{'flexible' if role is None else role.value} worker: {error.message}")
        return 1


def parse(role: Role | None, arguments: Sequence[str], environ: Mapping[str, str]) -> Command:
    """Flags win over `BATON_*` variables, which win over the defaults. Raises `InvalidRequestError` naming a bad variable."""
    flags = _parser(role).parse_args(arguments)
    settings = WorkerSettings.from_env(
        environ,
        routers=tuple(flags.routers.split(",")) if flags.routers else None,
        host=flags.host,
        port=flags.port,
        metrics_port=flags.metrics_port,
        advertise_host=flags.advertise_host,
        worker_id=flags.worker_id,
        drain_grace_s=flags.drain_grace_s,
        log_format=flags.log_format and LogFormat(flags.log_format),
        log_level=flags.log_level and LogLevel(flags.log_level),
    )
    flexible = role is None
    imports_prompts = role is Role.DECODE
    role = role or Role(flags.role)
    prefills = role is Role.PREFILL or flexible
    if not settings.worker_id:
        made = f"{role.value}-{socket.gethostname()}-{secrets.token_hex(3)}"
        settings = replace(settings, worker_id=made)
    engine = EngineConfig(
        model=flags.model,
        dtype=flags.dtype,
        weights=_format(flags.weights),
        imports_prompts=imports_prompts,
        prompt_weights=_format(flags.prompt_weights),
        device=flags.device,
        block_size_tokens=flags.block_size_tokens,
        kv_pool_tokens=flags.kv_pool_tokens,
        max_batch_tokens=flags.max_batch_tokens
        or default_batch_tokens(flags.device, prefills=prefills),
        max_running=flags.max_running,
        max_context_tokens=flags.max_context_tokens,
        # Ray tells the libraries beneath torch to use one thread.
        kernels=flags.kernels,
        threads=flags.threads or usable_cores(),
        prefix_cache=not flags.no_prefix_cache,
        capture_decode=role is Role.DECODE or flexible,
    )
    num_gpus = flags.num_gpus
    if num_gpus is None:
        num_gpus = 1.0 if flags.device == "cuda" else 0.0
    return Command(
        role=role,
        settings=settings,
        engine=simulated(engine) if EngineKind(flags.engine) is EngineKind.SIM else engine,
        ray_address=flags.ray_address or environ.get("RAY_ADDRESS", "auto"),
        namespace=flags.namespace,
        num_gpus=num_gpus,
        ray_resource=flags.ray_resource,
        ray_node_ip=flags.ray_node_ip,
    )


def _parser(role: Role | None) -> argparse.ArgumentParser:
    defaults = EngineConfig(model="")
    kind = "flexible" if role is None else role.value
    parser = argparse.ArgumentParser(
        prog=f"python -m {'flex' if role is None else role.value}_worker",
        description=f"Runs one Baton {kind} worker as a Ray actor on this node. Settings not given here come from "
        "BATON_<NAME> variables; see baton.service.settings.",
    )
    add = parser.add_argument
    if role is None:
        roles = [each.value for each in Role]
        add("--role", choices=roles, required=True, help="what it does until it is told otherwise")
    add("--model", required=True, help="directory in Hugging Face format, or hub id")
    add("--routers", help="host:port of every router to join, comma-separated")
    add("--ray-address", help="cluster to join; 'local' starts a private one (default: auto)")
    add(
        "--ray-node-ip", help="which of this machine's Ray nodes to run on, where there are several"
    )
    add(
        "--ray-resource",
        default="",
        help="custom resource of the node, of which the worker takes one: nodes that offer one run one worker each",
    )
    add("--namespace", default="baton", help="where the workers' actors find each other")
    add("--host", help="address to listen on")
    add("--advertise-host", help="host that routers reach this worker at")
    add("--port", type=int, help="gRPC port; 0 takes a free one")
    add("--metrics-port", type=int, help="Prometheus port; 0 takes a free one")
    add("--worker-id", help="default: made from role, host name and random letters")
    add(
        "--drain-grace",
        type=float,
        dest="drain_grace_s",
        metavar="SECONDS",
        help="how long running requests may go on after SIGTERM",
    )
    add("--log-format", choices=[each.value for each in LogFormat])
    add("--log-level", choices=[each.value for each in LogLevel])
    add(
        "--engine",
        choices=[each.value for each in EngineKind],
        default=EngineKind.TORCH.value,
        help="sim answers without the model's weights, from a simulated engine",
    )
    add(
        "--dtype",
        choices=[each.value for each in KVDtype],
        help="of activations and KV (default: the checkpoint's)",
    )
    formats = [each.value for each in WeightFormat]
    add("--kernels", choices=KERNELS, help="what computes on a CPU (default: native)")
    add("--weights", choices=formats, help="how the weights are kept (default: in the dtype)")
    parser.set_defaults(prompt_weights=None)
    if role is Role.DECODE:
        add(
            "--prompt-weights",
            choices=formats,
            help="what --weights the prefill workers have; where it is not this worker's, it leaves prompts to them (default: none)",
        )
    add("--device", choices=["cpu", "cuda"], default=defaults.device)
    add("--num-gpus", type=float, help="share of a GPU that Ray reserves (default: 1 with cuda)")
    add("--threads", type=int, help="CPU threads of the engine (default: all of this process's)")
    add("--block-size-tokens", type=int, default=defaults.block_size_tokens)
    add("--kv-pool-tokens", type=int, help="default: sized from memory")
    add("--max-batch-tokens", type=int, help="default: 512; on CUDA what suits the role")
    add("--max-running", type=int, default=defaults.max_running)
    add("--max-context-tokens", type=int, help="default: the model's")
    add("--no-prefix-cache", action="store_true", help="compute every prompt afresh")
    return parser


def _format(name: str | None) -> WeightFormat | None:
    return None if name is None else WeightFormat(name)


def banner(info: WorkerInfo) -> str:
    """One line: what runs, and where."""
    return (
        f"{info.role.value} worker {info.worker_id} serves {info.model} at {info.address} "
        f"({info.device}, {info.arithmetic}, {info.num_blocks} KV blocks of "
        f"{info.block_size_tokens} tokens, context {info.max_context_tokens}; metrics at "
        f"{info.metrics_address}; pid {info.pid}; Baton {info.version})"
    )


async def _run(actor: type[WorkerActor], command: Command, cluster: RayCluster) -> int:
    role = command.role
    config = ActorConfig(
        settings=command.settings,
        engine=command.engine,
        role=role,
        namespace=cluster.namespace,
        num_gpus=command.num_gpus,
        ray_resource=command.ray_resource,
    )
    stop = _stop_signal()
    progress = paced(lambda *loaded: _log.info("loaded %s", in_words(*loaded)))
    starting = asyncio.create_task(launch(actor, config, progress))
    if not await _before(stop, starting):
        return 0
    worker = starting.result()
    status_line = StatusLine(worker.snapshot, command.settings.status_line_s)
    status_line.start()
    try:
        _say(banner(worker.info))
        ended = asyncio.create_task(worker.ended())
        if await _before(stop, ended):
            _say(f"{role.value} worker: {ended.result().message}")
            return 1
        stop.clear()
        return await _drain(role, worker, command.settings.drain_grace_s, stop)
    finally:
        await status_line.close()
        await worker.stop()


async def _drain(role: Role, worker: RunningWorker, grace_s: float, stop: asyncio.Event) -> int:
    _say(f"{role.value} worker: draining for up to {grace_s:.0f} s; a second signal stops at once")
    draining = asyncio.create_task(worker.drain(grace_s))
    if not await _before(stop, draining):
        worker.kill()
        return 1
    _say(f"{role.value} worker: stopped")
    return 0


async def _before(stop: asyncio.Event, task: asyncio.Task[object]) -> bool:
    """Whether the task ended before the signal came; else it is cancelled."""
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({stopping, task}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return True
        task.cancel()
        await asyncio.wait({task})
        return False
    finally:
        stopping.cancel()


def _stop_signal() -> asyncio.Event:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return stop


def _ray(command: Command) -> AbstractContextManager[RayCluster]:
    if command.ray_address == "local":
        return start_local(LocalRaySettings(namespace=command.namespace, prestarted_workers=1))
    return join(command.ray_address, namespace=command.namespace, node_ip=command.ray_node_ip)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
