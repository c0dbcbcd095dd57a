"""Which workers compute a request: pure decisions over an immutable view of the fleet. No clock, no I/O, no await.

    place(view, request) -> Placement(prefill | None, decode) | NoWorker(reason)

What every policy upholds: a draining worker gets nothing; prefill and decode share a KV digest; a request that has tokens
stays with the digest that made them; a worker that failed this request, that is under suspicion, or that could never hold the
sequence is taken only where there is no other way; and decode computes the prompt itself where it lacks little of it, or
where no sound prefill worker is there. Between the pairs that remain, the policy chooses.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from baton.types import Role, WorkerId, WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker as one request sees it."""

    info: WorkerInfo
    draining: bool = False
    suspect: bool = False
    """It failed an attempt a moment ago, or is silent."""
    requests: int = 0
    """Running, waiting and on their way."""
    queued_prefill_tokens: int = 0
    """Tokens ahead of this request that the worker has yet to compute."""
    free_blocks: int = 0
    """Free, or holding no more than a reusable prefix."""
    cached_tokens: int = 0
    """Leading tokens of this request that its prefix cache holds."""

    @property
    def digest(self) -> str:
        return self.info.spec.digest


@dataclass(frozen=True, slots=True)
class Resident:
    """Where the KV of a sequence's beginning was left a moment ago, which the worker has yet to report."""

    worker_id: WorkerId
    num_tokens: int


@dataclass(frozen=True, slots=True)
class FleetView:
    """All members, as one request sees them."""

    prefill: tuple[WorkerView, ...]
    decode: tuple[WorkerView, ...]

    def knowing(self, resident: Resident) -> "FleetView":
        """The view in which that decode worker holds that KV, as far as it fills blocks."""
        return replace(self, decode=tuple(_knowing(worker, resident) for worker in self.decode))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceRequest:
    """What placement must know of a request."""

    num_tokens: int
    """Prompt and generated tokens: what must be in the KV cache."""
    turn: int = 0
    """Counts the router's placements: breaks ties, and is the round of the round-robin."""
    avoid: frozenset[WorkerId] = field(default=frozenset())
    """Workers that failed earlier attempts."""
    digest: str | None = None
    """Set where tokens were generated: only this KV digest continues them."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers of one attempt."""

    prefill: WorkerView | None
    """None: decode computes the prompt itself."""
    decode: WorkerView


@dataclass(frozen=True, slots=True)
class NoWorker:
    """Nobody can take the request now."""

    reason: str


class Policy(Protocol):
    """See the module docstring."""

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        """A pure function of its arguments."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadAware:
    """The default: least estimated work between now and the first token, then least crowding in decode. Everything is weighed in
    tokens of prefill.
    """

    local_prefill_tokens: int = 32
    """Decode computes the prompt itself where it lacks at most so many tokens."""
    request_weight: float = 24.0
    """What one more request on a decode worker costs the ones that run there."""
    handoff_weight: float = 0.05
    """Shipping the KV of a token within a node."""
    distant_handoff_weight: float = 0.25
    """Shipping it between nodes."""
    full_weight: float = 8.0
    """A token for which decode has no free block: somebody must finish first."""
    interference_weight: float = 3.0
    """A prompt's token computed on a decode worker, where every running request waits for it."""

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        best: tuple[float, int] | None = None
        chosen: Placement | None = None
        pairs = _pairs(view, request, self.local_prefill_tokens, self._prefill_cost)
        if isinstance(pairs, NoWorker):
            return pairs
        for order, pair in enumerate(_rotated(pairs, request.turn)):
            cost = (self._pair_cost(pair, request), order)
            if best is None or cost < best:
                best, chosen = cost, pair
        assert chosen is not None
        return chosen

    def _prefill_cost(self, worker: WorkerView, request: PlaceRequest) -> float:
        return worker.queued_prefill_tokens + _uncached(worker, request)

    def _pair_cost(self, pair: Placement, request: PlaceRequest) -> float:
        decode, prefill = pair.decode, pair.prefill
        lacking = _uncached(decode, request)
        size = decode.info.block_size_tokens
        missing_tokens = max(0, -(-lacking // size) - decode.free_blocks) * size
        cost = self.request_weight * decode.requests + self.full_weight * missing_tokens
        if prefill is None:
            return cost + decode.queued_prefill_tokens + self.interference_weight * lacking
        near = prefill.info.node == decode.info.node
        weight = self.handoff_weight if near else self.distant_handoff_weight
        return (
            cost
            + self._prefill_cost(prefill, request)
            + weight * lacking
            # Prompts computed in decode's own batch delay each of its steps.
            + decode.queued_prefill_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRobin:
    """Each in turn, whatever their load: a baseline to compare with."""

    local_prefill_tokens: int = 32
    """Decode computes the prompt itself where it lacks at most so many tokens."""

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        def no_preference(_worker: WorkerView, _request: PlaceRequest) -> float:
            return 0.0

        pairs = _pairs(view, request, self.local_prefill_tokens, no_preference)
        if isinstance(pairs, NoWorker):
            return pairs
        decodes = sorted({pair.decode.info.worker_id for pair in pairs})
        decode_id = decodes[request.turn % len(decodes)]
        return next(
            pair
            for pair in _rotated(pairs, request.turn)
            if pair.decode.info.worker_id == decode_id
        )


def _knowing(worker: WorkerView, resident: Resident) -> WorkerView:
    if worker.info.worker_id != resident.worker_id:
        return worker
    size = worker.info.block_size_tokens
    return replace(
        worker, cached_tokens=max(worker.cached_tokens, resident.num_tokens // size * size)
    )


class _PrefillCost(Protocol):
    def __call__(self, worker: WorkerView, request: PlaceRequest, /) -> float: ...


def _pairs(
    view: FleetView, request: PlaceRequest, local_tokens: int, prefill_cost: _PrefillCost
) -> list[Placement] | NoWorker:
    """The pairs worth comparing; at least one. For each decode worker: itself alone, or the cheapest prefill workers of its digest
    on its node and anywhere, so that the work is linear in the fleet.
    """
    decodes = [w for w in view.decode if _usable(w, request)]
    if not decodes:
        return NoWorker(_why_none(view.decode, request))
    decodes = _soundest(decodes, request)
    prefills = [w for w in view.prefill if _usable(w, request) and _trouble(w, request) == 0]
    nearest: dict[tuple[str, str], WorkerView] = {}
    anywhere: dict[str, WorkerView] = {}
    for worker in _rotated(prefills, request.turn):
        cost = prefill_cost(worker, request)
        place = (worker.digest, worker.info.node)
        if place not in nearest or cost < prefill_cost(nearest[place], request):
            nearest[place] = worker
        if worker.digest not in anywhere or cost < prefill_cost(anywhere[worker.digest], request):
            anywhere[worker.digest] = worker
    pairs = []
    for decode in decodes:
        if _uncached(decode, request) <= local_tokens or decode.digest not in anywhere:
            pairs.append(Placement(None, decode))
            continue
        near = nearest.get((decode.digest, decode.info.node))
        far = anywhere[decode.digest]
        pairs.extend(Placement(p, decode) for p in _distinct(near, far))
    return pairs


def _usable(worker: WorkerView, request: PlaceRequest) -> bool:
    return not worker.draining and request.digest in (None, worker.digest)


def _trouble(worker: WorkerView, request: PlaceRequest) -> int:
    """0 is sound; of troubled workers, the least troubled is taken first."""
    pool_tokens = worker.info.num_blocks * worker.info.block_size_tokens
    # At its own limit a prefill worker would end the request, though decode may have room.
    tokens = request.num_tokens + (1 if worker.info.role is Role.PREFILL else 0)
    too_small = tokens >= min(pool_tokens, worker.info.max_context_tokens)
    return 4 * too_small + 2 * (worker.info.worker_id in request.avoid) + worker.suspect


def _soundest(workers: Sequence[WorkerView], request: PlaceRequest) -> list[WorkerView]:
    least = min(_trouble(w, request) for w in workers)
    return [w for w in workers if _trouble(w, request) == least]


def _uncached(worker: WorkerView, request: PlaceRequest) -> int:
    """Tokens to compute; the last one always is, for its logits."""
    return max(1, request.num_tokens - worker.cached_tokens)


def _why_none(workers: Sequence[WorkerView], request: PlaceRequest) -> str:
    if not workers:
        return "no decode worker has joined"
    if all(w.draining for w in workers):
        return "every decode worker is draining"
    if request.digest is not None:
        return "no decode worker has the KV digest that the request began with"
    raise AssertionError("a usable decode worker was left out")


_T = TypeVar("_T")


def _rotated(items: Sequence[_T], turn: int) -> Iterator[_T]:
    """All items, beginning with another one each turn: equals take turns."""
    start = turn % len(items) if items else 0
    yield from items[start:]
    yield from items[:start]


def _distinct(near: WorkerView | None, far: WorkerView) -> Iterable[WorkerView]:
    return (far,) if near is None or near is far else (near, far)
