"""How every Baton process opens a gRPC channel to another of the fleet: sizes and pings that match what `baton.service.server`
allows, and the fleet's certificates where there are any.

Used on the event loop of the process.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

import grpc

from baton.errors import FieldViolation, InvalidRequestError
from baton.service.settings import ServerSettings
from baton.service.tls import ChannelCertificates, TlsFiles

NO_RETRIES = ("grpc.enable_retries", 0)
"""For every channel. gRPC 1.85 sends a call again, of itself, where the server was gone before it saw it; some of these calls then never
end, nor fail. Whoever makes a call here tries again by its own rules.
"""


def open_channel(
    target: str, settings: ServerSettings, *, server_name: str = ""
) -> grpc.aio.Channel:
    """A channel to host:port. Pings keep it alive through silent stretches of a call and find a dead peer; a peer that comes back is
    found within a second. With certificates, the peer's must be for the settings' `fleet_server_name`, else for `server_name`, else for the
    host. Raises `InvalidRequestError` where the fleet's certificates are unusable.
    """
    options = channel_options(settings, server_name=server_name)
    files = fleet_files(settings)
    if files is None:
        return grpc.aio.insecure_channel(target, options=options)
    certificates = ChannelCertificates(files)
    return RenewedChannel(
        lambda: grpc.aio.secure_channel(target, certificates.credentials, options=options),
        lambda: certificates.version,
        retire_s=settings.default_timeout_s,
    )


def fleet_files(settings: ServerSettings) -> TlsFiles | None:
    """None where the fleet has no certificates. Raises `InvalidRequestError` where it has only some of the three: without the CA, a port
    would take everybody.
    """
    given = {
        "fleet_cert_file": settings.fleet_cert_file,
        "fleet_key_file": settings.fleet_key_file,
        "fleet_ca_file": settings.fleet_ca_file,
    }
    if not any(given.values()):
        return None
    missing = [name for name, path in given.items() if not path]
    if missing:
        raise InvalidRequestError(
            *(FieldViolation(name, "is needed with the fleet's other files") for name in missing)
        )
    return TlsFiles(
        cert=settings.fleet_cert_file, key=settings.fleet_key_file, ca=settings.fleet_ca_file
    )


def channel_options(
    settings: ServerSettings, *, server_name: str = ""
) -> list[tuple[str, int | str]]:
    """Options for a client of servers that run with the same settings; see `open_channel` for the name."""
    name = settings.fleet_server_name or server_name
    named: list[tuple[str, int | str]] = [("grpc.ssl_target_name_override", name)] if name else []
    return [
        *named,
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_s * 500)),
        # A ping that gRPC sent to measure the network holds the others back, and has a timeout of its own: a minute.
        ("grpc.http2.ping_timeout_ms", round(settings.keepalive_s * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # What a connection may take to come about, whatever the name says: a busy peer's handshake is not quick. A refusal ends it at once.
        ("grpc.min_reconnect_backoff_ms", 3000),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # One connection per channel: a dead one is not shared with a fresh channel.
        ("grpc.use_local_subchannel_pool", 1),
        NO_RETRIES,
    ]


class RenewedChannel(grpc.aio.Channel):
    """A channel that is opened anew, for calls to come, when its certificates change: gRPC fixes them for a channel's life. Running calls
    stay where they are, until `retire_s` after the change.
    """

    def __init__(
        self, open_: Callable[[], grpc.aio.Channel], version: Callable[[], int], *, retire_s: float
    ) -> None:
        self._open = open_
        self._version_now = version
        self._retire_s = retire_s
        self._version = version()
        self._channel = open_()
        self._retiring: set[asyncio.Task[None]] = set()

    def _current(self) -> grpc.aio.Channel:
        version = self._version_now()
        if version != self._version:
            retired, self._channel, self._version = self._channel, self._open(), version
            task = asyncio.create_task(self._retire(retired), name="retire channel")
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
        return self._channel

    async def _retire(self, channel: grpc.aio.Channel) -> None:
        try:
            await asyncio.sleep(self._retire_s)
        finally:
            await channel.close(None)

    def _late(self, kind: str, *args: Any, **kwargs: Any) -> Any:
        """A stub's method that finds its channel when it is called."""

        def call(*call_args: Any, **call_kwargs: Any) -> Any:
            method = getattr(self._current(), kind)(*args, **kwargs)
            return method(*call_args, **call_kwargs)

        return call

    def unary_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._late("unary_unary", *args, **kwargs)

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._late("unary_stream", *args, **kwargs)

    def stream_unary(self, *args: Any, **kwargs: Any) -> Any:
        return self._late("stream_unary", *args, **kwargs)

    def stream_stream(self, *args: Any, **kwargs: Any) -> Any:
        return self._late("stream_stream", *args, **kwargs)

    async def close(self, grace: float | None = None) -> None:
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(self._channel.close(grace), *self._retiring, return_exceptions=True)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:  # noqa: FBT001, FBT002 - the base's
        return self._channel.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._channel.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._channel.channel_ready()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close(None)
