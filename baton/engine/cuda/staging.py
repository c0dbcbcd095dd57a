"""KV between the pool and wire buffers: through two pinned buffers in turn, on a stream beside the computation's.

While the device copies one piece, the host reads, or fills, the other: the checksum and the copy into the wire buffer cost no time of
their own. A piece is a number of whole planes (the keys or the values of one layer), since a wire buffer is one plane after
another and is checksummed in that order.

Used by the engine thread only. Order between the streams is by events; what is written to the pool is seen by every later step.
"""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from baton.engine.cuda.link import Link
from baton.errors import CorruptKVError
from baton.kv.checksum import RunningChecksum
from baton.kv.spec import KVDtype, KVSpec, SealedKV, WireKV
from baton.kv.wire_buffers import WireBuffers

PIECE_BYTES = 32 * 2**20
"""Enough for the link's full rate; less than what a checksum loses by waiting for the first piece."""


def pieces(num_planes: int, plane_bytes: int, piece_bytes: int) -> list[slice]:
    """The planes of each piece: as many as fit, at least one."""
    count = max(1, piece_bytes // plane_bytes)
    return [slice(first, min(first + count, num_planes)) for first in range(0, num_planes, count)]


class Mark(Protocol):
    """A point in a stream."""

    def synchronize(self) -> None:
        """Waits for it, on the host."""
        ...


class Side(Protocol):
    """A stream for copies, and its order with the stream of the computation."""

    def use(self) -> AbstractContextManager[None]:
        """What is launched within goes to this stream."""
        ...

    def follow(self) -> None:
        """Later copies wait for what has been launched to compute."""
        ...

    def lead(self) -> None:
        """What is launched to compute later waits for the copies so far."""
        ...

    def mark(self) -> Mark:
        """A point after all copies so far."""
        ...


class CudaSide:
    """Implements `Side`."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def use(self) -> AbstractContextManager[None]:
        return torch.cuda.stream(self._stream)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())

    def lead(self) -> None:
        torch.cuda.current_stream().wait_stream(self._stream)

    def mark(self) -> Mark:
        event: Mark = self._stream.record_event()
        return event


class InlineSide:
    """Implements `Side`, and its marks, where there are no streams: every copy is done when it returns."""

    def use(self) -> AbstractContextManager[None]:
        return nullcontext()

    def follow(self) -> None:
        """Nothing is under way."""

    def lead(self) -> None:
        """Nothing is under way."""

    def mark(self) -> Mark:
        return self

    def synchronize(self) -> None:
        """Nothing is under way."""


class Staging:
    """Copies for one pool."""

    def __init__(
        self, spec: KVSpec, data: Tensor, link: Link, side: Side, *, piece_bytes: int = PIECE_BYTES
    ) -> None:
        """`data` is the pool: by plane kind, layer, block, slot, head and dimension."""
        self._spec = spec
        self._block_size = data.shape[3]
        self._link = link
        self._side = side
        self._piece_bytes = piece_bytes
        self._wires = WireBuffers()
        bits = torch.float32 if spec.dtype is KVDtype.FLOAT32 else torch.int16
        self._planes = data.view(bits).view(2 * data.shape[1], -1, math.prod(data.shape[4:]))
        """By plane, slot, and what a slot holds; halves as the bits that they are."""
        self._buffers = (_Buffer(link), _Buffer(link))

    def read_kv(self, block_table: Sequence[int], first: int, last: int) -> SealedKV:
        """As `KVPool.read_kv`."""
        wire = self._wires.empty(self._spec.wire_shape(last - first), self._spec.dtype.wire_dtype)
        planes, checksum = _by_plane(wire), RunningChecksum()
        slots = self._slots(block_table, first, last)
        self._side.follow()
        previous: tuple[WireKV, Tensor, _Buffer] | None = None
        for number, cut in enumerate(self._cut(planes)):
            buffer = self._buffers[number % 2]
            with self._side.use():
                chosen = self._planes[cut].index_select(1, slots)
                staged = buffer.take(chosen.shape, chosen.dtype)
                staged.copy_(chosen, non_blocking=True)
            buffer.busy = self._side.mark()
            if previous is not None:
                _drain(*previous, checksum)
            previous = planes[cut], staged, buffer
        if previous is not None:
            _drain(*previous, checksum)
        return SealedKV(wire, checksum.value)

    def write_kv(self, block_table: Sequence[int], first: int, kv: SealedKV) -> None:
        """As `KVPool.write_kv`: the pool is written as the bytes arrive, and cleared where they prove to be others."""
        assert kv.data.shape == self._spec.wire_shape(kv.data.shape[2]), kv.data.shape
        assert kv.data.dtype == self._spec.dtype.wire_dtype, kv.data.dtype
        planes, checksum = _by_plane(kv.data), RunningChecksum()
        slots = self._slots(block_table, first, first + kv.data.shape[2])
        self._side.follow()
        try:
            for number, cut in enumerate(self._cut(planes)):
                self._write_piece(self._buffers[number % 2], cut, planes[cut], slots, checksum)
            checksum.compare(kv)
        except CorruptKVError:
            # Bytes that nobody vouches for may be numbers that are not finite.
            with self._side.use():
                self._planes[:, slots] = 0
            raise
        finally:
            # Where a piece failed, too: what was sent before it may not reach blocks that are others' by then.
            self._side.lead()

    def _write_piece(
        self, buffer: "_Buffer", cut: slice, part: WireKV, slots: Tensor, checksum: RunningChecksum
    ) -> None:
        staged = buffer.take((len(part), len(slots), self._planes.shape[2]), self._planes.dtype)
        for out, source in zip(staged.numpy(), part, strict=True):
            checksum.add(source)
            np.copyto(out.view(source.dtype), source.reshape(out.shape))
        with self._side.use():
            arrived = staged.to(self._planes.device, non_blocking=True)
            self._planes[cut].index_copy_(1, slots, arrived)
        buffer.busy = self._side.mark()

    def _cut(self, planes: WireKV) -> list[slice]:
        return pieces(len(planes), planes[0].nbytes, self._piece_bytes)

    def _slots(self, block_table: Sequence[int], first: int, last: int) -> Tensor:
        # -> [last - first]
        blocks = np.array(block_table[first // self._block_size : -(-last // self._block_size)])
        tokens = np.arange(first, last)
        at = blocks[tokens // self._block_size - first // self._block_size]
        return self._link.send(at * self._block_size + tokens % self._block_size)


class _Buffer:
    """Pinned memory, as large as any piece so far."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._memory = torch.empty(0, dtype=torch.uint8)
        self.busy: Mark | None = None
        """After this the device has read it, or written it."""

    def wait(self) -> None:
        """Until the device has no more to do with it."""
        if self.busy is not None:
            self.busy.synchronize()
            self.busy = None

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor in it, once nobody needs what it holds."""
        self.wait()
        num_bytes = math.prod(shape) * dtype.itemsize
        if len(self._memory) < num_bytes:
            self._memory = self._link.empty(num_bytes)
        return self._memory[:num_bytes].view(dtype).view(*shape)


def _drain(target: WireKV, staged: Tensor, buffer: _Buffer, checksum: RunningChecksum) -> None:
    """Takes a piece over into the wire buffer, once it has arrived."""
    buffer.wait()
    for out, source in zip(target, staged.numpy(), strict=True):
        np.copyto(out, source.view(out.dtype).reshape(out.shape))
        checksum.add(out)


def _by_plane(kv: WireKV) -> WireKV:
    # [2, L, T, H, D] -> [2 * L, T * H * D]
    return kv.reshape(kv.shape[0] * kv.shape[1], math.prod(kv.shape[2:]))
