"""WorkerService over gRPC: what every worker answers, whatever its role. Protobuf in, protobuf out; the work is the host's. Runs on
the worker's event loop.
"""

import math
from typing import Protocol

from baton.codec import load_to_proto, role_from_proto, role_to_proto, worker_info_to_proto
from baton.errors import FieldViolation, InvalidRequestError
from baton.service.calls import Context, bounded
from baton.service.settings import WorkerSettings
from baton.types import Role, WorkerInfo, WorkerLoad
from baton.v1 import worker_pb2, worker_pb2_grpc

WORKER_SERVICE = "baton.v1.WorkerService"


class Host(Protocol):
    """What the service speaks for; `baton.service.worker_host.WorkerHost` is one."""

    settings: WorkerSettings

    @property
    def info(self) -> WorkerInfo: ...

    @property
    def load(self) -> WorkerLoad: ...

    @property
    def num_calls(self) -> int: ...

    @property
    def draining(self) -> bool: ...

    @property
    def changing_to(self) -> Role | None: ...

    @property
    def problem(self) -> str: ...

    async def set_role(self, role: Role, drain_timeout_s: float) -> Role: ...

    async def drain(self, grace_s: float) -> bool: ...


class WorkerServicer(worker_pb2_grpc.WorkerServiceServicer):
    """See the module docstring. Errors become statuses in `baton.service.interceptors`."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def GetStatus(  # noqa: N802
        self,
        request: worker_pb2.GetStatusRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> worker_pb2.GetStatusResponse:
        host, turning = self._host, self._host.changing_to
        return worker_pb2.GetStatusResponse(
            info=worker_info_to_proto(host.info),
            load=load_to_proto(host.load),
            running_calls=host.num_calls,
            draining=host.draining,
            changing_to=None if turning is None else role_to_proto(turning),
            problem=host.problem,
        )

    async def SetRole(  # noqa: N802
        self, request: worker_pb2.SetRoleRequest, context: Context
    ) -> worker_pb2.SetRoleResponse:
        role = role_from_proto(request.role, "role")
        given = request.HasField("drain_timeout_seconds")
        timeout_s = self._timeout_s(
            "drain_timeout_seconds", request.drain_timeout_seconds if given else None
        )
        async with bounded(context, self._host.settings.default_timeout_s):
            previous = await self._host.set_role(role, timeout_s)
        return worker_pb2.SetRoleResponse(
            info=worker_info_to_proto(self._host.info),
            previous_role=role_to_proto(previous),
            running_calls=self._host.num_calls,
        )

    async def Drain(  # noqa: N802
        self, request: worker_pb2.DrainRequest, context: Context
    ) -> worker_pb2.DrainResponse:
        given = request.HasField("timeout_seconds")
        timeout_s = self._timeout_s("timeout_seconds", request.timeout_seconds if given else None)
        async with bounded(context, self._host.settings.default_timeout_s):
            await self._host.drain(timeout_s)
        return worker_pb2.DrainResponse(running_calls=self._host.num_calls)

    def _timeout_s(self, field: str, given_s: float | None) -> float:
        if given_s is None:
            return self._host.settings.drain_grace_s
        if not (math.isfinite(given_s) and given_s >= 0):
            raise InvalidRequestError(FieldViolation(field, "must be a time, or 0"))
        return given_s
