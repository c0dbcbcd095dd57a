"""A short soak; `make soak` runs a long one."""

import pytest

from baton.transfer.ray_runtime import RayCluster
from tests.faults.soak import soak

pytestmark = [pytest.mark.e2e, pytest.mark.ray, pytest.mark.timeout(300)]


async def test_faults_in_random_order_leave_nothing_behind(ray_cluster: RayCluster) -> None:
    """Promise: whichever faults come, one after another, under steady load: no hang, no failed request, no wrong token, and no block,
    file descriptor, task or thread left behind.
    """
    report = await soak(ray_cluster, seconds=35, seed=0)
    assert report.requests > 50
    print(report.table())  # noqa: T201 - shown where the test fails
