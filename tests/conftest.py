"""Fixtures for every test. The Ray cluster is started once a session, because starting one takes seconds."""

from collections.abc import Iterator

import pytest
from hypothesis import settings

from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local
from tests.redis_server import redis_server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz-examples", type=int, default=20, help="how hard to fuzz each method")


def pytest_configure() -> None:
    # How long an example takes is the machine's business.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")


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
