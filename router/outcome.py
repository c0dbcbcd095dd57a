"""How an attempt went: how far it came, why it failed, what its workers told. Plain data."""

from dataclasses import dataclass
from enum import Enum

from baton.errors import (
    AbortedError,
    BatonError,
    CorruptKVError,
    DeadlineError,
    InternalError,
    InvalidRequestError,
    UnavailableError,
)
from baton.types import WorkerId


class Stage(Enum):
    """What an attempt is waiting for; named in deadline errors."""

    RESERVE = "reserve"
    PREFILL = "prefill"
    HANDOFF = "handoff"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt was given up."""

    error: BatonError
    blame: WorkerId
    """The worker to avoid next time."""

    @property
    def retryable(self) -> bool:
        """Whether another attempt can succeed."""
        return not isinstance(self.error, InvalidRequestError | DeadlineError | AbortedError)

    @property
    def suspicious(self) -> bool:
        """Whether other requests, too, should rather go elsewhere."""
        return isinstance(self.error, UnavailableError | CorruptKVError | InternalError)


@dataclass(slots=True)
class AttemptStats:
    """What the workers told about their part."""

    cached_tokens: int = 0
    """Leading tokens found in a prefix cache, on either side."""
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    handoff_s: float = 0.0
    handoff_bytes: int = 0
    preemptions: int = 0
