"""A fleet in virtual time: workers that compute at a given speed and keep bounded prefix caches, behind the router's own registry and
placement policies. A discrete-event simulation: deterministic, and as fast as the policies decide.

The router sees what a real one sees: heartbeats every half second with load and cache changes, and its own claims since.

    arrive -> place -> decode reserves blocks, or waits -> prefill queue -> first token -> handoff -> decode steps -> end
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from baton.kv.spec import KVDtype, KVSpec
from baton.types import BlockHash, PrefixDelta, Role, WorkerId, WorkerInfo, WorkerLoad
from router.placement import Placement, PlaceRequest, Policy
from router.registry import Claim, Registry

BLOCK_TOKENS = 64
SPEC = KVSpec(
    num_layers=32,
    num_kv_heads=8,
    head_dim=128,
    dtype=KVDtype.BFLOAT16,
    position_scheme="rope",
    model_fingerprint="sim",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What each worker can do: about an 8B model on one H100."""

    prefill_tokens_per_s: float = 10_000.0
    step_s: float = 0.020
    """A decode step for one request."""
    step_per_request_s: float = 0.0005
    """What each further request adds to it."""
    near_handoff_tokens_per_s: float = 200_000.0
    """KV shipped within a node."""
    far_handoff_tokens_per_s: float = 40_000.0
    pool_tokens: int = 400_000
    heartbeat_s: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One request of a trace. Blocks are named by their content, as `baton.kv.prefix` does."""

    at_s: float
    prompt_tokens: int
    output_tokens: int
    prompt: Sequence[BlockHash]
    """The prompt's full blocks."""
    whole: Sequence[BlockHash]
    """Those of prompt and output."""


@dataclass(eq=False, slots=True)
class Running:
    """A request on its way, and what became of it."""

    request: TraceRequest
    prefill: "PrefillWorker | None" = None
    claims: list[Claim] = field(default_factory=list)
    cached_tokens: int = 0
    """Found in a prefix cache by the worker that computed the prompt."""
    skip_blocks: int = 0
    first_token_s: float = 0.0
    end_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.at_s

    @property
    def tpot_s(self) -> float:
        return (self.end_s - self.first_token_s) / max(1, self.request.output_tokens - 1)

    @property
    def lacking_tokens(self) -> int:
        """What decode lacks of the KV."""
        return self.request.prompt_tokens - BLOCK_TOKENS * self.skip_blocks


def worker_info(
    role: Role,
    number: int,
    *,
    node: str,
    pool_tokens: int = 400_000,
    block_tokens: int = BLOCK_TOKENS,
) -> WorkerInfo:
    """A worker as it would announce itself."""
    return WorkerInfo(
        worker_id=WorkerId(f"{role.value}-{number}"),
        role=role,
        address="127.0.0.1:1",
        transfer_address="",
        model="sim",
        spec=SPEC,
        vocab_size=1 << 16,
        max_context_tokens=1 << 20,
        eos_token_ids=(0,),
        block_size_tokens=block_tokens,
        num_blocks=pool_tokens // block_tokens,
        node=node,
        pid=1,
        device="sim",
        version="0",
    )


class Pool:
    """A worker's blocks: held by requests, or kept for their content until room is needed, least recently used first."""

    def __init__(self, blocks: int) -> None:
        self._size = blocks
        self._kept: OrderedDict[BlockHash, None] = OrderedDict()
        self._holders: dict[BlockHash, int] = {}
        self._delta: dict[BlockHash, bool] = {}
        self._unnamed = 0

    @property
    def free(self) -> int:
        """Blocks that hold nothing."""
        return self._size - len(self._kept) - len(self._holders) - self._unnamed

    @property
    def kept(self) -> int:
        return len(self._kept)

    def leading(self, hashes: Sequence[BlockHash]) -> int:
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._kept and block_hash not in self._holders:
                return index
        return len(hashes)

    def reserve(self, blocks: int) -> bool:
        """Takes blocks without a name; False where there is no room."""
        if self.free + self.kept < blocks:
            return False
        self._unnamed += blocks
        while self.free < 0:
            oldest, _ = self._kept.popitem(last=False)
            self._note(oldest, stored=False)
        return True

    def unreserve(self, blocks: int) -> None:
        self._unnamed -= blocks

    def hold(self, hashes: Sequence[BlockHash]) -> None:
        """Names blocks, and holds them. Precondition: what is new among them was reserved, and is unreserved by this."""
        for block_hash in hashes:
            held = self._holders.get(block_hash, 0)
            if not held and block_hash in self._kept:
                del self._kept[block_hash]
            elif not held:
                self._note(block_hash, stored=True)
            self._holders[block_hash] = held + 1

    def let_go(self, hashes: Sequence[BlockHash]) -> None:
        # The end of a sequence goes first, so that what stays is a prefix.
        for block_hash in reversed(hashes):
            self._holders[block_hash] -= 1
            if not self._holders[block_hash]:
                del self._holders[block_hash]
                self._kept[block_hash] = None

    def take_delta(self) -> PrefixDelta:
        stored = tuple(h for h, is_stored in self._delta.items() if is_stored)
        evicted = tuple(h for h, is_stored in self._delta.items() if not is_stored)
        self._delta.clear()
        return PrefixDelta(stored=stored, evicted=evicted)

    def _note(self, block_hash: BlockHash, *, stored: bool) -> None:
        if self._delta.get(block_hash, stored) != stored:
            del self._delta[block_hash]
        else:
            self._delta[block_hash] = stored


class PrefillWorker:
    """Computes one prompt after the other."""

    def __init__(self, fleet: "SimFleet", info: WorkerInfo) -> None:
        self.info = info
        self._fleet = fleet
        self._pool = Pool(info.num_blocks)
        self._queue: deque[Running] = deque()
        self._busy: Running | None = None
        self._done_at_s = 0.0
        self._held = 0

    def add(self, running: Running) -> None:
        self._queue.append(running)
        self._next()

    def taken(self, running: Running) -> None:
        """Decode has the KV."""
        self._pool.let_go(running.request.prompt)
        self._held -= 1
        self._next()

    def report(self) -> tuple[WorkerLoad, PrefixDelta]:
        rate = self._fleet.speeds.prefill_tokens_per_s
        left_s = self._done_at_s - self._fleet.now_s if self._busy else 0.0
        queued = sum(each.request.prompt_tokens for each in self._queue)
        load = WorkerLoad(
            running_requests=self._held + (self._busy is not None),
            waiting_requests=len(self._queue),
            queued_prefill_tokens=round(left_s * rate) + queued,
            free_blocks=self._pool.free,
            cached_blocks=self._pool.kept,
            prefill_tokens_per_s=rate,
        )
        return load, self._pool.take_delta()

    def _next(self) -> None:
        if self._busy is not None or not self._queue:
            return
        running = self._queue[0]
        prompt = running.request.prompt
        cached = self._pool.leading(prompt)
        # Held first: making room must not evict what it counts on.
        self._pool.hold(prompt[:cached])
        if not self._pool.reserve(len(prompt) - cached):
            self._pool.let_go(prompt[:cached])
            return
        self._pool.unreserve(len(prompt) - cached)
        self._pool.hold(prompt[cached:])
        self._queue.popleft()
        self._busy = running
        running.cached_tokens = BLOCK_TOKENS * cached
        tokens = max(1, running.request.prompt_tokens - running.cached_tokens)
        self._done_at_s = self._fleet.now_s + tokens / self._fleet.speeds.prefill_tokens_per_s
        self._fleet.at(self._done_at_s, lambda: self._done(running))

    def _done(self, running: Running) -> None:
        self._busy = None
        self._held += 1
        self._fleet.computed(running)
        self._next()


class DecodeWorker:
    """One token for every request in each step; a step takes longer the more there are."""

    def __init__(self, fleet: "SimFleet", info: WorkerInfo) -> None:
        self.info = info
        self._fleet = fleet
        self._pool = Pool(info.num_blocks)
        self._waiting: deque[Running] = deque()
        self._reserved = 0
        self._ends: list[tuple[float, int, Running]] = []
        """Heap: after how many of this worker's steps a request ends."""
        self._steps = 0.0
        self._at_s = 0.0
        self._numbers = count()
        self._round = 0

    def add(self, running: Running) -> None:
        self._waiting.append(running)
        self._reserve()

    def received(self, running: Running) -> None:
        """The KV is here, and the first token is out."""
        request = running.request
        self._advance()
        self._pool.unreserve(len(request.prompt) - running.skip_blocks)
        self._pool.hold(request.prompt[running.skip_blocks :])
        self._reserved -= 1
        end = self._steps + request.output_tokens - 1
        heappush(self._ends, (end, next(self._numbers), running))
        self._schedule()

    def report(self) -> tuple[WorkerLoad, PrefixDelta]:
        load = WorkerLoad(
            running_requests=len(self._ends) + self._reserved,
            waiting_requests=len(self._waiting),
            free_blocks=self._pool.free,
            cached_blocks=self._pool.kept,
            prefill_tokens_per_s=self._fleet.speeds.prefill_tokens_per_s,
            decode_step_s=self._step_s,
        )
        return load, self._pool.take_delta()

    @property
    def _step_s(self) -> float:
        speeds = self._fleet.speeds
        return speeds.step_s + speeds.step_per_request_s * max(0, len(self._ends) - 1)

    def _reserve(self) -> None:
        while self._waiting:
            running = self._waiting[0]
            request = running.request
            skip = self._pool.leading(request.prompt)
            self._pool.hold(request.prompt[:skip])
            if not self._pool.reserve(self._blocks(request) - skip):
                self._pool.let_go(request.prompt[:skip])
                return
            self._waiting.popleft()
            self._reserved += 1
            running.skip_blocks = skip
            self._fleet.reserved(running, self)

    def _advance(self) -> None:
        now_s = self._fleet.now_s
        if self._ends:
            self._steps += (now_s - self._at_s) / self._step_s
        self._at_s = now_s

    def _schedule(self) -> None:
        """Looks again when the first one ends, unless something changes before."""
        self._round += 1
        round_ = self._round
        if self._ends:
            in_s = max(0.0, self._ends[0][0] - self._steps) * self._step_s
            self._fleet.at(self._fleet.now_s + in_s, lambda: self._look(round_))

    def _look(self, round_: int) -> None:
        if round_ != self._round:
            return
        self._advance()
        while self._ends and self._ends[0][0] <= self._steps + 1e-6:
            self._end(heappop(self._ends)[2])
        self._schedule()
        self._reserve()

    def _end(self, running: Running) -> None:
        request = running.request
        self._pool.unreserve(self._blocks(request) - len(request.prompt))
        self._pool.hold(request.whole[len(request.prompt) :])
        self._pool.let_go(request.whole)
        self._fleet.ended(running)

    def _blocks(self, request: TraceRequest) -> int:
        return -(-(request.prompt_tokens + request.output_tokens) // BLOCK_TOKENS)


class SimFleet:
    """Plays a trace: the clock, the router, and the workers."""

    def __init__(self, policy: Policy, *, prefill: int, decode: int, speeds: Speeds) -> None:
        self.speeds = speeds
        self.now_s = 0.0
        self._policy = policy
        self._registry = Registry()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._turn = 0
        self._left = 0
        self._outcomes: list[Running] = []
        self._prefills: dict[WorkerId, PrefillWorker] = {}
        self._decodes: dict[WorkerId, DecodeWorker] = {}
        for number in range(max(prefill, decode)):
            for role, wanted in ((Role.PREFILL, prefill), (Role.DECODE, decode)):
                if number < wanted:
                    self._join(role, number)

    def play(self, trace: Sequence[TraceRequest]) -> list[Running]:
        """What became of each request, in order of their ends."""
        self._left = len(trace)
        for request in trace:
            self.at(request.at_s, lambda request=request: self._arrive(request))  # type: ignore[misc]
        while self._left:
            self.now_s, _, event = heappop(self._events)
            event()
        return self._outcomes

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        heappush(self._events, (when_s, next(self._numbers), event))

    def reserved(self, running: Running, decode: DecodeWorker) -> None:
        """Decode has blocks for it."""
        if running.prefill is not None:
            running.claims[1].sent_at_s = self.now_s
            running.prefill.add(running)
            return
        running.cached_tokens = BLOCK_TOKENS * running.skip_blocks
        tokens = max(1, running.lacking_tokens)
        in_s = tokens / self.speeds.prefill_tokens_per_s + self.speeds.step_s
        self.at(self.now_s + in_s, lambda: self._computed_there(running, decode))

    def computed(self, running: Running) -> None:
        """Prefill has the first token and the KV."""
        running.first_token_s = self.now_s
        assert running.prefill is not None
        decode = self._decodes[running.claims[0].worker_id]
        near = running.prefill.info.node == decode.info.node
        speeds = self.speeds
        rate = speeds.near_handoff_tokens_per_s if near else speeds.far_handoff_tokens_per_s
        in_s = running.lacking_tokens / rate
        self.at(self.now_s + in_s, lambda: self._handed(running, decode))

    def ended(self, running: Running) -> None:
        """The last token is out."""
        running.end_s = self.now_s
        for claim in running.claims:
            self._registry.release(claim)
        self._outcomes.append(running)
        self._left -= 1

    def _handed(self, running: Running, decode: DecodeWorker) -> None:
        assert running.prefill is not None
        running.prefill.taken(running)
        decode.received(running)

    def _computed_there(self, running: Running, decode: DecodeWorker) -> None:
        running.first_token_s = self.now_s
        decode.received(running)

    def _arrive(self, request: TraceRequest) -> None:
        self._turn += 1
        view = self._registry.view({BLOCK_TOKENS: request.prompt}, self.now_s)
        wanted = PlaceRequest(num_tokens=request.prompt_tokens, turn=self._turn)
        placement = self._policy.place(view, wanted)
        assert isinstance(placement, Placement)
        running = Running(request)
        decode_id = placement.decode.info.worker_id
        local = placement.prefill is None
        tokens = request.prompt_tokens - placement.skip_tokens if local else 0
        running.claims.append(self._claim(decode_id, tokens, request))
        running.claims[0].sent_at_s = self.now_s
        if placement.prefill is not None:
            prefill_id = placement.prefill.info.worker_id
            tokens = request.prompt_tokens - placement.prefill_cached_tokens
            running.claims.append(self._claim(prefill_id, tokens, request))
            running.prefill = self._prefills[prefill_id]
        self._decodes[decode_id].add(running)

    def _claim(self, worker_id: WorkerId, tokens: int, request: TraceRequest) -> Claim:
        claim = Claim(
            worker_id=worker_id,
            prefill_tokens=max(0, tokens),
            blocks=-(-request.prompt_tokens // BLOCK_TOKENS),
            made_at_s=self.now_s,
        )
        self._registry.claim(claim)
        return claim

    def _join(self, role: Role, number: int) -> None:
        # Two of each role on a node.
        node = f"node-{number // 2}"
        info = worker_info(role, number, node=node, pool_tokens=self.speeds.pool_tokens)
        session = self._registry.join(info, 0.0)
        worker: PrefillWorker | DecodeWorker
        if role is Role.PREFILL:
            worker = self._prefills[info.worker_id] = PrefillWorker(self, info)
        else:
            worker = self._decodes[info.worker_id] = DecodeWorker(self, info)
        # Heartbeats of different workers fall on different instants.
        first_s = self.speeds.heartbeat_s * ((number * 0.37 + (role is Role.DECODE) * 0.11) % 1)
        self.at(first_s, lambda: self._beat(worker, session))

    def _beat(self, worker: PrefillWorker | DecodeWorker, session: int) -> None:
        load, prefix = worker.report()
        self._registry.heartbeat(
            worker.info.worker_id, session, load, prefix, draining=False, now_s=self.now_s
        )
        self.at(self.now_s + self.speeds.heartbeat_s, lambda: self._beat(worker, session))
