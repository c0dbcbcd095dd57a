"""The engine's record of one request: its tokens, its blocks, and how far it has come.

WAITING ──▶ RUNNING ──▶ (gone)          LOCAL; also DECODE after a preemption
   ▲          │
   └──────────┘ preempted
WAITING ──▶ RUNNING ──▶ HELD ──▶ (gone)       PREFILL: KV waits to be exported
WAITING ──▶ RESERVED ──▶ RUNNING ──▶ (gone)   DECODE: KV arrives by import
"""

import math
from collections import deque
from collections.abc import Iterator
from enum import Enum

from baton.engine.base import EngineRequest, Mode
from baton.errors import FieldViolation
from baton.kv.prefix import child_hash, root_of
from baton.types import AttemptKey, BlockHash, FinishReason, Sequence


class Stage(Enum):
    """See the module docstring."""

    WAITING = "waiting"
    RESERVED = "reserved"
    RUNNING = "running"
    HELD = "held"


def find_violations(sequence: Sequence, vocab_size: int) -> Iterator[FieldViolation]:
    """What no token could be computed or chosen by. Routers send none of it, but a step that fails for it would fail everybody's."""
    params = sequence.sampling
    listed = {
        "prompt": sequence.tokens,
        "sampling.logit_bias": [token for token, _ in params.logit_bias],
        "sampling.stop_token_ids": params.stop_token_ids,
    }
    for name, ids in listed.items():
        if not all(0 <= token < vocab_size for token in ids):
            yield FieldViolation(name, f"a token id is not in [0, {vocab_size})")
    holds = {
        "logit_bias": all(math.isfinite(bias) for _, bias in params.logit_bias),
        "temperature": 0 <= params.temperature < math.inf,
        "top_p": 0 < params.top_p <= 1,
        "min_p": 0 <= params.min_p <= 1,
        "repetition_penalty": 0 < params.repetition_penalty < math.inf,
        "presence_penalty": math.isfinite(params.presence_penalty),
        "frequency_penalty": math.isfinite(params.frequency_penalty),
        "logprobs": params.logprobs is None or params.logprobs >= 0,
    }
    for name, is_so in holds.items():
        if not is_so:
            yield FieldViolation(f"sampling.{name}", "is out of range")


class RequestState:
    """Mutable state of one request; owned by the engine.

    [0, num_computed)             KV is in the blocks of `table`
    [num_computed, len(tokens))   known, not yet computed
    """

    def __init__(self, request: EngineRequest, block_size: int) -> None:
        sequence = request.sequence
        self.key: AttemptKey = request.key
        self.mode = request.mode
        self._exports = deque(request.export)
        self.params = sequence.sampling
        self.prompt = sequence.prompt
        self.output = list(sequence.generated)
        self.tokens = [*sequence.prompt, *sequence.generated]
        self.num_given = len(self.tokens)
        """Tokens that came with the request."""
        self.stage = Stage.WAITING
        self.table: list[int] = []
        self.num_computed = 0
        self.num_published = 0
        """Leading blocks of the table that the prefix cache knows."""
        self.started = False
        self.root = root_of(sequence.cache_salt)
        """The parent of the first block's hash."""
        self._block_size = block_size
        self._hashes: list[BlockHash] = []

    @property
    def awaits_import(self) -> bool:
        """Whether its KV comes from another worker once it has blocks."""
        return self.mode is Mode.DECODE and not self.started

    def hashes(self, num_blocks: int) -> list[BlockHash]:
        """Hashes of the first `num_blocks` blocks, all of which must be full of known tokens."""
        while len(self._hashes) < num_blocks:
            index = len(self._hashes)
            parent = self._hashes[-1] if index else self.root
            self._hashes.append(child_hash(parent, self.block_tokens(index)))
        return self._hashes[:num_blocks]

    def block_tokens(self, index: int) -> list[int]:
        """The tokens of one full block."""
        return self.tokens[index * self._block_size : (index + 1) * self._block_size]

    def take_exports(self) -> list[tuple[int, int]]:
        """The token ranges to copy out of which everything is computed, each once. One that was preempted and comes again makes no copy
        twice.
        """
        due: list[tuple[int, int]] = []
        while self._exports and self._exports[0][1] <= self.num_computed:
            due.append(self._exports.popleft())
        return due

    def append(self, token_id: int) -> int:
        """Adds a generated token; returns its output position."""
        self.tokens.append(token_id)
        self.output.append(token_id)
        return len(self.output) - 1

    def finish_reason(
        self, eos_token_ids: frozenset[int], max_context_tokens: int
    ) -> FinishReason | None:
        """Whether the newest token ends the request. (The sampler cannot choose an end before min_tokens.)"""
        newest = self.output[-1]
        if newest in self.params.stop_token_ids:
            return FinishReason.STOP
        if newest in eos_token_ids and not self.params.ignore_eos:
            return FinishReason.STOP
        if len(self.output) >= self.params.max_tokens or len(self.tokens) >= max_context_tokens:
            return FinishReason.LENGTH
        return None
