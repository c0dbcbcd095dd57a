"""Fixtures for every test. The Ray cluster is started once a session, because starting one takes seconds."""

from collections.abc import Iterator

import pytest

from baton.transfer.ray_runtime import LocalRaySettings, RayCluster, start_local


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A local cluster that this process is connected to. Tests name their actors so that they do not collide."""
    settings = LocalRaySettings(
        namespace="baton-tests", prestarted_workers=2, object_store_bytes=160 << 20
    )
    with start_local(settings) as cluster:
        yield cluster
