"""What a router tells of itself at one instant, as plain data: the one form behind the JSON of `/status`, the page, and `baton top`.

Holds ids, counts and times; never a prompt, an output, or what a client's error message may quote of them. Fields' docstrings are the
descriptions in the schema. Additions are compatible, anything else is not.
"""

from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from baton.types import Role


class _Documented:
    __slots__ = ()
    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(use_attribute_docstrings=True)


class WorkerState(Enum):
    """What keeps a worker from new requests, if anything."""

    READY = "ready"
    SUSPECT = "suspect"
    """It failed a request a moment ago: it comes last."""
    SILENT = "silent"
    """Its heartbeat is late: it comes last."""
    STALLED = "stalled"
    """Its engine makes no progress."""
    DRAINING = "draining"


class RequestState(Enum):
    """How far a request has come."""

    QUEUED = "queued"
    """Not admitted yet."""
    RUNNING = "running"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    """By its client, or the client went away."""
    FAILED = "failed"


class StageName(Enum):
    """What an attempt does or waits for."""

    RESERVE = "reserve"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus(_Documented):
    """The served model."""

    name: str
    fingerprint: str
    dtype: str
    max_context_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterStatus(_Documented):
    """The router process."""

    version: str
    uptime_s: float
    draining: bool
    """Refuses new requests."""
    model: ModelStatus | None
    """None before the first worker joined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBlocks(_Documented):
    """The blocks of a worker's KV pool, by state."""

    total: int
    free: int
    """Hold nothing."""
    cached: int
    """Hold a reusable prefix that no request uses."""
    reserved: int
    """Held for a sequence whose KV has not arrived."""
    used: int
    """Held by sequences being computed."""
    in_flight: int
    """Hold finished KV that waits to be handed over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus(_Documented):
    """A member of the fleet, as it last reported."""

    worker_id: str
    role: Role
    can_be: tuple[Role, ...]
    """Roles that it can take; empty for workers that do not tell."""
    state: WorkerState
    node: str
    device: str
    weights: str
    """How it keeps the model's weights."""
    version: str
    member_s: float
    """How long it has been a member."""
    heard_s: float
    """How long ago it last reported."""
    running_requests: int
    waiting_requests: int
    """Wait for blocks."""
    queued_prefill_tokens: int
    """Prompt tokens that are not computed yet."""
    kv: KvBlocks
    block_size_tokens: int
    prefill_tokens_per_s: float
    """Lately; 0 before the first."""
    decode_step_s: float
    """Mean length of the steps that generate tokens, lately; 0 before the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus(_Documented):
    """A stage of an attempt. Times are seconds after the request was received."""

    stage: StageName
    start_s: float
    end_s: float | None
    """None while it lasts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStatus(_Documented):
    """One try at one of a request's completions, on one pair of workers."""

    choice: int
    """Which completion."""
    prefill_worker: str
    """Empty where decode computes the prompt itself."""
    decode_worker: str
    stages: tuple[StageStatus, ...]
    failure: str
    """Why it was given up; empty where it was not."""
    resumed_tokens: int
    """Tokens that earlier attempts had generated."""
    handoff_s: float
    handoff_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestStatus(_Documented):
    """A request, live or ended. Times that are not told as Unix times are seconds after it was received."""

    serial: int
    """Which of all requests of this view it is, in order of receipt: tells those apart that have one id, or none."""
    request_id: str
    """Empty until it is validated."""
    tenant: str
    state: RequestState
    waits_for: str
    """The stage that it is in; empty once it has ended."""
    session_id: str
    """Empty where it is no turn of a session."""
    priority: int
    received_unix_s: float
    age_s: float
    """Until now or, of one that has ended, until its end."""
    admitted_s: float | None
    placed_s: float | None
    """When its first attempt began."""
    first_token_s: float | None
    """When its client was sent the first token."""
    last_token_s: float | None
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt, found in a prefix cache."""
    completion_tokens: int
    max_tokens: int
    """Of each completion."""
    choices: int
    attempts: tuple[AttemptStatus, ...]
    error: str
    """The reason of one that failed; empty otherwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestsStatus(_Documented):
    """The requests of this router."""

    running: int
    queued: int
    live: tuple[RequestStatus, ...]
    """In order of receipt; where there are many, the oldest only."""
    ended: tuple[RequestStatus, ...]
    """The last ones that ended, the latest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionStatus(_Documented):
    """A session, after its last turn at this router."""

    session_id: str
    tenant: str
    generating: bool
    """A turn runs."""
    turns: int
    failed_turns: int
    history_tokens: int
    prompt_tokens: int
    """Of all turns, each with the history that it came with."""
    cached_tokens: int
    """Of those, found in a prefix cache."""
    last_cached_tokens: int
    completion_tokens: int
    decode_worker: str
    """Of the last turn."""
    updated_unix_s: float
    expires_unix_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionsStatus(_Documented):
    """Conversations that routers keep."""

    idle: int | None
    """In the store, as last counted; None for who may not know of others'."""
    generating: int | None
    recent: tuple[SessionStatus, ...]
    """Those of which this router served a turn, the latest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyStatus(_Documented):
    """Percentiles over the window, right to 5 %, and for each slot of it."""

    count: int
    p50_s: float | None
    p90_s: float | None
    p99_s: float | None
    p50_series_s: tuple[float | None, ...]
    """None for a slot without any."""
    p99_series_s: tuple[float | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateStatus(_Documented):
    """How much of something there was a second."""

    per_s: float
    """Over the last five seconds."""
    mean_per_s: float
    """Over the window."""
    series_per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficStatus(_Documented):
    """The last minutes, in slots of a second, the oldest first; the present second is not part of them."""

    window_s: float
    slot_s: float
    ttft: LatencyStatus
    """From receipt to the first token that the client was sent."""
    itl: LatencyStatus
    """Between consecutive messages with tokens."""
    requests: RateStatus
    """That ended."""
    failures: RateStatus
    """Of them, that failed."""
    prompt_tokens: RateStatus
    """Of requests that ended."""
    completion_tokens: RateStatus
    handoff_bytes: RateStatus
    """KV from prefill to decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSnapshot(_Documented):
    """A router's state at one instant: everything for who administers, and for a tenant what is its own."""

    at_unix_s: float
    tenant: str | None
    """Whose view this is; None is everybody's."""
    router: RouterStatus
    fleet: tuple[WorkerStatus, ...] | None
    """None for who may not know of the workers."""
    requests: RequestsStatus
    sessions: SessionsStatus
    traffic: TrafficStatus


SNAPSHOT: TypeAdapter[StatusSnapshot] = TypeAdapter(StatusSnapshot)
"""To JSON and back."""
