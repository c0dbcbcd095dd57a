"""What computes a step's logits: the seam below the runner. One implementation is of torch, one of native kernels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from baton.engine.batch import BatchRow
from baton.kv.spec import SealedKV


@dataclass(frozen=True, slots=True)
class Logits:
    """Of the rows that want a token."""

    rows: Sequence[int]
    """Whose, by their number in the batch."""
    values: Tensor
    """[R, V], float32; valid until the next step."""


class Backend(Protocol):
    """A model and its KV pool. Called by the engine thread, in torch's inference mode."""

    def compute(self, rows: Sequence[BatchRow]) -> Logits:
        """Computes all rows in one pass; see `baton.engine.batch.Runner.run`."""
        ...

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        """See `baton.engine.batch.Runner.read_kv`."""
        ...

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        """See `baton.engine.batch.Runner.write_kv`."""
        ...
