"""One HTTP/1.1 connection: uvicorn's, with a bound on everything that a client could drag out or pile up.

    head       `max_head_bytes`, else 431
    request    whole within `read_timeout_s` of its first byte (the first one: of the connection), else 408
    answers    taken within `write_stall_s`, else the connection is cut, which cancels what it waits for
    next one   begun within `KEEP_ALIVE_S`, and not before the answer to this one is complete: what comes earlier is dropped, and the
               connection closed after the answer. So a connection that closes belongs to one request, which its handler learns of.

All on the event loop.
"""

import asyncio
import re
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from router.http.errors import HttpError, of_status

KEEP_ALIVE_S = 75
"""Longer than clients keep a connection that is not used: whoever closes it should be the one that knows whether it sends."""
_UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*", re.IGNORECASE)
CHUNK_OVERHEAD = 8
"""A body in chunks of one byte takes six times its size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionLimits:
    """See the module docstring."""

    max_connections: int
    """One more gets 503."""
    max_head_bytes: int
    max_body_bytes: int
    """The application refuses larger ones; here it bounds what comes after it has."""
    read_timeout_s: float
    write_stall_s: float


class GuardedConnection(HttpToolsProtocol):
    """See the module docstring. The methods are asyncio's and the parser's."""

    def __init__(self, limits: ConnectionLimits, config: Config, state: ServerState) -> None:
        super().__init__(config=config, server_state=state, app_state={})
        self._limits = limits
        self._received_bytes = 0
        """Of the request that is being read."""
        self._has_head = False
        self._head = bytearray()
        """As it came, with what came along."""
        self._upgrades = False
        """The head asks for another protocol."""
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None
        self._is_over = False
        """Whatever comes is dropped."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(of_status(503, "too many connections", code="too_many_connections"))
            return
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_over = True
        self._unset_timers()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_over:
            return
        if self._reading is None and not self._answers:
            self._expect()
        self._received_bytes += len(data)
        if not self._has_head:
            self._head += data
        super().data_received(data)
        if self._upgrades:
            self._stay()
        limits = self._limits
        most = limits.max_head_bytes
        if self._has_head:
            most += CHUNK_OVERHEAD * limits.max_body_bytes
        if self._reading is not None and self._received_bytes > most:
            self._refuse(_TOO_LARGE if self._has_head else _HEAD_TOO_LARGE)

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - the base's words are fewer
        self._refuse(of_status(400, "the request is not valid HTTP", code="invalid_http"))

    def on_message_begin(self) -> None:
        if self._answers:
            self.cycle.keep_alive = False
            self._is_over = True
            return
        if self._reading is None:
            # In one piece with the end of the one before, which was answered before it had arrived.
            self._expect()
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if not self._is_over:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        # What follows a body in chunks is dropped.
        if not self._is_over and not self._has_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self._is_over:
            return
        if self.parser.should_upgrade():
            self._upgrades = True
            return
        head_bytes = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if head_bytes > self._limits.max_head_bytes:
            self._refuse(_HEAD_TOO_LARGE)
            return
        super().on_headers_complete()
        self._has_head = True

    def on_body(self, body: bytes) -> None:
        if not self._is_over and not self._upgrades:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_over or self._upgrades:
            return
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._cut_later()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._cut_later()

    def shutdown(self) -> None:
        """Closes once nothing is under way."""
        super().shutdown()
        if self.transport.is_closing():
            self._cut_later()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cut_later()

    def resume_writing(self) -> None:
        if self._writing is not None and not self.transport.is_closing():
            self._writing.cancel()
            self._writing = None
        super().resume_writing()

    @property
    def _answers(self) -> bool:
        """Whether an answer is under way."""
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is not None and not cycle.response_complete

    def _expect(self) -> None:
        """A request is to be read, within its time."""
        self._received_bytes, self._has_head = 0, False
        self._head.clear()
        self._reading = self.loop.call_later(self._limits.read_timeout_s, self._read_timed_out)

    def _stay(self) -> None:
        """Goes on as if nobody had asked for another protocol, as HTTP permits: Java's client asks for HTTP/2 with every first request. The
        parser leaves the body of such a request unread.
        """
        self._upgrades = False
        head, end, rest = bytes(self._head).partition(b"\r\n\r\n")
        plain = _UPGRADE.sub(b"", head)
        if plain == head:
            self._refuse(of_status(400, "the request is not valid HTTP", code="invalid_http"))
            return
        self.parser = httptools.HttpRequestParser(self)
        # As uvicorn's own: what follows a last request is not for the parser to refuse.
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._head.clear()
        super().data_received(plain + end + rest)
        if self._upgrades:
            self._stay()

    def _read_timed_out(self) -> None:
        self._reading = None
        self._refuse(of_status(408, "the request took too long to arrive", code="request_timeout"))

    def _refuse(self, error: HttpError) -> None:
        """The connection ends with this answer, unless another one has begun."""
        if self.transport.is_closing():
            return
        self._is_over = True
        if not self._answers:
            self.transport.write(_whole(error))
        else:
            if not self.cycle.response_started:
                self.transport.write(_whole(error))
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()
        self._cut_later()

    def _cut_later(self) -> None:
        """What is written is taken in time, or never."""
        if self._writing is None:
            self._writing = self.loop.call_later(self._limits.write_stall_s, self.transport.abort)

    def _unset_timers(self) -> None:
        for timer in (self._reading, self._writing):
            if timer is not None:
                timer.cancel()
        self._reading = self._writing = None


_HEAD_TOO_LARGE = of_status(431, "the request's head is too large", code="head_too_large")
_TOO_LARGE = of_status(413, "the request is too large", code="request_too_large")


def _whole(error: HttpError) -> bytes:
    headers: Mapping[str, str] = {
        "content-type": "application/json",
        "content-length": str(len(error.body)),
        "connection": "close",
        **error.headers,
    }
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join((*lines, "", "")).encode() + error.body
