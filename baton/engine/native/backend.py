"""The native kernels as the runner's backend: lays out a step's rows as they take them, and calls them once."""

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from baton.engine.backend import Logits
from baton.engine.batch import BatchRow
from baton.engine.native.library import Batch, Library
from baton.engine.native.pool import KVCopies, NativePool
from baton.engine.native.weights import Weights
from baton.kv.spec import KVSpec, SealedKV
from baton.kv.wire_buffers import WireBuffers

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - links are not followed, and a file of another user's is left alone


class NativeBackend:
    """Implements `Backend`."""

    def __init__(
        self,
        library: Library,
        weights: Weights,
        spec: KVSpec,
        *,
        num_blocks: int,
        block_size_tokens: int,
        threads: int,
        tiles: bool,
    ) -> None:
        """Engines of one user on this machine divide the cores among those that compute; `threads` is what a lone one uses. `tiles`: the
        processor's may be used, where there are any.
        """
        self._library, self._weights = library, weights
        self._pool = NativePool(spec, num_blocks=num_blocks, block_size_tokens=block_size_tokens)
        self._engine = library.engine(
            weights.model, self._pool.pool, threads, _cores_path(), tiles=tiles
        )
        # At exit the process frees all, and the engine's thread may still compute.
        weakref.finalize(self, library.free_engine, self._engine).atexit = False
        self._copies = KVCopies(
            library, self._engine, spec, WireBuffers(), block_size_tokens=block_size_tokens
        )
        self._logits = torch.empty(0, dtype=torch.float32)

    def compute(self, rows: Sequence[BatchRow]) -> Logits:
        tokens: list[int] = []
        layout: list[int] = []
        tables: list[int] = []
        sampled: list[int] = []
        wanted: list[int] = []
        block_size: int = self._pool.pool.block_size
        for index, row in enumerate(rows):
            # The kernels check nothing.
            end = row.start + len(row.token_ids)
            assert row.start < end <= len(row.block_table) * block_size, (row.start, end)
            layout += (len(tokens), len(row.token_ids), row.start, len(tables))
            tokens += row.token_ids
            tables += row.block_table
            if row.sample is not None:
                sampled.append(len(tokens) - 1)
                wanted.append(index)
        vocab: int = self._weights.model.vocab
        if len(wanted) > len(self._logits):
            self._logits = torch.empty((len(wanted), vocab), dtype=torch.float32)
        sizes = [len(tokens), len(layout), len(tables)]
        packed = np.array(tokens + layout + tables + sampled, np.int32)
        at = packed.ctypes.data
        starts = [at + 4 * sum(sizes[:part]) for part in range(4)]
        self._library.step(
            self._engine,
            Batch(*starts, self._logits.data_ptr(), None, len(tokens), len(rows), len(sampled)),
        )
        return Logits(wanted, self._logits[: len(wanted)])

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        return self._copies.read_kv(block_table, first, last)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        self._copies.write_kv(block_table, first, kv)


def _cores_path() -> str | None:
    folder = SHARED_MEMORY if SHARED_MEMORY.is_dir() else Path(tempfile.gettempdir())
    return str(folder / f"baton-cores-{os.getuid()}")
