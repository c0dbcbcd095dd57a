"""`make monitoring-manifests`: writes what depends on which dashboards and rules there are: k8s/monitoring's list of files, and the rules
as objects of the Prometheus operator. Whoever has no operator takes the same rule files as they are.
"""

from pathlib import Path
from typing import Any

import yaml

from tests.k8s.manifests import K8S

DIRECTORY = K8S / "monitoring"
RULES = "prometheusrules.yaml"
_COMMENT = "# Written by `make monitoring-manifests`, from the files beside it.\n"
_ABOUT = "# What Prometheus scrapes, the rules it evaluates, and the dashboards that Grafana's sidecar picks up by their label.\n"


def written(directory: Path) -> dict[str, str]:
    """File names and contents."""
    rules = sorted(directory.glob("rules/*.yaml"))
    dashboards = sorted(directory.glob("dashboards/*.json"))
    kustomization: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1alpha1",
        "kind": "Component",
        "resources": ["monitors.yaml", *([RULES] if rules else [])],
    }
    if dashboards:
        kustomization["configMapGenerator"] = [
            {"name": each.stem, "files": [f"dashboards/{each.name}"]} for each in dashboards
        ]
        kustomization["generatorOptions"] = {
            "disableNameSuffixHash": True,
            "labels": {"grafana_dashboard": "1"},
        }
    files = {"kustomization.yaml": _ABOUT + _COMMENT + _text(kustomization)}
    if rules:
        objects = (_COMMENT + _text(_rule(each)) for each in rules)
        files[RULES] = "---\n".join(objects)
    return files


def _rule(path: Path) -> dict[str, Any]:
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": path.stem},
        "spec": yaml.safe_load(path.read_text()),
    }


def _text(document: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False, width=200)
    return text


if __name__ == "__main__":
    for name, content in written(DIRECTORY).items():
        (DIRECTORY / name).write_text(content)
