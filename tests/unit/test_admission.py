"""Admission: who is served when, who waits, who is refused. Random histories check what holds in all of them."""

from collections import Counter
from collections.abc import Mapping
from math import inf

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from baton.service.keys import TenantLimits
from router.admission import Admission, Admit, Queue, Refusal, Reject
from router.tenants import FIRST_OUTPUT_TOKENS, Demand, Ticket


def admission(
    max_running: int = 1,
    max_queued: int = 100,
    *,
    ageing_s: float = 5.0,
    limits: Mapping[str, TenantLimits] | None = None,
) -> Admission:
    known = limits or {}
    return Admission(
        max_running=max_running,
        max_queued=max_queued,
        ageing_s=ageing_s,
        limits=lambda tenant: known.get(tenant, TenantLimits()),
    )


def demand(
    tenant: str = "",
    priority: int = 0,
    *,
    prompt: int = 100,
    output: int = 10,
    budget_s: float = inf,
) -> Demand:
    return Demand(
        tenant=tenant,
        priority=priority,
        prompt_tokens=prompt,
        max_tokens=output,
        ttft_budget_s=budget_s,
    )


def admitted(verdict: Admit | Queue | Reject) -> Ticket:
    assert isinstance(verdict, Admit), verdict
    return verdict.ticket


def queued(verdict: Admit | Queue | Reject) -> Ticket:
    assert isinstance(verdict, Queue), verdict
    return verdict.ticket


def refused(verdict: Admit | Queue | Reject) -> Reject:
    assert isinstance(verdict, Reject), verdict
    return verdict


def order_of_service(house: Admission, running: Ticket, count: int, now_s: float) -> list[Ticket]:
    """Ends one request after the other, each with the tokens that it was charged for; who came to be served."""
    served: list[Ticket] = []
    for _ in range(count):
        tokens = round(running.cost_tokens) - running.demand.prompt_tokens
        (running,) = house.leave(running, now_s, tokens)
        served.append(running)
    return served


def test_requests_run_while_there_is_a_place_and_then_wait_in_order() -> None:
    house = admission(2)
    first = admitted(house.offer(demand(), 0.0, None))
    second = admitted(house.offer(demand(), 0.0, None))
    third, fourth = (queued(house.offer(demand(), 0.1, None)) for _ in range(2))
    assert (house.running, house.queued) == (2, 2)
    assert house.leave(second, 1.0) == [third]
    assert house.leave(second, 1.0) == [], "leaving is idempotent"
    assert house.leave(first, 1.0) == [fourth]


def test_a_request_that_gives_up_waiting_is_passed_over() -> None:
    house = admission()
    running = admitted(house.offer(demand(), 0.0, None))
    second, third = (queued(house.offer(demand(), 0.0, None)) for _ in range(2))
    assert house.leave(second, 0.5) == []
    assert house.leave(running, 1.0) == [third]


def test_priority_decides_within_a_tenant_and_waiting_raises_it() -> None:
    """With 5 s for each step: 2 arriving at 9 s passes 0 arriving at 0 s; arriving at 11 s, it does not."""
    for arrives_s, first_is_urgent in ((9.0, True), (11.0, False)):
        house = admission(ageing_s=5.0)
        running = admitted(house.offer(demand(), 0.0, None))
        patient = queued(house.offer(demand(), 0.0, None))
        urgent = queued(house.offer(demand(priority=2), arrives_s, None))
        assert house.leave(running, 20.0) == [urgent if first_is_urgent else patient]


def test_the_queue_is_bounded_and_the_refusal_says_when_to_come_again() -> None:
    house = admission(1, 2)
    admitted(house.offer(demand(), 0.0, None))
    for _ in range(2):
        queued(house.offer(demand(), 0.0, None))
    verdict = refused(house.offer(demand(), 0.0, None))
    assert verdict.refusal is Refusal.QUEUE_FULL
    assert verdict.retry_after_s > 0
    assert house.queued == 2


def test_a_full_queue_refuses_the_last_of_the_tenant_that_fills_it() -> None:
    """Another tenant's request takes the place of the flood's last one; a more urgent one of the flood's own does too."""
    house = admission(1, 3)
    admitted(house.offer(demand("flood"), 0.0, None))
    first, _, last = (queued(house.offer(demand("flood"), i, None)) for i in range(3))
    verdict = house.offer(demand("quiet"), 3.0, None)
    assert isinstance(verdict, Queue)
    assert verdict.displaced is not None
    assert verdict.displaced[0] is last
    assert not last.queued
    assert refused(house.offer(demand("flood"), 4.0, None)).refusal is Refusal.QUEUE_FULL
    verdict = house.offer(demand("flood", priority=50), 5.0, None)
    assert isinstance(verdict, Queue)
    assert verdict.displaced is not None
    assert first.queued
    house.check_integrity()


@pytest.mark.parametrize(("predicted_s", "late"), [(None, False), (0.9, False), (1.5, True)])
def test_what_cannot_make_its_first_token_in_time_is_refused(
    predicted_s: float | None, *, late: bool
) -> None:
    """Before any work, even where a place is free; the delay after which to try again is what it is late by."""
    house = admission()
    verdict = house.offer(demand(budget_s=1.0), 0.0, predicted_s)
    if late:
        assert refused(verdict).refusal is Refusal.TTFT
        assert refused(verdict).retry_after_s == pytest.approx(0.5)
        assert house.running == 0
    else:
        admitted(verdict)


def test_the_wait_for_a_place_counts_towards_the_first_token() -> None:
    """Places become free every two seconds; with three waiting, the next waits eight."""
    house = admission()
    running = admitted(house.offer(demand(), 0.0, None))
    for _ in range(5):
        queued(house.offer(demand(), 0.0, None))
    for now_s in (2.0, 4.0):
        (running,) = house.leave(running, now_s)
    assert refused(house.offer(demand(budget_s=7.0), 4.0, None)).refusal is Refusal.TTFT
    queued(house.offer(demand(budget_s=9.0), 4.0, None))


def test_what_waits_past_its_budget_is_told_how_late_it_would_be() -> None:
    """Places become free every two seconds: of four that wait, the last one would be served in eight, and another half later."""
    house = admission()
    running = admitted(house.offer(demand(), 0.0, None))
    waiting = [queued(house.offer(demand(budget_s=60.0), 0.0, None)) for _ in range(6)]
    for now_s in (2.0, 4.0):
        (running,) = house.leave(running, now_s)
    verdict = house.expire(waiting[-1], 0.5)
    assert verdict.refusal is Refusal.TTFT
    assert verdict.retry_after_s == pytest.approx(8.5)
    assert "60 s" in verdict.message
    assert house.expire(running, 0.5).retry_after_s == pytest.approx(0.5), "its turn just came"
    house.leave(waiting[-1], 60.0)
    house.check_integrity()


def test_a_tenants_concurrency_is_bounded_and_its_places_go_to_others() -> None:
    house = admission(3, limits={"a": TenantLimits(max_running=1)})
    first = admitted(house.offer(demand("a"), 0.0, None))
    second = queued(house.offer(demand("a"), 0.0, None))
    other = admitted(house.offer(demand("b"), 0.0, None))
    assert house.leave(other, 1.0) == []
    assert house.leave(first, 2.0) == [second]


def test_a_tenants_token_rate_is_bounded_with_a_burst() -> None:
    """100 tokens a second, 500 at once: five requests of 100 pass, the sixth is told to come in a second, and then passes."""
    house = admission(100, limits={"a": TenantLimits(tokens_per_s=100, burst_tokens=500)})
    request = demand("a", prompt=90, output=10)
    for _ in range(5):
        admitted(house.offer(request, 0.0, None))
    verdict = refused(house.offer(request, 0.0, None))
    assert verdict.refusal is Refusal.TOKEN_RATE
    assert verdict.retry_after_s == pytest.approx(1.0)
    admitted(house.offer(demand("b"), 0.0, None))
    admitted(house.offer(request, 1.0, None))
    refused(house.offer(request, 1.5, None))


def test_a_request_larger_than_the_burst_takes_a_full_bucket_and_then_its_debt() -> None:
    house = admission(100, limits={"a": TenantLimits(tokens_per_s=100, burst_tokens=500)})
    admitted(house.offer(demand("a", prompt=990), 0.0, None))
    assert refused(house.offer(demand("a"), 0.0, None)).retry_after_s == pytest.approx(6.1)
    admitted(house.offer(demand("a"), 6.2, None))


def test_what_a_request_really_took_is_what_its_tenant_pays() -> None:
    """The guess at its output is made good at its end: by more, by less, and all of it where it never ran."""
    limits = {"a": TenantLimits(tokens_per_s=100, burst_tokens=500)}
    for completion, passes in ((0, True), (10, True), (400, False)):
        house = admission(1, limits=limits)
        ticket = admitted(house.offer(demand("a", prompt=100, output=1000), 0.0, None))
        assert ticket.cost_tokens > 300
        admitted_next = house.leave(ticket, 0.0, completion)
        assert admitted_next == []
        verdict = house.offer(demand("a", prompt=200, output=1), 0.0, None)
        assert isinstance(verdict, Admit) == passes
    house = admission(1, limits=limits)
    admitted(house.offer(demand("b"), 0.0, None))
    waiting = queued(house.offer(demand("a", prompt=490), 0.0, None))
    refused(house.offer(demand("a", prompt=490), 0.0, None))
    house.leave(waiting, 0.0)
    queued(house.offer(demand("a", prompt=490), 0.0, None))


def test_output_that_was_there_before_costs_nothing() -> None:
    """A request that goes on is charged for what it adds, however far it came, and is no measure of how long outputs are."""
    limits = {"a": TenantLimits(tokens_per_s=100, burst_tokens=500)}
    again = Demand(tenant="a", prompt_tokens=0, max_tokens=0, generated_tokens=400)
    for completion, wait_s in ((0, 0.0), (400, 0.0), (450, 0.5)):
        house = admission(4, limits=limits)
        admitted(house.offer(demand("b"), 0.0, None))
        house.leave(admitted(house.offer(again, 0.0, None)), 0.0, completion)
        verdict = house.offer(demand("a", prompt=500, output=0), 0.0, None)
        assert (verdict.retry_after_s if isinstance(verdict, Reject) else 0.0) == wait_s
        unknown = admitted(house.offer(demand("a", prompt=0, output=1000), 10.0, None))
        assert unknown.cost_tokens == FIRST_OUTPUT_TOKENS


costs = st.lists(st.integers(1, 400), min_size=30, max_size=30)


@hypothesis_settings(deadline=None)
@given(costs_a=costs, costs_b=costs, weight_a=st.sampled_from([0.5, 1.0, 3.0]))
def test_two_tenants_that_wait_all_the_time_are_served_by_their_weights(
    costs_a: list[int], costs_b: list[int], weight_a: float
) -> None:
    """At every instant, what each was served over its weight differs by no more than one request of each."""
    house = admission(1, 1000, limits={"a": TenantLimits(weight=weight_a)})
    running = admitted(house.offer(demand("start"), 0.0, None))
    for tenant, of_tenant in (("a", costs_a), ("b", costs_b)):
        for cost in of_tenant:
            queued(house.offer(demand(tenant, prompt=cost, output=0), 0.0, None))
    served = {"a": 0.0, "b": 0.0}
    waiting = Counter({"a": 30, "b": 30})
    most = max(costs_a) / weight_a + max(costs_b)
    for ticket in order_of_service(house, running, 60, 1.0):
        tenant = ticket.demand.tenant
        if min(waiting.values()) > 0:
            served[tenant] += ticket.cost_tokens / (weight_a if tenant == "a" else 1.0)
            assert abs(served["a"] - served["b"]) <= most + 1e-6
        waiting[tenant] -= 1


def test_a_tenant_that_comes_late_is_not_served_for_the_time_before() -> None:
    """A newcomer shares from now on: it does not get every place until it has caught up."""
    house = admission()
    running = admitted(house.offer(demand("early"), 0.0, None))
    for _ in range(60):
        queued(house.offer(demand("early"), 0.0, None))
    running = order_of_service(house, running, 40, 1.0)[-1]
    for _ in range(20):
        queued(house.offer(demand("late"), 1.0, None))
    next_ten = order_of_service(house, running, 10, 1.0)
    assert Counter(t.demand.tenant for t in next_ten) == {"early": 5, "late": 5}


@hypothesis_settings(deadline=None)
@given(
    priorities=st.lists(st.integers(-100, 100), min_size=1, max_size=40),
    victim=st.integers(-100, 100),
)
def test_no_request_starves_whatever_comes_after_it(priorities: list[int], victim: int) -> None:
    """One arrival and one departure a second: it is served once it has waited `ageing_s` for each step of priority above it."""
    house = admission(1, 10_000, ageing_s=0.1)
    running = admitted(house.offer(demand(), 0.0, None))
    patient = queued(house.offer(demand(priority=victim), 0.0, None))
    now_s = 0.0
    longest_s = 0.1 * (100 - victim) + 2.0
    while not patient.running:
        now_s += 1.0
        house.offer(demand(priority=priorities[int(now_s) % len(priorities)]), now_s, None)
        (running,) = house.leave(running, now_s)
        assert now_s <= longest_s


def test_a_changed_concurrency_counts_for_a_busy_tenant() -> None:
    """More of those that wait are served at once, in their order; beyond a lower one, what runs goes on and nothing follows it."""
    known = {"a": TenantLimits(max_running=1)}
    house = admission(10, limits=known)
    first = admitted(house.offer(demand("a"), 0.0, None))
    waiting = [queued(house.offer(demand("a"), 0.0, None)) for _ in range(4)]
    known["a"] = TenantLimits(max_running=3)
    assert house.refresh(1.0) == waiting[:2]
    assert house.refresh(1.0) == []
    known["a"] = TenantLimits(max_running=1)
    assert house.refresh(2.0) == []
    for ticket in (first, waiting[0]):
        assert house.leave(ticket, 3.0) == []
    assert house.leave(waiting[1], 3.0) == [waiting[2]]
    known["a"] = TenantLimits()
    assert house.refresh(4.0) == [waiting[3]]
    house.check_integrity()


def test_a_changed_token_rate_counts_for_a_busy_tenant() -> None:
    """What was used before is remembered, and comes back at the new rate."""
    known = {"a": TenantLimits(tokens_per_s=100, burst_tokens=1000)}
    house = admission(10, limits=known)
    admitted(house.offer(demand("a", prompt=990), 0.0, None))
    known["a"] = TenantLimits(tokens_per_s=10, burst_tokens=1000)
    house.refresh(5.0)
    assert refused(house.offer(demand("a", prompt=590), 5.0, None)).retry_after_s == pytest.approx(
        10.0
    )
    known["a"] = TenantLimits()
    house.refresh(6.0)
    admitted(house.offer(demand("a", prompt=100_000), 6.0, None))
    known["a"] = TenantLimits(tokens_per_s=10, burst_tokens=1000)
    house.refresh(7.0)
    admitted(house.offer(demand("a", prompt=990), 7.0, None))
    refused(house.offer(demand("a", prompt=90), 7.0, None))


def test_tenants_that_are_gone_leave_nothing_behind() -> None:
    house = admission()
    for number in range(50):
        house.leave(admitted(house.offer(demand(f"t{number}"), number, None)), number, 10)
    assert len(house._tenants) == 0


class AdmissionMachine(RuleBasedStateMachine):
    """Whatever comes and goes: no limit is passed, no place is left empty, nobody is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.limits = {
            "one": TenantLimits(max_running=1),
            "slow": TenantLimits(tokens_per_s=50, burst_tokens=400, weight=2.0),
        }
        self.house = admission(3, 5, limits=self.limits)
        self.now_s = 0.0
        self.here: list[Ticket] = []
        self.slow_tokens = 0.0

    @rule(
        tenant=st.sampled_from(["", "one", "slow", "other"]),
        priority=st.integers(-3, 3),
        prompt=st.integers(1, 300),
        wait_s=st.sampled_from([0.0, 0.5]),
    )
    def arrive(self, tenant: str, priority: int, prompt: int, wait_s: float) -> None:
        self.now_s += wait_s
        verdict = self.house.offer(
            demand(tenant, priority, prompt=prompt, output=10), self.now_s, None
        )
        if isinstance(verdict, Reject):
            assert verdict.refusal is not Refusal.TTFT
            assert 0 < verdict.retry_after_s <= 60
            return
        if isinstance(verdict, Queue) and verdict.displaced is not None:
            self.here.remove(verdict.displaced[0])
        self.here.append(verdict.ticket)

    @rule(data=st.data(), completion=st.integers(0, 10))
    def leave(self, data: st.DataObject, completion: int) -> None:
        if not self.here:
            return
        ticket = self.here.pop(data.draw(st.integers(0, len(self.here) - 1)))
        ran = ticket.running
        if ticket.demand.tenant == "slow" and ran:
            self.slow_tokens += ticket.demand.prompt_tokens + completion
        admitted_now = self.house.leave(ticket, self.now_s, completion)
        assert all(each.running and each in self.here for each in admitted_now)
        assert ran or not admitted_now

    @rule(max_running=st.sampled_from([1, 2, None]))
    def change(self, max_running: int | None) -> None:
        self.limits["one"] = TenantLimits(max_running=max_running)
        before = sum(t.running for t in self.here if t.demand.tenant == "one")
        admitted_now = self.house.refresh(self.now_s)
        assert all(each.running and each in self.here for each in admitted_now)
        after = sum(t.running for t in self.here if t.demand.tenant == "one")
        assert max_running is None or after <= max(before, max_running)

    @invariant()
    def holds(self) -> None:
        self.house.check_integrity()
        assert self.house.running == sum(t.running for t in self.here)
        assert self.house.queued == sum(t.queued for t in self.here)
        # A last request may be larger than what is left of the bucket, never than the bucket.
        assert self.slow_tokens <= 400 + 50 * self.now_s


TestAdmissionMachine = AdmissionMachine.TestCase
TestAdmissionMachine.settings = hypothesis_settings(max_examples=60, stateful_step_count=40)
