"""What a session is: plain data, and its compact form in a store. No I/O, no clock.

    Session    what is told of it: counts, times, the last turn
    History    what its next turn builds on: tokens and, of conversations, messages
    Lease      the right to run its turn, for a while

Instants are seconds since the Unix epoch, because stores outlive processes.
"""

import json
import math
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NewType

import numpy as np

from router.chat import ChatTurn

SessionId = NewType("SessionId", str)


@dataclass(frozen=True, slots=True)
class SessionKey:
    """A session's name. Another tenant's is another session."""

    tenant: str
    """Empty where callers have no identity."""
    session_id: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is told of a session. What has not come to be is 0 or empty."""

    key: SessionKey
    model: str
    created_s: float
    updated_s: float
    """When the last turn ended."""
    ttl_s: float
    """Longest life."""
    idle_s: float
    """Longest pause between turns."""
    turns: int = 0
    """Those that finished."""
    history_tokens: int = 0
    prompt_tokens: int = 0
    """Of all turns that finished, each with the history that it came with; and so are the next two."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    last_cached_tokens: int = 0
    prefill_worker: str = ""
    """Of the last turn."""
    decode_worker: str = ""
    cache_salt: str = ""
    last_lease_id: str = ""
    failed_turns: int = 0
    last_failure: str = ""
    """Why the last of them failed."""
    leased_until_s: float = 0.0
    """A turn runs, at most until then."""

    @property
    def expires_s(self) -> float:
        """When it is forgotten, unless a turn runs."""
        return min(self.created_s + self.ttl_s, self.updated_s + self.idle_s)

    def is_generating(self, now_s: float) -> bool:
        """Whether a turn runs."""
        return self.leased_until_s > now_s


@dataclass(frozen=True, slots=True)
class History:
    """What a session's next prompt begins with."""

    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    messages: tuple[ChatTurn, ...] = ()
    """Empty where the turns were not chats."""
    answer_in_tokens: bool = True
    """Of a conversation: whether the tokens end with the last message, the answer, or before it."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a session's turn. Who holds no lease changes nothing."""

    lease_id: str
    until_s: float


def new_session_id(now_s: float) -> SessionId:
    """In the order of their creation as text, and not to be guessed."""
    return SessionId(f"s{int(now_s * 1000):012x}{secrets.token_hex(10)}")


def encode_session(session: Session) -> bytes:
    """Without the lease, which stores keep beside it."""
    values = asdict(session)
    for name in ("key", "leased_until_s"):
        del values[name]
    return json.dumps(values, ensure_ascii=False).encode()


def decode_session(key: SessionKey, data: bytes, leased_until_s: float) -> Session:
    """The inverse of `encode_session`."""
    return Session(key=key, leased_until_s=leased_until_s, **json.loads(data))


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """Four bytes for each."""
    return np.asarray(tokens, dtype="<u4").tobytes()


def encode_messages(history: History) -> bytes:
    """Empty where there are none."""
    if not history.messages:
        return b""
    pairs = [[message.role, message.content] for message in history.messages]
    return json.dumps([history.answer_in_tokens, pairs], ensure_ascii=False).encode(
        "utf-8", "surrogatepass"
    )


def decode_history(tokens: bytes, messages: bytes) -> History:
    """The inverse of `encode_tokens` and `encode_messages`."""
    ids = array("I", np.frombuffer(tokens, dtype="<u4").astype(np.uintc).tobytes())
    if not messages:
        return History(ids)
    answer_in_tokens, pairs = json.loads(messages.decode("utf-8", "surrogatepass"))
    return History(ids, tuple(ChatTurn(role, content) for role, content in pairs), answer_in_tokens)


def bounded_s(asked_s: float, limit_s: float) -> float:
    """A duration that a client asks for, 0 for the longest. Precondition: neither negative nor NaN."""
    assert asked_s >= 0
    return min(asked_s, limit_s) if asked_s and math.isfinite(asked_s) else limit_s
