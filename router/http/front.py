"""The HTTP port: one FastAPI application, and the server that runs it on the router's own event loop.

    built      routes are added: `add`
    started    serves; every path needs a key where the clients' gRPC port does, but for those that were added as open
    drains     connections close after their answer; what is refused is said by whoever handles it
    stopped    answers that are under way get `STOP_S`, then every connection is cut

All methods are called on that event loop.
"""

import asyncio
from collections.abc import Callable

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import Response
from uvicorn import Config
from uvicorn.server import ServerState

from baton import __version__
from baton.errors import (
    BatonError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)
from baton.service.access import Access
from baton.service.settings import RouterSettings
from baton.service.tls import TlsFiles, server_context
from router.http.connection import KEEP_ALIVE_S, ConnectionLimits, GuardedConnection
from router.http.edge import Edge, response_to, response_to_status
from router.http.errors import to_http, violations

STOP_S = 1.0
BACKLOG = 1024


class HttpFront:
    """See the module docstring."""

    def __init__(
        self, settings: RouterSettings, access: Access, *, tls: TlsFiles | None = None
    ) -> None:
        """Raises `InvalidRequestError` where the settings name no address, or a file that is unusable."""
        self._settings = settings
        self._host, self._port = _address(settings.http_listen)
        self._ssl = None if tls is None else server_context(tls)
        self._app = FastAPI(
            title="Baton",
            version=__version__,
            summary="Language models, served with prefill and decode on different workers.",
            docs_url=None,
            redoc_url=None,
        )
        self._app.add_exception_handler(BatonError, _answer_error)
        self._app.add_exception_handler(HTTPException, _answer_status)
        self._app.add_exception_handler(RequestValidationError, _answer_violations)
        self._app.add_exception_handler(Exception, _answer_bug)
        self._edge = Edge(self._app, access, max_body_bytes=settings.max_message_bytes)
        self._edge.open_paths.add(str(self._app.openapi_url))
        self._state = ServerState()
        self._server: asyncio.Server | None = None

    def add(self, routes: APIRouter, *, needs_key: bool = True) -> None:
        """Serves these routes too. Before `start` only. Those without a key may have no parameters in their paths."""
        # What the OpenAPI document says; the edge is what checks.
        keys = [Security(HTTPBearer(auto_error=False))] if needs_key else []
        self._app.include_router(routes, dependencies=keys if self._settings.api_keys_file else [])
        if not needs_key:
            each = (route for route in routes.routes if isinstance(route, APIRoute))
            self._edge.open_paths.update(route.path for route in each)

    @property
    def port(self) -> int:
        """The bound port. Precondition: started."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def start(self) -> None:
        """Listens. Raises `UnavailableError` where the address cannot be bound."""
        config = Config(
            self._edge,
            http=GuardedConnection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            # Of clients' errors it would write a line each.
            log_level="error",
            access_log=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        config.load()
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._connections(config),
                self._host,
                self._port,
                ssl=self._ssl,
                ssl_handshake_timeout=(
                    None if self._ssl is None else self._settings.http_read_timeout_s
                ),
                backlog=BACKLOG,
                reuse_port=self._settings.share_port,
            )
        except OSError as error:
            problem = f"cannot listen on {self._settings.http_listen}: {error.strerror}"
            raise UnavailableError(problem) from None

    def drain(self) -> None:
        """From now on, connections close when nothing is under way on them. Idempotent."""
        self._edge.draining = True
        for connection in tuple(self._state.connections):
            connection.shutdown()

    async def stop(self) -> None:
        """Precondition: whatever is asked now is refused at once. Idempotent."""
        if self._server is None:
            return
        self._server.close()
        self.drain()
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=STOP_S)
        for connection in tuple(self._state.connections):
            connection.transport.abort()
        # Their handlers learn of it by themselves.
        if self._state.tasks:
            await asyncio.wait(self._state.tasks, timeout=STOP_S)
        self._server = None

    def _connections(self, config: Config) -> Callable[[], asyncio.Protocol]:
        settings = self._settings
        limits = ConnectionLimits(
            max_connections=settings.http_max_connections,
            max_head_bytes=settings.max_metadata_bytes,
            max_body_bytes=settings.max_message_bytes,
            read_timeout_s=settings.http_read_timeout_s,
            write_stall_s=settings.write_stall_s,
        )
        return lambda: GuardedConnection(limits, config, self._state)


def _address(listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if not colon or not host or not port.isdecimal():
        raise InvalidRequestError(FieldViolation("http_listen", "must be host:port"))
    return host.strip("[]"), int(port)


async def _answer_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    return response_to(to_http(error))


async def _answer_status(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return response_to_status(error)


async def _answer_bug(_: Request, error: Exception) -> Response:
    # Raised again to the edge, which logs it.
    return response_to(to_http(InternalError(f"internal error ({type(error).__name__})")))


async def _answer_violations(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return response_to(to_http(InvalidRequestError(*violations(error.errors()))))
