"""The committed dashboards and rules, as tests read them."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prometheus_client import CollectorRegistry

from baton.engine.sim import SimConfig, build_sim_engine
from baton.service.metrics import RouterMetrics, WorkerMetrics
from baton.types import ObjectStoreUsage, Role, WorkerLoad
from router.sessions.metrics import SessionMetrics

MONITORING = Path(__file__).parent.parent / "k8s" / "monitoring"
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
RULES = sorted((MONITORING / "rules").glob("*.yaml"))
RULE_TESTS = sorted((MONITORING / "rules" / "tests").glob("*.yaml"))

VARIABLES = {"$__rate_interval": "2m", "$job": ".+"}
"""What a panel's query is sent with."""

_NAME = re.compile(r"\b(?:baton|vllm)[a-z_]*:?[a-z0-9_:]*")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of one panel."""

    board: str
    panel: str
    expr: str

    @property
    def sent(self) -> str:
        """With the variables' values."""
        expr = self.expr
        for variable, value in VARIABLES.items():
            expr = expr.replace(variable, value)
        return expr


def load(path: Path) -> dict[str, Any]:
    """A dashboard."""
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    """Those that show something: rows are titles."""
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def queries() -> list[PanelQuery]:
    """Every query of every panel."""
    return [
        PanelQuery(path.stem, panel["title"], target["expr"])
        for path in DASHBOARDS
        for panel in panels(load(path))
        for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    """Recording rules and alerts."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]


def names_in(expr: str) -> set[str]:
    """Baton's metrics and recording rules that an expression asks for."""
    return set(_NAME.findall(expr))


def exported() -> set[str]:
    """Names of all samples of a router and of a worker."""
    router, worker = RouterMetrics(), WorkerMetrics(Role.DECODE)
    SessionMetrics(router.registry)
    info = build_sim_engine(SimConfig(num_blocks=8)).info
    worker.watch(info, WorkerLoad, lambda: 0.0)
    worker.set_object_store(ObjectStoreUsage(used_bytes=1, capacity_bytes=2, spilled_bytes=0))
    return {*_samples(router.registry), *_samples(worker.registry)}


def _samples(registry: CollectorRegistry) -> Iterator[str]:
    for family in registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
        for suffix in suffixes.get(family.type, [""]):
            yield family.name + suffix
