"""The KV blocks of the native kernels, and their copies to and from wire layout. See `src/cache.h` for the order within a block.

As `baton.kv.pool`: which block belongs to whom is not known here. Unlike there, a slot may hold what is no number: whoever begins a tile
of 16 tokens clears what lies beyond. Used by the engine thread only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton.engine.native.library import Library, Pool
from baton.errors import CorruptKVError
from baton.kv.checksum import RunningChecksum
from baton.kv.spec import KVSpec, SealedKV, WireKV
from baton.kv.wire_buffers import WireBuffers

Table = np.ndarray[tuple[int], np.dtype[np.int32]]


class NativePool:
    """Keys and values of every block."""

    def __init__(self, spec: KVSpec, *, num_blocks: int, block_size_tokens: int) -> None:
        # The kernel hands out zero pages only when they are first written.
        num_values = 2 * spec.num_layers * num_blocks * block_size_tokens * spec.num_kv_heads
        self._memory = np.zeros(num_values * spec.head_dim * spec.dtype.item_bytes + 64, np.uint8)
        self.pool = Pool(-(-self._memory.ctypes.data // 64) * 64, num_blocks, block_size_tokens)


@dataclass(frozen=True, slots=True)
class KVCopies:
    """Moves KV between an engine's pool and the wire."""

    library: Library
    engine: int
    spec: KVSpec
    buffers: WireBuffers
    block_size_tokens: int

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        """A new wire buffer with the KV of tokens [first, last) of the sequence in these blocks."""
        wire = self.buffers.empty(self.spec.wire_shape(last - first), self.spec.dtype.wire_dtype)
        table, checksum = self._table(block_table, first, last), RunningChecksum()
        for plane, layer in self._planes():
            out = wire[plane, layer]
            self.library.read_kv(
                self.engine, plane, layer, table.ctypes.data, first, last, out.ctypes.data
            )
            checksum.add(out)
        return SealedKV(wire, checksum.value)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        """Writes a wire buffer as the KV of tokens [first, first + T), and verifies it on the way. The buffer is not kept. Raises
        `CorruptKVError` where it is not what was sealed; then nothing of it is left in the pool.
        """
        tokens = kv.data.shape[2]
        assert kv.data.shape == self.spec.wire_shape(tokens), kv.data.shape
        assert kv.data.dtype == self.spec.dtype.wire_dtype, kv.data.dtype
        assert kv.data.flags.c_contiguous, "the kernels read it as one piece"
        table, checksum = self._table(block_table, first, first + tokens), RunningChecksum()
        for plane, layer in self._planes():
            source = kv.data[plane, layer]
            checksum.add(source)
            self._write(table, plane, layer, first, source)
        try:
            checksum.compare(kv)
        except CorruptKVError:
            # Bytes that nobody vouches for may be numbers that are not finite.
            nothing = np.zeros_like(kv.data[0, 0])
            for plane, layer in self._planes():
                self._write(table, plane, layer, first, nothing)
            raise

    def _table(self, block_table: Sequence[int], first: int, last: int) -> Table:
        # The kernels check nothing.
        assert 0 <= first < last <= len(block_table) * self.block_size_tokens, (first, last)
        return np.array(block_table, np.int32)

    def _write(
        self,
        table: Table,
        plane: int,
        layer: int,
        first: int,
        source: WireKV,
    ) -> None:
        last = first + len(source)
        self.library.write_kv(
            self.engine, plane, layer, table.ctypes.data, first, last, source.ctypes.data
        )

    def _planes(self) -> list[tuple[int, int]]:
        return [(plane, layer) for plane in range(2) for layer in range(self.spec.num_layers)]
