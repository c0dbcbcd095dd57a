"""Workers that turn from one role to the other, as operators and routers have them do it."""

import grpc

from baton.codec import role_to_proto
from baton.types import Role
from baton.v1 import worker_pb2, worker_pb2_grpc

ANSWER_S = 20.0
"""Beside the drain."""


async def set_role(address: str, role: Role, drain_timeout_s: float) -> worker_pb2.SetRoleResponse:
    """Raises `grpc.RpcError`."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        request = worker_pb2.SetRoleRequest(
            role=role_to_proto(role), drain_timeout_seconds=drain_timeout_s
        )
        answer: worker_pb2.SetRoleResponse = await stub.SetRole(
            request, timeout=drain_timeout_s + ANSWER_S
        )
        return answer
