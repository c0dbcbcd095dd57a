"""The KV transfer seam: how a decode worker takes a prompt's KV from a prefill worker.

    decode                                   prefill
    transport.ready(address, key, piece) ──▶ source.ready       waits, bounded, until the piece is computed
                                    ◀─────── Ready | Underway | Refused
    transport.pull(address, PullRequest) ──▶ source.pull        copies [first, last) out of the pool
                                    ◀─────── (KVMeta, buffer)   the buffer is decode's: prefill may die now
    import into the pool, which verifies, leave the context: the buffer is dropped and its byte credit returned

A long prompt goes piece by piece while the rest of it is computed (`baton.transfer.layout.handoff_pieces`): ready, pull, import, and
again, until ready tells that the prompt is done; then the pieces that are left. Credit is taken only once a piece exists, so a
pull that waits for a slow prefill holds nothing that another pull needs.
Failures cross the wire as values (`Refused`), not as pickled exceptions. Both sides run in their worker's event loop.
"""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from baton.kv.spec import KVSpec, SealedKV, WireKV
from baton.types import NO_TRACE, AttemptKey, PositionLogprobs, TraceContext


@dataclass(frozen=True, slots=True)
class Ready:
    """The prompt is computed and its KV is held for decode."""

    first_token: int
    """What prefill chose at output index len(sequence.generated)."""
    done_unix_s: float
    """When, by prefill's wall clock."""
    logprobs: PositionLogprobs | None = None
    """Of the first token, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a prompt that decode pulls by itself; see `baton.transfer.layout.handoff_pieces`."""

    last: int
    """The token after it."""
    has_begun: bool
    """The attempt is there, or was: there is none to wait for. So it is once decode has the piece before."""


@dataclass(frozen=True, slots=True)
class Underway:
    """The piece that was asked for can be pulled; what follows it is still being computed."""


@dataclass(frozen=True, slots=True)
class Refused:
    """Why prefill has no KV to give."""

    reason: str
    """`BatonError.reason` of the error that the decode side raises."""
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PullRequest:
    """Which KV decode wants."""

    key: AttemptKey
    first: int
    last: int
    """Tokens [first, last)."""
    digest: str
    """Decode's KV spec digest; prefill refuses any other than its own."""
    timeout_s: float = 30.0
    """When the source gives up; set by the transport, from the caller's. Decode's cancellation can get lost on its way."""
    trace: TraceContext = NO_TRACE
    """Decode's handoff."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVMeta:
    """Travels with a buffer and says exactly what it is. `key.attempt` is the epoch: a buffer of an earlier attempt is refused."""

    key: AttemptKey
    first: int
    last: int
    dtype: str
    digest: str
    checksum: int
    """XXH3-64 of the buffer's bytes when they left the pool."""


class KVSource(Protocol):
    """Prefill's side; implemented by the prefill worker."""

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        """Waits until the attempt's prompt is computed, or the piece of it that is asked for; the attempt may not have reached this worker
        yet. Refused after `timeout_s`, or once the attempt failed or was released. A source may keep to whole prompts.
        """
        ...

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        """Copies the KV out; the buffer is None where refused. Pulling up to the sequence's last token hands the attempt over: prefill
        then frees its blocks.
        """
        ...


class KVTransport(Protocol):
    """Decode's side. All methods raise `UnavailableError` where the peer is gone, `PreconditionError` where it refuses, and
    `DeadlineError` after `timeout_s`.
    """

    async def ready(
        self, address: str, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway:
        """See `KVSource.ready`."""
        ...

    def pull(
        self, address: str, request: PullRequest, *, spec: KVSpec, timeout_s: float
    ) -> AbstractAsyncContextManager[SealedKV]:
        """The buffer, read-only, valid inside the context only, and the checksum that it was sealed with: whoever copies the bytes
        verifies them. Waits for the buffer's bytes of credit first. `spec` is decode's, the one that `request.digest` names. Raises
        `CorruptKVError` where digest, epoch, range or shape differ from what was asked.
        """
        ...

    async def close(self) -> None: ...
