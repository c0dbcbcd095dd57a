"""The autoscaling policy against a fluid model of a fleet: prompts flow in, workers compute them, answers stay for a while."""

import random
from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.types import Role, WorkerId
from router.autoscale import (
    AutoscaleConfig,
    FleetSample,
    RoleChange,
    WorkerSample,
    decide,
    prefill_rate,
)

PREFILL, DECODE = Role.PREFILL, Role.DECODE
BOTH = (PREFILL, DECODE)
CONFIG = AutoscaleConfig(window_s=10.0, dwell_s=60.0, cooldown_s=20.0)
STEP_S = 1.0
RATE = 1000.0
"""Tokens that a worker of the model computes in a second."""


@dataclass(frozen=True)
class Load:
    """What clients ask for, without an end."""

    prompt_tokens_per_s: float
    answers: float
    """Requests that are being answered at any time."""


@dataclass
class Fluid:
    """A fleet under a load, with the policy at work. Every change is checked when it is made."""

    roles: dict[WorkerId, Role]
    config: AutoscaleConfig = CONFIG
    noise: random.Random | None = None
    now_s: float = 0.0
    queue: float = 0.0
    sent: float = 0.0
    changes: list[tuple[float, RoleChange]] = field(default_factory=list)
    history: deque[FleetSample] = field(default_factory=deque)
    changed_at_s: dict[WorkerId, float] = field(default_factory=dict)

    def count(self, role: Role) -> int:
        return sum(each is role for each in self.roles.values())

    def run(self, load: Load, duration_s: float) -> list[RoleChange]:
        """Returns the changes."""
        before = len(self.changes)
        end_s = self.now_s + duration_s
        while self.now_s < end_s:
            self.now_s += STEP_S
            wobble = self.noise.uniform(0.8, 1.2) if self.noise is not None else 1.0
            arrived = load.prompt_tokens_per_s * STEP_S * wobble
            self.sent += arrived
            computed = min(self.queue + arrived, self.count(PREFILL) * RATE * STEP_S)
            self.queue += arrived - computed
            self._sample(load.answers * wobble)
            change = decide(self.history, self.changed_at_s, self.now_s, self.config)
            if change is not None:
                self._make(change)
        return [change for _, change in self.changes[before:]]

    def _sample(self, answers: float) -> None:
        workers = []
        for worker_id, role in self.roles.items():
            share = 1 / self.count(role)
            workers.append(
                WorkerSample(
                    worker_id=worker_id,
                    role=role,
                    can_be=BOTH,
                    requests=answers * share if role is DECODE else 0,
                    queued_prefill_tokens=round(self.queue * share) if role is PREFILL else 0,
                    used_share=0.1,
                )
            )
        sample = FleetSample(
            at_s=self.now_s, workers=tuple(workers), sent_prefill_tokens=round(self.sent)
        )
        self.history.append(sample)
        while self.history[0].at_s < self.now_s - 60:
            self.history.popleft()

    def _make(self, change: RoleChange) -> None:
        role = self.roles[change.worker_id]
        assert role is not change.to_role
        assert self.count(role) >= 2, "a role lost its last worker"
        if self.changes:
            assert self.now_s - self.changes[-1][0] >= self.config.cooldown_s
        last_s = self.changed_at_s.get(change.worker_id)
        assert last_s is None or self.now_s - last_s >= self.config.dwell_s
        self.roles[change.worker_id] = change.to_role
        self.changed_at_s[change.worker_id] = self.now_s
        self.changes.append((self.now_s, change))


def fleet(prefill: int, decode: int, seed: int | None = None) -> Fluid:
    names = [*[PREFILL] * prefill, *[DECODE] * decode]
    roles = {WorkerId(f"w{number}"): role for number, role in enumerate(names)}
    return Fluid(roles, noise=None if seed is None else random.Random(seed))


loads = st.builds(Load, prompt_tokens_per_s=st.floats(0, 6000), answers=st.floats(0, 32.0 * 8))
fleets = st.builds(fleet, st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))


@settings(max_examples=25, deadline=None)
@given(house=fleets, load=loads)
def test_a_constant_load_never_brings_a_worker_back(house: Fluid, load: Load) -> None:
    """Promise: no flapping: whatever the load, as long as it lasts, workers turn one way only, and then no more."""
    changes = house.run(load, 500)
    assert len({change.to_role for change in changes}) <= 1
    assert len({change.worker_id for change in changes}) == len(changes)
    assert house.count(PREFILL) >= 1
    assert house.count(DECODE) >= 1


@settings(max_examples=20, deadline=None)
@given(house=fleets, shifts=st.lists(loads, min_size=1, max_size=6), data=st.data())
def test_no_shift_of_load_takes_a_roles_last_worker(
    house: Fluid, shifts: list[Load], data: st.DataObject
) -> None:
    """Promise: minimums, dwell and cooldown hold at every change, however the load moves; `Fluid` checks each."""
    for load in shifts:
        house.run(load, data.draw(st.floats(1, 200)))
        assert house.count(PREFILL) >= 1
        assert house.count(DECODE) >= 1


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_roles_follow_a_load_that_moves_from_prompts_to_answers_and_back(seed: int | None) -> None:
    """Promise: after a shift, roles change until both phases carry their load."""
    house = fleet(3, 3, seed)
    long_prompts, long_answers = Load(3500.0, 20.0), Load(500.0, 120.0)
    for _ in range(2):
        house.run(long_prompts, 300)
        assert house.count(PREFILL) >= 4
        assert house.queue < RATE
        house.run(long_answers, 300)
        assert house.count(DECODE) >= 4
    assert house.run(long_answers, 300) == []


def sample_at(at_s: float, *workers: WorkerSample, sent: int = 0) -> FleetSample:
    return FleetSample(at_s=at_s, workers=workers, sent_prefill_tokens=sent)


def member(name: str, role: Role, **changes: object) -> WorkerSample:
    sample = WorkerSample(worker_id=WorkerId(name), role=role, can_be=BOTH)
    return replace(sample, **changes)  # type: ignore[arg-type]


def held(*workers: WorkerSample, config: AutoscaleConfig = CONFIG) -> RoleChange | None:
    """What is decided after these workers looked the same for a while."""
    history = [sample_at(n * STEP_S, *workers) for n in range(60)]
    return decide(history, {}, history[-1].at_s, config)


CROWDED = [member("d1", DECODE, requests=40), member("d2", DECODE, requests=40)]


def test_the_least_loaded_sound_worker_that_can_turns() -> None:
    busy = member("p0", PREFILL, requests=3)
    fixed = member("p1", PREFILL, can_be=(PREFILL,))
    draining = member("p2", PREFILL, sound=False)
    idle = member("p3", PREFILL, requests=1)
    change = held(busy, fixed, draining, idle, *CROWDED)
    assert change is not None
    assert (change.worker_id, change.to_role) == ("p3", DECODE)


def test_a_last_sound_worker_stays() -> None:
    assert held(member("p0", PREFILL), *CROWDED) is None
    assert held(member("p0", PREFILL), member("p1", PREFILL, sound=False), *CROWDED) is None


def test_a_full_pool_is_pressure_as_many_requests_are() -> None:
    prefills = [member("p0", PREFILL), member("p1", PREFILL)]
    assert held(*prefills, member("d", DECODE, used_share=0.5)) is None
    change = held(*prefills, member("d", DECODE, used_share=0.95))
    assert change is not None
    assert change.to_role is DECODE


@pytest.mark.parametrize("role", [PREFILL, DECODE])
def test_a_role_that_lost_its_last_worker_gets_one_and_one_that_never_had_any_does_not(
    role: Role,
) -> None:
    """Workers join one after the other when a fleet starts: what is not there yet is not lost."""
    other = DECODE if role is PREFILL else PREFILL
    left = [member("a", other, requests=40), member("b", other, requests=40)]
    assert held(*left) is None
    late = [member("c", role)]
    history = [sample_at(n * STEP_S, *left, *(late * (n > 50))) for n in range(60)]
    assert decide(history, {}, history[-1].at_s, CONFIG) is None
    history = [sample_at(n * STEP_S, *left, *(late * (n < 30))) for n in range(60)]
    change = decide(history, {}, history[-1].at_s, CONFIG)
    assert change is not None
    assert change.to_role is role


def test_a_blip_is_no_load() -> None:
    calm = [member("p0", PREFILL), member("p1", PREFILL), member("d", DECODE)]
    blip = [*calm[:2], member("d", DECODE, requests=500)]
    history = [sample_at(n * STEP_S, *(blip if n % 5 == 0 else calm)) for n in range(60)]
    assert decide(history, {}, history[-1].at_s, CONFIG) is None


def test_nothing_is_decided_before_a_window_is_full_or_soon_after_a_change() -> None:
    workers = [member("p0", PREFILL), member("p1", PREFILL), *CROWDED]
    history = [sample_at(n * STEP_S, *workers) for n in range(8)]
    assert decide(history, {}, history[-1].at_s, CONFIG) is None
    history = [sample_at(n * STEP_S, *workers) for n in range(200)]
    now_s = history[-1].at_s
    assert decide(history, {WorkerId("d1"): now_s - 19}, now_s, CONFIG) is None
    change = decide(history, {WorkerId("p0"): now_s - 30}, now_s, CONFIG)
    assert change is not None
    assert change.worker_id == "p1", "p0 turned half a minute ago"


def test_prefills_rate_counts_the_time_in_which_it_has_work() -> None:
    def at(n: int, queued: int, sent: int) -> FleetSample:
        return sample_at(n, member("p", PREFILL, queued_prefill_tokens=queued), sent=sent)

    assert prefill_rate([at(0, 0, 0), at(1, 0, 0), at(2, 0, 0)]) == 0.0
    assert prefill_rate([at(0, 0, 0), at(1, 500, 600), at(2, 400, 600), at(9, 400, 600)]) == (
        pytest.approx(200 / 9)
    )
    assert prefill_rate([at(0, 0, 0), at(1, 0, 100), at(60, 0, 100)]) == pytest.approx(100.0)
