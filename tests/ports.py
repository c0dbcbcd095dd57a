"""Ports that stay a server's own while it is down."""

import os
import random
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache

from baton.cli.ports import DRAWN, bind
from baton.errors import UnavailableError


def free_port() -> int:
    """One that is free on every address, that no kernel gives away by itself, and that no other test of this run is given."""
    return next(_ports())


@cache
def _ports() -> Iterator[int]:
    """Each of pytest's processes has a share of its own."""
    share = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    shares = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    ports = list(DRAWN[share::shares])
    # Another run may have the same seed.
    random.SystemRandom().shuffle(ports)
    return filter(_is_free, ports)


def _is_free(port: int) -> bool:
    with ExitStack() as held:
        try:
            bind("0.0.0.0", port, held)  # noqa: S104 - nothing listens on it
        except UnavailableError:
            return False
        return True
