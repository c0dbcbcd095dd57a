"""What an engine computes next: a pure function from the requests' state and the free blocks to a plan.

The policy, in order:

1. Requests that generate go first, one token each: a long prompt delays nobody's next token. Where more generate than a step takes,
   the first ones do, and leave one token to prompts; whoever calls lets them take turns.
2. Prompts that have begun get chunks of the token budget that is left, first come first served.
3. Waiting requests are admitted first come first served, each only once the blocks for all of its tokens are available, so an
   admitted prompt never stalls half-way. One that does not fit holds back those behind it: nobody starves.
4. A request that needs a block when none is available preempts the one that came last; if that is itself, or is computed in
   this step already, it waits. Preempted requests give all blocks back and are recomputed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from baton.kv.blocks import blocks_for
from baton.types import AttemptKey


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Fixed bounds of a step."""

    block_size_tokens: int
    max_batch_tokens: int
    """Most tokens to compute in one step."""
    max_running: int
    """Most requests of one step, and most to be admitted. More may generate: those whose KV came from elsewhere."""


@dataclass(frozen=True, slots=True)
class Running:
    """An admitted request, in order of arrival.

    [0, num_computed)            KV is in its blocks
    [num_computed, num_tokens)   known tokens, to be computed; one of them: the request generates
    """

    key: AttemptKey
    num_tokens: int
    num_computed: int
    num_blocks: int
    """Blocks it holds; all of them count as available once it is preempted."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that holds nothing yet, in order of arrival."""

    key: AttemptKey
    num_tokens: int
    num_cached: int
    """Leading tokens that the prefix cache holds."""
    num_blocks: int
    """Blocks it needs that are not available from the prefix cache without cost: new ones, and cached ones that nobody
    holds."""
    computes: bool
    """False where its KV comes from elsewhere: it takes blocks, but no token budget."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do, in this order: preempt, admit, compute."""

    preempt: tuple[AttemptKey, ...]
    admit: tuple[AttemptKey, ...]
    chunks: tuple[tuple[AttemptKey, int], ...]
    """How many tokens of each request to compute."""


def plan_step(
    running: Sequence[Running],
    waiting: Iterable[Waiting],
    *,
    available_blocks: int,
    holding: int,
    limits: Limits,
) -> Plan:
    """Plans one step. `holding` counts requests that hold blocks though they are done computing; they use up `max_running` too."""
    queue = iter(waiting)
    head = tuple(islice(queue, 1))
    has_place = len(running) + holding < limits.max_running
    step = _Step(limits, available_blocks)
    staying = step.generate(running, prompts_wait=has_place and any(w.computes for w in head))
    step.continue_prompts(staying)
    admitted = [] if step.preempted else step.admit(chain(head, queue), len(staying), holding)
    return Plan(tuple(step.preempted), tuple(admitted), tuple(step.chunks))


class _Step:
    """What is left of the budget and the blocks while one step is planned."""

    def __init__(self, limits: Limits, available_blocks: int) -> None:
        self.preempted: list[AttemptKey] = []
        self.chunks: list[tuple[AttemptKey, int]] = []
        self._limits = limits
        self._available = available_blocks
        self._budget = limits.max_batch_tokens
        self._rows = limits.max_running

    def generate(self, running: Sequence[Running], *, prompts_wait: bool) -> list[Running]:
        """Rules 1 and 4. Returns the requests that were not preempted."""
        staying = list(running)
        # However many generate, prompts get on.
        prompts_wait |= any(r.num_tokens - r.num_computed > 1 for r in running)
        kept = int(prompts_wait and min(self._rows, self._budget) > 1)
        index = 0
        while index < len(staying):
            request = staying[index]
            index += 1
            has_room = min(self._budget, self._rows) > kept
            if request.num_tokens - request.num_computed == 1 and has_room:
                need = self._new_blocks(request, 1)
                if not self._make_room(need, request, staying):
                    return staying
                self._take(request.key, 1, need)
        return staying

    def continue_prompts(self, staying: list[Running]) -> None:
        """Rule 2."""
        index = 0
        while index < len(staying):
            request = staying[index]
            index += 1
            remaining = request.num_tokens - request.num_computed
            take = min(remaining, self._budget)
            if remaining > 1 and take and self._rows:
                need = self._new_blocks(request, take)
                if not self._make_room(need, request, staying):
                    return
                self._take(request.key, take, need)

    def admit(self, waiting: Iterable[Waiting], num_staying: int, holding: int) -> list[AttemptKey]:
        """Rule 3."""
        admitted: list[AttemptKey] = []
        # One block of slack for each request that generates keeps a newcomer from being preempted at once.
        slack = num_staying
        room = self._limits.max_running - num_staying - holding
        for newcomer in waiting:
            if len(admitted) >= room or newcomer.num_blocks + slack > self._available:
                break
            if newcomer.computes:
                take = min(newcomer.num_tokens - newcomer.num_cached, self._budget)
                if not take:
                    break
                self._take(newcomer.key, take, newcomer.num_blocks)
                slack += 1
            else:
                self._available -= newcomer.num_blocks
            admitted.append(newcomer.key)
        return admitted

    def _make_room(self, need: int, request: Running, staying: list[Running]) -> bool:
        """Preempts from the end of `staying` until `need` blocks are available; False where the request itself had to go. Those that
        this step computes already stay.
        """
        planned = {key for key, _ in self.chunks}
        while need > self._available:
            victim = staying[-1]
            if victim.key in planned and victim is not request:
                victim = request
            staying.remove(victim)
            self.preempted.append(victim.key)
            self._available += victim.num_blocks
            if victim is request:
                return False
        return True

    def _take(self, key: AttemptKey, num_tokens: int, num_blocks: int) -> None:
        self._budget -= num_tokens
        self._rows -= 1
        self._available -= num_blocks
        self.chunks.append((key, num_tokens))

    def _new_blocks(self, request: Running, take: int) -> int:
        total = blocks_for(request.num_computed + take, self._limits.block_size_tokens)
        return max(0, total - request.num_blocks)
