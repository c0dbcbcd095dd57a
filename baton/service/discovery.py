"""Who the routers are where a name stands for all of them: one lookup of the system's resolver, on the event loop's threads."""

import asyncio
import socket
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RouterAddress:
    """Where a router is dialled."""

    target: str
    """host:port."""
    server_name: str = ""
    """Whom its certificate must be for, where that is not the host."""


async def found_routers(names: Iterable[str]) -> frozenset[RouterAddress]:
    """Every address of every host:port. Where a host has addresses of both families, each router has one of each: IPv4 counts then.
    Raises `OSError` where a name is not known.
    """
    loop = asyncio.get_running_loop()
    found = set()
    for name in names:
        host, _, port = name.rpartition(":")
        try:
            answers = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError as error:
            raise OSError(f"{host!r} can be no name") from error
        families = {family for family, *_ in answers}
        family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
        for each, _, _, _, address in answers:
            if each == family:
                ip = address[0] if family == socket.AF_INET else f"[{address[0]}]"
                found.add(RouterAddress(f"{ip}:{port}", host))
    return frozenset(found)
