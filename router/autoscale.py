"""When a worker should turn to the other role: a pure decision over what the fleet looked like lately. No clock, no I/O, no await.

    decide(history, changed_at_s, now_s, config) -> RoleChange | None

Each role has a pressure, by its median over the window, of which 1 is as much as it should carry:

    prefill   seconds of backlog: queued tokens / (workers * tokens a worker computes in a second), over the limit
    decode    requests a worker over the limit, or used share of the blocks over the limit, whichever is more
    a role that lost its last sound worker is under more pressure than it can carry

A role at 1 or more gets a worker where the other role, with one worker less, would still be calm. That gap is the hysteresis: a
load that stays as it is never brings a worker back, since the role that gave would have to be at 1 while it is calm.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from baton.types import Role, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """A member of the fleet at one instant."""

    worker_id: WorkerId
    role: Role
    can_be: tuple[Role, ...]
    sound: bool = True
    """Takes requests: it neither drains nor is under suspicion."""
    requests: float = 0.0
    """That it computes, or that wait until it has; not those that wait for prefill."""
    queued_prefill_tokens: int = 0
    """Sent to it and not yet computed."""
    used_share: float = 0.0
    """Of its blocks, in [0, 1]: held by what it computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSample:
    """The fleet at one instant, by the monotonic clock."""

    at_s: float
    workers: tuple[WorkerSample, ...]
    sent_prefill_tokens: int
    """Sent to prefill workers since the router started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleConfig:
    """How eager the policy is."""

    window_s: float = 10.0
    """Pressures are medians over so much time without a change of role."""
    dwell_s: float = 60.0
    """A worker keeps a role for so long at least."""
    cooldown_s: float = 20.0
    """Shortest time between two changes anywhere."""
    backlog_limit_s: float = 1.0
    """Seconds of prefill's backlog that are pressure 1."""
    decode_requests_limit: float = 32.0
    """Requests on a decode worker that are pressure 1."""
    used_share_limit: float = 0.9
    """Share of decode's blocks in use that is pressure 1."""
    calm: float = 0.7
    """Most pressure that a role may be under after it gave a worker; below 1."""


@dataclass(frozen=True, slots=True)
class RoleChange:
    """One worker is to turn."""

    worker_id: WorkerId
    to_role: Role
    reason: str


OTHER = {Role.PREFILL: Role.DECODE, Role.DECODE: Role.PREFILL}
MOST = 10.0
"""Pressures are cut here."""


def decide(
    history: Sequence[FleetSample],
    changed_at_s: Mapping[WorkerId, float],
    now_s: float,
    config: AutoscaleConfig,
) -> RoleChange | None:
    """`history` is in order of time; `changed_at_s` has the last change of each worker that ever changed. Never takes a role's last
    sound worker.
    """
    history = _whole(history)
    begin_s = now_s - config.window_s
    window = [sample for sample in history if sample.at_s >= begin_s]
    last_change_s = max(changed_at_s.values(), default=-math.inf)
    quiet = now_s - last_change_s >= max(config.cooldown_s, config.window_s)
    if not quiet or len(window) < 2 or history[0].at_s > begin_s:
        return None
    rate = prefill_rate(history)
    pressure = {
        Role.PREFILL: median(_prefill_pressure(sample, rate, config) for sample in window),
        Role.DECODE: median(_decode_pressure(sample, config) for sample in window),
    }
    needy = max(pressure, key=lambda role: pressure[role])
    giver = OTHER[needy]
    strain = max(pressure[giver], _busy_share(window) if giver is Role.PREFILL else 0.0)
    givers, takers = _sound(window[-1], giver), _sound(window[-1], needy)
    if pressure[needy] < 1.0 or len(givers) < 2:
        return None
    if takers and strain * len(givers) / (len(givers) - 1) > config.calm:
        return None
    settled = [
        worker
        for worker in givers
        if needy in worker.can_be
        and now_s - changed_at_s.get(worker.worker_id, -math.inf) >= config.dwell_s
    ]
    if not settled:
        return None
    chosen = min(settled, key=lambda w: (w.requests, w.queued_prefill_tokens, w.worker_id))
    reason = (
        f"{needy.value} is at {pressure[needy]:.2f} of what it should carry, "
        f"{giver.value} at {strain:.2f}"
    )
    return RoleChange(chosen.worker_id, needy, reason)


def prefill_rate(history: Sequence[FleetSample]) -> float:
    """Tokens that a prefill worker computes in a second in which it has any to compute; 0 where that was not seen."""
    computed, busy_s = 0, 0.0
    for before, after in pairwise(history):
        sent = after.sent_prefill_tokens - before.sent_prefill_tokens
        computed += max(0, sent + _queued(before) - _queued(after))
        elapsed_s = after.at_s - before.at_s
        busy = sum(worker.queued_prefill_tokens > 0 for worker in _of(after, Role.PREFILL))
        # What came and went between two samples kept somebody busy too.
        busy_s += elapsed_s * max(busy, 1 if sent > 0 else 0)
    return computed / busy_s if busy_s else 0.0


def _whole(history: Sequence[FleetSample]) -> Sequence[FleetSample]:
    """From when both roles had a sound worker: before, workers were still to come, or whoever runs the fleet wants none."""
    for index, sample in enumerate(history):
        if all(_sound(sample, role) for role in Role):
            return list(history)[index:]
    return ()


def _prefill_pressure(sample: FleetSample, rate: float, config: AutoscaleConfig) -> float:
    workers, queued = _sound(sample, Role.PREFILL), _queued(sample)
    if not workers:
        return MOST
    if not queued:
        return 0.0
    if not rate:
        return MOST
    return min(MOST, queued / (len(workers) * rate) / config.backlog_limit_s)


def _decode_pressure(sample: FleetSample, config: AutoscaleConfig) -> float:
    workers = _sound(sample, Role.DECODE)
    if not workers:
        return MOST
    requests = sum(worker.requests for worker in workers) / len(workers)
    used = sum(worker.used_share for worker in workers) / len(workers)
    pressure = max(requests / config.decode_requests_limit, used / config.used_share_limit)
    return min(MOST, pressure)


def _busy_share(window: Sequence[FleetSample]) -> float:
    """Of the prefill workers' time, how much they had something to compute."""
    seen = [worker for sample in window for worker in _sound(sample, Role.PREFILL)]
    return sum(worker.queued_prefill_tokens > 0 for worker in seen) / len(seen) if seen else 0.0


def _queued(sample: FleetSample) -> int:
    return sum(worker.queued_prefill_tokens for worker in _of(sample, Role.PREFILL))


def _of(sample: FleetSample, role: Role) -> list[WorkerSample]:
    return [worker for worker in sample.workers if worker.role is role]


def _sound(sample: FleetSample, role: Role) -> list[WorkerSample]:
    return [worker for worker in _of(sample, role) if worker.sound]
