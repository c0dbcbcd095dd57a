"""The `baton` command. It composes the services, and imports what a command needs when that command runs, so that
`baton generate` starts without torch or Ray.
"""

from baton.cli.app import app


def main() -> None:
    """The console script."""
    app()
