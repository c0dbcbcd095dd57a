"""The fleet as the router knows it: who is a member, how busy each worker is, what its prefix cache holds, whom to avoid.

Pure state transitions: no clock, no I/O, no await; `now_s` is the monotonic clock. Owned by `router.fleet` and used on the
router's event loop only. Placement sees it through `view`, an immutable snapshot; a worker's part of it is made anew only where
that worker changed, so that a view costs little in a large fleet.

A heartbeat tells what a worker knew when it was sent. Requests placed since are *claims*: they weigh on the worker at once,
until a heartbeat is late enough to include them or the claim is released. Invariant: without claims, no worker carries
claimed load.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from baton.types import BlockHash, PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from router.autoscale import FleetSample, WorkerSample
from router.placement import FleetView, WorkerView, longest_tokens
from router.prefix_index import PrefixIndex

TYPICAL_MEMORY = 0.98
"""What each report leaves of the weight of those before it in a role's typical speed."""


@dataclass(eq=False, slots=True, kw_only=True)
class Claim:
    """Load that one side of an attempt puts on one worker. Two alike claims are two claims."""

    worker_id: WorkerId
    prefill_tokens: int
    """Tokens that the worker will compute before it can generate."""
    blocks: int
    """Pool blocks it will hold."""
    made_at_s: float = 0.0
    """When it was placed."""
    sent_at_s: float | None = None
    """When the worker was called; None while that is still to come."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What a member told last, and what the router makes of it."""

    info: WorkerInfo
    load: WorkerLoad
    at_s: float
    silent: bool
    """It should have told more since."""
    suspect: bool
    """It failed an attempt a moment ago."""


@dataclass(slots=True)
class _Worker:
    info: WorkerInfo
    longest_tokens: int
    session: int
    heard_at_s: float
    """When the last heartbeat came."""
    load: WorkerLoad
    draining: bool = False
    hidden: dict[Claim, None] = field(default_factory=dict)
    """Claims that the load does not include yet, in order of making."""
    failed_at_s: float | None = None
    """Set while under suspicion."""


class Registry:
    """See the module docstring. A session is one Join call of a worker; what an older one still sends is ignored."""

    def __init__(self, *, suspicion_s: float = 5.0, silence_s: float = math.inf) -> None:
        """`suspicion_s`: longest time that a failed worker is avoided. `silence_s`: one that was not heard for so long before the last word
        of any is avoided too; where all are silent, it is this process that did not listen.
        """
        self._suspicion_s = suspicion_s
        self._silence_s = silence_s
        self._sent_prefill_tokens = 0
        self._workers: dict[WorkerId, _Worker] = {}
        self._views: dict[Role, dict[WorkerId, WorkerView]] = {role: {} for role in Role}
        self._stale: dict[WorkerId, None] = {}
        """Members whose view is not what they are now."""
        self._suspects: set[WorkerId] = set()
        self._heard: OrderedDict[WorkerId, None] = OrderedDict()
        """Members, the one first whose last heartbeat is the longest ago."""
        self._silent: set[WorkerId] = set()
        """Members whose view says that they are silent."""
        self._prefixes: dict[int, PrefixIndex] = {}
        """By block size."""
        self._typical_tokens_per_s: dict[Role, float] = dict.fromkeys(Role, 0.0)
        self._typical_step_s = 0.0
        self._sessions = 0
        self.version = 0
        """While it stays the same, so does every view, but for its clock."""

    def join(self, info: WorkerInfo, now_s: float) -> int:
        """Makes a worker a member, in place of an earlier session of the same id; returns the session. Until its first heartbeat it
        counts as idle.
        """
        earlier = self._workers.get(info.worker_id)
        if earlier is not None:
            self.leave(info.worker_id, earlier.session)
        self._sessions += 1
        load = WorkerLoad(free_blocks=info.num_blocks)
        self._workers[info.worker_id] = _Worker(
            info, longest_tokens(info), self._sessions, now_s, load
        )
        size = info.block_size_tokens
        self._prefixes.setdefault(size, PrefixIndex(size)).add(info.worker_id)
        self._touch(info.worker_id)
        self._heard[info.worker_id] = None
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
        self._prefixes[worker.info.block_size_tokens].update(worker_id, prefix)
        self._learn_speed(worker.info.role, load)
        # What was sent before the previous heartbeat came is part of this one's load.
        for claim in tuple(worker.hidden):
            if claim.sent_at_s is not None and claim.sent_at_s < worker.heard_at_s:
                del worker.hidden[claim]
        if worker.failed_at_s is not None and worker.failed_at_s < worker.heard_at_s:
            self._trust(worker)
        worker.heard_at_s = now_s
        self._heard.move_to_end(worker_id)
        self._silent.discard(worker_id)
        self._touch(worker_id)
        return True

    def change_role(self, worker_id: WorkerId, session: int, role: Role) -> bool:
        """The member does the other phase from now on; False where the session is not the worker's current one."""
        worker = self._current(worker_id, session)
        if worker is None:
            return False
        self._views[worker.info.role].pop(worker_id, None)
        worker.info = replace(worker.info, role=role)
        worker.longest_tokens = longest_tokens(worker.info)
        self._touch(worker_id)
        return True

    def leave(self, worker_id: WorkerId, session: int) -> bool:
        """Ends a membership; False where the session is not the worker's current one."""
        worker = self._current(worker_id, session)
        if worker is None:
            return False
        del self._workers[worker_id]
        self._views[worker.info.role].pop(worker_id, None)
        self._stale.pop(worker_id, None)
        self.version += 1
        self._suspects.discard(worker_id)
        self._silent.discard(worker_id)
        del self._heard[worker_id]
        size = worker.info.block_size_tokens
        self._prefixes[size].remove(worker_id)
        if not len(self._prefixes[size]):
            del self._prefixes[size]
        return True

    def suspect(self, worker_id: WorkerId, now_s: float) -> None:
        """A worker failed an attempt: it is placed last until two later heartbeats came, or the suspicion is old."""
        worker = self._workers.get(worker_id)
        if worker is not None:
            worker.failed_at_s = now_s
            self._suspects.add(worker_id)
            self._touch(worker_id)

    def note_cached(
        self, worker_id: WorkerId, block_size_tokens: int, hashes: Sequence[BlockHash]
    ) -> None:
        """A worker of that block size holds these blocks. No effect where it is not a member."""
        worker = self._workers.get(worker_id)
        if worker is not None and worker.info.block_size_tokens == block_size_tokens:
            self._prefixes[block_size_tokens].update(worker_id, PrefixDelta(stored=tuple(hashes)))
            self.version += 1

    def claim(self, claim: Claim) -> None:
        """Puts load on a worker. No effect where it is not a member."""
        worker = self._workers.get(claim.worker_id)
        if worker is not None:
            worker.hidden[claim] = None
            self._touch(claim.worker_id)

    def release(self, claim: Claim) -> None:
        """Takes a claim's load off. Idempotent."""
        worker = self._workers.get(claim.worker_id)
        if worker is not None:
            worker.hidden.pop(claim, None)
            self._touch(claim.worker_id)

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

    def loads(self) -> tuple[WorkerLoad, ...]:
        """Every member's, as it last told."""
        return tuple(worker.load for worker in self._workers.values())

    def heard(self, now_s: float) -> tuple[Heard, ...]:
        """Every member, in order of joining."""
        return tuple(
            Heard(
                worker.info,
                worker.load,
                worker.heard_at_s,
                silent=now_s - worker.heard_at_s >= self._silence_s,
                suspect=worker.failed_at_s is not None
                and now_s - worker.failed_at_s < self._suspicion_s,
            )
            for worker in self._workers.values()
        )

    def infos(self) -> tuple[WorkerInfo, ...]:
        """Every member, in order of joining."""
        return tuple(worker.info for worker in self._workers.values())

    def block_sizes(self) -> frozenset[int]:
        """The block sizes for which `view` takes hashes."""
        return frozenset(self._prefixes)

    def view(self, hashes: Mapping[int, Sequence[BlockHash]], now_s: float) -> FleetView:
        """The fleet as one request sees it; `hashes` are its tokens' block hashes by block size."""
        for worker_id in tuple(self._suspects):
            worker = self._workers[worker_id]
            if worker.failed_at_s is None or now_s - worker.failed_at_s >= self._suspicion_s:
                self._trust(worker)
        for worker_id in self._heard:
            if not self._is_silent(self._workers[worker_id]):
                break
            if worker_id not in self._silent:
                self._silent.add(worker_id)
                self._touch(worker_id)
        for worker_id in self._stale:
            worker = self._workers[worker_id]
            self._views[worker.info.role][worker_id] = self._view(worker, now_s)
        self._stale.clear()
        cached: dict[WorkerId, int] = {}
        for size, index in self._prefixes.items():
            cached |= index.cached_tokens(hashes.get(size, ()))
        return FleetView(
            prefill=tuple(self._views[Role.PREFILL].values()),
            decode=tuple(self._views[Role.DECODE].values()),
            cached=cached,
            now_s=now_s,
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
            assert (worker.failed_at_s is not None) == (worker_id in self._suspects)
            assert worker_id in self._stale or worker_id in self._views[worker.info.role]
        assert self._heard.keys() == self._workers.keys()
        assert self._silent <= self._workers.keys()
        assert self._stale.keys() | self._suspects <= self._workers.keys()
        assert sum(len(index) for index in self._prefixes.values()) == len(self._workers)
        for index in self._prefixes.values():
            index.check_integrity()

    def _current(self, worker_id: WorkerId, session: int) -> _Worker | None:
        worker = self._workers.get(worker_id)
        return worker if worker is not None and worker.session == session else None

    def _touch(self, worker_id: WorkerId) -> None:
        """The worker's view is not what it is now."""
        self._stale[worker_id] = None
        self.version += 1

    def _is_silent(self, worker: _Worker) -> bool:
        latest = self._workers[next(reversed(self._heard))]
        return latest.heard_at_s - worker.heard_at_s >= self._silence_s

    def _avoided(self, worker: _Worker, now_s: float) -> bool:
        failed_at_s = worker.failed_at_s
        return self._is_silent(worker) or (
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

    def _trust(self, worker: _Worker) -> None:
        worker.failed_at_s = None
        self._suspects.discard(worker.info.worker_id)
        self._touch(worker.info.worker_id)

    def _learn_speed(self, role: Role, load: WorkerLoad) -> None:
        typical = self._typical_tokens_per_s
        typical[role] = _averaged(typical[role], load.prefill_tokens_per_s)
        self._typical_step_s = _averaged(self._typical_step_s, load.decode_step_s)

    def _view(self, worker: _Worker, now_s: float) -> WorkerView:
        load = worker.load
        typical = self._typical_tokens_per_s
        rate = load.prefill_tokens_per_s or typical[worker.info.role] or max(typical.values())
        # The queue as it goes: it shrinks while the worker computes, and grows with each claim.
        queued, as_of_s = float(load.queued_prefill_tokens), worker.heard_at_s
        claimed_blocks = 0
        for claim in worker.hidden:
            made_at_s = max(as_of_s, claim.made_at_s)
            queued = max(0.0, queued - rate * (made_at_s - as_of_s)) + claim.prefill_tokens
            as_of_s = made_at_s
            claimed_blocks += claim.blocks
        free = load.free_blocks - claimed_blocks
        return WorkerView(
            info=worker.info,
            longest_tokens=worker.longest_tokens,
            computes_prompts=worker.info.computes_prompts,
            draining=worker.draining,
            suspect=self._avoided(worker, now_s),
            requests=load.running_requests + load.waiting_requests + len(worker.hidden),
            queued_prefill_tokens=queued,
            as_of_s=as_of_s,
            free_blocks=max(0, free),
            reclaimable_blocks=max(0, load.cached_blocks + min(0, free)),
            prefill_tokens_per_s=rate,
            decode_step_s=load.decode_step_s or self._typical_step_s,
        )


def _averaged(before: float, new: float) -> float:
    """A moving average; 0 is no measurement."""
    if before == 0 or new == 0:
        return before or new
    return TYPICAL_MEMORY * before + (1 - TYPICAL_MEMORY) * new
