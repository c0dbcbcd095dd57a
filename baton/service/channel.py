"""How every Baton process opens a gRPC channel: sizes and pings that match what `baton.service.server` allows."""

import grpc

from baton.service.settings import ServerSettings


def open_channel(target: str, settings: ServerSettings) -> grpc.aio.Channel:
    """A channel to host:port. Pings keep it alive through silent stretches of a call and find a dead peer; a peer that comes back is
    found within a second.
    """
    return grpc.aio.insecure_channel(target, options=channel_options(settings))


def channel_options(settings: ServerSettings) -> list[tuple[str, int]]:
    """Options for a client of servers that run with the same settings."""
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", round(settings.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_s * 500)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
        # One connection per channel: a dead one is not shared with a fresh channel.
        ("grpc.use_local_subchannel_pool", 1),
    ]
