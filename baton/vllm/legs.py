"""What the workers' sides of a foreign request take and tell: the seam between the protocol and the work. Pure data.

    prefill leg   Placed ─▶ Tokens (the first one) ─▶ Held ─▶ Finished      the KV stays, for its time to live
    decode leg    Tokens (prefill's) ─▶ Placed ─▶ Tokens … ─▶ Finished      for each choice

A leg's iterator is the lease on what the request holds: closing it frees everything, but for KV that a finished prefill leg holds.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Protocol

from baton.types import (
    NO_TRACE,
    FinishReason,
    SamplingParams,
    Sequence,
    TokenChunk,
    TraceContext,
)
from baton.vllm.handoff import HandedOver


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignRequest:
    """A `GenerateRequest` that can be served as it stands."""

    request_id: str
    """The router's: both legs have the same one."""
    prompt: tuple[int, ...]
    sampling: SamplingParams
    """Resolved."""
    handed: HandedOver | None = None
    """What the prefill leg handed over, as the router passed it on."""
    trace: TraceContext = NO_TRACE
    """The router's call."""

    def sequence(self, choice: int = 0) -> Sequence:
        """Of one of the `n` choices."""
        return Sequence(self.prompt, (), replace(self.sampling, choice=choice))

    def as_prefill(self) -> "ForeignRequest":
        """What a prefill leg computes: one token, chosen as if none could end the output, after which the KV stays."""
        raw = replace(
            self.sampling,
            max_tokens=2,
            min_tokens=0,
            n=1,
            stop=(),
            stop_token_ids=(),
            ignore_eos=True,
        )
        return replace(self, sampling=raw)


@dataclass(frozen=True, slots=True)
class Placed:
    """A choice has its blocks; it waited for them until now."""

    choice: int
    cached_tokens: int
    """Prompt tokens that a prefix cache held."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """The next tokens of a choice."""

    choice: int
    chunk: TokenChunk


@dataclass(frozen=True, slots=True)
class Held:
    """The prompt's KV can be pulled from here."""

    handed: HandedOver


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a choice."""

    choice: int
    reason: FinishReason


LegEvent = Placed | Tokens | Held | Finished


class PrefillLeg(Protocol):
    """A prefill worker's side; `prefill_worker.foreign` is one."""

    def run(self, request: ForeignRequest) -> AsyncGenerator[LegEvent, None]: ...

    def abort(self, request_id: str) -> None:
        """Frees the KV that is held for a request. Idempotent."""
        ...


class DecodeLeg(Protocol):
    """A decode worker's side; `decode_worker.foreign` is one."""

    def run(self, request: ForeignRequest, timeout_s: float) -> AsyncGenerator[LegEvent, None]: ...
