"""The fleet as the router knows it: who is a member, how busy each worker is, what its prefix cache holds, whom to avoid.

Pure state transitions: no clock, no I/O, no await; `now_s` is the monotonic clock. Owned by `router.fleet` and used on the
router's event loop only. Placement sees it through `view`, an immutable snapshot.

A heartbeat tells what a worker knew when it was sent. Requests placed since are *claims*: they weigh on the worker at once,
until a heartbeat is late enough to include them or the claim is released. Invariant: without claims, no worker carries
claimed load.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from baton.types import BlockHash, PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from router.autoscale import FleetSample, WorkerSample
from router.placement import FleetView, WorkerView


@dataclass(eq=False, slots=True, kw_only=True)
class Claim:
    """Load that one side of an attempt puts on one worker. Two alike claims are two claims."""

    worker_id: WorkerId
    prefill_tokens: int
    """Tokens that the worker will compute before it can generate."""
    blocks: int
    """Pool blocks it will hold."""
    sent_at_s: float | None = None
    """When the worker was called; None while that is still to come."""


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    session: int
    heard_at_s: float
    """When the last heartbeat came."""
    load: WorkerLoad
    draining: bool = False
    cached: set[BlockHash] = field(default_factory=set)
    hidden: set[Claim] = field(default_factory=set)
    """Claims that the load does not include yet."""
    failed_at_s: float | None = None
    """Set while under suspicion."""


class Registry:
    """See the module docstring. A session is one Join call of a worker; what an older one still sends is ignored."""

    def __init__(self, *, suspicion_s: float = 5.0, silence_s: float = math.inf) -> None:
        """`suspicion_s`: longest time that a failed worker is avoided; `silence_s`: one that was not heard for so long is avoided too."""
        self._suspicion_s = suspicion_s
        self._silence_s = silence_s
        self._sent_prefill_tokens = 0
        self._workers: dict[WorkerId, _Worker] = {}
        self._sessions = 0

    def join(self, info: WorkerInfo, now_s: float) -> int:
        """Makes a worker a member, in place of an earlier session of the same id; returns the session. Until its first heartbeat it
        counts as idle.
        """
        self._sessions += 1
        load = WorkerLoad(free_blocks=info.num_blocks)
        self._workers[info.worker_id] = _Worker(info, self._sessions, now_s, load)
        return self._sessions

    def heartbeat(
        self,
        worker_id: WorkerId,
        session: int,
        load: WorkerLoad,
        prefix: PrefixDelta,
        *,
        draining: bool,
        now_s: float,
    ) -> bool:
        """Takes a report in; False where the session is not the worker's current one."""
        worker = self._current(worker_id, session)
        if worker is None:
            return False
        worker.load = load
        worker.draining = draining
        worker.cached.difference_update(prefix.evicted)
        worker.cached.update(prefix.stored)
        # What was sent before the previous heartbeat came is part of this one's load.
        worker.hidden = {
            c for c in worker.hidden if c.sent_at_s is None or c.sent_at_s >= worker.heard_at_s
        }
        if worker.failed_at_s is not None and worker.failed_at_s < worker.heard_at_s:
            worker.failed_at_s = None
        worker.heard_at_s = now_s
        return True

    def change_role(self, worker_id: WorkerId, session: int, role: Role) -> bool:
        """The member does the other phase from now on; False where the session is not the worker's current one."""
        worker = self._current(worker_id, session)
        if worker is None:
            return False
        worker.info = replace(worker.info, role=role)
        return True

    def leave(self, worker_id: WorkerId, session: int) -> bool:
        """Ends a membership; False where the session is not the worker's current one."""
        if self._current(worker_id, session) is None:
            return False
        del self._workers[worker_id]
        return True

    def suspect(self, worker_id: WorkerId, now_s: float) -> None:
        """A worker failed an attempt: it is placed last until two later heartbeats came, or the suspicion is old."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.failed_at_s = now_s

    def note_cached(
        self, worker_id: WorkerId, block_size_tokens: int, hashes: Sequence[BlockHash]
    ) -> None:
        """A worker of that block size holds these blocks. No effect where it is not a member."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.info.block_size_tokens == block_size_tokens:
            worker.cached.update(hashes)

    def claim(self, claim: Claim) -> None:
        """Puts load on a worker. No effect where it is not a member."""
        worker = self._workers.get(claim.worker_id)
        if worker is not None:
            worker.hidden.add(claim)

    def release(self, claim: Claim) -> None:
        """Takes a claim's load off. Idempotent."""
        worker = self._workers.get(claim.worker_id)
        if worker is not None:
            worker.hidden.discard(claim)

    def sent(self, claim: Claim, now_s: float) -> None:
        """The worker was called: later heartbeats include the claim."""
        claim.sent_at_s = now_s
        worker = self._workers.get(claim.worker_id)
        if worker is not None and worker.info.role is Role.PREFILL:
            self._sent_prefill_tokens += claim.prefill_tokens

    def sample(self, now_s: float) -> FleetSample:
        """The fleet as autoscaling sees it. Prompts that wait for decode's blocks are no backlog of prefill's."""
        return FleetSample(
            at_s=now_s,
            workers=tuple(self._sample(worker, now_s) for worker in self._workers.values()),
            sent_prefill_tokens=self._sent_prefill_tokens,
        )

    def infos(self) -> tuple[WorkerInfo, ...]:
        """Every member, in order of joining."""
        return tuple(worker.info for worker in self._workers.values())

    def block_sizes(self) -> frozenset[int]:
        """The block sizes for which `view` takes hashes."""
        return frozenset(worker.info.block_size_tokens for worker in self._workers.values())

    def view(self, hashes: Mapping[int, Sequence[BlockHash]], now_s: float) -> FleetView:
        """The fleet as one request sees it; `hashes` are its tokens' block hashes by block size."""
        views = [self._view(worker, hashes, now_s) for worker in self._workers.values()]
        return FleetView(
            prefill=tuple(v for v in views if v.info.role is Role.PREFILL),
            decode=tuple(v for v in views if v.info.role is Role.DECODE),
        )

    def claimed_tokens(self) -> int:
        """Claimed load over all workers; 0 where nothing is in flight."""
        return sum(c.prefill_tokens + c.blocks for w in self._workers.values() for c in w.hidden)

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        for worker_id, worker in self._workers.items():
            assert worker.info.worker_id == worker_id
            assert worker.session <= self._sessions
            assert all(claim.worker_id == worker_id for claim in worker.hidden)

    def _current(self, worker_id: WorkerId, session: int) -> _Worker | None:
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.session == session else None

    def _avoided(self, worker: _Worker, now_s: float) -> bool:
        failed_at_s = worker.failed_at_s
        return now_s - worker.heard_at_s >= self._silence_s or (
            failed_at_s is not None and now_s - failed_at_s < self._suspicion_s
        )

    def _sample(self, worker: _Worker, now_s: float) -> WorkerSample:
        load, info = worker.load, worker.info
        sent = sum(c.prefill_tokens for c in worker.hidden if c.sent_at_s is not None)
        # What is reserved waits for prefill: it is no sign that decode lacks anything.
        computing = load.used_blocks / max(1, load.used_blocks + load.reserved_blocks)
        return WorkerSample(
            worker_id=info.worker_id,
            role=info.role,
            can_be=info.can_be,
            sound=not worker.draining and not self._avoided(worker, now_s),
            requests=computing * (load.running_requests + load.waiting_requests),
            queued_prefill_tokens=load.queued_prefill_tokens + sent,
            used_share=load.used_blocks / info.num_blocks,
        )

    def _view(
        self, worker: _Worker, hashes: Mapping[int, Sequence[BlockHash]], now_s: float
    ) -> WorkerView:
        load, size = worker.load, worker.info.block_size_tokens
        return WorkerView(
            info=worker.info,
            draining=worker.draining,
            suspect=self._avoided(worker, now_s),
            requests=load.running_requests + load.waiting_requests + len(worker.hidden),
            queued_prefill_tokens=(
                load.queued_prefill_tokens + sum(c.prefill_tokens for c in worker.hidden)
            ),
            free_blocks=max(
                0, load.free_blocks + load.cached_blocks - sum(c.blocks for c in worker.hidden)
            ),
            cached_tokens=size * _leading(hashes.get(size, ()), worker.cached),
        )


def _leading(hashes: Sequence[BlockHash], cached: set[BlockHash]) -> int:
    """How many of the first hashes are cached, up to the first that is not."""
    count = 0
    for block_hash in hashes:
        if block_hash not in cached:
            break
        count += 1
    return count
