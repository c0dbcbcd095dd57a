"""One worker's series: its engine, its pool, its handoffs. Every one carries the role that the worker has at the time. Recorded on the
worker's event loop.
"""

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram

from baton.engine.base import EngineInfo
from baton.errors import (
    CancelledError,
    CapacityError,
    CorruptKVError,
    DeadlineError,
    InternalError,
    PreconditionError,
    UnavailableError,
)
from baton.service.metrics.exposition import MetricsServer
from baton.service.metrics.load import LoadCollector, WorkerState
from baton.service.metrics.series import OK, SECONDS, Children
from baton.service.metrics.vllm import PATH as VLLM_PATH
from baton.service.metrics.vllm import VllmCollector
from baton.types import ObjectStoreUsage, Role, WorkerLoad

HANDOFF_FAILURES = (
    CancelledError,
    CapacityError,
    CorruptKVError,
    DeadlineError,
    InternalError,
    PreconditionError,
    UnavailableError,
)
"""How handoffs fail, as far as is known beforehand."""


@dataclass(frozen=True, slots=True)
class _RoleSeries:
    """The children of one role, for what is counted often."""

    prefill_tokens: Counter
    decode_tokens: Counter
    query_tokens: Counter
    hit_tokens: Counter
    preemptions: Counter
    handoff_bytes: Counter
    queue_s: Histogram
    prefill_s: Histogram
    handoff_s: Histogram


class WorkerMetrics(MetricsServer):
    """See the module docstring."""

    def __init__(self, role: Role) -> None:
        super().__init__()
        self.vllm_registry = self.others[VLLM_PATH] = CollectorRegistry()
        self._requests = Children(self._counter("requests", "Calls by outcome.", "outcome"))
        self._failures = Children(
            self._counter("handoff_failures", "Handoffs that failed.", "reason")
        )
        self._handoff_bytes = self._counter("handoff_bytes", "KV bytes handed over.")
        self._prefill_tokens = self._counter("prefill_tokens", "Prompt tokens computed.")
        self._decode_tokens = self._counter("decode_tokens", "Tokens generated after the prompt.")
        self._query_tokens = self._counter(
            "prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache."
        )
        self._hit_tokens = self._counter(
            "prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache."
        )
        self._preemptions = self._counter(
            "preemptions", "Times a request lost its blocks and was recomputed."
        )
        self._queue_s = self._histogram("queue_seconds", "From arrival to the first step.")
        self._prefill_s = self._histogram("prefill_seconds", "Computing a prompt.")
        self._handoff_s = self._histogram(
            "handoff_seconds", "From the end of prefill until decode has taken the KV."
        )
        self._roles: dict[Role, _RoleSeries] = {}
        self._state = WorkerState(role)
        self.role = role

    @property
    def role(self) -> Role:
        """What the worker does now; later values count for it."""
        return self._state.role

    @role.setter
    def role(self, role: Role) -> None:
        self._state.role = role
        if role not in self._roles:
            self._roles[role] = self._series_of(role)
        self._now = self._roles[role]

    def watch(
        self,
        info: EngineInfo,
        load: Callable[[], WorkerLoad],
        stalled_s: Callable[[], float],
    ) -> None:
        """Exports the engine's load at every scrape. Both are called on the scrape's thread."""
        self.registry.register(LoadCollector(info, self._state, load, stalled_s))
        self.vllm_registry.register(VllmCollector(info, load))

    def record_call(self, outcome: str) -> None:
        self._requests(self.role.value, outcome).inc()

    def set_orphaned_blocks(self, count: int) -> None:
        """Blocks that were just found to be held and to belong to no call."""
        self._state.orphaned_blocks = count

    def set_progress(self, *, progresses: bool) -> None:
        """Whether the engine makes progress, as health tells."""
        self._state.progresses = progresses

    def set_object_store(self, usage: ObjectStoreUsage | None) -> None:
        """As sampled just now; None where it cannot be told."""
        self._state.object_store = usage

    def record_queue(self, seconds: float, *, prompt_tokens: int, hit_tokens: int) -> None:
        """A request got its blocks; so many of its tokens were looked up in the prefix cache, and found."""
        self._now.queue_s.observe(seconds)
        self._now.query_tokens.inc(prompt_tokens)
        self._now.hit_tokens.inc(hit_tokens)

    def record_prefill(self, seconds: float, *, computed_tokens: int) -> None:
        self._now.prefill_s.observe(seconds)
        self._now.prefill_tokens.inc(computed_tokens)

    def record_decode_tokens(self, count: int) -> None:
        self._now.decode_tokens.inc(count)

    def record_preemption(self) -> None:
        self._now.preemptions.inc()

    def record_handoff(self, seconds: float, num_bytes: int) -> None:
        self._now.handoff_s.observe(seconds)
        self._now.handoff_bytes.inc(num_bytes)

    def record_handoff_failure(self, reason: str) -> None:
        """`reason` is a `BatonError.reason`."""
        self._failures(self.role.value, reason.lower()).inc()

    def _series_of(self, role: Role) -> _RoleSeries:
        name = role.value
        self._requests(name, OK)
        for failure in HANDOFF_FAILURES:
            self._failures(name, failure.reason.lower())
        return _RoleSeries(
            prefill_tokens=self._prefill_tokens.labels(name),
            decode_tokens=self._decode_tokens.labels(name),
            query_tokens=self._query_tokens.labels(name),
            hit_tokens=self._hit_tokens.labels(name),
            preemptions=self._preemptions.labels(name),
            handoff_bytes=self._handoff_bytes.labels(name),
            queue_s=self._queue_s.labels(name),
            prefill_s=self._prefill_s.labels(name),
            handoff_s=self._handoff_s.labels(name),
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        full = f"baton_worker_{name}_total"
        return Counter(full, text, ["role", *labels], registry=self.registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        full = f"baton_worker_{name}"
        return Histogram(full, text, ["role"], buckets=SECONDS, registry=self.registry)
