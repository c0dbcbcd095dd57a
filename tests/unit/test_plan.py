"""The step planner: who computes what, who waits, who is preempted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv.blocks import blocks_for
from baton.scheduling.plan import Limits, Plan, Running, Waiting, plan_step
from baton.types import AttemptKey, RequestId

LIMITS = Limits(block_size_tokens=4, max_batch_tokens=8, max_running=3)


def key(name: str) -> AttemptKey:
    return AttemptKey(RequestId(name))


def generating(name: str, num_tokens: int) -> Running:
    return Running(key(name), num_tokens, num_tokens - 1, blocks_for(num_tokens - 1, 4))


def newcomer(name: str, num_tokens: int, *, cached: int = 0, computes: bool = True) -> Waiting:
    return Waiting(key(name), num_tokens, cached, blocks_for(num_tokens - cached, 4), computes)


def plan(
    running: list[Running], waiting: list[Waiting], available: int, *, holding: int = 0
) -> Plan:
    return plan_step(running, waiting, available_blocks=available, holding=holding, limits=LIMITS)


def test_generating_requests_go_before_a_prompt_that_came_first() -> None:
    prompt = Running(key("prompt"), 100, 0, 25)
    result = plan([prompt, generating("a", 6), generating("b", 7)], [], 10)
    assert result.chunks == ((key("a"), 1), (key("b"), 1), (key("prompt"), 6))


def test_a_prompt_that_has_begun_goes_on_however_many_generate() -> None:
    result = plan([*(generating(name, 6) for name in "abcd"), Running(key("p"), 9, 4, 3)], [], 10)
    assert result.chunks == ((key("a"), 1), (key("b"), 1), (key("p"), 5))


@pytest.mark.parametrize("begun", [True, False])
def test_prompts_get_on_where_as_many_generate_as_a_step_has_tokens(*, begun: bool) -> None:
    limits = Limits(block_size_tokens=4, max_batch_tokens=4, max_running=9)
    many = [generating(name, 6) for name in "abcdef"]
    prompt = Running(key("p"), 9, 4, 3)
    result = plan_step(
        [*many, prompt] if begun else many,
        [] if begun else [newcomer("p", 9)],
        available_blocks=40,
        holding=0,
        limits=limits,
    )
    assert result.chunks == ((key("a"), 1), (key("b"), 1), (key("c"), 1), (key("p"), 1))


def test_a_long_prompt_is_cut_to_the_budget() -> None:
    assert plan([], [newcomer("a", 100)], 25).chunks == ((key("a"), 8),)


def test_a_prompt_is_admitted_only_when_all_of_its_blocks_are_available() -> None:
    assert plan([], [newcomer("a", 100)], 24).admit == ()


def test_a_waiting_request_that_does_not_fit_holds_back_those_behind_it() -> None:
    assert plan([], [newcomer("big", 100), newcomer("small", 4)], 10) == Plan((), (), ())


def test_the_newest_request_is_preempted_when_blocks_run_out() -> None:
    full = [generating("old", 9), generating("young", 9)]
    result = plan(full, [newcomer("w", 4)], 0)
    assert result.preempt == (key("young"),)
    assert result.chunks == ((key("old"), 1),)
    assert result.admit == (), "what was just freed goes to those who were preempted"


def test_the_last_request_preempts_itself_when_others_hold_the_blocks() -> None:
    assert plan([generating("only", 9)], [], 0).preempt == (key("only"),)


def test_a_request_whose_kv_is_imported_takes_blocks_but_no_budget() -> None:
    waiting = [newcomer("remote", 40, computes=False), newcomer("local", 8)]
    result = plan([], waiting, 20)
    assert result.admit == (key("remote"), key("local"))
    assert result.chunks == ((key("local"), 8),)


def test_max_running_counts_requests_that_only_hold_blocks() -> None:
    assert plan([generating("a", 6)], [newcomer("w", 4)], 10, holding=2).admit == ()


@given(
    running=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=6),
    waiting=st.lists(st.tuples(st.integers(1, 60), st.booleans()), max_size=6),
    available=st.integers(0, 30),
)
def test_a_plan_never_promises_more_than_there_is(
    running: list[tuple[int, int]], waiting: list[tuple[int, bool]], available: int
) -> None:
    active = [
        Running(key(f"r{i}"), computed + rest, computed, blocks_for(computed, 4))
        for i, (computed, rest) in enumerate(running)
    ]
    queue = [newcomer(f"w{i}", n, computes=computes) for i, (n, computes) in enumerate(waiting)]
    result = plan(active, queue, available)
    by_key = {r.key: r for r in active}
    freed = sum(by_key[k].num_blocks for k in result.preempt)
    spent = sum(
        max(0, blocks_for(by_key[k].num_computed + n, 4) - by_key[k].num_blocks)
        for k, n in result.chunks
        if k in by_key
    ) + sum(w.num_blocks for w in queue if w.key in result.admit)
    assert spent <= available + freed
    assert sum(n for _, n in result.chunks) <= LIMITS.max_batch_tokens
    assert len(result.chunks) <= LIMITS.max_running
    assert len({k for k, _ in result.chunks}) == len(result.chunks)
    assert not set(result.preempt) & {k for k, _ in result.chunks}
    assert result.admit == tuple(w.key for w in queue[: len(result.admit)])
    ready = [r for r in active if r.num_tokens - r.num_computed == 1]
    if ready and not result.chunks:
        assert result.preempt, "a request that could generate makes the step do something"
