"""The KV tensors: one paged pool for all layers, and its copies to and from wire layout.

Shapes: L layers, B blocks, S tokens in a block, H KV heads, D head size, T tokens. Slot of a token: block * S + offset.

Which block belongs to whom is not known here (`baton.kv.blocks`); slots are written before they are read, and slots beyond a
sequence's length are masked, so blocks are never cleared. Used by the engine thread only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from baton.errors import CorruptKVError
from baton.kv.checksum import RunningChecksum, sealed
from baton.kv.spec import KVDtype, KVSpec, SealedKV, WireKV
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
        self._planes: WireKV | None = None
        """On CPU the same memory, `[2 * L, B, S * H * D]`: the copies' view of it."""
        if device == "cpu":
            # Numpy allocates: the kernel hands out zero pages only when they are first written.
            host = np.zeros(shape, spec.dtype.wire_dtype)
            self._planes = host.reshape(2 * spec.num_layers, num_blocks, -1)
            self.data = torch.from_numpy(host).view(dtype)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=device)
        self.layers = tuple(LayerKV(*self.data[:, layer]) for layer in range(spec.num_layers))

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        """A new wire buffer with the KV of tokens [first, last) of the sequence in these blocks."""
        wire = self._buffers.empty(self._spec.wire_shape(last - first), self._spec.dtype.wire_dtype)
        if self._planes is None:
            slots = self._slots(block_table, first, last)
            chosen = self.data.flatten(2, 3).index_select(2, slots)
            torch.from_numpy(wire).copy_(chosen.view(_wire_torch_dtype(self._spec.dtype)))
            return sealed(wire)
        place, checksum = self._place(block_table, first, last), RunningChecksum()
        for plane, out in zip(self._planes, _by_plane(wire), strict=True):
            place.copy_out(plane, out)
            checksum.add(out)
        return SealedKV(wire, checksum.value)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        """Writes a wire buffer as the KV of tokens [first, first + T), and verifies it on the way. The buffer is not kept. Raises
        `CorruptKVError` where it is not what was sealed; then nothing of it is left in the pool.
        """
        tokens = kv.data.shape[2]
        assert kv.data.shape == self._spec.wire_shape(tokens), kv.data.shape
        assert kv.data.dtype == self._spec.dtype.wire_dtype, kv.data.dtype
        if self._planes is None:
            self._write_to_device(self._slots(block_table, first, first + tokens), kv)
            return
        place, checksum = self._place(block_table, first, first + tokens), RunningChecksum()
        for plane, source in zip(self._planes, _by_plane(kv.data), strict=True):
            checksum.add(source)
            place.copy_in(source, plane)
        try:
            checksum.compare(kv)
        except CorruptKVError:
            # Bytes that nobody vouches for may be numbers that are not finite.
            nothing = np.zeros_like(_by_plane(kv.data)[0])
            for plane in self._planes:
                place.copy_in(nothing, plane)
            raise

    def _write_to_device(self, slots: Tensor, kv: SealedKV) -> None:
        # torch takes no read-only arrays, so the bytes go through pinned memory, which the copy to the device wants anyway.
        dtype = _wire_torch_dtype(self._spec.dtype)
        staged = torch.empty(kv.data.shape, dtype=dtype, pin_memory=True)
        checksum = RunningChecksum()
        for out, source in zip(_by_plane(staged.numpy()), _by_plane(kv.data), strict=True):
            checksum.add(source)
            np.copyto(out, source)
        checksum.compare(kv)
        values = staged.to(self.data.device).view(self.data.dtype)
        self.data.flatten(2, 3).index_copy_(2, slots, values)

    def _place(self, block_table: Sequence[int], first: int, last: int) -> "_Place":
        width = self._spec.num_kv_heads * self._spec.head_dim
        return _Place(block_table, first, last, size=self._block_size, width=width)

    def _slots(self, block_table: Sequence[int], first: int, last: int) -> Tensor:
        # -> [last - first]
        blocks = torch.tensor(block_table, dtype=torch.int64)
        slots = blocks[:, None] * self._block_size + torch.arange(self._block_size)
        return slots.flatten()[first:last].to(self.data.device)


class _Place:
    """Where tokens [first, last) of a sequence are in a plane of the pool, cut at the borders of blocks.

    [first, head)   the end of a block
    [head, tail)    whole blocks
    [tail, last)    the start of a block
    """

    # plane: [B, S * W]  wire: [T * W], with W = H * D
    def __init__(
        self, block_table: Sequence[int], first: int, last: int, *, size: int, width: int
    ) -> None:
        head = min(last, -(-first // size) * size)
        tail = max(head, last // size * size)
        self._blocks = np.array(block_table[head // size : tail // size], np.intp)
        self._middle = slice((head - first) * width, (tail - first) * width)
        self._ends: list[tuple[slice, tuple[int, slice]]] = []
        for start, end in ((first, head), (tail, last)):
            if start < end:
                index, offset = divmod(start, size)
                slots = slice(offset * width, (offset + end - start) * width)
                part = slice((start - first) * width, (end - first) * width)
                self._ends.append((part, (block_table[index], slots)))

    def copy_out(self, plane: WireKV, wire: WireKV) -> None:
        """From the pool."""
        for part, slots in self._ends:
            wire[part] = plane[slots]
        middle = wire[self._middle].reshape(len(self._blocks), plane.shape[1])
        # "clip" writes into `out` directly; no index is out of range.
        np.take(plane, self._blocks, axis=0, out=middle, mode="clip")

    def copy_in(self, wire: WireKV, plane: WireKV) -> None:
        """Into the pool."""
        for part, slots in self._ends:
            plane[slots] = wire[part]
        plane[self._blocks] = wire[self._middle].reshape(len(self._blocks), plane.shape[1])


def _by_plane(kv: WireKV) -> WireKV:
    # [2, L, T, H, D] -> [2 * L, T * H * D]
    return kv.reshape(kv.shape[0] * kv.shape[1], math.prod(kv.shape[2:]))


def _wire_torch_dtype(dtype: KVDtype) -> torch.dtype:
    return torch.float32 if dtype is KVDtype.FLOAT32 else torch.uint16
