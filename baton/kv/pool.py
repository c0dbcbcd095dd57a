"""The KV tensors: one paged pool for all layers, and its copies to and from wire layout.

Shapes: L layers, B blocks, S tokens in a block, H KV heads, D head size, T tokens. Slot of a token: block * S + offset.

Which block belongs to whom is not known here (`baton.kv.blocks`); slots are written before they are read, and slots beyond a
sequence's length are masked, so blocks are never cleared. Used by the engine thread only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.kv.spec import KVDtype, KVSpec, WireKV
from baton.kv.wire_buffers import WireBuffers

TORCH_DTYPES = {
    KVDtype.FLOAT32: torch.float32,
    KVDtype.BFLOAT16: torch.bfloat16,
    KVDtype.FLOAT16: torch.float16,
}


def size_pool(
    *,
    kv_pool_tokens: int | None,
    free_bytes: int,
    token_bytes: int,
    block_size_tokens: int,
    most_tokens: int,
) -> int:
    """Number of blocks: for `kv_pool_tokens`, or else for all of `free_bytes`, but for no more than `most_tokens`, which is what all
    sequences could ever use. 0 where memory has no room for one block.
    """
    if kv_pool_tokens is not None:
        return -(-kv_pool_tokens // block_size_tokens)
    affordable = free_bytes // (token_bytes * block_size_tokens)
    return min(affordable, -(-most_tokens // block_size_tokens))


@dataclass(frozen=True, slots=True)
class LayerKV:
    """One layer's part of the pool."""

    keys: Tensor
    """[B, S, H, D], contiguous."""
    values: Tensor

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Stores one token per slot."""
        # slots: [T]  keys, values: [T, H, D]
        if keys.dtype == torch.float16:
            # What overflows must not outlive its sequence: see `KVPool`.
            keys, values = keys.nan_to_num(), values.nan_to_num()
        self.keys.flatten(0, 1).index_copy_(0, slots, keys)
        self.values.flatten(0, 1).index_copy_(0, slots, values)

    def gather(self, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of blocks, one after another."""
        # blocks: [N] -> keys, values: [N * S, H, D]
        shape = (-1, *self.keys.shape[2:])
        keys = self.keys.flatten(1).index_select(0, blocks)
        values = self.values.flatten(1).index_select(0, blocks)
        return keys.view(shape), values.view(shape)


class KVPool:
    """Keys and values of every block, `[2, L, B, S, H, D]`. Every slot always holds finite numbers: a masked slot is multiplied by
    zero, and what is not finite would survive that and reach whichever sequence has the block next.
    """

    def __init__(
        self, spec: KVSpec, *, num_blocks: int, block_size_tokens: int, device: str
    ) -> None:
        self._spec = spec
        self._block_size = block_size_tokens
        self._buffers = WireBuffers()
        shape = (
            2,
            spec.num_layers,
            num_blocks,
            block_size_tokens,
            spec.num_kv_heads,
            spec.head_dim,
        )
        dtype = TORCH_DTYPES[spec.dtype]
        # On CPU numpy allocates: the kernel hands out zero pages only when they are first written.
        self._host: WireKV | None = None
        if device == "cpu":
            self._host = np.zeros(shape, spec.dtype.wire_dtype)
            self.data = torch.from_numpy(self._host).view(dtype)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = tuple(LayerKV(*self.data[:, layer]) for layer in range(spec.num_layers))

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> WireKV:
        """A new wire buffer with the KV of tokens [first, last) of the sequence in these blocks."""
        wire = self._buffers.empty(self._spec.wire_shape(last - first), self._spec.dtype.wire_dtype)
        if self._host is not None:
            out, pool = _by_token(wire), _by_slot(self._host)
            for at, slot, count in self._runs(block_table, first, last):
                out[:, at : at + count] = pool[:, slot : slot + count]
            return wire
        slots = self._slots(block_table, first, last)
        chosen = self.data.flatten(2, 3).index_select(2, slots)
        torch.from_numpy(wire).copy_(chosen.view(_wire_torch_dtype(self._spec.dtype)))
        return wire

    def write_kv(self, block_table: Sequence[int], first: int, kv: WireKV) -> None:
        """Writes a wire buffer as the KV of tokens [first, first + T). The buffer is not kept and may be read-only."""
        tokens = kv.shape[2]
        assert kv.shape == self._spec.wire_shape(tokens), kv.shape
        assert kv.dtype == self._spec.dtype.wire_dtype, kv.dtype
        if self._host is not None:
            source, pool = _by_token(kv), _by_slot(self._host)
            for at, slot, count in self._runs(block_table, first, first + tokens):
                pool[:, slot : slot + count] = source[:, at : at + count]
            return
        # torch takes no read-only arrays, so the bytes go through pinned memory, which the copy to the device wants anyway.
        staged = torch.empty(kv.shape, dtype=_wire_torch_dtype(self._spec.dtype), pin_memory=True)
        np.copyto(staged.numpy(), kv)
        slots = self._slots(block_table, first, first + tokens)
        values = staged.to(self.data.device).view(self.data.dtype)
        self.data.flatten(2, 3).index_copy_(2, slots, values)

    def _runs(
        self, block_table: Sequence[int], first: int, last: int
    ) -> Iterator[tuple[int, int, int]]:
        """Cuts tokens [first, last) into runs whose slots are consecutive.

        [first + at, first + at + count)   tokens of the run
        [slot, slot + count)               their slots
        """
        size, token = self._block_size, first
        while token < last:
            index, offset = divmod(token, size)
            slot, end = block_table[index] * size + offset, index + 1
            while end * size < last and block_table[end] == block_table[end - 1] + 1:
                end += 1
            count = min(last, end * size) - token
            yield token - first, slot, count
            token += count

    def _slots(self, block_table: Sequence[int], first: int, last: int) -> Tensor:
        # -> [last - first]
        runs = self._runs(block_table, first, last)
        slots = [torch.arange(slot, slot + count) for _, slot, count in runs]
        return torch.cat([torch.empty(0, dtype=torch.int64), *slots]).to(self.data.device)


def _by_token(wire: WireKV) -> WireKV:
    # [2, L, T, H, D] -> [2 * L, T, H * D]
    planes, num_layers, tokens, heads, head_dim = wire.shape
    return wire.reshape(planes * num_layers, tokens, heads * head_dim)


def _by_slot(pool: WireKV) -> WireKV:
    # [2, L, B, S, H, D] -> [2 * L, B * S, H * D]
    planes, num_layers, blocks, size, heads, head_dim = pool.shape
    return pool.reshape(planes * num_layers, blocks * size, heads * head_dim)


def _wire_torch_dtype(dtype: KVDtype) -> torch.dtype:
    return torch.float32 if dtype is KVDtype.FLOAT32 else torch.uint16
