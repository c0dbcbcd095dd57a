"""Every dashboard and every rule that is there is deployed."""

from pathlib import Path

import yaml

from tests.k8s.manifests import documents, rendered
from tests.k8s.monitoring_manifests import DIRECTORY, RULES, written


def test_the_component_has_every_dashboard_and_rule_as_it_is() -> None:
    for name, content in written(DIRECTORY).items():
        assert (DIRECTORY / name).read_text() == content, "run: make monitoring-manifests"


def test_rules_become_objects_and_dashboards_config_maps_that_grafana_finds(tmp_path: Path) -> None:
    groups = {"groups": [{"name": "g", "rules": [{"record": "a:b", "expr": "sum(x)"}]}]}
    for directory, name, content in (
        ("rules", "fleet.yaml", yaml.safe_dump(groups)),
        ("dashboards", "fleet.json", "{}"),
    ):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / name).write_text(content)
    files = written(tmp_path)
    (rule,) = documents(files[RULES])
    assert (rule["kind"], rule["metadata"]["name"], rule["spec"]) == (
        "PrometheusRule",
        "fleet",
        groups,
    )
    component = yaml.safe_load(files["kustomization.yaml"])
    assert component["resources"] == ["monitors.yaml", RULES]
    assert component["configMapGenerator"] == [
        {"name": "fleet", "files": ["dashboards/fleet.json"]}
    ]
    assert component["generatorOptions"]["labels"] == {"grafana_dashboard": "1"}


def test_prometheus_finds_the_ports_by_their_names() -> None:
    objects = documents(rendered("overlays/production"))
    by_kind = {each["kind"]: each["spec"] for each in objects if "Monitor" in each["kind"]}
    assert by_kind["PodMonitor"]["podMetricsEndpoints"][0]["port"] == "baton-metrics"
    selector = by_kind["ServiceMonitor"]["selector"]["matchLabels"].items()
    (service,) = (
        each
        for each in objects
        if each["kind"] == "Service" and selector <= each["metadata"]["labels"].items()
    )
    ports = {each["name"] for each in service["spec"]["ports"]}
    assert by_kind["ServiceMonitor"]["endpoints"][0]["port"] in ports
