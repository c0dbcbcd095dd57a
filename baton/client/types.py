"""What callers of the client give and get. Pure data; immutable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from baton.types import FinishReason, PositionLogprobs, WorkerInfo


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation."""

    role: str
    """"system", "user" or "assistant"."""
    content: str


Prompt = str | Sequence[int] | Sequence[ChatMessage]
"""Text, token ids of the served model, or a conversation that the model's chat template renders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """How tokens are chosen. None leaves the choice to the server; out-of-range values raise `InvalidRequestError` on use."""

    max_tokens: int | None = None
    """Default: what the context has left after the prompt."""
    min_tokens: int = 0
    """No stop is honoured before this many tokens."""
    temperature: float | None = None
    """0 is greedy. Default 1."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 is off."""
    top_p: float | None = None
    """Keep the smallest set of tokens with this probability. Default 1."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one's probability."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens of the prompt and the output less likely. Default 1."""
    presence_penalty: float = 0.0
    """Subtracted once from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """Subtracted for each time a token is in the output."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    seed: int | None = None
    """The same seed gives the same tokens. Default: drawn by the server and told in the result."""
    stop: Sequence[str] = ()
    """The answer ends before the first of these strings."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    """Generate on past the model's end-of-sequence tokens."""
    logprobs: int | None = None
    """Report log-probabilities, with this many alternatives for each token."""
    n: int = 1
    """Completions of the same prompt, up to 16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionOptions:
    """How the channel behaves."""

    keepalive_s: float | None = 30.0
    """Interval of pings while a call is open, so that a silently lost server is noticed; None sends none. Servers end connections
    that ping more often than they permit.
    """
    keepalive_timeout_s: float = 20.0
    """How long a ping may stay unanswered before the connection counts as lost."""
    max_message_bytes: int = 16 * 1024 * 1024
    """Largest message accepted from the server."""
    reconnect_s: float = 15.0
    """How long a request whose router is lost tries to go on, at that router or another; 0 not at all."""
    tls: bool = False
    """Speak TLS; so it is where one of the files is given. Files are read once, when the client is made."""
    tls_ca_file: str = ""
    """PEM certificates that the server's must chain to; empty: the system's."""
    tls_cert_file: str = ""
    """PEM certificate to show to servers that ask for one."""
    tls_key_file: str = ""
    """PEM key of that certificate."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """New output. The texts of all chunks, joined, are the answer. Text may lag behind the tokens, so either can be empty."""

    text: str
    first_index: int
    """Output position of the first token."""
    token_ids: tuple[int, ...]
    logprobs: tuple[PositionLogprobs, ...]
    """One for each token where they were asked for, else empty."""
    choice: int = 0
    """Which of the n completions it belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One of a request's n completions."""

    text: str
    token_ids: tuple[int, ...]
    """The output, with the token that stopped it where one did."""
    logprobs: tuple[PositionLogprobs, ...]
    finish_reason: FinishReason
    stop_string: str | None
    """The stop string that ended it, where one did."""
    stop_token_id: int | None
    """The stop or end-of-sequence token that ended it, where one did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from a prefix cache."""
    completion_tokens: int


class SessionState(Enum):
    """What a session does."""

    IDLE = "idle"
    """It waits for its next turn."""
    GENERATING = "generating"
    """A turn runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A conversation that the router remembers, as it was when it was asked for."""

    session_id: str
    state: SessionState
    model: str
    turns: int
    """Turns that finished."""
    history_tokens: int
    """Tokens that the next turn builds on."""
    usage: Usage
    """Over all turns that finished. Each prompt counts whole, history included."""
    last_cached_tokens: int
    """Of the last turn's prompt."""
    prefill_worker: str
    """Of the last turn; empty where decode computed the prompt itself."""
    decode_worker: str
    failed_turns: int
    """Turns that failed or were cancelled: each left the session as it was before."""
    last_failure: str
    """Why the last of them did."""
    created_unix_s: float
    """Seconds since the Unix epoch, as the next two."""
    updated_unix_s: float
    """When the last turn ended."""
    expires_unix_s: float
    """When it is forgotten unless a turn comes before."""


@dataclass(frozen=True, slots=True)
class SessionTurn:
    """The turn of a session that a request was."""

    session_id: str
    turn: int
    """1 for the session's first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time went: instants in seconds since the router received the request, None where a stage did not happen."""

    admitted_at_s: float | None
    placed_at_s: float | None
    """Workers were chosen."""
    reserved_at_s: float | None
    """Decode held the blocks for the whole prompt."""
    prefill_started_at_s: float | None
    first_token_at_s: float | None
    kv_received_at_s: float | None
    """Decode held the prompt's KV."""
    last_token_at_s: float | None
    finished_at_s: float | None
    prefill_queue_s: float
    """In the prefill engine's queue, by the worker's clock."""
    prefill_s: float
    """Computing the prompt, by the worker's clock."""
    handoff_s: float
    """From the end of prefill to the KV in decode's pool."""
    handoff_bytes: int
    preemptions: int
    """Times that decode ran out of blocks and recomputed this request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try on a pair of workers; the last one of a finished request succeeded."""

    prefill_worker: str
    """Empty where decode computed the prompt itself."""
    decode_worker: str
    failure: str
    """Why it was given up; empty for the one that succeeded."""
    resumed_tokens: int
    """Tokens the client already had when it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result(Completion):
    """A finished request; as a completion, its first one."""

    request_id: str
    model: str
    completions: tuple[Completion, ...]
    """All of them, the first one too."""
    seed: int
    """Repeating the request with this seed repeats its tokens."""
    usage: Usage
    timings: Timings
    attempts: tuple[Attempt, ...]
    session: SessionTurn | None = None
    """Set where it was a session's turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """The served model, and who serves it now."""

    model: str
    fingerprint: str
    """Identifies the weights."""
    dtype: str
    vocab_size: int
    max_context_tokens: int
    """Longest sequence, prompt and output together."""
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    workers: tuple[WorkerInfo, ...]
