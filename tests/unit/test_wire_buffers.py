"""Recycled memory for wire buffers."""

import gc
import weakref

import numpy as np
import numpy.typing as npt
import pytest

from baton.kv.wire_buffers import SMALLEST_BYTES, WireBuffers

FLOAT32, UINT16 = np.dtype(np.float32), np.dtype(np.uint16)
LARGE = (2, SMALLEST_BYTES // 4)


def address(array: npt.NDArray[np.generic]) -> int:
    return int(array.__array_interface__["data"][0])


@pytest.mark.parametrize("shape", [(2, 3), (0, 4), LARGE])
def test_a_buffer_is_writable_contiguous_and_of_the_shape_asked_for(shape: tuple[int, ...]) -> None:
    buffer = WireBuffers().empty(shape, FLOAT32)
    assert (buffer.shape, buffer.dtype) == (shape, FLOAT32)
    assert buffer.flags.c_contiguous
    buffer[...] = 1


def test_memory_is_used_again_once_its_array_is_dropped() -> None:
    buffers = WireBuffers()
    first = buffers.empty(LARGE, FLOAT32)
    where = address(first)
    del first
    second = buffers.empty(LARGE, FLOAT32)
    assert address(second) == where
    assert buffers.kept_bytes == 0


def test_memory_behind_a_view_is_not_handed_out() -> None:
    """A transport may hold any view of the array that it was given."""
    buffers = WireBuffers()
    view = buffers.empty(LARGE, FLOAT32)[1, 5:].view(UINT16)
    view[...] = 7
    other = buffers.empty(LARGE, FLOAT32)
    other[...] = 0
    assert (view == 7).all()


def test_no_more_memory_is_kept_than_agreed() -> None:
    buffers = WireBuffers(keep=2)
    held = [buffers.empty(LARGE, FLOAT32) for _ in range(5)]
    num_bytes = held[0].nbytes
    held.clear()
    assert buffers.kept_bytes == 2 * num_bytes


def test_a_block_much_too_large_is_let_go() -> None:
    buffers = WireBuffers()
    large = buffers.empty((8, SMALLEST_BYTES // 4), FLOAT32)
    del large
    small = buffers.empty((1, SMALLEST_BYTES // 4), FLOAT32)
    assert buffers.kept_bytes == 0
    assert small.nbytes == SMALLEST_BYTES


def test_arrays_do_not_keep_each_other_alive() -> None:
    buffers = WireBuffers()
    first = buffers.empty(LARGE, FLOAT32)
    gone = weakref.ref(first.base if first.base is not None else first)
    del first
    gc.collect()
    assert gone() is None
