"""Domain vocabulary shared by every layer: identities, sampling parameters, what a token is.

Pure data: no protobuf, no torch, no I/O. Values are validated where they enter (`router.validation`); here they are trusted.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NewType

from baton.kv.spec import KVSpec, WeightFormat

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
BlockHash = NewType("BlockHash", int)
"""64-bit hash of a block's tokens and of every token before it."""


class Role(Enum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


class FinishReason(Enum):
    """Why a request that succeeded ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class AttemptKey:
    """One try at a request on one pair of workers: the name under which workers hold its resources."""

    request_id: RequestId
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.request_id}#{self.attempt}"


@dataclass(frozen=True, slots=True)
class TraceContext:
    """The span that what follows belongs to, as W3C Trace Context's two headers name it."""

    traceparent: str = ""
    """Empty where there is none."""
    tracestate: str = ""


NO_TRACE = TraceContext()


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen. Resolved: every default is filled in, every value in range."""

    max_tokens: int
    """Most tokens to generate, over all attempts; >= 1."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens cannot be chosen before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 is off."""
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    """Unsigned, 64 bits."""
    choice: int = 0
    """Which of several completions of one prompt this is; part of the noise's key."""
    n: int = 1
    """Completions asked for; the router's business, as stop strings are."""
    stop: tuple[str, ...] = ()
    """Stop strings; matched by the router, which sees text. Engines ignore them."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of alternatives to report beside the chosen token; None reports nothing."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithm of a token's probability, by the raw logits."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """What one output position's distribution looked like."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
    """Most likely first."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """What an engine must know to compute a request's next token, whoever computed the ones before."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    """Tokens that earlier attempts generated: output positions [0, len(generated))."""
    sampling: SamplingParams
    cache_salt: str = ""
    """Only sequences of equal salt share KV through a prefix cache."""

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and generated tokens, in order."""
        return self.prompt + self.generated

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)


@dataclass(frozen=True, slots=True)
class TurnRecord:
    """The session's turn that a request is."""

    session_id: str
    lease_id: str
    """The right to end the turn."""
    said: tuple[tuple[str, str], ...]
    """Roles and contents of what the client says in it; empty where it is no chat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """What a router must know of a request, beside its sequences, to go on where another router broke off."""

    request_id: str
    """The client's."""
    tenant: str = ""
    stop: tuple[str, ...] = ()
    n: int = 1
    deadline_unix_s: float
    """After it, nobody waits for the request any more."""
    turn: TurnRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """How busy a worker is, at one instant. The five block counts add up to the pool."""

    running_requests: int = 0
    waiting_requests: int = 0
    queued_prefill_tokens: int = 0
    """Tokens admitted or queued whose KV is not yet computed."""
    free_blocks: int = 0
    """Hold nothing."""
    cached_blocks: int = 0
    """Hold a reusable prefix that no request uses; reclaimed when blocks run out."""
    reserved_blocks: int = 0
    """Held for a sequence whose KV has not arrived."""
    used_blocks: int = 0
    """Held by sequences being computed."""
    in_flight_blocks: int = 0
    """Hold finished KV that waits to be handed over."""
    prefill_tokens_per_s: float = 0.0
    """Prompt tokens computed in a second of steps that compute any, lately; 0 where none was."""
    decode_step_s: float = 0.0
    """Mean length of the steps that generate tokens, lately; 0 where none was."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStoreUsage:
    """The object store of a worker's node, which carries KV between workers."""

    used_bytes: int
    capacity_bytes: int
    spilled_bytes: int
    """Written to disk for want of room, since the node started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixDelta:
    """Changes of a prefix cache since the last delta was taken."""

    stored: tuple[BlockHash, ...] = ()
    evicted: tuple[BlockHash, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """Consecutive generated tokens."""

    first_index: int
    """Output position of the first one."""
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...] = ()
    """One for each token where they were asked for, else empty."""

    @property
    def end_index(self) -> int:
        """Output position after the last token."""
        return self.first_index + len(self.token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """What a worker is; fixed for its lifetime, but for the role of one that can take several."""

    worker_id: WorkerId
    role: Role
    address: str
    """host:port of its gRPC server."""
    transfer_address: str
    """Where the transfer layer finds it: a Ray actor's name, or an in-process key."""
    model: str
    spec: KVSpec
    vocab_size: int
    max_context_tokens: int
    """Longest sequence, prompt and output together."""
    eos_token_ids: tuple[int, ...]
    block_size_tokens: int
    num_blocks: int
    node: str
    """Host name, for placement that prefers a handoff within one node."""
    pid: int
    metrics_address: str = ""
    """host:port, or empty where it serves no metrics."""
    device: str
    version: str
    can_be: tuple[Role, ...] = ()
    """Roles that it can take; empty for workers that do not tell."""
    weights: WeightFormat | None = None
    """In which it computes; None: the dtype's own."""

    @property
    def weight_format(self) -> WeightFormat:
        """In which it computes."""
        return self.weights or WeightFormat(self.spec.dtype.value)

    @property
    def arithmetic(self) -> str:
        """Its dtype and, where that is another, its weights' format, for people."""
        dtype = self.spec.dtype.value
        own = "" if self.weight_format.value == dtype else f", {self.weight_format.value} weights"
        return dtype + own

    @property
    def computes_prompts(self) -> bool:
        """Whether prompts are computed in its format; else it takes their KV from those that have it."""
        return self.weight_format is self.spec.weight_format
