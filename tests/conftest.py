"""Fixtures for every test. The Ray cluster is started once a session, because starting one takes seconds.

Tests run in several processes, pytest-xdist's workers, of which each runs whole modules, in their order within a group:

    faults  one after the other, for they keep the machine busy
    others  each module a group of its own
"""

import gc
import os
import signal
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local
from tests.redis_server import redis_server

if not Path("/dev/nvidiactl").exists():
    # Triton decides while it is imported, which others do too, whether it compiles kernels or interprets them.
    os.environ["TRITON_INTERPRET"] = "1"

AGAIN_S = 20.0
"""Long enough for what a test that timed out has to clean up."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-examples", type=int, default=20, help="how hard to fuzz each method")


def pytest_configure() -> None:
    # How long an example takes, to make and to try, is the machine's business.
    settings.register_profile(
        "untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("untimed")


class Spread(LoadScopeScheduling):  # type: ignore[misc] # untyped
    """See the module docstring."""

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return "faults" if "faults/" in path else path


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> Spread:
    return Spread(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, so that no worker ends long after the others."""
    first = ("faults", "e2e")
    rank = {name: number for number, name in enumerate(first)}
    items.sort(key=lambda item: rank.get(item.path.parent.name, len(first)))


def pytest_collection_finish() -> None:
    # What is alive now stays; the collections below need not look at it.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(settings: Any) -> Generator[None, Any, Any]:
    """Lets a test's timeout come again: what a signal raises inside of a task or a destructor is lost, and the test would hang."""
    is_set = yield
    signal.setitimer(signal.ITIMER_REAL, settings.timeout, AGAIN_S)
    return is_set


@pytest.fixture(scope="module", autouse=True)
def _leaves_nothing_open() -> Iterator[None]:
    """A module answers itself for what it has left open: that is told when it is collected, as a warning, and warnings are errors."""
    yield
    gc.collect()


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A local cluster that this process is connected to. Tests name their actors so that they do not collide."""
    local = LocalRaySettings(
        namespace="baton-tests", prestarted_workers=2, object_store_bytes=160 << 20
    )
    with start_local(local) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server that tests share. Each uses tenants of its own, or empties it first."""
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session", autouse=True)
def _sessions_in_memory() -> Iterator[None]:
    """Routers that tests start leave no files in the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON_SESSION_STORE", "sqlite://")
        yield
