"""The gRPC server that every Baton process runs: grpc.aio with health, reflection, limits, keepalive and typed errors.

All methods are called on the process's event loop. Health starts as NOT_SERVING for every service and is set by the owner;
"" speaks for the process itself: it serves from `start` to `stop`, and also while a service drains. Where the settings ask for it, a
port of its own answers health, and nothing else, in plaintext.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from baton.errors import UnavailableError
from baton.service.access import Access, OpenAccess
from baton.service.health import HealthServicer
from baton.service.interceptors import ErrorInterceptor
from baton.service.settings import ServerSettings
from baton.service.tls import TlsFiles, server_credentials

MAX_PENDING_CALLS = 65536
"""Calls that have arrived and that the event loop has not come to."""


def _make_server(access: Access, options: list[tuple[str, int]]) -> grpc.aio.Server:
    """One that finds its methods by name. Generated code also registers each of them with gRPC, whose server then waits for every one
    anew whenever a call arrives: that costs more than the search.
    """
    server: Any = grpc.aio.server(interceptors=[ErrorInterceptor(access)], options=options)
    server.add_registered_method_handlers = lambda *_: None
    return server  # type: ignore[no-any-return]


class GrpcServer:
    """Servicers are added through `register`; then `start`, health by `set_serving`, and `stop`."""

    def __init__(
        self,
        settings: ServerSettings,
        services: Iterable[str],
        *,
        tls: TlsFiles | None = None,
        access: Access | None = None,
        share_port: bool = False,
    ) -> None:
        """`services` are the full names of the services that will be registered. `tls` None speaks plaintext, `access` None takes
        everybody.
        """
        self._settings = settings
        self._services = tuple(services)
        self._tls = tls
        options = _server_options(settings, share_port=share_port)
        self._server = _make_server(access or OpenAccess(), options)
        self._health = HealthServicer()
        self._probed: grpc.aio.Server | None = None
        self.port = 0
        """The bound port, once started."""
        self.health_port = 0
        """The bound port of `health_listen`, once started; 0 where there is none."""

    def register(self, add: Callable[[grpc.aio.Server], None]) -> None:
        """Calls `add` with the server, to add a servicer. Before `start` only."""
        add(self._server)

    async def start(self) -> int:
        """Binds and serves; returns the port. Raises `UnavailableError` where the address cannot be bound, `InvalidRequestError` where
        the certificates are unusable.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        await self.set_serving(serving=False)
        if self._settings.reflection:
            names = (*self._services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)
        address = f"{self._settings.host}:{self._settings.port}"
        credentials = None if self._tls is None else server_credentials(self._tls)
        try:
            if credentials is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, credentials)
        except RuntimeError:
            raise UnavailableError(f"cannot listen on {address}: is the port taken?") from None
        if self._settings.health_listen:
            await self._start_health(self._settings.health_listen)
        await self._server.start()
        return self.port

    async def _start_health(self, address: str) -> None:
        """Serves the same health where whoever probes it needs no certificate."""
        server = _make_server(OpenAccess(), [])
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        try:
            self.health_port = server.add_insecure_port(address)
        except RuntimeError:
            raise UnavailableError(
                f"cannot listen for probes on {address}: is the port taken?"
            ) from None
        await server.start()
        self._probed = server

    async def set_serving(
        self, *, serving: bool, alive: bool = True, idle: Collection[str] = ()
    ) -> None:
        """`serving` is the health of the named services, but for the `idle` ones, which do not serve; `alive` is that of the process
        ("").
        """
        states = {name: serving and name not in idle for name in self._services}
        self._health.set({"": alive} | states)

    async def stop(self, grace_s: float) -> None:
        """Health turns NOT_SERVING for good, new calls are refused, running ones are cancelled after the grace. Idempotent."""
        self._health.finish()
        await self._server.stop(grace_s)
        if self._probed is not None:
            await self._probed.stop(0)


def _server_options(settings: ServerSettings, *, share_port: bool) -> list[tuple[str, int]]:
    return [
        # Processes on one port share its connections at random: never by accident.
        ("grpc.so_reuseport", int(share_port)),
        # Beyond it, gRPC cancels calls without saying why; who may wait is for the services to say.
        ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        # Without the second, gRPC refuses some calls at random between the two.
        ("grpc.max_metadata_size", settings.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", settings.max_metadata_bytes),
        ("grpc.max_concurrent_streams", settings.max_streams),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_s * 500)),
        # A ping that gRPC sent to measure the network holds the others back, and has a timeout of its own: a minute.
        ("grpc.http2.ping_timeout_ms", round(settings.keepalive_s * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        (
            "grpc.http2.min_ping_interval_without_data_ms",
            round(settings.min_client_ping_s * 1000),
        ),
    ]
