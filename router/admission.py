"""Who is served when, and who is refused: state transitions without clock, I/O or await; `now_s` is any clock that does not go back.

    offer(demand)  -> Admit | Queue | Reject
    leave(ticket)  -> the tickets whose turn came by that
    refresh()      -> the same, where a tenant's limits have changed

1. A request that its tenant's token rate does not permit yet is refused, and so is one whose first token cannot come within its
   budget, as far as that can be predicted: before any work, and with the time after which to try again.
2. While a place is free that its tenant may take, a request is admitted; no place stays empty while somebody may take it.
3. Else it waits. Between tenants, the one that was served least for its weight is next (start-time fair queueing, in tokens:
   of two that wait all the time, neither gets ahead by more than one request of each). Within a tenant, priority decides, and
   waiting raises it: a request goes before every one that arrives `ageing_s` later for each step of priority between the
   two, so none starves.
4. The queue is bounded. Where it is full, the last request of the tenant that has most of it, for its weight, gives way.

Used by `router.requests` on the router's event loop.
"""

from dataclasses import dataclass
from enum import Enum
from itertools import count

from router.tenants import Demand, LimitsOf, Tenant, Ticket

GAP_MEMORY = 0.9
"""What each departure leaves of the weight of those before it in the mean time between departures."""
MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0


class Refusal(Enum):
    """Why a request is not served; a metric's label."""

    QUEUE_FULL = "queue_full"
    TTFT = "ttft"
    """Its first token would come too late."""
    TOKEN_RATE = "token_rate"


@dataclass(frozen=True, slots=True)
class Admit:
    """It is the request's turn."""

    ticket: Ticket


@dataclass(frozen=True, slots=True)
class Queue:
    """The request waits."""

    ticket: Ticket
    displaced: tuple[Ticket, "Reject"] | None = None
    """Who waited and is refused instead: it has left."""


@dataclass(frozen=True, slots=True)
class Reject:
    """The request is refused, and nothing of it is kept."""

    refusal: Refusal
    message: str
    retry_after_s: float


class Admission:
    """See the module docstring."""

    def __init__(
        self, *, max_running: int, max_queued: int, ageing_s: float, limits: LimitsOf
    ) -> None:
        self._max_running = max_running
        self._max_queued = max_queued
        self._ageing_s = ageing_s
        self._limits = limits
        self._tenants: dict[str, Tenant] = {}
        self._running = 0
        self._queued = 0
        self._clock = 0.0
        """Virtual time: that of the tenant admitted last, when it was."""
        self._numbers = count()
        self._gap_s = 0.0
        """Mean time between departures while every place was taken."""
        self._departed_at_s: float | None = None

    @property
    def running(self) -> int:
        return self._running

    @property
    def queued(self) -> int:
        return self._queued

    def offer(
        self, demand: Demand, now_s: float, predicted_ttft_s: float | None
    ) -> Admit | Queue | Reject:
        """A request arrives; `predicted_ttft_s` is what it would take once it is served, None where that is not known."""
        tenant = self._tenant(demand.tenant, now_s)
        cost = tenant.cost_of(demand)
        rate_wait_s = tenant.wait_s(cost, now_s)
        if rate_wait_s > 0:
            return _reject(Refusal.TOKEN_RATE, "the tenant's token rate is used up", rate_wait_s)
        order = (now_s - demand.priority * self._ageing_s, next(self._numbers))
        ticket = Ticket(demand, cost, order)
        free = self._running < self._max_running and tenant.may_run
        wait_s = 0.0 if free else self._expected_wait_s(tenant, ticket)
        late_s = late_by_s(demand.ttft_budget_s, (predicted_ttft_s or 0.0) + wait_s)
        if late_s > 0:
            return too_late(late_s)
        if free:
            tenant.charge(cost, now_s)
            self._admit(tenant, ticket)
            return Admit(ticket)
        displaced = None
        if self._queued >= self._max_queued:
            full = _reject(Refusal.QUEUE_FULL, f"{self._queued} requests wait already", wait_s)
            victim = self._victim(tenant, ticket)
            if victim is ticket:
                return full
            self.leave(victim, now_s)
            displaced = (victim, full)
        tenant.charge(cost, now_s)
        tenant.push(ticket)
        self._queued += 1
        return Queue(ticket, displaced)

    def leave(self, ticket: Ticket, now_s: float, completion_tokens: int = 0) -> list[Ticket]:
        """A request ended, or waits no longer; returns those admitted in its place. Idempotent."""
        tenant = self._tenants[ticket.demand.tenant] if ticket.queued or ticket.running else None
        if tenant is None:
            return []
        if ticket.queued:
            tenant.remove(ticket)
            tenant.charge(-ticket.cost_tokens, now_s)
            self._queued -= 1
            return []
        self._note_departure(now_s)
        ticket.running = False
        tenant.running -= 1
        self._running -= 1
        tenant.settle(ticket, completion_tokens, now_s)
        admitted = self._admit_waiting()
        if not self._running and not self._queued:
            self._rest(now_s)
        return admitted

    def expire(self, ticket: Ticket, predicted_ttft_s: float | None) -> Reject:
        """The refusal of a request whose budget passed before its turn came; it is still to leave."""
        wait_s, demand = 0.0, ticket.demand
        # Its turn, or its displacement, may have come in this very moment.
        if ticket.queued:
            wait_s = self._expected_wait_s(self._tenants[demand.tenant], ticket)
        budget_s = round(demand.ttft_budget_s, 2)
        message = f"its turn did not come within the {budget_s:g} s that its first token may take"
        return _reject(Refusal.TTFT, message, wait_s + (predicted_ttft_s or 0.0))

    def refresh(self, now_s: float) -> list[Ticket]:
        """Tenants' limits may have changed; returns the tickets admitted by that."""
        for name, tenant in self._tenants.items():
            tenant.limit(self._limits(name), now_s)
        return self._admit_waiting()

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance, or a place is empty that somebody may take."""
        tenants = self._tenants.values()
        assert self._running == sum(t.running for t in tenants) <= self._max_running
        assert self._queued == sum(len(t.queue) for t in tenants) <= self._max_queued
        for name, tenant in self._tenants.items():
            for order, ticket in tenant.queue:
                assert ticket.queued
                assert not ticket.running
                assert (ticket.order, ticket.demand.tenant) == (order, name)
        if self._running < self._max_running:
            assert not any(t.queue and t.may_run for t in tenants)

    def _tenant(self, name: str, now_s: float) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            tenant = self._tenants[name] = Tenant(self._limits(name))
            tenant.charge(0.0, now_s)
        elif not tenant.running and not tenant.queue:
            # They may have changed. Of a tenant that is here, those that wait come first: see `refresh`.
            tenant.limit(self._limits(name), now_s)
        return tenant

    def _admit(self, tenant: Tenant, ticket: Ticket) -> None:
        assert tenant.may_run
        # A tenant that did not wait has no claim to what it let pass.
        self._clock = max(self._clock, tenant.clock)
        tenant.clock = self._clock + ticket.cost_tokens / tenant.limits.weight
        ticket.running = True
        tenant.running += 1
        self._running += 1

    def _admit_waiting(self) -> list[Ticket]:
        admitted = []
        while self._running < self._max_running:
            waiting = [t for t in self._tenants.values() if t.queue and t.may_run]
            if not waiting:
                break
            tenant = min(waiting, key=lambda t: (max(t.clock, self._clock), t.queue[0][0]))
            ticket = tenant.pop()
            self._queued -= 1
            self._admit(tenant, ticket)
            admitted.append(ticket)
        return admitted

    def _victim(self, tenant: Tenant, ticket: Ticket) -> Ticket:
        """Who gives way in a full queue."""

        def share(each: Tenant) -> float:
            return (len(each.queue) + (each is tenant)) / each.limits.weight

        # Between equals, the one that comes now.
        most = max(self._tenants.values(), key=lambda each: (share(each), each is tenant))
        if most is not tenant:
            return most.last()
        last = tenant.last() if tenant.queue else ticket
        return last if last.order > ticket.order else ticket

    def _expected_wait_s(self, tenant: Tenant, ticket: Ticket) -> float:
        before = 1 + sum(order < ticket.order for order, _ in tenant.queue)
        rivals = [t for t in self._tenants.values() if t.queue or t is tenant]
        share = tenant.limits.weight / sum(t.limits.weight for t in rivals)
        return self._gap_s * min(self._queued + (not ticket.queued), before / share)

    def _note_departure(self, now_s: float) -> None:
        full = self._running >= self._max_running
        if full and self._departed_at_s is not None:
            gap_s = now_s - self._departed_at_s
            mean_s = GAP_MEMORY * self._gap_s + (1 - GAP_MEMORY) * gap_s
            self._gap_s = mean_s if self._gap_s else gap_s
        self._departed_at_s = now_s if full else None

    def _rest(self, now_s: float) -> None:
        """Nobody is here: what need not be remembered is forgotten, tenants that come and go included."""
        self._clock = 0.0
        for name, tenant in tuple(self._tenants.items()):
            tenant.clock = 0.0
            if not tenant.spent_tokens(now_s):
                del self._tenants[name]


def late_by_s(budget_s: float, predicted_ttft_s: float) -> float:
    """By how much a first token would miss its budget; 0 where it would not."""
    return max(0.0, predicted_ttft_s - budget_s)


def too_late(late_s: float) -> Reject:
    """The refusal of a request whose first token would miss its budget by so much."""
    return _reject(Refusal.TTFT, f"the first token would come {late_s:.2g} s too late", late_s)


def _reject(refusal: Refusal, message: str, retry_after_s: float) -> Reject:
    return Reject(refusal, message, min(MAX_RETRY_S, max(MIN_RETRY_S, retry_after_s)))
