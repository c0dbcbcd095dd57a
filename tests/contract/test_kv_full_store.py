"""What the Ray transport promises where the object store has no room."""

import time

import numpy as np
import pytest
import ray

from baton.errors import BatonError
from baton.transfer.ray_runtime import RayCluster
from tests.contract.fake_source import LARGE_SPEC, Act, key_for, kv_of, request_for
from tests.contract.transport_rigs import RayPeers

TIMEOUT_S = 15.0


@pytest.mark.ray
async def test_a_pull_through_a_full_store_delivers_or_says_why_in_time(
    ray_cluster: RayCluster,
) -> None:
    """A store that others fill makes handoffs slow, or fails them with a typed error; it neither hangs nor corrupts them."""
    peers = RayPeers()
    rig = peers.rig()
    assert ray_cluster.object_store_bytes is not None
    block = np.ones(ray_cluster.object_store_bytes // 8, np.uint8)
    held = [ray.put(block) for _ in range(9)]
    delivered = 0
    try:
        for i in range(3):
            request = request_for(key_for(Act.GOOD, i), 0, 90, LARGE_SPEC)
            start_s = time.monotonic()
            try:
                async with rig.transport.pull(
                    rig.address, request, spec=LARGE_SPEC, timeout_s=TIMEOUT_S
                ) as kv:
                    assert kv.data.tobytes() == kv_of(request, LARGE_SPEC).tobytes()
                    delivered += 1
                    del kv
            except BatonError as error:
                assert error.reason in {"NO_CAPACITY", "DEADLINE_EXCEEDED", "UNAVAILABLE"}  # noqa: PT017
            assert time.monotonic() - start_s < TIMEOUT_S + 2
            assert rig.budget.in_use_bytes == 0
        del held, block
        request = request_for(key_for(Act.GOOD), 0, 8, LARGE_SPEC)
        async with rig.transport.pull(rig.address, request, spec=LARGE_SPEC, timeout_s=20) as kv:
            assert kv.data.tobytes() == kv_of(request, LARGE_SPEC).tobytes()
        assert delivered > 0, "Ray spills to disk rather than refuse"
    finally:
        peers.close()
