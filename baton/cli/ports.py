"""Ports for servers that start later, or again: chosen now, and still theirs then."""

import random
import socket
from contextlib import ExitStack, suppress

from baton.errors import UnavailableError

DRAWN = range(20_000, 30_000)
"""Below what kernels give to connections and to servers that take any port, so that nobody gets one while its server is down."""
_DRAWS = 100


def bind(host: str, port: int, held: ExitStack) -> int:
    """The port, bound without listening for as long as it is held; 0 draws a free one. Raises `UnavailableError` where it is taken."""
    if port:
        return _bind(host, port, held)
    # Workers in processes that share a seed draw too.
    for drawn in random.SystemRandom().sample(DRAWN, _DRAWS):
        with suppress(UnavailableError):
            return _bind(host, drawn, held)
    return _bind(host, 0, held)


def _bind(host: str, port: int, held: ExitStack) -> int:
    probe = held.enter_context(socket.socket())
    # As servers do: connections of an earlier run that still linger do not count.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind((host, port))
    except OSError as error:
        raise UnavailableError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    bound: int = probe.getsockname()[1]
    return bound
