"""What counts as progress: the limit of a step, requests that wait for blocks, and what health makes of it."""

from dataclasses import replace

import pytest

from baton.engine.motion import Motion, StepClock
from baton.service.progress import EngineProgress, problem_of, step_limit_s
from baton.service.settings import WorkerSettings
from baton.types import WorkerLoad

SETTINGS = WorkerSettings(progress_limit_s=0.75, stall_limit_s=10.0)
GOOD = EngineProgress(failed=False, stalled_s=0.0, expected_s=None, stuck_s=0.0)


class Clock:
    """Stands still until it is told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def stepped(steps: list[tuple[int, float]]) -> tuple[StepClock, Clock]:
    """After steps of so many tokens that took so long."""
    time_s = Clock()
    clock = StepClock(time_s)
    for tokens, took_s in steps:
        clock.begin()
        if tokens:
            clock.computes(tokens)
        time_s.now_s += took_s
        clock.end()
    return clock, time_s


def expected(clock: StepClock, tokens: int) -> float | None:
    clock.begin()
    if tokens:
        clock.computes(tokens)
    answer = clock.expected_s
    clock.end()
    return answer


@pytest.mark.parametrize(
    ("steps", "tokens", "answer"),
    [
        ([], 1, None),
        ([], 0, None),
        ([(0, 0.01)], 512, None),
        ([(1, 0.02)], 1, 0.02),
        ([(1, 0.02), (300, 2.0)], 500, 2.0),
        ([(1, 0.02), (300, 2.0)], 1, 0.02),
        ([(1, 0.02)], 100, 0.02 * 2**6),
        ([(300, 2.0)], 3, 2.0),
        ([(300, 2.0)], 0, None),
    ],
)
def test_a_step_is_expected_to_take_what_steps_of_its_size_took(
    steps: list[tuple[int, float]], tokens: int, answer: float | None
) -> None:
    clock, _ = stepped(steps)
    assert expected(clock, tokens) == (pytest.approx(answer) if answer else None)


def test_a_slow_step_is_forgotten_slowly() -> None:
    clock, _ = stepped([(1, 1.0), (1, 0.01)])
    assert expected(clock, 1) == pytest.approx(0.9)
    clock, _ = stepped([(1, 1.0), *[(1, 0.01)] * 60])
    assert expected(clock, 1) == pytest.approx(0.01)


def test_only_a_step_under_way_stalls() -> None:
    clock, time_s = stepped([(1, 0.02)])
    time_s.now_s += 50
    assert (clock.stalled_s, clock.expected_s) == (0.0, None)
    clock.begin()
    time_s.now_s += 3
    assert clock.stalled_s == 3


@pytest.mark.parametrize(
    ("expected_s", "limit_s"), [(None, 10.0), (0.001, 0.75), (0.5, 2.0), (9.0, 10.0)]
)
def test_the_limit_follows_what_is_expected_between_its_bounds(
    expected_s: float | None, limit_s: float
) -> None:
    assert step_limit_s(expected_s, SETTINGS) == limit_s


def test_what_turns_health_and_whether_the_process_is_sound() -> None:
    assert problem_of(GOOD, SETTINGS) is None
    assert problem_of(replace(GOOD, stalled_s=1.0), SETTINGS) is None
    assert problem_of(replace(GOOD, stuck_s=0.7), SETTINGS) is None
    under_way = replace(GOOD, stuck_s=1.2, stalled_s=1.1, expected_s=1.0)
    assert problem_of(under_way, SETTINGS) is None, "its blocks move at its end"
    for bad, alive in (
        (replace(GOOD, failed=True), False),
        (replace(GOOD, stalled_s=1.0, expected_s=0.02), False),
        (replace(GOOD, stalled_s=10.0), False),
        (replace(GOOD, stuck_s=0.8), True),
    ):
        problem = problem_of(bad, SETTINGS)
        assert problem is not None
        assert problem.alive is alive


def test_requests_that_wait_are_stuck_only_while_nothing_moves() -> None:
    motion = Motion()
    idle, full = WorkerLoad(free_blocks=8), WorkerLoad(reserved_blocks=8, running_requests=1)
    waiting = replace(full, waiting_requests=1)
    motion.saw(idle, 0.0, computed=False)
    motion.saw(full, 1.0, computed=True)
    assert motion.stuck_s(50.0) == 0.0
    motion.saw(waiting, 50.0, computed=False)
    assert motion.stuck_s(51.0) == 1.0
    # One more that waits is no progress, a token is, and so is a block.
    motion.saw(replace(waiting, waiting_requests=2), 52.0, computed=False)
    assert motion.stuck_s(53.0) == 3.0
    motion.saw(waiting, 54.0, computed=True)
    assert motion.stuck_s(55.0) == 1.0
    motion.saw(replace(waiting, reserved_blocks=7, free_blocks=1), 56.0, computed=False)
    assert motion.stuck_s(57.0) == 1.0
    motion.saw(idle, 58.0, computed=False)
    assert motion.stuck_s(90.0) == 0.0
