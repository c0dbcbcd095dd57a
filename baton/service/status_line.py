"""One line now and then that tells people what a process does: throughput, requests, KV and latency since the line before.

Two snapshots make a report, purely; snapshots are read from the metrics and the load that exist anyway. `StatusLine` takes them, on an
event loop. A process that is idle says so once.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise

from prometheus_client import CollectorRegistry

from baton.errors import UnavailableError
from baton.service.logging import STATUS_LOGGER, fields
from baton.types import WorkerLoad

_log = logging.getLogger(STATUS_LOGGER)

MEDIAN = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What a process has done so far, and has to do."""

    at_s: float
    """On the monotonic clock of whoever took it."""
    prompt_tokens: float
    looked_up_tokens: float
    """Of prompts, those that a prefix cache was asked for."""
    generated_tokens: float
    reused_tokens: float
    """Prompt tokens whose KV came from a prefix cache."""
    handoff_bytes: float
    running: int
    waiting: int
    kv_used: float
    """Share of the KV blocks that requests hold."""
    ttft_s: tuple[tuple[float, float], ...] = ()
    """Upper bound and count of each bucket of times to the first token; counts include the buckets below."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What was done between two snapshots, and the state at the second."""

    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    running: int
    waiting: int
    kv_used: float
    prefix_hit_rate: float | None
    """None where no prompt came."""
    handoff_bytes_per_s: float
    ttft_p50_s: float | None
    """None where no first token came, or it is not known here."""

    @property
    def idle(self) -> bool:
        """Nothing was done, and nothing is to do."""
        done = self.prompt_tokens_per_s + self.generation_tokens_per_s + self.handoff_bytes_per_s
        return not done and not self.running and not self.waiting

    def __str__(self) -> str:
        if self.idle:
            return f"idle, KV {self.kv_used:.1%}"
        parts = [
            f"prompt {self.prompt_tokens_per_s:.1f} tok/s",
            f"generation {self.generation_tokens_per_s:.1f} tok/s",
            f"running {self.running}",
            f"waiting {self.waiting}",
            f"KV {self.kv_used:.1%}",
        ]
        if self.prefix_hit_rate is not None:
            parts.append(f"prefix hits {self.prefix_hit_rate:.1%}")
        parts.append(f"handoff {self.handoff_bytes_per_s / 1e6:.1f} MB/s")
        if self.ttft_p50_s is not None:
            parts.append(f"TTFT p50 {self.ttft_p50_s * 1000:.0f} ms")
        return ", ".join(parts)


def report(before: Snapshot, after: Snapshot) -> Report:
    """Precondition: `after` is later. What has become less counts as nothing done: the process began anew."""
    seconds = after.at_s - before.at_s

    def grown(then: float, now: float) -> float:
        return max(0.0, now - then)

    prompt_tokens = grown(before.prompt_tokens, after.prompt_tokens)
    reused = grown(before.reused_tokens, after.reused_tokens)
    looked_up = grown(before.looked_up_tokens, after.looked_up_tokens)
    return Report(
        prompt_tokens_per_s=prompt_tokens / seconds,
        generation_tokens_per_s=grown(before.generated_tokens, after.generated_tokens) / seconds,
        running=after.running,
        waiting=after.waiting,
        kv_used=after.kv_used,
        prefix_hit_rate=min(1.0, reused / looked_up) if looked_up else None,
        handoff_bytes_per_s=grown(before.handoff_bytes, after.handoff_bytes) / seconds,
        ttft_p50_s=_median(before.ttft_s, after.ttft_s),
    )


def _median(
    before: tuple[tuple[float, float], ...], after: tuple[tuple[float, float], ...]
) -> float | None:
    """Of what came between two states of a histogram: within its bucket by linear interpolation; of the last, unbounded one, its lower
    bound.
    """
    then = dict(before)
    new = [(bound, count - then.get(bound, 0.0)) for bound, count in after]
    if not new or new[-1][1] <= 0:
        return None
    rank = MEDIAN * new[-1][1]
    for (low, below), (high, count) in pairwise([(0.0, 0.0), *new]):
        if count >= rank:
            within = (rank - below) / (count - below)
            return low if high == float("inf") else low + (high - low) * within
    return None


def used_share(loads: Iterable[WorkerLoad]) -> float:
    """Of all blocks of these workers, those that requests hold."""
    used = total = 0
    for load in loads:
        held = load.reserved_blocks + load.used_blocks + load.in_flight_blocks
        used += held
        total += held + load.free_blocks + load.cached_blocks
    return used / total if total else 0.0


def totals(registry: CollectorRegistry, *names: str) -> Mapping[str, float]:
    """Samples by name, each the sum over its labels; 0 where nothing was counted yet."""
    found = dict.fromkeys(names, 0.0)
    for family in registry.restricted_registry(names).collect():
        for sample in family.samples:
            found[sample.name] += sample.value
    return found


def buckets(registry: CollectorRegistry, name: str) -> tuple[tuple[float, float], ...]:
    """A histogram's, for `Snapshot.ttft_s`."""
    families = registry.restricted_registry([f"{name}_bucket"]).collect()
    samples = [sample for family in families for sample in family.samples]
    return tuple((float(sample.labels["le"]), sample.value) for sample in samples)


def worker_snapshot(registry: CollectorRegistry, load: WorkerLoad) -> Snapshot:
    """Of a worker, from its metrics' registry. Its prompt tokens are those that it computed or found."""
    prefilled, looked_up, hits, generated, handed = (
        f"baton_worker_{name}_total"
        for name in (
            "prefill_tokens",
            "prefix_cache_query_tokens",
            "prefix_cache_hit_tokens",
            "decode_tokens",
            "handoff_bytes",
        )
    )
    done = totals(registry, prefilled, looked_up, hits, generated, handed)
    return Snapshot(
        at_s=time.monotonic(),
        prompt_tokens=done[prefilled] + done[hits],
        looked_up_tokens=done[looked_up],
        generated_tokens=done[generated],
        reused_tokens=done[hits],
        handoff_bytes=done[handed],
        running=load.running_requests,
        waiting=load.waiting_requests,
        kv_used=used_share([load]),
    )


class StatusLine:
    """See the module docstring."""

    def __init__(self, take: Callable[[], Awaitable[Snapshot]], interval_s: float) -> None:
        """`take` may raise `UnavailableError`: then there is no line."""
        self._take = take
        self._interval_s = interval_s
        self._last: Snapshot | None = None
        self._said_idle = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """From now on, unless the interval is 0."""
        if self._interval_s > 0:
            self._task = asyncio.create_task(self._run(), name="status line")

    async def close(self) -> None:
        """Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def tell(self) -> None:
        """Writes what has happened since it was last called, where that is news."""
        try:
            now = await self._take()
        except UnavailableError:
            return
        before, self._last = self._last, now
        if before is None:
            return
        told = report(before, now)
        if not (told.idle and self._said_idle):
            _log.info("%s", told, extra=fields(**asdict(told)))
        self._said_idle = told.idle

    async def _run(self) -> None:
        while True:
            await self.tell()
            await asyncio.sleep(self._interval_s)
