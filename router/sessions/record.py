"""What a session is: plain data, and its compact form in a store. No I/O, no clock.

    Session    what is told of it: counts, times, the last turn
    History    what its next turn builds on: tokens and, of conversations, messages; and the last turn's answer
    Lease      the right to run its turn, for a while. Its id begins with the mark of the request that the turn is

Instants are seconds since the Unix epoch, because stores outlive processes.
"""

import base64
import hashlib
import json
import math
import secrets
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import NewType

import numpy as np

from baton.codec import chunk_from_proto, chunk_to_proto
from baton.types import FinishReason, TokenChunk
from baton.v1 import common_pb2, inference_pb2
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
    earlier_marks: tuple[str, ...] = ()
    """Of the requests that some turns before the last one were."""
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
class Answered:
    """What the last turn's client was told, or was about to be."""

    seed: int
    reason: FinishReason
    tokens: TokenChunk


@dataclass(frozen=True, slots=True)
class History:
    """What a session's next prompt begins with."""

    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    messages: tuple[ChatTurn, ...] = ()
    """Empty where the turns were not chats."""
    answer_in_tokens: bool = True
    """Of a conversation: whether the tokens end with the last message, the answer, or before it."""
    answered: Answered | None = None
    """None before the first turn, and where its request had no id by which to ask for it again."""

    @property
    def last_prompt(self) -> "array[int]":
        """Of the turn that was answered."""
        assert self.answered is not None
        num_answered = len(self.answered.tokens.token_ids) if self.answer_in_tokens else 0
        return self.tokens[: len(self.tokens) - num_answered]


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to run a session's turn. Who holds no lease changes nothing."""

    lease_id: str
    until_s: float
    holder: str
    """Who runs the turn. Whoever goes on with it takes the lease over under its id: those before may still finish it, not give it up."""


def mark_of(request: inference_pb2.GenerateRequest) -> str:
    """The same for a client that asks again, with the seed that it was told or without it, and for nothing else that is asked under
    the same id. Empty where a request has no id, or is no turn of a session.
    """
    if not (request.request_id and request.session_id):
        return ""
    asked = inference_pb2.GenerateRequest()
    asked.CopyFrom(request)
    asked.sampling.SetInParent()
    asked.sampling.ClearField("seed")
    return hashlib.sha256(asked.SerializeToString(deterministic=True)).hexdigest()[:32]


def new_lease_id(mark: str) -> str:
    """Of a turn that is the request of that mark."""
    return f"{mark}-{secrets.token_hex(8)}"


def new_holder() -> str:
    """Of a lease, each time that it is taken."""
    return secrets.token_hex(8)


def mark_in(lease_id: str) -> str:
    """The mark of the request; empty where it had none."""
    return lease_id.rpartition("-")[0]


def is_same_turn(lease_id: str, other_id: str) -> bool:
    """Whether two leases are of one turn: the same one, or of a request that was asked twice."""
    return lease_id == other_id or mark_in(lease_id) == mark_in(other_id) != ""


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
    values = json.loads(data)
    values["earlier_marks"] = tuple(values.get("earlier_marks", ()))
    return Session(key=key, leased_until_s=leased_until_s, **values)


def encode_tokens(tokens: Sequence[int]) -> bytes:
    """Four bytes for each."""
    return np.asarray(tokens, dtype="<u4").tobytes()


def encode_messages(history: History) -> bytes:
    """All of a history but its tokens; empty where there is nothing else."""
    if not history.messages and history.answered is None:
        return b""
    pairs = [[message.role, message.content] for message in history.messages]
    values: list[object] = [history.answer_in_tokens, pairs]
    if (answered := history.answered) is not None:
        tokens = chunk_to_proto(answered.tokens).SerializeToString()
        values += [answered.seed, answered.reason.value, base64.b64encode(tokens).decode()]
    return json.dumps(values, ensure_ascii=False).encode("utf-8", "surrogatepass")


def decode_history(tokens: bytes, messages: bytes) -> History:
    """The inverse of `encode_tokens` and `encode_messages`."""
    ids = array("I", np.frombuffer(tokens, dtype="<u4").astype(np.uintc).tobytes())
    if not messages:
        return History(ids)
    answer_in_tokens, pairs, *answered = json.loads(messages.decode("utf-8", "surrogatepass"))
    return History(
        ids,
        tuple(ChatTurn(role, content) for role, content in pairs),
        answer_in_tokens,
        _answered(*answered) if answered else None,
    )


def _answered(seed: int, reason: str, tokens: str) -> Answered:
    chunk = common_pb2.TokenChunk.FromString(base64.b64decode(tokens))
    return Answered(seed, FinishReason(reason), chunk_from_proto(chunk))


def bounded_s(asked_s: float, limit_s: float) -> float:
    """A duration that a client asks for, 0 for the longest. Precondition: neither negative nor NaN."""
    assert asked_s >= 0
    return min(asked_s, limit_s) if asked_s and math.isfinite(asked_s) else limit_s
