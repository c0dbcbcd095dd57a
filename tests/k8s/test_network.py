"""Who reaches whom, by the NetworkPolicies as Kubernetes evaluates them: what no policy of both ends allows does not happen."""

from collections.abc import Mapping

import pytest

from tests.k8s.manifests import Manifest, documents, pod_templates, rendered

CLIENTS = {"kubernetes.io/metadata.name": "shop", "baton/clients": "true"}
MONITORING = {"kubernetes.io/metadata.name": "monitoring"}
DNS = {"kubernetes.io/metadata.name": "kube-system"}
OTHERS = {"kubernetes.io/metadata.name": "others"}
OWN = {"kubernetes.io/metadata.name": "baton"}
Peer = tuple[Mapping[str, str], Mapping[str, str]]
"""Labels of the namespace and of the pod."""

OUTSIDE: dict[str, Peer] = {
    "client": (CLIENTS, {}),
    "prometheus": (MONITORING, {"app.kubernetes.io/name": "prometheus"}),
    "grafana": (MONITORING, {"app.kubernetes.io/name": "grafana"}),
    "dns": (DNS, {"k8s-app": "kube-dns"}),
    "stranger": (OTHERS, {}),
}
GRPC, HTTP, FLEET, WORKER, METRICS = 50051, 8000, 50052, 50061, 9090
REDIS, GCS, RAYLET, ACTOR = 6379, 6379, 6380, 10050

ALLOWED = {
    ("client", "router", GRPC),
    ("client", "router", HTTP),
    ("prefill", "router", FLEET),
    ("decode", "router", FLEET),
    ("router", "prefill", WORKER),
    ("router", "decode", WORKER),
    ("prometheus", "router", METRICS),
    ("prometheus", "prefill", METRICS),
    ("prometheus", "decode", METRICS),
    ("router", "redis", REDIS),
    ("ray-head", "redis", REDIS),
    *((one, "ray-head", GCS) for one in ("prefill", "decode")),
    *(
        (one, other, port)
        for one in ("ray-head", "prefill", "decode")
        for other in ("ray-head", "prefill", "decode")
        for port in (RAYLET, ACTOR)
        if one != other
    ),
}
PORTS = {
    "router": (GRPC, HTTP, FLEET, METRICS, 50053),
    "prefill": (WORKER, METRICS, RAYLET, ACTOR, 50063),
    "decode": (WORKER, METRICS, RAYLET, ACTOR, 50063),
    "ray-head": (GCS, RAYLET, ACTOR, 8265, 10001),
    "redis": (REDIS,),
}


def selects(selector: Manifest, labels: Mapping[str, str]) -> bool:
    if not selector.get("matchLabels", {}).items() <= labels.items():
        return False
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In"
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def is_peer(rule: Manifest, peer: Peer) -> bool:
    namespace, pod = peer
    if "namespaceSelector" in rule:
        if not selects(rule["namespaceSelector"], namespace):
            return False
    elif namespace != OWN:
        return False
    return selects(rule.get("podSelector", {}), pod)


def permits(policies: list[Manifest], direction: str, of: Peer, peer: Peer, port: int) -> bool:
    """Whether the policies of `of`, which is one of Baton's pods or outside, let the peer in, or reach it."""
    if of[0] != OWN:
        return True
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return any(
        is_peer(each, peer)
        and any(
            rule["port"] <= port <= rule.get("endPort", rule["port"]) for rule in allow["ports"]
        )
        for policy in policies
        if direction in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], of[1])
        for allow in policy["spec"].get(key, [])
        for each in allow[peers]
    )


@pytest.fixture(scope="module")
def objects() -> list[Manifest]:
    return documents(rendered("overlays/cpu"))


def test_exactly_what_is_needed_gets_through(objects: list[Manifest]) -> None:
    """Promise: clients reach the routers' port and nothing else; Ray's ports answer its own nodes only, since they run code."""
    policies = [each for each in objects if each["kind"] == "NetworkPolicy"]
    pods: dict[str, Peer] = {each.component: (OWN, each.labels) for each in pod_templates(objects)}
    peers = pods | OUTSIDE
    through = {
        (one, other, port)
        for one in peers
        for other, ports in PORTS.items()
        for port in ports
        if one != other
        and permits(policies, "Egress", peers[one], peers[other], port)
        and permits(policies, "Ingress", peers[other], peers[one], port)
    }
    # The control store's port is open on every node, where only the head listens.
    assert through == ALLOWED
    for name in pods:
        assert permits(policies, "Egress", peers[name], peers["dns"], 53)
        assert not permits(policies, "Egress", peers[name], peers["stranger"], 443)


def test_without_the_default_policy_nothing_would_be_denied(objects: list[Manifest]) -> None:
    denying = next(each for each in objects if each["metadata"]["name"] == "default-deny")
    assert denying["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
