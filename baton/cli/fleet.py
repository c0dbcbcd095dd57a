"""`baton fleet`: who serves, how busy, and in which role; and the word to a worker to turn or to drain.

The router tells an administrator who is there; the rest is asked of each worker itself, so this runs where workers can be reached.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import grpc
import typer
from rich.markup import escape
from rich.table import Table

from baton.cli.connect import connected, worker_channel
from baton.cli.console import reported, stderr, stdout
from baton.cli.options import Address
from baton.codec import load_from_proto, role_from_proto, role_to_proto, worker_info_from_proto
from baton.errors import BatonError, NotFoundError, PreconditionError
from baton.service.status import error_from_rpc
from baton.types import Role, WorkerInfo
from baton.v1 import worker_pb2, worker_pb2_grpc

STATUS_TIMEOUT_S = 2.0
SLACK_S = 5.0
"""What a call may take beyond the drain that it waits for."""
LOCAL = "127.0.0.1:50051"
NOBODY = "No worker has joined, or the key is no administrator's: only to those are workers shown."

Worker = Annotated[str, typer.Argument(help="Its id, as `baton fleet` lists it.")]
DrainTimeout = Annotated[
    float, typer.Option("--drain-timeout", help="Seconds that what runs there may take to end.")
]

fleet = typer.Typer(invoke_without_command=True, rich_markup_mode="rich")


@fleet.callback()
def members(context: typer.Context, *, address: Address = LOCAL) -> None:
    """List the workers of a router, with role, state and load; turn or drain one.

    [bold]Examples[/]

      baton fleet

      baton fleet set-role prefill-1 decode

      baton fleet drain decode-0
    """
    if context.invoked_subcommand is not None:
        context.obj = address
        return
    with reported():
        table = Table("worker", "role", "can be", "state", "requests", "queued tokens", "free KV")
        workers = _workers(address)
        for info in workers:
            table.add_row(*_row(info))
        stdout().print(table)
        if not workers:
            stderr().print(NOBODY, style="dim", soft_wrap=True)


@fleet.command("set-role")
def set_role(
    context: typer.Context,
    worker: Worker,
    role: Annotated[Role, typer.Argument(help="What it is to do.")],
    *,
    drain_timeout: DrainTimeout = 30.0,
    force: Annotated[
        bool, typer.Option("--force", help="Even where it is the last one of its role.")
    ] = False,
) -> None:
    """Turn a worker to another role while it serves."""
    with reported():
        workers = _workers(context.obj)
        info = _named(worker, workers)
        peers = [each for each in workers if each.role is info.role]
        if role is not info.role and len(peers) == 1 and not force:
            raise PreconditionError(
                f"{worker} is the last {info.role.value} worker; --force turns it all the same"
            )
        request = worker_pb2.SetRoleRequest(
            role=role_to_proto(role), drain_timeout_seconds=drain_timeout
        )
        with _reached(info) as stub:
            answer = stub.SetRole(request, timeout=drain_timeout + SLACK_S)
        before = role_from_proto(answer.previous_role, "previous_role")
        left = f"; {answer.running_calls} calls still run" if answer.running_calls else ""
        print(f"{worker}: {before.value} -> {role.value}{left}")


@fleet.command()
def drain(context: typer.Context, worker: Worker, *, drain_timeout: DrainTimeout = 30.0) -> None:
    """Let a worker take nothing new, for good, and wait until it is idle; its process runs on."""
    with reported():
        info = _named(worker, _workers(context.obj))
        request = worker_pb2.DrainRequest(timeout_seconds=drain_timeout)
        with _reached(info) as stub:
            left = stub.Drain(request, timeout=drain_timeout + SLACK_S).running_calls
        print(f"{worker}: " + (f"{left} calls still run" if left else "drained"))


def _workers(address: str) -> tuple[WorkerInfo, ...]:
    with connected(address) as client:
        return client.model().workers


def _named(worker_id: str, workers: tuple[WorkerInfo, ...]) -> WorkerInfo:
    for info in workers:
        if info.worker_id == worker_id:
            return info
    raise NotFoundError("worker", worker_id)


def _row(info: WorkerInfo) -> tuple[str, ...]:
    name, can_be = escape(info.worker_id), ", ".join(role.value for role in info.can_be) or "-"
    try:
        with _reached(info) as stub:
            status = stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=STATUS_TIMEOUT_S)
    except BatonError as error:
        return (name, info.role.value, can_be, f"[red]{escape(error.message)}[/]", "-", "-", "-")
    load = load_from_proto(status.load)
    requests = f"{load.running_requests} + {load.waiting_requests} waiting"
    free = (load.free_blocks + load.cached_blocks) / info.num_blocks
    role = worker_info_from_proto(status.info).role.value
    return (
        name,
        role,
        can_be,
        escape(_state(status)),
        requests,
        f"{load.queued_prefill_tokens:,}",
        f"{free:.0%}",
    )


def _state(status: worker_pb2.GetStatusResponse) -> str:
    if status.problem:
        return status.problem
    if status.draining:
        return f"draining, {status.running_calls} calls run"
    if status.changing_to:
        turning = role_from_proto(status.changing_to, "changing_to").value
        return f"turns to {turning}, {status.running_calls} calls run"
    return "ready"


@contextmanager
def _reached(info: WorkerInfo) -> Iterator[worker_pb2_grpc.WorkerServiceStub]:
    """Raises what the worker answers, or that it does not, as a `BatonError`."""
    try:
        with worker_channel(info.address) as channel:
            yield worker_pb2_grpc.WorkerServiceStub(channel)
    except grpc.RpcError as error:
        raise error_from_rpc(error) from error
