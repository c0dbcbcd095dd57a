"""What a worker's scrape samples: its engine's load, its health, the object store.

The collector runs on the scrape's thread and reads `WorkerState`, whose fields the event loop replaces one by one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from baton.engine.base import EngineInfo
from baton.types import ObjectStoreUsage, Role, WorkerLoad


@dataclass(slots=True)
class WorkerState:
    """What the event loop tells."""

    role: Role
    orphaned_blocks: int = 0
    progresses: bool = True
    object_store: ObjectStoreUsage | None = None


class LoadCollector(Collector):
    """Gauges from one snapshot a scrape, so that the block counts add up."""

    def __init__(
        self,
        info: EngineInfo,
        state: WorkerState,
        load: Callable[[], WorkerLoad],
        stalled_s: Callable[[], float],
    ) -> None:
        self._info = info
        self._state = state
        self._load = load
        self._stalled_s = stalled_s

    def collect(self) -> Iterator[Metric]:
        load, role = self._load(), self._state.role.value
        yield self._describe(role)
        yield _blocks(role, load)
        yield from self._gauges(role, load)
        usage = self._state.object_store
        if usage is not None:
            yield from _object_store(role, usage)

    def _describe(self, role: str) -> Metric:
        info = self._info
        family = GaugeMetricFamily(
            "baton_worker_info",
            "What the worker serves; always 1.",
            labels=["role", "model_name", "device", "dtype"],
        )
        family.add_metric([role, info.model, info.device, info.spec.dtype.value], 1)
        return family

    def _gauges(self, role: str, load: WorkerLoad) -> Iterator[Metric]:
        for name, text, value in (
            ("running_requests", "Requests that hold blocks.", load.running_requests),
            ("waiting_requests", "Requests that wait for blocks.", load.waiting_requests),
            (
                "queued_prefill_tokens",
                "Tokens whose KV is not yet computed.",
                load.queued_prefill_tokens,
            ),
            (
                "orphaned_kv_blocks",
                "Blocks that are held and belong to no call: 0, or there is a leak.",
                self._state.orphaned_blocks,
            ),
            ("engine_stalled_seconds", "How long the current step runs.", self._stalled_s()),
            (
                "making_progress",
                "1, or 0 where the engine failed, hangs or cannot move.",
                float(self._state.progresses),
            ),
        ):
            gauge = GaugeMetricFamily(f"baton_worker_{name}", text, labels=["role"])
            gauge.add_metric([role], value)
            yield gauge


def _blocks(role: str, load: WorkerLoad) -> Metric:
    blocks = GaugeMetricFamily(
        "baton_worker_kv_blocks", "Blocks of the KV pool by state.", labels=["role", "state"]
    )
    for state, count in (
        ("free", load.free_blocks),
        ("cached", load.cached_blocks),
        ("reserved", load.reserved_blocks),
        ("used", load.used_blocks),
        ("in_flight", load.in_flight_blocks),
    ):
        blocks.add_metric([role, state], count)
    return blocks


def _object_store(role: str, usage: ObjectStoreUsage) -> Iterator[Metric]:
    for name, text, value in (
        ("used", "Object store in use on the worker's node.", usage.used_bytes),
        ("capacity", "Size of the object store on the worker's node.", usage.capacity_bytes),
    ):
        gauge = GaugeMetricFamily(f"baton_worker_object_store_{name}_bytes", text, labels=["role"])
        gauge.add_metric([role], value)
        yield gauge
    spilled = CounterMetricFamily(
        "baton_worker_object_store_spilled_bytes",
        "Objects written to disk for want of room on the worker's node.",
        labels=["role"],
    )
    spilled.add_metric([role], usage.spilled_bytes)
    yield spilled
