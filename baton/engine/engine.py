"""Continuous batching over a paged KV pool: the engine behind `baton.engine.base.Engine`, for any runner.

A step is plan (`baton.scheduling.plan`), run (the runner), settle (tokens, prefix cache, events); one that admits or preempts
returns after the plan, and the next call runs it. Each copy of a prompt's KV that was asked for is a step of its own, before all
others. The engine keeps the books, so its invariants can be checked after every step:

* a request's table holds blocks for every computed token, and the pool's holder counts equal the tables;
* a block is published to the prefix cache only once all of its tokens are computed;
* whatever `release` is called on, and whenever, all of its blocks are free afterwards.

Not thread-safe: one thread owns it (`baton.engine.aio`). Torch-free: tensors are the runner's business.
"""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import replace

from baton.engine.base import (
    EngineEvent,
    EngineInfo,
    EngineRequest,
    Exported,
    Failed,
    Held,
    Mode,
    Preempted,
    Progress,
    Reserved,
    Started,
    Token,
)
from baton.engine.batch import BatchRow, Runner, Sampled, SampleInput
from baton.engine.request import RequestState, Stage, find_violations
from baton.engine.speed import SpeedMeter
from baton.engine.tables import BlockTables
from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CapacityError,
    FieldViolation,
    InvalidRequestError,
    PreconditionError,
)
from baton.kv.blocks import BlockPool
from baton.kv.spec import SealedKV
from baton.scheduling.plan import Limits, Running, plan_step
from baton.types import AttemptKey, PrefixDelta, WorkerLoad


class PagedEngine:
    """Implements `Engine`. See the module docstring."""

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_tokens: int,
        max_running: int,
        prefix_cache: bool = True,
        kv_cache: bool = True,
    ) -> None:
        """`kv_cache=False` recomputes every token in every step: the baseline that shows what the cache buys."""
        self._runner = runner
        info = runner.info
        pool_tokens = info.num_blocks * info.block_size_tokens
        self._info = replace(info, max_context_tokens=min(info.max_context_tokens, pool_tokens))
        self._limits = Limits(
            block_size_tokens=info.block_size_tokens,
            max_batch_tokens=max_batch_tokens if kv_cache else pool_tokens,
            max_running=max_running,
        )
        self._eos = frozenset(info.eos_token_ids)
        self._kv_cache = kv_cache
        self._pool = BlockPool(info.num_blocks, info.block_size_tokens)
        self._tables = BlockTables(
            self._pool,
            prefix_cache=prefix_cache and kv_cache,
            prompts_only=not info.computes_prompts,
        )
        self._requests: dict[AttemptKey, RequestState] = {}
        self._waiting: list[RequestState] = []
        self._running: list[RequestState] = []
        self._batch: list[tuple[RequestState, int]] = []
        """Planned, not yet computed: how many tokens of which requests."""
        self._exports: deque[tuple[RequestState, int, int]] = deque()
        """Copies to make: which tokens [first, last) of which requests."""
        self._speed = SpeedMeter()
        self._settled = True
        """Nothing changed since a step that found nothing to do."""

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def runner(self) -> Runner:
        """The runner, for engines that share one model."""
        return self._runner

    def add(self, request: EngineRequest) -> None:
        if request.key in self._requests:
            raise AlreadyExistsError(f"attempt {request.key} is already here")
        length = len(request.sequence)
        if not request.sequence.prompt:
            raise InvalidRequestError(FieldViolation("prompt", "is empty"))
        if length >= self._info.max_context_tokens:
            raise InvalidRequestError(
                FieldViolation(
                    "prompt",
                    f"has {length} tokens; this worker's context is "
                    f"{self._info.max_context_tokens} tokens, with room for at least one more",
                )
            )
        violations = tuple(find_violations(request.sequence, self._info.vocab_size))
        if violations:
            raise InvalidRequestError(*violations)
        assert all(0 <= first < last <= length for first, last in request.export)
        if request.mode is not Mode.DECODE and not self._info.computes_prompts:
            raise PreconditionError(
                f"this worker computes in {self._info.weight_format.value}; prompts are computed in "
                f"{self._info.spec.weight_format.value}, by others"
            )
        state = RequestState(request, self._info.block_size_tokens)
        self._requests[request.key] = state
        self._waiting.append(state)
        self._settled = False

    def release(self, key: AttemptKey) -> bool:
        state = self._requests.pop(key, None)
        if state is None:
            return False
        if state.stage is Stage.WAITING:
            self._waiting.remove(state)
        elif state.stage is Stage.RUNNING:
            self._running.remove(state)
        self._give_back(state)
        return True

    def has_work(self) -> bool:
        if self._running or self._batch or self._exports:
            return True
        return bool(self._waiting and not self._settled)

    def step(self, on_batch: Callable[[int], None] = lambda _: None) -> tuple[EngineEvent, ...]:
        if self._exports:
            # One at a time: another worker can fetch the first while the second is made.
            return tuple(self._export(*self._exports.popleft()))
        if not self._batch:
            events = self._prepare()
            if events:
                # Told before the batch is computed: a reservation starts another worker's work.
                return tuple(events)
        return tuple(self._compute(on_batch))

    def export_kv(self, key: AttemptKey, first: int, last: int) -> SealedKV:
        state = self._requests.get(key)
        if state is None or state.stage is not Stage.HELD:
            raise PreconditionError(f"no finished KV is held for attempt {key}")
        if not 0 <= first < last <= state.num_computed:
            raise PreconditionError(
                f"tokens [{first}, {last}) are not within the {state.num_computed} computed"
            )
        return self._runner.read_kv(state.table, first, last)

    def hold(self, key: AttemptKey) -> Held:
        state = self._requests.get(key)
        generates = (
            state is not None
            and state.mode is not Mode.PREFILL
            and state.stage in {Stage.RUNNING, Stage.HELD}
            and len(state.tokens) > state.num_given
            and state.num_computed == len(state.tokens) - 1
        )
        if state is None or not generates:
            raise PreconditionError(f"attempt {key} does not generate")
        if state.stage is Stage.RUNNING:
            self._running.remove(state)
            state.stage = Stage.HELD
        return Held(len(state.output), state.output[-1])

    def resume(self, key: AttemptKey) -> None:
        state = self._requests.get(key)
        if state is not None and state.stage is Stage.HELD and state.mode is not Mode.PREFILL:
            state.stage = Stage.RUNNING
            self._running.append(state)
            self._settled = False

    def import_kv(self, key: AttemptKey, first: int, kv: SealedKV) -> None:
        state = self._reserved(key)
        last = first + kv.data.shape[2]
        if first != state.num_computed or last > state.num_given:
            raise PreconditionError(
                f"tokens [{first}, {last}) do not continue the {state.num_computed} imported "
                f"of {state.num_given}"
            )
        self._runner.write_kv(state.table, first, kv)
        state.num_computed = last
        self._tables.publish(state)

    def start_decode(self, key: AttemptKey, first_token: int | None) -> None:
        state = self._reserved(key)
        least = state.num_given if first_token is not None else len(state.prompt)
        if state.num_computed < least:
            raise PreconditionError(f"KV of {state.num_computed} of {least} tokens has arrived")
        if first_token is None:
            if state.num_computed == state.num_given:
                raise PreconditionError("no token is left whose successor could be computed")
        else:
            if not 0 <= first_token < self._info.vocab_size:
                raise PreconditionError(f"token {first_token} is not in the vocabulary")
            state.append(first_token)
        state.started = True
        state.stage = Stage.RUNNING
        self._running.append(state)

    def load(self) -> WorkerLoad:
        blocks: dict[Stage, set[int]] = {stage: set() for stage in Stage}
        for state in self._requests.values():
            blocks[state.stage].update(state.table)
        used = blocks[Stage.RUNNING]
        in_flight = blocks[Stage.HELD] - used
        reserved = blocks[Stage.RESERVED] - used - in_flight
        uncomputed = sum(
            len(s.tokens) - s.num_computed - (1 if s.started else 0)
            for s in (*self._running, *self._waiting)
            if not s.awaits_import
        )
        return WorkerLoad(
            running_requests=len(self._requests) - len(self._waiting),
            waiting_requests=len(self._waiting),
            queued_prefill_tokens=max(0, uncomputed),
            free_blocks=self._pool.num_blank,
            cached_blocks=self._pool.num_cached,
            reserved_blocks=len(reserved),
            used_blocks=len(used),
            in_flight_blocks=len(in_flight),
            prefill_tokens_per_s=self._speed.prefill_tokens_per_s,
            decode_step_s=self._speed.decode_step_s,
        )

    def orphaned_blocks(self, owned: AbstractSet[AttemptKey]) -> int:
        held = self._info.num_blocks - self._pool.num_available
        tables = [state.table for key, state in self._requests.items() if key in owned]
        return held - len({block for table in tables for block in table})

    def take_prefix_delta(self) -> PrefixDelta:
        return self._pool.take_delta()

    def check_integrity(self) -> None:
        states = self._requests.values()
        self._pool.check_integrity([s.table for s in states])
        assert [s for s in states if s.stage is Stage.RUNNING] == sorted(
            self._running, key=list(states).index
        )
        assert set(self._waiting) == {s for s in states if s.stage is Stage.WAITING}
        for s in states:
            assert len(s.table) * self._info.block_size_tokens >= s.num_computed
            assert s.num_computed <= len(s.tokens)
            assert s.stage is not Stage.WAITING or not s.table

    def _prepare(self) -> list[EngineEvent]:
        """Plans a step and gives out its blocks; what is to be computed is left in `_batch`."""
        plan = plan_step(
            [Running(s.key, len(s.tokens), s.num_computed, len(s.table)) for s in self._running],
            map(self._tables.waiting_view, self._waiting),
            available_blocks=self._pool.num_available,
            holding=sum(s.stage is Stage.HELD for s in self._requests.values()),
            limits=self._limits,
        )
        events = [self._preempt(self._requests[key]) for key in plan.preempt]
        for key in plan.admit:
            if not self._admit(self._requests[key], events):
                break
        for key, count in plan.chunks:
            state = self._requests[key]
            if state.stage is Stage.RUNNING and self._tables.grow(
                state, state.num_computed + count
            ):
                self._batch.append((state, count))
        self._settled = not (plan.preempt or plan.admit or self._batch)
        return events

    def _reserved(self, key: AttemptKey) -> RequestState:
        state = self._requests.get(key)
        if state is None or state.stage is not Stage.RESERVED:
            raise PreconditionError(f"no blocks are reserved for attempt {key}")
        return state

    def _admit(self, state: RequestState, events: list[EngineEvent]) -> bool:
        if not self._tables.fill(state):
            # An admission before this one evicted part of the prefix that the plan counted on.
            return False
        self._waiting.remove(state)
        if state.awaits_import:
            state.stage = Stage.RESERVED
            events.append(Reserved(state.key, state.num_computed))
            return True
        state.stage = Stage.RUNNING
        self._running.append(state)
        if not state.started:
            state.started = True
            events.append(Started(state.key, state.num_computed))
        return True

    def _preempt(self, state: RequestState) -> EngineEvent:
        if not self._info.computes_prompts:
            # Its prompt cannot be recomputed here.
            self.release(state.key)
            return Failed(state.key, CapacityError("its KV blocks went to earlier requests"))
        self._running.remove(state)
        self._give_back(state)
        state.stage = Stage.WAITING
        self._waiting.insert(0, state)
        return Preempted(state.key)

    def _give_back(self, state: RequestState) -> None:
        self._tables.give_back(state)
        self._settled = False

    def _compute(self, on_batch: Callable[[int], None]) -> list[EngineEvent]:
        batch = [
            (s, n)
            for s, n in self._batch
            if self._requests.get(s.key) is s and s.stage is Stage.RUNNING
        ]
        self._batch.clear()
        events: list[EngineEvent] = []
        if not batch:
            return events
        on_batch(sum(count for _, count in batch))
        if len(self._running) > min(self._limits.max_batch_tokens, self._limits.max_running):
            # More requests generate than a step computes: those of this step go to the end of the line.
            served = {id(state) for state, _ in batch}
            self._running.sort(key=lambda state: id(state) in served)
        rows = [self._row(state, count) for state, count in batch]
        began_s = time.perf_counter()
        try:
            sampled: list[Sampled | BatonError | None] = [*self._runner.run(rows)]
        except BatonError:
            sampled = [self._run_alone(row) for row in rows]
        generating = sum(bool(state.output) and count == 1 for state, count in batch)
        self._speed.record(
            prefill_tokens=sum(count for _, count in batch) - generating,
            generating=generating,
            seconds=time.perf_counter() - began_s,
        )
        for (state, count), result in zip(batch, sampled, strict=True):
            if isinstance(result, BatonError):
                events.append(Failed(state.key, result))
                self.release(state.key)
                continue
            state.num_computed += count
            self._tables.publish(state)
            exports = state.take_exports()
            if result is None:
                events.append(Progress(state.key, state.num_computed))
            else:
                events.append(self._settle(state, result))
            if state.key in self._requests:
                self._exports += ((state, first, last) for first, last in exports)
        return events

    def _run_alone(self, row: BatchRow) -> Sampled | BatonError | None:
        """One row's failure is that row's: the others are computed again without it. Writing the same KV twice is harmless."""
        try:
            return self._runner.run([row])[0]
        except BatonError as error:
            return error

    def _row(self, state: RequestState, count: int) -> BatchRow:
        first, last = state.num_computed, state.num_computed + count
        return BatchRow(
            token_ids=state.tokens[first:last],
            start=first,
            block_table=state.table,
            sample=SampleInput(state.params, state.prompt, state.output)
            if last == len(state.tokens)
            else None,
        )

    def _settle(self, state: RequestState, sampled: Sampled) -> Token:
        index = state.append(sampled.token_id)
        finish = state.finish_reason(self._eos, self._info.max_context_tokens)
        if finish is not None:
            self.release(state.key)
        elif state.mode is Mode.PREFILL:
            self._running.remove(state)
            state.stage = Stage.HELD
        elif not self._kv_cache:
            state.num_computed = 0
        return Token(state.key, index, sampled.token_id, sampled.logprobs, finish)

    def _export(self, state: RequestState, first: int, last: int) -> list[EngineEvent]:
        if self._requests.get(state.key) is not state:
            return []
        try:
            kv = self._runner.read_kv(state.table, first, last)
        except (MemoryError, RuntimeError):
            # Not the engine's failure: the pull asks again, and gets the error.
            return [Exported(state.key, first, last, None)]
        return [Exported(state.key, first, last, kv)]
