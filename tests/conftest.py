"""Fixtures for every test. The Ray cluster is started once a session, because starting one takes seconds.

Tests run in several processes, pytest-xdist's workers, of which each runs whole modules, in their order within a group:

    ray     modules that use the shared cluster, and all that break workers over Ray: one after the other, for they keep the machine busy
    others  each module a group of its own
"""

import gc
import signal
from collections.abc import Generator, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local
from tests.redis_server import redis_server

TESTS = Path(__file__).parent
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups, the longest first, so that no worker ends long after the others."""
    ranked: list[tuple[int, pytest.Item]] = []
    for path, grouped in groupby(items, key=lambda item: item.path):
        module = list(grouped)
        name = path.relative_to(TESTS).as_posix()
        marks = {mark.name for item in module for mark in item.iter_markers()}
        functions = [item for item in module if isinstance(item, pytest.Function)]
        fixtures = {fixture for item in functions for fixture in item.fixturenames}
        over_ray = "ray" in marks and name.startswith(("contract/", "faults/"))
        in_ray = over_ray or "ray_cluster" in fixtures
        rank = 0 if in_ray else 1 if marks & {"ray", "e2e"} else 2
        for item in module:
            item.add_marker(pytest.mark.xdist_group("ray" if in_ray else name))
            ranked.append((rank, item))
    items[:] = [item for _, item in sorted(ranked, key=lambda each: each[0])]


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
