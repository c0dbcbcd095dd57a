"""The engine seam: one protocol that the torch engine, the simulated engine and foreign engines implement.

An engine knows no network. It is driven by one thread (`baton.engine.aio` owns that thread); no method is thread-safe. Every
resource is held under an `AttemptKey` and freed by `release`, which is idempotent and legal at any instant between steps.

Life of a request in an engine, by mode:

    LOCAL    add → … Started → Progress* → Token → … Token(finish)
    PREFILL  add → … Started → (Progress | Exported)* → Token → Exported* → [KV held: export_kv] → release
    DECODE   add → … Reserved → [import_kv → start_decode] → Progress* → Token → … Token(finish)
    hold     Token → [KV held: export_kv] → release      LOCAL, DECODE: another worker goes on

A Token with a finish reason is the last event of its key; the engine has then released LOCAL and DECODE requests by itself,
and a PREFILL request too, since nothing will follow its first token.
"""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from baton.errors import BatonError
from baton.kv.spec import KVSpec, SealedKV, WeightFormat
from baton.types import (
    AttemptKey,
    FinishReason,
    PositionLogprobs,
    PrefixDelta,
    Sequence,
    WorkerLoad,
)


class Mode(Enum):
    """What the engine is to do with a request."""

    LOCAL = "local"
    """Compute the prompt and generate."""
    PREFILL = "prefill"
    """Compute the prompt and one token; hold the KV until released."""
    DECODE = "decode"
    """Reserve blocks for the sequence, wait for its KV, generate."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A request as an engine takes it."""

    key: AttemptKey
    sequence: Sequence
    mode: Mode
    export: tuple[tuple[int, int], ...] = ()
    """PREFILL: token ranges [first, last) to copy out, in order, each right after the step that computes its last token, before any
    other request's. What is asked for later, by `export_kv`, waits for the step that runs then.
    """


@dataclass(frozen=True, slots=True)
class Reserved:
    """DECODE: blocks for every token of the sequence are held."""

    key: AttemptKey
    cached_tokens: int
    """Leading tokens whose KV the prefix cache held; import starts after them."""


@dataclass(frozen=True, slots=True)
class Started:
    """LOCAL, PREFILL: the first chunk is about to be computed."""

    key: AttemptKey
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """A chunk of the prompt was computed, and more remains."""

    key: AttemptKey
    computed_tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Exported:
    """A copy of the KV that the request asked for in `export`; its owner is whoever reads the event."""

    key: AttemptKey
    first: int
    last: int
    kv: SealedKV | None
    """None where the copy failed; `export_kv` may try again."""


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token."""

    key: AttemptKey
    index: int
    """Output position; the first token of an attempt has index len(sequence.generated)."""
    token_id: int
    logprobs: PositionLogprobs | None
    finish: FinishReason | None
    """Set on the last token."""


@dataclass(frozen=True, slots=True)
class Preempted:
    """The request lost its blocks and will be recomputed here."""

    key: AttemptKey


@dataclass(frozen=True, slots=True)
class Failed:
    """The request cannot go on; the engine holds nothing for it any more."""

    key: AttemptKey
    error: BatonError


@dataclass(frozen=True, slots=True)
class Held:
    """Where a request was stopped."""

    end_index: int
    """Output position after its newest token."""
    newest_token: int


EngineEvent = Reserved | Started | Progress | Exported | Token | Preempted | Failed


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine serves; fixed once it is built."""

    model: str
    spec: KVSpec
    vocab_size: int
    max_context_tokens: int
    eos_token_ids: tuple[int, ...]
    block_size_tokens: int
    num_blocks: int
    device: str
    weights: WeightFormat | None = None
    """In which it computes; None: the dtype's own. `spec.weights` is the format in which prompts are computed, here or elsewhere."""
    directory: str = ""
    """Where the checkpoint, and its tokenizer, are on this machine; empty: there is none."""

    @property
    def weight_format(self) -> WeightFormat:
        """In which it computes."""
        return self.weights or WeightFormat(self.spec.dtype.value)

    @property
    def computes_prompts(self) -> bool:
        """Whether prompts are computed in the engine's format; else their KV is always imported, only that of generated tokens is
        computed here, and no other sequence may reuse it as its prompt's.
        """
        return self.weight_format is self.spec.weight_format


class Engine(Protocol):
    """See the module docstring for the calling rules."""

    @property
    def info(self) -> EngineInfo: ...

    def add(self, request: EngineRequest) -> None:
        """Queues the request. Raises `InvalidRequestError` where it can never fit (context, pool, token ids) and
        `AlreadyExistsError` where the key is held; then nothing is held.
        """
        ...

    def release(self, key: AttemptKey) -> bool:
        """Frees all that is held under `key` and forgets it, whatever its stage. False where nothing was held."""
        ...

    def has_work(self) -> bool:
        """Whether `step` would do anything now. Requests that wait for KV, or for export, are no work."""
        ...

    def step(self, on_batch: Callable[[int], None] = ...) -> tuple[EngineEvent, ...]:
        """Schedules and computes one batch; returns what happened, in order. `on_batch` is told how many tokens it computes, before it
        does.
        """
        ...

    def export_kv(self, key: AttemptKey, first: int, last: int) -> SealedKV:
        """Copies the KV of tokens [first, last) out of the pool into a new wire buffer. Precondition: a PREFILL request whose first
        token is out and which has not finished; else raises `PreconditionError`. The blocks stay held.
        """
        ...

    def hold(self, key: AttemptKey) -> Held:
        """Stops a request that generates, after its newest token, and holds its KV for `export_kv`: of every token but that one. Raises
        `PreconditionError` where it does not generate now, and leaves it as it is. Idempotent: who was not told may ask again.
        """
        ...

    def resume(self, key: AttemptKey) -> None:
        """Goes on with a request that `hold` stopped; no effect on any other."""
        ...

    def import_kv(self, key: AttemptKey, first: int, kv: SealedKV) -> None:
        """Copies the KV of tokens [first, first + T) into the reserved blocks and verifies it on the way. Several calls may cover the
        range piecewise, in order. Precondition: Reserved; else raises `PreconditionError`. Raises `CorruptKVError` where the
        bytes are not those sealed; they have left no trace then. The buffer is not kept.
        """
        ...

    def start_decode(self, key: AttemptKey, first_token: int | None) -> None:
        """All KV is in, and `first_token` is the token that prefill chose at index len(sequence.generated): generate from it. Same
        precondition as `import_kv`, and that every token's KV was imported or cached. Without a first token, the prompt's KV is in:
        compute that of the generated tokens here, of which there is one at least, and choose the token after them.
        """
        ...

    def load(self) -> WorkerLoad: ...

    def orphaned_blocks(self, owned: AbstractSet[AttemptKey]) -> int:
        """Blocks that are held, but by no request of these keys: anything but 0 is a leak."""
        ...

    def take_prefix_delta(self) -> PrefixDelta:
        """Prefix-cache changes since the last call."""
        ...

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        ...
