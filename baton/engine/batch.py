"""What one engine step computes: the rows that the scheduler planned, as a runner takes them.

`baton.engine.engine` decides and keeps the books; a `Runner` owns the model and the KV tensors and does the arithmetic. The
torch runner and the simulated one implement the same protocol, and one thread calls them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from baton.engine.base import EngineInfo
from baton.kv.spec import SealedKV
from baton.types import PositionLogprobs, SamplingParams


@dataclass(frozen=True, slots=True)
class SampleInput:
    """What the sampler needs to choose a row's next token. The sequences are the engine's own: read, never kept or changed."""

    params: SamplingParams
    prompt: Sequence[int]
    output: Sequence[int]
    """Every generated token so far; the token to choose has output position len(output)."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One sequence's part of a step.

    [0, start)                         KV is in the pool
    [start, start + len(token_ids))    computed in this step; KV is written to the pool
    """

    token_ids: Sequence[int]
    start: int
    block_table: Sequence[int]
    """Pool blocks that hold tokens [0, start + len(token_ids)), in order; may be longer."""
    sample: SampleInput | None
    """Set where the last token's logits are to be sampled."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A chosen token."""

    token_id: int
    logprobs: PositionLogprobs | None


class Runner(Protocol):
    """Model and KV tensors. Blocks are numbered [0, info.num_blocks)."""

    @property
    def info(self) -> EngineInfo: ...

    def run(self, rows: Sequence[BatchRow]) -> list[Sampled | None]:
        """Computes all rows in one pass; result i belongs to row i and is None where `sample` is None. Which rows share a batch, and how
        a prompt is cut into rows, does not change what is chosen.
        """
        ...

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        """A new wire buffer with the KV of tokens [first, last) of the sequence in these blocks."""
        ...

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        """Writes a wire buffer as the KV of tokens [first, first + T). The buffer is not kept. Raises `CorruptKVError` where it is not
        what was sealed; then nothing of it is left.
        """
        ...
