"""The manifests name flags, settings, ports, services and metrics of the code: a name that changes there fails here."""

import subprocess
from pathlib import Path

import pytest
import yaml

import baton
from tests.k8s.checks import (
    CHECKS,
    Check,
    baton_templates,
    command_of,
    commands_parse,
    drains_fit,
    ports_are_listened_at,
    probes_reach_health,
    queries,
    queries_name_metrics,
    services_find_pods,
    settings_exist,
    settings_of,
    simulated,
    stores_fit,
)
from tests.k8s.manifests import ROOT, TARGETS, documents, pod_templates, rendered


@pytest.fixture(autouse=True)
def _model_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated engine reads the checkpoint's description, which images have at /opt/tales."""
    tales = Path(baton.__file__).parent / "models" / "tales"
    monkeypatch.setattr(
        "baton.engine.sim.Path", lambda given: tales if given == "/opt/tales" else Path(given)
    )


@pytest.mark.parametrize("target", TARGETS)
def test_the_manifests_are_true_to_the_code(target: str) -> None:
    objects = documents(rendered(target))
    assert [problem for check in CHECKS for problem in check(objects)] == []


@pytest.mark.parametrize(
    ("check", "target", "there", "instead"),
    [
        (settings_exist, "base", "BATON_DISCOVER_ROUTERS", "BATON_FIND_ROUTERS"),
        (settings_exist, "base", 'BATON_PORT: "50051"', "BATON_PORT: many"),
        (settings_exist, "overlays/gpu", "BATON_FLEET_CA_FILE", "BATON_FLEET_CA"),
        (commands_parse, "base", "--ray-resource prefill", "--resource prefill"),
        (commands_parse, "base", "--dtype float32", "--precision float32"),
        (commands_parse, "overlays/sim", "--engine sim", "--engine pretend"),
        (commands_parse, "base", '{"decode": 1}', '{"other": 1}'),
        (commands_parse, "base", "--node-manager-port", "--raylet-port"),
        (commands_parse, "base", "num-cpus: ", "cpus: "),
        (probes_reach_health, "base", "baton.v1.DecodeService", "baton.v1.Decode"),
        (probes_reach_health, "base", "0.0.0.0:50063", "0.0.0.0:50064"),
        (ports_are_listened_at, "base", "BATON_ROUTERS: baton-router", "BATON_ROUTERS: router"),
        (ports_are_listened_at, "base", 'BATON_METRICS_PORT: "9090"', 'BATON_METRICS_PORT: "1"'),
        (services_find_pods, "base", "ray.io/group: decode", "ray.io/group: decoder"),
        (services_find_pods, "base", "targetPort: fleet", "targetPort: workers"),
        (drains_fit, "base", 'BATON_DRAIN_GRACE_S: "60"', 'BATON_DRAIN_GRACE_S: "80"'),
        (stores_fit, "base", 'value: "943718400"', 'value: "1073741824"'),
        (queries_name_metrics, "overlays/production", "_queued_prefill_tokens", "_prefill_queue"),
    ],
)
def test_a_name_that_the_code_does_not_know_is_found(
    check: Check, target: str, there: str, instead: str
) -> None:
    """The checks can fail: each sees a name that is not the code's."""
    text = rendered(target)
    assert there in text
    assert list(check(documents(text.replace(there, instead))))


@pytest.mark.parametrize("target", TARGETS)
def test_workers_run_what_the_overlay_says(target: str) -> None:
    objects = documents(rendered(target))
    workers = [each for each in baton_templates(objects) if each.component != "router"]
    assert {each.component for each in workers} == {"prefill", "decode"}
    for worker in workers:
        command = command_of(worker, objects)
        assert simulated(command) == (target == "overlays/sim")
        assert command.num_gpus == (target in {"overlays/gpu", "overlays/production"})
        assert command.settings.discover_routers
        assert command.ray_resource == worker.component


@pytest.mark.parametrize("target", ["overlays/gpu", "overlays/production"])
def test_a_secured_overlay_shows_certificates_and_asks_for_keys(target: str) -> None:
    """Promise: each file that a setting names is mounted from a Secret, and one name is in every certificate of the fleet."""
    objects = documents(rendered(target))
    for template in baton_templates(objects):
        settings = settings_of(template, objects)
        files = [settings.fleet_cert_file, settings.fleet_key_file, settings.fleet_ca_file]
        files += [getattr(settings, name, "") for name in ("tls_cert_file", "api_keys_file")]
        secrets = {each["name"] for each in template.spec["volumes"] if "secret" in each}
        mounts = {
            each["mountPath"]
            for each in template.container["volumeMounts"]
            if each["name"] in secrets and each["readOnly"]
        }
        assert {str(Path(file).parent) for file in files if file} == mounts
        assert all(files) or template.component != "router"
        assert settings.fleet_server_name == "baton-fleet"
    names = [each["spec"].get("dnsNames") for each in objects if each["kind"] == "Certificate"]
    assert ["baton-fleet"] in names or target == "overlays/gpu"


def test_images_are_of_this_version_and_ray_of_its_pin() -> None:
    objects = documents(rendered("base"))
    images = {each.container["image"] for each in pod_templates(objects)}
    assert images == {f"baton-router:{baton.__version__}", f"baton-worker:{baton.__version__}"}
    cluster = next(each for each in objects if each["kind"] == "RayCluster")
    assert f"ray=={cluster['spec']['rayVersion']}" in (ROOT / "pyproject.toml").read_text()


def test_prometheus_parses_the_scalers_queries(tmp_path: Path) -> None:
    scaled = [
        {"record": f"scaler:{number}", "expr": query}
        for number, (_, query) in enumerate(queries(documents(rendered("overlays/production"))))
    ]
    assert len(scaled) >= 2
    rules = tmp_path / "rules.yaml"
    rules.write_text(yaml.safe_dump({"groups": [{"name": "scalers", "rules": scaled}]}))
    done = subprocess.run(
        ["promtool", "check", "rules", str(rules)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
