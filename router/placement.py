"""Which workers compute a request: pure decisions over an immutable view of the fleet. No clock, no I/O, no await.

    policy.place(view, request) -> Placement(prefill | None, decode, skip_tokens, predicted_ttft_s) | NoWorker(reason)

What every policy upholds, by taking its choice from `candidates`: a draining worker gets nothing; prefill and decode share a KV
digest; a request that has tokens stays with the digest and the weight format that made them; a worker that failed this request,
that is under suspicion, or that could never hold the sequence is taken only where there is no other way; and decode computes the
prompt itself where it lacks little of it, or where no sound prefill worker is there, but never where prompts are computed in another
format than its own. Between what remains, the policy chooses;
`router.policies` has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from baton.kv.spec import WeightFormat
from baton.types import Role, WorkerId, WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A worker at one instant, the same for every request."""

    info: WorkerInfo
    longest_tokens: int
    """Longest sequence that it can take."""
    computes_prompts: bool = True
    """Whether it computes in the format in which prompts are computed."""
    draining: bool = False
    suspect: bool = False
    """It failed an attempt a moment ago, or is silent."""
    requests: int = 0
    """Running, waiting and on their way."""
    queued_prefill_tokens: float = 0.0
    """Tokens that the worker had yet to compute at `as_of_s`, those on their way included."""
    as_of_s: float = 0.0
    """Monotonic clock."""
    free_blocks: int = 0
    """Hold nothing, and nothing on its way will take them."""
    reclaimable_blocks: int = 0
    """Hold no more than a reusable prefix, which is lost where they are taken."""
    prefill_tokens_per_s: float = 0.0
    """Measured by it, or typical of its role, or of the fleet, where it has measured nothing; 0 where nobody has."""
    decode_step_s: float = 0.0
    """Mean length of its steps that generate, or typical; 0 where nobody has measured any."""

    @property
    def digest(self) -> str:
        return self.info.spec.digest

    def queued_at(self, now_s: float) -> float:
        """Tokens ahead of a request that comes at `now_s`: a worker that has work is doing it."""
        done = self.prefill_tokens_per_s * (now_s - self.as_of_s)
        return max(0.0, self.queued_prefill_tokens - done)


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
    cached: Mapping[WorkerId, int] = field(default_factory=dict)
    """Leading tokens of the request that a worker's prefix cache holds; who is absent holds none."""
    now_s: float = 0.0
    """Monotonic clock."""

    def knowing(self, resident: Resident) -> "FleetView":
        """The view in which that decode worker holds that KV, as far as it fills blocks."""
        for worker in self.decode:
            # One that computes no prompts keeps an answer's KV to itself.
            if worker.info.worker_id == resident.worker_id and worker.computes_prompts:
                size = worker.info.block_size_tokens
                left = resident.num_tokens // size * size
                known = self.cached.get(resident.worker_id, 0)
                return replace(self, cached={**self.cached, resident.worker_id: max(known, left)})
        return self


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
    weights: WeightFormat | None = None
    """Set where tokens were generated: only a decode worker of this format continues them."""
    moves: bool = False
    """Its KV comes from another decode worker: no prompt is to be computed."""
    last_decode: WorkerId | None = None
    """Where the session's last turn was decoded: taken before its equals."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers of one attempt."""

    prefill: WorkerView | None
    """None: decode computes the prompt itself."""
    decode: WorkerView
    prefill_cached_tokens: int = 0
    """Leading tokens that prefill need not compute."""
    skip_tokens: int = 0
    """Leading tokens that decode holds: they need not be shipped, nor computed where decode computes."""
    predicted_ttft_s: float | None = None
    """From now to the first token; None where no speed is known yet."""


@dataclass(frozen=True, slots=True)
class NoWorker:
    """Nobody can take the request now."""

    reason: str


class Policy(Protocol):
    """See the module docstring."""

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        """A pure function of its arguments."""
        ...


@dataclass(frozen=True, slots=True)
class Candidates:
    """The workers that a policy may choose from, another one first each turn, so that equals take turns."""

    prefill: Mapping[str, Sequence[WorkerView]]
    """By KV digest; a digest that is absent has no sound prefill worker."""
    decode: Sequence[WorkerView]
    """At least one."""


def candidates(view: FleetView, request: PlaceRequest) -> Candidates | NoWorker:
    """What the module docstring promises of every policy. Linear in the fleet."""
    prefill = _by_trouble(view.prefill, request)
    by_digest: dict[str, list[WorkerView]] = {}
    for worker in rotated(prefill.get(0, ()), request.turn):
        by_digest.setdefault(worker.info.spec.digest, []).append(worker)
    usable: Sequence[WorkerView] = view.decode
    if request.weights is not None:
        usable = [w for w in usable if _continues(w, request)]
    if not request.moves and not all(w.computes_prompts for w in usable):
        usable = _supplied(usable, prefill, by_digest)
    decode = _by_trouble(usable, request)
    if not decode:
        return NoWorker(_why_none(view.decode, request))
    soundest = decode[min(decode)]
    return Candidates(by_digest, rotated(soundest, request.turn))


def _continues(worker: WorkerView, request: PlaceRequest) -> bool:
    return request.weights is None or request.weights is worker.info.weight_format


def _supplied(
    decode: Sequence[WorkerView],
    prefill: Mapping[int, Sequence[WorkerView]],
    by_digest: dict[str, list[WorkerView]],
) -> list[WorkerView]:
    """Without those that need a prefill worker and have none. For their digests, `by_digest` gets the least troubled."""
    for digest in {w.digest for w in decode if not w.computes_prompts} - by_digest.keys():
        for trouble in sorted(prefill):
            if found := [w for w in prefill[trouble] if w.digest == digest]:
                by_digest[digest] = found
                break
    return [w for w in decode if w.computes_prompts or w.digest in by_digest]


def placed(
    view: FleetView, request: PlaceRequest, prefill: WorkerView | None, decode: WorkerView
) -> Placement:
    """The choice, with what follows from it."""
    skip = view.cached.get(decode.info.worker_id, 0)
    cached = 0 if prefill is None else view.cached.get(prefill.info.worker_id, 0)
    computing, held = (decode, skip) if prefill is None else (prefill, cached)
    predicted_s = None
    if computing.prefill_tokens_per_s > 0:
        tokens = computing.queued_at(view.now_s) + lacking(request, held)
        predicted_s = tokens / computing.prefill_tokens_per_s
    return Placement(prefill, decode, cached, skip, predicted_s)


def lacking(request: PlaceRequest, cached_tokens: int) -> int:
    """Tokens to compute where so many are cached; the last one always is, for its logits."""
    return max(1, request.num_tokens - cached_tokens)


_T = TypeVar("_T")


def rotated(items: Sequence[_T], turn: int) -> Sequence[_T]:
    """All items, beginning with another one each turn."""
    start = turn % len(items) if items else 0
    return [*items[start:], *items[:start]]


def longest_tokens(info: WorkerInfo) -> int:
    """Longest sequence that a worker can take, with room to go on."""
    limit = min(info.num_blocks * info.block_size_tokens, info.max_context_tokens)
    # At its own limit a prefill worker would end the request, though decode may have room.
    return limit - (2 if info.role is Role.PREFILL else 1)


def _by_trouble(
    workers: Sequence[WorkerView], request: PlaceRequest
) -> Mapping[int, Sequence[WorkerView]]:
    """Workers that may be used at all, by how much speaks against each; 0 is sound."""
    digest, avoid, num_tokens = request.digest, request.avoid, request.num_tokens
    sound: list[WorkerView] = []
    found = {0: sound}
    for worker in workers:
        if worker.draining or (digest is not None and digest != worker.info.spec.digest):
            continue
        too_long = num_tokens > worker.longest_tokens
        if not (too_long or worker.suspect or (avoid and worker.info.worker_id in avoid)):
            sound.append(worker)
            continue
        trouble = 4 * too_long + 2 * (worker.info.worker_id in avoid) + worker.suspect
        found.setdefault(trouble, []).append(worker)
    return {trouble: group for trouble, group in found.items() if group}


def _why_none(workers: Sequence[WorkerView], request: PlaceRequest) -> str:
    if not workers:
        return "no decode worker has joined"
    if all(w.draining for w in workers):
        return "every decode worker is draining"
    fitting = [w for w in workers if not w.draining and request.digest in {None, w.digest}]
    if not fitting:
        return "no decode worker has the KV digest that the request began with"
    if not any(_continues(w, request) for w in fitting):
        return "no decode worker has the weight format that the request began with"
    return "no prefill worker computes prompts in the format that the decode workers need"
