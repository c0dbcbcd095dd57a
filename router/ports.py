"""Where the router listens: the clients' port and, where the settings ask for one, the fleet's.

    clients   InferenceService, with the clients' keys and certificates
    fleet     FleetService, and InferenceService for whoever administers; takes the fleet's certificates where there are any, no keys

With one port for both, a client could announce itself as a worker and be sent other clients' prompts; so that is refused as soon as
clients are told apart. All methods are called on the router's event loop.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import grpc

from baton.errors import BatonError, FieldViolation, InvalidRequestError
from baton.service.access import Access, KeyAccess, OpenAccess, WatchedAccess
from baton.service.channel import fleet_files
from baton.service.server import GrpcServer
from baton.service.settings import RouterSettings
from baton.service.tls import TlsFiles


class Ports:
    """See the module docstring."""

    def __init__(
        self,
        settings: RouterSettings,
        *,
        client_services: Iterable[str],
        fleet_service: str,
        on_refused: Callable[[BatonError], None],
    ) -> None:
        """Services by their full names. `on_refused` is told of every client that has no access.
        Raises `InvalidRequestError` where the settings contradict each other or a file is unusable.
        """
        within = _fleet_settings(settings)
        self.access: Access = WatchedAccess(_client_access(settings), on_refused)
        tls, names = client_tls(settings), [*client_services]
        self._clients = GrpcServer(
            settings,
            names if within is not None else [*names, fleet_service],
            tls=tls,
            access=self.access,
            share_port=settings.share_port,
        )
        self._fleet = self._clients
        if within is not None:
            tls = fleet_files(settings)
            self._fleet = GrpcServer(within, [*names, fleet_service], tls=tls)

    @property
    def port(self) -> int:
        """The clients'. Precondition: started."""
        return self._clients.port

    @property
    def fleet_port(self) -> int:
        """The workers'. Precondition: started."""
        return self._fleet.port

    def register_for_clients(self, add: Callable[[grpc.aio.Server, Access], None]) -> None:
        """Calls `add` for each port, with what tells its callers apart. Before `start` only."""
        self._clients.register(lambda server: add(server, self.access))
        if self._fleet is not self._clients:
            self._fleet.register(lambda server: add(server, OpenAccess()))

    def register_for_fleet(self, add: Callable[[grpc.aio.Server], None]) -> None:
        """Before `start` only."""
        self._fleet.register(add)

    async def start(self) -> None:
        """Listens. Raises `UnavailableError` where a port is taken; then none is left open."""
        try:
            for server in self._servers:
                await server.start()
        except Exception:
            await self.stop()
            raise

    async def set_serving(self, *, serving: bool) -> None:
        """The health of every service."""
        for server in self._servers:
            await server.set_serving(serving=serving)

    async def stop(self) -> None:
        """At once. Idempotent."""
        for server in self._servers:
            await server.stop(0)

    @property
    def _servers(self) -> tuple[GrpcServer, ...]:
        # Workers must be able to join before clients can ask.
        return tuple(dict.fromkeys((self._fleet, self._clients)))


def _fleet_settings(settings: RouterSettings) -> RouterSettings | None:
    """The settings of the fleet's own port, if it has one."""
    if not settings.fleet_listen:
        if settings.share_port:
            raise _invalid("fleet_listen", "is needed where processes share a port")
        guarded = (settings.api_keys_file, settings.tls_cert_file, settings.fleet_cert_file)
        if any(guarded):
            raise _invalid("fleet_listen", "is needed with API keys or certificates")
        return None
    host, colon, port = settings.fleet_listen.rpartition(":")
    if not colon or not port.isdigit():
        raise _invalid("fleet_listen", "must be host:port")
    return replace(settings, host=host, port=int(port), health_listen="")


def _client_access(settings: RouterSettings) -> Access:
    if not settings.api_keys_file:
        return OpenAccess()
    return KeyAccess(settings.api_keys_file, private_caches=settings.private_caches)


def client_tls(settings: RouterSettings) -> TlsFiles | None:
    """The certificates of the clients' ports, if they have any. Raises `InvalidRequestError`."""
    files = TlsFiles(
        cert=settings.tls_cert_file, key=settings.tls_key_file, ca=settings.tls_client_ca_file
    )
    if files == TlsFiles():
        return None
    if not files.cert:
        raise _invalid("tls_cert_file", "is needed with the clients' CA or the key")
    return files


def _invalid(field: str, description: str) -> InvalidRequestError:
    return InvalidRequestError(FieldViolation(field, description))
