"""Tenants: what each may use, and the books of what it has used. Pure; `now_s` is any clock that does not go back. Owned by
`router.admission`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from math import inf

from baton.service.keys import TenantLimits

BURST_S = 10.0
"""Seconds' worth of tokens that a bucket holds by default."""
OUTPUT_MEMORY = 0.9
"""What each output leaves of the weight of those before it in a tenant's usual output."""
FIRST_OUTPUT_TOKENS = 256.0
"""Taken for the usual output of a tenant that has had none."""

LimitsOf = Callable[[str], TenantLimits]
"""The limits of a tenant by its name; "" is every caller without one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What admission must know of a request."""

    prompt_tokens: int
    max_tokens: int
    """Most tokens that it may generate, over all of its choices."""
    generated_tokens: int = 0
    """Of its output, those that were there when it came: of no cost."""
    tenant: str = ""
    priority: int = 0
    """Higher goes first among the tenant's requests."""
    ttft_budget_s: float = inf
    """From arrival; a first token that comes later is of no use."""


@dataclass(eq=False, slots=True)
class Ticket:
    """One request, from its arrival until it leaves. Two alike tickets are two."""

    demand: Demand
    cost_tokens: float
    """What the tenant was charged, until the true figure is known."""
    order: tuple[float, int]
    """Among the tenant's requests that wait the least is next; no two are equal."""
    queued: bool = False
    running: bool = False


@dataclass(slots=True)
class Tenant:
    """One tenant's queue, rate and share."""

    limits: TenantLimits
    running: int = 0
    clock: float = 0.0
    """Virtual time: the tokens that it was served, over its weight. Whose clock is furthest behind is next."""
    queue: list[tuple[tuple[float, int], Ticket]] = field(default_factory=list)
    """A heap."""
    _spent_tokens: float = 0.0
    """What the bucket lacked at `_spent_at_s`; more than it holds where a request was larger, or cost more, than it seemed."""
    _spent_at_s: float = 0.0
    _usual_output_tokens: float = FIRST_OUTPUT_TOKENS

    @property
    def may_run(self) -> bool:
        """Whether its concurrency permits one more."""
        return self.limits.max_running is None or self.running < self.limits.max_running

    def limit(self, limits: TenantLimits, now_s: float) -> None:
        """What it may use from now on; what runs beyond that goes on."""
        self.charge(0.0, now_s)
        self.limits = limits

    def cost_of(self, demand: Demand) -> float:
        """A guess: most outputs end long before their limit."""
        return demand.prompt_tokens + min(demand.max_tokens, self._usual_output_tokens)

    def wait_s(self, tokens: float, now_s: float) -> float:
        """Until the rate permits so many tokens; 0 is now, and so it is for none: a request that was admitted once."""
        rate = self.limits.tokens_per_s
        if rate is None or not tokens:
            return 0.0
        size = self.limits.burst_tokens or BURST_S * rate
        return max(0.0, self.spent_tokens(now_s) + min(tokens, size) - size) / rate

    def spent_tokens(self, now_s: float) -> float:
        """What the bucket lacks now."""
        rate = self.limits.tokens_per_s
        if rate is None:
            return 0.0
        return max(0.0, self._spent_tokens - rate * (now_s - self._spent_at_s))

    def charge(self, tokens: float, now_s: float) -> None:
        """Takes tokens from the bucket; less than 0 gives some back."""
        self._spent_tokens, self._spent_at_s = max(0.0, self.spent_tokens(now_s) + tokens), now_s

    def settle(self, ticket: Ticket, completion_tokens: int, now_s: float) -> None:
        """A request of its own ended, with so many tokens of output: what it was charged too much or too little is made good."""
        demand = ticket.demand
        generated_tokens = max(0, completion_tokens - demand.generated_tokens)
        surplus = demand.prompt_tokens + generated_tokens - ticket.cost_tokens
        self.clock += surplus / self.limits.weight
        self.charge(surplus, now_s)
        # The rest of an output says little of how long outputs are.
        if completion_tokens and not demand.generated_tokens:
            old, new = OUTPUT_MEMORY, 1 - OUTPUT_MEMORY
            self._usual_output_tokens = old * self._usual_output_tokens + new * completion_tokens

    def push(self, ticket: Ticket) -> None:
        heappush(self.queue, (ticket.order, ticket))
        ticket.queued = True

    def pop(self) -> Ticket:
        """The next in order. Precondition: one waits."""
        _, ticket = heappop(self.queue)
        ticket.queued = False
        return ticket

    def remove(self, ticket: Ticket) -> None:
        """Precondition: it waits."""
        self.queue.remove((ticket.order, ticket))
        heapify(self.queue)
        ticket.queued = False

    def last(self) -> Ticket:
        """The last in order. Precondition: one waits."""
        return max(self.queue)[1]
