"""What of the manifests must be true of the code: each check returns what is wrong, in words, so that a test can show that it sees it."""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields

import ray.scripts.scripts

from baton.engine.sim import SimConfig
from baton.errors import BatonError
from baton.service.settings import RouterSettings, ServerSettings, WorkerSettings
from baton.types import Role
from baton.worker.command import Command, parse
from decode_worker.servicer import SERVICE as DECODE_SERVICE
from prefill_worker.servicer import SERVICE as PREFILL_SERVICE
from router.app import INFERENCE_SERVICE
from tests.dashboards import exported
from tests.k8s.manifests import Manifest, PodTemplate, environment, pod_templates

STOP_S = 20
"""What a process may take to stop after its drain."""
SERVICES = {"router": INFERENCE_SERVICE, "prefill": PREFILL_SERVICE, "decode": DECODE_SERVICE}
Check = Callable[[list[Manifest]], Iterator[str]]


def baton_templates(objects: list[Manifest]) -> list[PodTemplate]:
    return [each for each in pod_templates(objects) if each.component in SERVICES]


def settings_of(template: PodTemplate, objects: list[Manifest]) -> ServerSettings:
    """Raises `InvalidRequestError` naming a bad variable."""
    group = RouterSettings if template.component == "router" else WorkerSettings
    return group.from_env(environment(template, objects))


def command_of(template: PodTemplate, objects: list[Manifest]) -> Command:
    """A worker's, as its own parser reads it."""
    script = template.container["args"][0]
    last = script.strip().splitlines()[-1]
    words = shlex.split(_expanded(last, environment(template, objects)))
    assert words[:3] == ["exec", "python", "-m"], last
    role = Role(template.component)
    assert words[3] == f"{role.value}_worker", last
    return parse(role, words[4:], environment(template, objects))


def _expanded(line: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$([A-Z_]+)", lambda found: variables[found[1]], line)


def settings_exist(objects: list[Manifest]) -> Iterator[str]:
    for template in baton_templates(objects):
        group = RouterSettings if template.component == "router" else WorkerSettings
        known = {f"BATON_{each.name.upper()}" for each in fields(group)}
        given = {name for name in environment(template, objects) if name.startswith("BATON_")}
        for name in sorted(given - known):
            yield f"{template.owner}: {name} is no setting of {group.__name__}"
        try:
            settings_of(template, objects)
        except BatonError as error:
            yield f"{template.owner}: {error.message}"


def commands_parse(objects: list[Manifest]) -> Iterator[str]:
    ray_flags = {flag for each in ray.scripts.scripts.start.params for flag in each.opts}
    for template in pod_templates(objects):
        if template.component in {"prefill", "decode"}:
            try:
                command = command_of(template, objects)
            except (AssertionError, SystemExit, BatonError) as error:
                yield f"{template.owner}: {error!r}"
                continue
            script = template.container["args"][0]
            if f"--resources='{{\"{command.ray_resource}\": 1}}'" not in script:
                yield f"{template.owner}: the node does not offer {command.ray_resource!r}"
            flags = set(re.findall(r"(--[a-z-]+)", script.partition("exec ")[0]))
        else:
            flags = {f"--{name}" for name in template.ray_params}
        for flag in sorted(flags - ray_flags):
            yield f"{template.owner}: `ray start` knows no {flag}"


def probes_reach_health(objects: list[Manifest]) -> Iterator[str]:
    for template in baton_templates(objects):
        listens = settings_of(template, objects).health_listen
        service = SERVICES[template.component]
        for probe, name in (
            ("startupProbe", service),
            ("readinessProbe", service),
            ("livenessProbe", ""),
        ):
            asks = template.container[probe]["grpc"]
            if asks["service"] != name:
                yield f"{template.owner}: {probe} asks for {asks['service']!r}, not {name!r}"
            if listens != f"0.0.0.0:{asks['port']}":
                yield f"{template.owner}: {probe} asks port {asks['port']}, health is at {listens}"


def ports_are_listened_at(objects: list[Manifest]) -> Iterator[str]:
    for template in baton_templates(objects):
        settings = settings_of(template, objects)
        metrics = "metrics" if template.component == "router" else "baton-metrics"
        listens = {
            "grpc": settings.port,
            metrics: settings.metrics_port,
            "health": _port_of(settings.health_listen),
        }
        if isinstance(settings, RouterSettings):
            listens["fleet"] = _port_of(settings.fleet_listen)
            listens["http"] = _port_of(settings.http_listen)
        shown = {each["name"]: each["containerPort"] for each in template.container["ports"]}
        if shown != listens:
            yield f"{template.owner}: shows {shown}, listens at {listens}"
        if settings.host != "0.0.0.0":  # noqa: S104 - compared
            yield f"{template.owner}: listens at {settings.host}"
    router_services = {
        f"{each['metadata']['name']}:{port['port']}"
        for each in objects
        if each["kind"] == "Service"
        for port in each["spec"]["ports"]
    }
    for template in baton_templates(objects):
        settings = settings_of(template, objects)
        if isinstance(settings, WorkerSettings):
            for target in settings.routers:
                if target not in router_services:
                    yield f"{template.owner}: joins {target}, which is no Service's port"


def services_find_pods(objects: list[Manifest]) -> Iterator[str]:
    for service in (each for each in objects if each["kind"] == "Service"):
        name, selector = service["metadata"]["name"], service["spec"]["selector"].items()
        found = [each for each in pod_templates(objects) if selector <= each.labels.items()]
        if not found:
            yield f"Service {name} selects no pod"
        for template in found:
            shown = {each["name"]: each["containerPort"] for each in template.container["ports"]}
            for port in service["spec"]["ports"]:
                if shown.get(port["targetPort"]) != port["port"]:
                    yield f"Service {name}: {port['targetPort']} is not {port['port']} of {template.owner}"


def drains_fit(objects: list[Manifest]) -> Iterator[str]:
    for template in baton_templates(objects):
        hooks = template.container.get("lifecycle", {})
        before_s = hooks["preStop"]["sleep"]["seconds"] if hooks else 0
        needed_s = before_s + settings_of(template, objects).drain_grace_s + STOP_S
        granted_s = template.spec["terminationGracePeriodSeconds"]
        if granted_s < needed_s:
            yield f"{template.owner}: {granted_s} s to end, {needed_s:g} s needed"


def stores_fit(objects: list[Manifest]) -> Iterator[str]:
    for template in pod_templates(objects):
        if template.component not in {"prefill", "decode", "ray-head"}:
            continue
        variables = environment(template, objects) | template.ray_params
        store = int(variables.get("OBJECT_STORE_BYTES") or variables["object-store-memory"])
        mounted = {each["mountPath"]: each["name"] for each in template.container["volumeMounts"]}
        store_volume = mounted["/dev/shm"]  # noqa: S108 - where Ray has its store
        volume = next(each for each in template.spec["volumes"] if each["name"] == store_volume)
        if volume["emptyDir"].get("medium") != "Memory":
            yield f"{template.owner}: /dev/shm is not in memory"
        room = _bytes(volume["emptyDir"]["sizeLimit"])
        memory = _bytes(template.container["resources"]["limits"]["memory"])
        if not store <= room * 0.95 or not room <= memory / 2:
            yield f"{template.owner}: store {store}, /dev/shm {room}, memory {memory} bytes"


def queries_name_metrics(objects: list[Manifest]) -> Iterator[str]:
    known = exported()
    for where, query in queries(objects):
        for name in re.findall(r"\bbaton_[a-z_]+", query):
            if name not in known:
                yield f"{where}: no process exports {name}"


def queries(objects: list[Manifest]) -> Iterator[tuple[str, str]]:
    """Of scalers and rules."""
    for each in objects:
        where = f"{each['kind']}/{each['metadata']['name']}"
        if each["kind"] == "ScaledObject":
            for trigger in each["spec"]["triggers"]:
                yield where, trigger["metadata"]["query"]
        elif each["kind"] == "PrometheusRule":
            for group in each["spec"]["groups"]:
                for rule in group["rules"]:
                    yield f"{where}/{rule.get('alert') or rule['record']}", rule["expr"]


def _port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def _bytes(quantity: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(Mi|Gi)", quantity).groups()  # type: ignore[union-attr]
    return int(number) * {"Mi": 2**20, "Gi": 2**30}[unit]


CHECKS: tuple[Check, ...] = (
    settings_exist,
    commands_parse,
    probes_reach_health,
    ports_are_listened_at,
    services_find_pods,
    drains_fit,
    stores_fit,
    queries_name_metrics,
)


def simulated(command: Command) -> bool:
    return isinstance(command.engine, SimConfig)
