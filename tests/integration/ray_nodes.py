"""`python -m tests.integration.ray_nodes`: a Ray cluster of three nodes on this machine, each with a raylet and an object store of its own,
in a process of its own: a process has one connection to Ray.

Prints the cluster's address. Each line on standard input is answered with what the nodes hold, as JSON; its end ends the cluster.
"""

import json
import logging
import sys
from dataclasses import asdict, dataclass

import ray
from ray._private import state
from ray._private.internal_api import node_stats
from ray.cluster_utils import Cluster

STORE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node, its actors, and what its object store has ever held."""

    address: str
    node_id: str
    actors: list[str]
    created_bytes: int


def main() -> None:
    """Runs until the end of standard input."""
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES},
    )
    try:
        for address, role in (("127.0.0.2", "prefill"), ("127.0.0.3", "decode")):
            cluster.add_node(
                node_ip_address=address,
                num_cpus=0,
                resources={role: 1},
                object_store_memory=STORE_BYTES,
            )
        ray.init(
            cluster.address, namespace="baton", log_to_driver=False, logging_level=logging.ERROR
        )
        sys.stdout.write(f"{cluster.address}\n")
        sys.stdout.flush()
        for _ in sys.stdin:
            sys.stdout.write(json.dumps([asdict(each) for each in reports()]) + "\n")
            sys.stdout.flush()
    finally:
        ray.shutdown()
        cluster.shutdown()  # type: ignore[no-untyped-call]


def reports() -> list[NodeReport]:
    """Of the nodes that offer a role."""
    alive = [each for each in state.actors().values() if each["State"] == "ALIVE"]
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        if not {"prefill", "decode"} & set(node["Resources"]):
            continue
        stats = node_stats(  # type: ignore[no-untyped-call]
            node_manager_address=node["NodeManagerAddress"],
            node_manager_port=node["NodeManagerPort"],
            include_memory_info=False,
        )
        found.append(
            NodeReport(
                node["NodeManagerAddress"],
                node["NodeID"],
                [each["Name"] for each in alive if each["Address"]["NodeID"] == node["NodeID"]],
                stats.store_stats.cumulative_created_bytes,
            )
        )
    return found


if __name__ == "__main__":
    main()
