"""The manifests as `kubectl kustomize` renders them, and the pods that come of them.

Of a RayCluster, KubeRay makes pods by the groups' templates; these stand here as Pods, with the labels that KubeRay adds, so that what is
checked of pods is checked of them too.
"""

import functools
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
TARGETS = ("base", *sorted(f"overlays/{path.name}" for path in (K8S / "overlays").iterdir()))
Manifest = dict[str, Any]
"""A foreign document."""


@functools.cache
def rendered(target: str) -> str:
    """Of a directory below k8s/."""
    program = shutil.which("kubectl")
    assert program, "kubectl is missing; install it: apt-get install kubectl (docs/kubernetes.md)"
    done = subprocess.run(
        [program, "kustomize", str(K8S / target)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def documents(text: str) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(text) if document]


@dataclass(frozen=True, slots=True, kw_only=True)
class PodTemplate:
    """What a workload's pods are made of. Baton's have one container."""

    owner: str
    """Kind and name, and the group of a RayCluster."""
    labels: dict[str, str]
    spec: Manifest
    ray_params: dict[str, str] = field(default_factory=dict)

    @property
    def container(self) -> Manifest:
        first: Manifest = self.spec["containers"][0]
        return first

    @property
    def component(self) -> str:
        return self.labels["app.kubernetes.io/component"]

    def as_pod(self) -> Manifest:
        name = self.owner.lower().replace("/", "-")
        metadata = {"name": name, "namespace": "baton", "labels": self.labels}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": self.spec}


def pod_templates(objects: list[Manifest]) -> list[PodTemplate]:
    return [template for each in objects for template in _templates_of(each)]


def _templates_of(manifest: Manifest) -> Iterator[PodTemplate]:
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    if kind in {"Deployment", "StatefulSet"}:
        template = manifest["spec"]["template"]
        yield PodTemplate(
            owner=f"{kind}/{name}", labels=template["metadata"]["labels"], spec=template["spec"]
        )
    elif kind == "RayCluster":
        spec = manifest["spec"]
        groups = [("headgroup", "head", spec["headGroupSpec"])]
        groups += [(each["groupName"], "worker", each) for each in spec["workerGroupSpecs"]]
        for group, node_type, each in groups:
            added = {
                "ray.io/cluster": name,
                "ray.io/node-type": node_type,
                "ray.io/group": group,
            }
            yield PodTemplate(
                owner=f"{kind}/{name}/{group}",
                labels=each["template"]["metadata"]["labels"] | added,
                spec=each["template"]["spec"],
                ray_params=each["rayStartParams"],
            )


def environment(template: PodTemplate, objects: list[Manifest]) -> dict[str, str]:
    """The container's variables; those of Secrets and of the pod are made up."""
    maps = {each["metadata"]["name"]: each for each in objects if each["kind"] == "ConfigMap"}
    found: dict[str, str] = {}
    for source in template.container.get("envFrom", []):
        found |= maps[source["configMapRef"]["name"]]["data"]
    for each in template.container.get("env", []):
        value = each.get("value", f"redis://{each['name'].lower()}")
        for name, known in found.items():
            value = value.replace(f"$({name})", known)
        found[each["name"]] = value
    return found
