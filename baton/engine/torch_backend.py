"""Torch as the runner's backend: the decoder over its KV pool, on CPU and CUDA."""

from collections.abc import Sequence

import torch

from baton.engine.attention import plan_batch
from baton.engine.backend import Logits
from baton.engine.batch import BatchRow
from baton.engine.model import Decoder
from baton.kv.pool import TORCH_DTYPES, KVPool
from baton.kv.spec import KVSpec, SealedKV


class TorchBackend:
    """Implements `Backend`."""

    def __init__(
        self,
        decoder: Decoder,
        spec: KVSpec,
        *,
        windows: frozenset[int | None],
        num_blocks: int,
        block_size_tokens: int,
        device: torch.device,
    ) -> None:
        """`windows`: those of the model's layers."""
        self.decoder, self._windows, self._device = decoder, windows, device
        self._block_size, self._dtype = block_size_tokens, TORCH_DTYPES[spec.dtype]
        self.pool = KVPool(
            spec, num_blocks=num_blocks, block_size_tokens=block_size_tokens, device=device.type
        )

    def compute(self, rows: Sequence[BatchRow]) -> Logits:
        plan = plan_batch(
            rows,
            block_size=self._block_size,
            windows=self._windows,
            dtype=self._dtype,
            device=self._device,
        )
        return Logits(plan.sampled_rows, self.decoder(plan, self.pool))

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        return self.pool.read_kv(block_table, first, last)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        self.pool.write_kv(block_table, first, kv)
