"""Runs `baton serve` as a person would; see `tests.served`."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.served import Serve, Served, served


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Starts `baton serve` with flags, any number of times; all are stopped afterwards."""
    with ExitStack() as running:
        yield lambda *flags: running.enter_context(served(tmp_path, *flags))


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One simulated server in one process, for tests that only ask it things."""
    flags = ("--engine", "sim", "--transport", "memory")
    with served(tmp_path_factory.mktemp("shared"), *flags) as running:
        yield running
