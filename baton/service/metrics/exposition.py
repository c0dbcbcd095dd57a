"""A registry, and the HTTP port at which Prometheus reads it. The port is served by threads of its own."""

from collections.abc import Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from threading import Thread
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app

from baton.errors import UnavailableError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

CLOSE_S = 0.02
"""How often the HTTP thread looks whether it is to end."""
SILENT_S = 10.0
"""A connection that says nothing for so long, or does not take its answer, is closed: it holds a thread."""


class _HttpServer(ThreadingMixIn, WSGIServer):
    """A slow scraper does not hold up another."""

    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    """Writes no access log, and nothing of connections that ask nothing."""

    timeout = SILENT_S

    def handle(self) -> None:
        # Of the client's making: the base would write a traceback to stderr.
        with suppress(TimeoutError, ConnectionError):
            super().handle()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Nothing."""


class MetricsServer:
    """Serves a registry at /metrics on a port of its own, and others beside it, from a thread of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        """Served at every path that `others` does not name."""
        self.others: dict[str, CollectorRegistry] = {}
        """By path. Read when the port opens."""
        ProcessCollector(registry=self.registry)
        self._http: _HttpServer | None = None

    def serve(self, host: str, port: int) -> int:
        """Returns the bound port. Raises `UnavailableError` where it cannot be bound."""
        main: WSGIApplication = make_wsgi_app(self.registry)
        others: dict[str, WSGIApplication] = {
            path: make_wsgi_app(registry) for path, registry in self.others.items()
        }

        def app(environ: "WSGIEnvironment", start: "StartResponse") -> Iterable[bytes]:
            return others.get(environ["PATH_INFO"], main)(environ, start)

        try:
            self._http = make_server(host, port, app, _HttpServer, _QuietHandler)
        except OSError as error:
            raise UnavailableError(f"cannot serve metrics on {host}:{port}: {error}") from error
        self._thread = Thread(
            target=self._http.serve_forever, args=(CLOSE_S,), name="metrics", daemon=True
        )
        self._thread.start()
        return self._http.server_port

    def close(self) -> None:
        """Blocks for `CLOSE_S` at most. Idempotent."""
        if self._http is not None:
            self._http.shutdown()
            self._http.server_close()
            self._thread.join()
            self._http = None
