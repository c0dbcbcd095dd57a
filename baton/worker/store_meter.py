"""How full the object store of this process's node is, by its raylet's own account.

Ray has no public call for it: this asks the raylet as `ray memory` does. Used by a worker's actor, on a thread: every call blocks,
for `TIMEOUT_S` at most.
"""

from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import node_manager_pb2, node_manager_pb2_grpc

from baton.errors import UnavailableError
from baton.types import ObjectStoreUsage

TIMEOUT_S = 2.0


class ObjectStoreMeter:
    """Keeps one connection to the raylet. Precondition: the process is connected to Ray."""

    def __init__(self) -> None:
        """Raises `UnavailableError` where Ray does not know this node."""
        here = ray.get_runtime_context().get_node_id()
        nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        for node in nodes:
            if node["NodeID"] == here:
                address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
                break
        else:
            raise UnavailableError("Ray does not know this node")
        channel: grpc.Channel = init_grpc_channel(address)
        self._raylet: Any = node_manager_pb2_grpc.NodeManagerServiceStub(channel)  # type: ignore[no-untyped-call]

    def sample(self) -> ObjectStoreUsage:
        """Raises `UnavailableError` where the raylet does not answer."""
        request = node_manager_pb2.GetNodeStatsRequest(  # type: ignore[attr-defined]
            include_memory_info=False
        )
        try:
            stats = self._raylet.GetNodeStats(request, timeout=TIMEOUT_S).store_stats
        except grpc.RpcError as error:
            raise UnavailableError(f"the raylet does not answer: {error}") from error
        return ObjectStoreUsage(
            used_bytes=stats.object_store_bytes_used,
            capacity_bytes=stats.object_store_bytes_avail,
            spilled_bytes=stats.spilled_bytes_total,
        )
