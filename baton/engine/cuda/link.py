"""Copies between the host and the device that wait for nothing: through pinned memory, on the stream of the computation.

Pinned blocks come from torch's own cache, which hands one out again only after the copies from it are done. On a CPU, where the
kernels run in Triton's interpreter, copies are plain ones.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Link:
    """One device's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pinned = device.type == "cuda"

    def send(self, values: NDArray[np.generic]) -> Tensor:
        """A copy on the device."""
        return self.stage(values).to(self.device, non_blocking=True)

    def send_into(self, values: NDArray[np.generic], target: Tensor) -> None:
        """Overwrites `target`, of the same shape and contiguous."""
        target.copy_(self.stage(values), non_blocking=True)

    def stage(self, values: NDArray[np.generic]) -> Tensor:
        """A copy that the device can read."""
        source = torch.from_numpy(values)
        return source.pin_memory() if self._pinned else source

    def empty(self, num_bytes: int) -> Tensor:
        """Memory of the host that the device can read and write."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)

    def fetch(self, values: Tensor) -> Callable[[], list[int]]:
        """Starts to copy integers to the host; what is returned waits for them."""
        if not self._pinned:
            copied: list[int] = values.tolist()
            return lambda: copied
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        host.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record()

        def wait() -> list[int]:
            arrived.synchronize()
            result: list[int] = host.tolist()
            return result

        return wait
