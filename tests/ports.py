"""Ports that stay a server's own while it is down."""

from contextlib import ExitStack

from baton.cli.ports import bind


def free_port() -> int:
    """One that is free on every address, and that no kernel gives away by itself."""
    with ExitStack() as held:
        return bind("0.0.0.0", 0, held)  # noqa: S104 - nothing listens on it
