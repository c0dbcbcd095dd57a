"""Memory for large wire buffers, used again: the kernel takes longer to hand out and clear fresh pages than a copy takes to fill
them.

`empty` is called by the engine thread; a buffer's memory comes back by itself when the array and its views are collected, on
whichever thread drops the last of them. Invariant: memory is in the list of free blocks or behind a live array, never both.
"""

import math
import weakref
from collections import deque

import numpy as np
import numpy.typing as npt

SMALLEST_BYTES = 4 << 20
"""Below, the allocator recycles well enough by itself."""


class WireBuffers:
    """Hands out uninitialized arrays, and keeps the memory of the last few for the next ones."""

    def __init__(self, *, keep: int = 2) -> None:
        self._free: deque[memoryview] = deque(maxlen=keep)

    @property
    def kept_bytes(self) -> int:
        """Memory that waits to be used again."""
        return sum(map(len, tuple(self._free)))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> npt.NDArray[np.generic]:
        """As `numpy.empty`."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes < SMALLEST_BYTES:
            return np.empty(shape, dtype)
        block = self._take(num_bytes) or np.empty(num_bytes, np.uint8).data
        owner = np.frombuffer(block, np.uint8, num_bytes)
        weakref.finalize(owner, self._free.append, block)
        return owner.view(dtype).reshape(shape)

    def _take(self, num_bytes: int) -> memoryview | None:
        """A free block that fits and is not more than twice too large; those that do not fit make room for one that will."""
        for _ in range(len(self._free)):
            try:
                block = self._free.popleft()
            except IndexError:  # pragma: no cover - only this thread takes
                return None
            if num_bytes <= len(block) <= 2 * num_bytes:
                return block
        return None
