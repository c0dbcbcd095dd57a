"""The placement policies. Each is a pure function of the view and the request; see `router.placement`.

round-robin     each worker in turn, whatever its load: a baseline
least-loaded    the shortest queue of prefill tokens, the fewest requests in decode; blind to prefixes
prefix-aware    the default: least delay for the request and for those after it, with what caches hold taken in
"""

from collections.abc import Mapping
from dataclasses import dataclass

from baton.service.settings import PlacementPolicy
from router.placement import (
    Candidates,
    FleetView,
    NoWorker,
    Placement,
    PlaceRequest,
    Policy,
    WorkerView,
    candidates,
    lacking,
    placed,
)

NOMINAL_TOKENS_PER_S = 10_000.0
"""Stands for a speed that nobody has measured yet."""
NOMINAL_STEP_S = 0.02
"""Stands for a length of step that nobody has measured yet."""

_Costed = tuple[float, WorkerView]
"""Seconds, and the worker that they are for."""


def policy_of(kind: PlacementPolicy, *, local_prefill_tokens: int) -> Policy:
    """The policy that a setting names."""
    match kind:
        case PlacementPolicy.ROUND_ROBIN:
            return RoundRobin(local_prefill_tokens=local_prefill_tokens)
        case PlacementPolicy.LEAST_LOADED:
            return LeastLoaded(local_prefill_tokens=local_prefill_tokens)
        case PlacementPolicy.PREFIX_AWARE:
            return PrefixAware(local_prefill_tokens=local_prefill_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundRobin:
    """Each in turn, whatever their load: a baseline to compare with."""

    local_prefill_tokens: int = 32
    """Decode computes the prompt itself where it lacks at most so many tokens."""

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        among = candidates(view, request)
        if isinstance(among, NoWorker):
            return among
        # Candidates are rotated by the turn.
        decode = among.decode[0]
        if _computes_alone(view, request, among, decode, self.local_prefill_tokens):
            return placed(view, request, None, decode)
        return placed(view, request, among.prefill[decode.digest][0], decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeastLoaded:
    """The least busy of each role, as if there were no prefix caches: a baseline to compare with."""

    local_prefill_tokens: int = 32
    """Decode computes the prompt itself where it lacks at most so many tokens."""

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        among = candidates(view, request)
        if isinstance(among, NoWorker):
            return among
        decode = min(among.decode, key=lambda worker: worker.requests)
        if _computes_alone(view, request, among, decode, self.local_prefill_tokens):
            return placed(view, request, None, decode)
        prefill = min(among.prefill[decode.digest], key=lambda worker: _wait_s(worker, view.now_s))
        return placed(view, request, prefill, decode)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixAware:
    """The default. Every weight is in seconds of delay, the request's own or what it causes to others."""

    local_prefill_tokens: int = 32
    """Decode computes the prompt itself where it lacks at most so many tokens."""
    work_weight: float = 2.0
    """A second of computing a prompt: it delays the request, and takes as much from those that come after."""
    step_weight: float = 0.25
    """A step of a decode worker: those of some are longer."""
    request_weight: float = 0.12
    """One more request on a decode worker, in steps of those that run there."""
    handoff_s: float = 0.005
    """Any handoff, whatever its size."""
    near_handoff_s: float = 5e-6
    """Shipping the KV of a token within a node."""
    far_handoff_s: float = 25e-6
    """Shipping it between nodes."""
    full_weight: float = 8.0
    """Computing a token for which decode has no free block: somebody must finish first."""
    reclaim_weight: float = 0.05
    """Computing a token whose block another prefix must give up."""
    interference_weight: float = 3.0
    """Computing a prompt's token on a decode worker, where every running request waits for it."""
    session_weight: float = 0.005
    """What the worker of a session's last turn is ahead of its equals, in steps."""

    def place(self, view: FleetView, request: PlaceRequest) -> Placement | NoWorker:
        among = candidates(view, request)
        if isinstance(among, NoWorker):
            return among
        near, far = self._best_prefills(view, request, among)
        cached, num_tokens = view.cached, request.num_tokens
        least_missing = num_tokens - max(cached.values(), default=0)
        floor_s = 0.0
        if far and least_missing > self.local_prefill_tokens:
            # Nobody's prompt is computed for less, so that most decode workers need no second look.
            floor_s = self.handoff_s + min(cost_s for cost_s, _ in far.values())
        best_s = float("inf")
        chosen: tuple[WorkerView | None, WorkerView] | None = None
        for decode in among.decode:
            info = decode.info
            steps = self.step_weight + self.request_weight * decode.requests
            if info.worker_id == request.last_decode:
                steps -= self.session_weight
            cost_s = steps * (decode.decode_step_s or NOMINAL_STEP_S)
            if cost_s + floor_s >= best_s and info.spec.digest in far:
                continue
            missing = max(1, num_tokens - cached.get(info.worker_id, 0))
            handoff_s = self.near_handoff_s * missing
            if cost_s + floor_s + handoff_s >= best_s and info.spec.digest in far:
                continue
            little = missing <= self.local_prefill_tokens and decode.computes_prompts
            alone = little or info.spec.digest not in far
            cost_s += self._crowding_s(view, decode, missing)
            prefill = None
            if alone:
                cost_s += self.interference_weight * missing / _rate(decode)
            else:
                pair_s, prefill = self._pair_s(decode, missing, near, far)
                cost_s += self.handoff_s + pair_s
            if cost_s < best_s:
                best_s, chosen = cost_s, (prefill, decode)
        assert chosen is not None
        return placed(view, request, *chosen)

    def _best_prefills(
        self, view: FleetView, request: PlaceRequest, among: Candidates
    ) -> tuple[Mapping[str, Mapping[str, _Costed]], Mapping[str, _Costed]]:
        """The cheapest prefill worker, with its cost, of each digest on each node, and of each digest: no pair needs another, so that the
        work is linear in the fleet. Its loop runs once for each worker of a large fleet, so it calls nothing.
        """
        near: dict[str, dict[str, _Costed]] = {}
        far: dict[str, _Costed] = {}
        cached, now_s, num_tokens = view.cached, view.now_s, request.num_tokens
        for digest, workers in among.prefill.items():
            least_s = float("inf")
            by_node = near[digest] = {}
            for worker in workers:
                info = worker.info
                speed = worker.prefill_tokens_per_s
                queued = worker.queued_prefill_tokens - speed * (now_s - worker.as_of_s)
                missing = num_tokens - cached.get(info.worker_id, 0)
                weighed = self.work_weight * (missing if missing > 0 else 1)
                cost_s = (weighed + queued if queued > 0 else weighed) / (
                    speed or NOMINAL_TOKENS_PER_S
                )
                if cost_s < least_s:
                    least_s, far[digest] = cost_s, (cost_s, worker)
                known = by_node.get(info.node)
                if known is None or cost_s < known[0]:
                    by_node[info.node] = (cost_s, worker)
        return near, far

    def _pair_s(
        self,
        decode: WorkerView,
        missing: int,
        near: Mapping[str, Mapping[str, _Costed]],
        far: Mapping[str, _Costed],
    ) -> _Costed:
        """The prefill worker that serves a decode worker best, and what it costs with the handoff."""
        digest = decode.info.spec.digest
        cost_s, prefill = far[digest]
        pair_s = cost_s + self.far_handoff_s * missing
        beside = near[digest].get(decode.info.node)
        if beside is not None and beside[0] + self.near_handoff_s * missing < pair_s:
            return beside[0] + self.near_handoff_s * missing, beside[1]
        return pair_s, prefill

    def _crowding_s(self, view: FleetView, decode: WorkerView, missing: int) -> float:
        """What it costs that others are there: their prompts, and their blocks."""
        # Prompts computed in decode's own batch delay each of its steps.
        cost_s = _wait_s(decode, view.now_s) if decode.queued_prefill_tokens else 0.0
        size = decode.info.block_size_tokens
        beyond_free = -(-missing // size) - decode.free_blocks
        if beyond_free > 0:
            beyond_all = max(0, beyond_free - decode.reclaimable_blocks)
            reclaimed = beyond_free - beyond_all
            weighed = self.full_weight * beyond_all + self.reclaim_weight * reclaimed
            cost_s += weighed * size / _rate(decode)
        return cost_s


def _computes_alone(
    view: FleetView,
    request: PlaceRequest,
    among: Candidates,
    decode: WorkerView,
    local_prefill_tokens: int,
) -> bool:
    missing = lacking(request, view.cached.get(decode.info.worker_id, 0))
    little = missing <= local_prefill_tokens and decode.computes_prompts
    return little or decode.digest not in among.prefill


def _rate(worker: WorkerView) -> float:
    return worker.prefill_tokens_per_s or NOMINAL_TOKENS_PER_S


def _wait_s(worker: WorkerView, now_s: float) -> float:
    """Until it has computed what was there before."""
    return worker.queued_at(now_s) / _rate(worker)
