"""grpc.health.v1, in which every watcher learns of every change. (In grpcio's own, a watcher that leaves silences the others, and
one that does not read holds them up.)

Used on the server's event loop. "" is the process, other names are services; a name never set is unknown.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping

from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.errors import NotFoundError
from baton.service.calls import Context


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the stubs are untyped
    """Starts with no names."""

    def __init__(self) -> None:
        self._serving: dict[str, bool] = {}
        self._changed = asyncio.Event()
        self._final = False

    def set(self, serving: Mapping[str, bool]) -> None:
        """Sets the given names. No effect after `finish`."""
        if not self._final and any(
            self._serving.get(name) is not is_up for name, is_up in serving.items()
        ):
            self._serving |= serving
            self._notify()

    def finish(self) -> None:
        """Every name is NOT_SERVING for good."""
        self.set(dict.fromkeys(self._serving, False))
        self._final = True

    async def Check(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: Context,  # noqa: ARG002
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._serving:
            raise NotFoundError("service", request.service)
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(  # noqa: N802
        self,
        request: health_pb2.HealthCheckRequest,
        context: Context,  # noqa: ARG002
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        told: int | None = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                told = status
                yield health_pb2.HealthCheckResponse(status=status)
            await changed.wait()

    def _status(self, service: str) -> int:
        name = "SERVICE_UNKNOWN"
        if service in self._serving:
            name = "SERVING" if self._serving[service] else "NOT_SERVING"
        return int(health_pb2.HealthCheckResponse.ServingStatus.Value(name))

    def _notify(self) -> None:
        """Wakes those who wait for the change so far; later waits are for the next one."""
        self._changed.set()
        self._changed = asyncio.Event()
