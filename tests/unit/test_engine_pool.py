"""The KV pool: its size, and its copies to and from wire layout."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from baton.errors import CorruptKVError
from baton.kv.checksum import sealed
from baton.kv.pool import KVPool, size_pool
from baton.kv.spec import KVDtype, KVSpec


def spec_of(dtype: KVDtype) -> KVSpec:
    return KVSpec(
        num_layers=2,
        num_kv_heads=3,
        head_dim=4,
        dtype=dtype,
        position_scheme="learned",
        model_fingerprint="none",
    )


def pool_of(dtype: KVDtype, *, block_size: int, num_blocks: int = 32) -> KVPool:
    return KVPool(spec_of(dtype), num_blocks=num_blocks, block_size_tokens=block_size, device="cpu")


def wire_of(dtype: KVDtype, tokens: int) -> npt.NDArray[np.generic]:
    """Every number in it different."""
    shape = spec_of(dtype).wire_shape(tokens)
    numbers = np.arange(np.prod(shape)).reshape(shape).astype(dtype.wire_dtype)
    numbers.setflags(write=False)
    return numbers


SCATTERED = (7, 8, 9, 3, 30, 31, 0, 12, 11, 10, 1, 2)


@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize(("first", "last"), [(0, 40), (0, 1), (3, 5), (4, 8), (7, 37), (11, 11)])
def test_what_is_written_is_read_back(dtype: KVDtype, first: int, last: int) -> None:
    pool, kv = pool_of(dtype, block_size=4), wire_of(dtype, last - first)
    pool.write_kv(SCATTERED, first, sealed(kv))
    copy = pool.read_kv(SCATTERED, first, last)
    assert copy.checksum == sealed(kv).checksum
    back = copy.data
    assert back.dtype == dtype.wire_dtype
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, kv)


def test_a_write_touches_nothing_but_its_range() -> None:
    pool = pool_of(KVDtype.FLOAT32, block_size=4)
    whole = tuple(range(32))
    pool.write_kv(whole, 0, sealed(wire_of(KVDtype.FLOAT32, 128)))
    before = pool.read_kv(whole, 0, 128).data
    pool.write_kv((5, 9), 2, sealed(np.full_like(wire_of(KVDtype.FLOAT32, 4), -1)))
    after = pool.read_kv(whole, 0, 128).data
    changed = np.nonzero((before != after).any(axis=(0, 1, 3, 4)))[0].tolist()
    assert changed == [5 * 4 + 2, 5 * 4 + 3, 9 * 4, 9 * 4 + 1]


@pytest.mark.parametrize("dtype", KVDtype)
@pytest.mark.parametrize(("source_block", "target_block"), [(4, 16), (16, 4), (1, 64), (5, 3)])
def test_pools_of_different_block_sizes_exchange_kv(
    dtype: KVDtype, source_block: int, target_block: int
) -> None:
    tokens, kv = 45, wire_of(dtype, 45)
    source = pool_of(dtype, block_size=source_block, num_blocks=64)
    target = pool_of(dtype, block_size=target_block, num_blocks=64)
    source_table = tuple(reversed(range(64)))
    target_table = tuple(range(1, 64, 2)) if target_block > 1 else source_table
    source.write_kv(source_table, 0, sealed(kv))
    for first in range(0, tokens, 7):
        last = min(tokens, first + 7)
        target.write_kv(target_table, first, source.read_kv(source_table, first, last))
    np.testing.assert_array_equal(target.read_kv(target_table, 0, tokens).data, kv)


@pytest.mark.parametrize(("first", "last"), [(0, 40), (5, 7), (3, 30), (6, 8)])
@pytest.mark.parametrize("at", [0, 17, -1])
def test_bytes_that_are_not_those_sealed_leave_no_trace(first: int, last: int, at: int) -> None:
    """What nobody vouches for may be numbers that are not finite, which would reach whoever has the block next."""
    pool = pool_of(KVDtype.FLOAT32, block_size=4)
    whole = tuple(range(32))
    neighbours = wire_of(KVDtype.FLOAT32, 128)
    pool.write_kv(whole, 0, sealed(neighbours))
    sent = sealed(np.full(spec_of(KVDtype.FLOAT32).wire_shape(last - first), 7, np.float32))
    sent.data.reshape(-1)[at] = np.nan
    with pytest.raises(CorruptKVError, match="checksum"):
        pool.write_kv(SCATTERED, first, sent)
    assert not pool.read_kv(SCATTERED, first, last).data.any()
    touched = [SCATTERED[t // 4] * 4 + t % 4 for t in range(first, last)]
    others = sorted(set(range(128)) - set(touched))
    left = pool.read_kv(whole, 0, 128).data
    np.testing.assert_array_equal(left[:, :, others], neighbours[:, :, others])


def test_a_read_is_a_copy_that_later_writes_do_not_change() -> None:
    pool, kv = pool_of(KVDtype.FLOAT32, block_size=4), wire_of(KVDtype.FLOAT32, 8)
    pool.write_kv((0, 1), 0, sealed(kv))
    read = pool.read_kv((0, 1), 0, 8).data
    pool.write_kv((0, 1), 0, sealed(np.zeros_like(kv)))
    np.testing.assert_array_equal(read, kv)


def test_the_wire_holds_what_layers_stored_by_slot() -> None:
    pool = pool_of(KVDtype.BFLOAT16, block_size=4)
    keys = torch.randn(3, 3, 4, dtype=torch.bfloat16)
    values = torch.randn(3, 3, 4, dtype=torch.bfloat16)
    slots = torch.tensor([9 * 4 + 3, 2 * 4, 2 * 4 + 1])  # tokens 3, 4, 5 of blocks (9, 2)
    pool.layers[1].write(slots, keys, values)
    wire = torch.from_numpy(pool.read_kv((9, 2), 3, 6).data).view(torch.bfloat16)
    assert torch.equal(wire[0, 1], keys)
    assert torch.equal(wire[1, 1], values)
    assert not wire[:, 0].any()


def test_gathered_blocks_stand_one_after_another() -> None:
    pool = pool_of(KVDtype.FLOAT32, block_size=4)
    pool.write_kv((6, 2), 0, sealed(wire_of(KVDtype.FLOAT32, 8)))
    keys, values = pool.layers[1].gather(torch.tensor([6, 2]))
    expected = torch.from_numpy(pool.read_kv((6, 2), 0, 8).data)
    assert torch.equal(keys, expected[0, 1])
    assert torch.equal(values, expected[1, 1])


def test_what_overflows_float16_leaves_nothing_that_could_poison_a_blocks_next_owner() -> None:
    """A NaN in a masked slot would survive multiplication by zero and reach another sequence."""
    pool = pool_of(KVDtype.FLOAT16, block_size=4)
    bad = torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0], dtype=torch.float16)
    bad = bad.expand(1, 3, 4)
    pool.layers[0].write(torch.tensor([5]), bad, bad)
    assert pool.data.isfinite().all()


@pytest.mark.parametrize(
    ("kv_pool_tokens", "free_bytes", "blocks"),
    [
        (160, 0, 10),  # as told, whatever is free
        (161, 10**9, 11),
        (None, 50 * 16 * 100, 50),  # what fits
        (None, 50 * 16 * 100 - 1, 49),
        (None, 10**9, 63),  # what could ever be used
        (None, 10, 0),
    ],
)
def test_a_pool_is_sized_as_told_or_from_memory_but_never_beyond_use(
    kv_pool_tokens: int | None, free_bytes: int, blocks: int
) -> None:
    size = size_pool(
        kv_pool_tokens=kv_pool_tokens,
        free_bytes=free_bytes,
        token_bytes=100,
        block_size_tokens=16,
        most_tokens=1000,
    )
    assert size == blocks
