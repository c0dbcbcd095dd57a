"""Staged KV copies, on a device whose copies are done at once: the same bytes as the pool's own."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import pytest
import torch

from baton.engine.cuda.link import Link
from baton.engine.cuda.staging import InlineSide, Staging, pieces
from baton.errors import CorruptKVError
from baton.kv.pool import KVPool
from baton.kv.spec import KVDtype, KVSpec, SealedKV

TABLE = (9, 2, 7, 4, 0, 11, 5)


class RecordingSide(InlineSide):
    """Notes the order of what the copies ask for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def follow(self) -> None:
        self.calls.append("follow")

    def lead(self) -> None:
        self.calls.append("lead")

    def synchronize(self) -> None:
        self.calls.append("wait")


def pool_of(dtype: KVDtype) -> KVPool:
    spec = KVSpec(
        num_layers=3,
        num_kv_heads=2,
        head_dim=4,
        dtype=dtype,
        position_scheme="none",
        model_fingerprint="none",
    )
    pool = KVPool(spec, num_blocks=12, block_size_tokens=4, device="cpu")
    pool.data.copy_(torch.randn(pool.data.shape))
    return pool


def staging_of(pool: KVPool, dtype: KVDtype, side: InlineSide, piece_bytes: int) -> Staging:
    spec = KVSpec(
        num_layers=3,
        num_kv_heads=2,
        head_dim=4,
        dtype=dtype,
        position_scheme="none",
        model_fingerprint="none",
    )
    link = Link(torch.device("cpu"))
    return Staging(spec, pool.data, link, side, piece_bytes=piece_bytes)


@pytest.mark.parametrize("dtype", list(KVDtype))
@pytest.mark.parametrize("piece_bytes", [1, 600, 10**6])
@pytest.mark.parametrize("span", [(0, 28), (3, 4), (3, 17), (4, 8)])
def test_staged_copies_are_those_of_the_pool(
    span: tuple[int, int], piece_bytes: int, dtype: KVDtype
) -> None:
    torch.manual_seed(1)
    pool, target = pool_of(dtype), pool_of(dtype)
    expected = pool.read_kv(TABLE, *span)
    staging = staging_of(pool, dtype, RecordingSide(), piece_bytes)
    kv = staging.read_kv(TABLE, *span)
    np.testing.assert_array_equal(kv.data, expected.data)
    assert kv.checksum == expected.checksum
    kv.data.setflags(write=False)
    before = target.data.clone()
    staging_of(target, dtype, RecordingSide(), piece_bytes).write_kv(TABLE[::-1], span[0], kv)
    np.testing.assert_array_equal(target.read_kv(TABLE[::-1], *span).data, kv.data)
    changed = (target.data != before).flatten(2, 3).any(dim=(0, 1, 3, 4)).sum()
    assert changed == span[1] - span[0]


def test_bytes_that_nobody_sealed_leave_nothing_in_the_pool() -> None:
    dtype = KVDtype.BFLOAT16
    pool = pool_of(dtype)
    kv = pool.read_kv(TABLE, 2, 20)
    side = RecordingSide()
    with pytest.raises(CorruptKVError):
        staging_of(pool, dtype, side, 600).write_kv(TABLE, 2, SealedKV(kv.data, kv.checksum ^ 1))
    assert not pool.read_kv(TABLE, 2, 20).data.any()
    assert side.calls[-1] == "lead", "what is computed next waits for the clearing"


def test_copies_follow_the_computation_and_lead_what_comes_next() -> None:
    pool, side = pool_of(KVDtype.FLOAT32), RecordingSide()
    staging = staging_of(pool, KVDtype.FLOAT32, side, 1)
    kv = staging.read_kv(TABLE, 0, 5)
    # Six planes, each a piece: each is read once it has arrived.
    assert side.calls == ["follow", *["wait"] * 6]
    side.calls.clear()
    staging.write_kv(TABLE, 0, kv)
    # A buffer is filled anew once the device has read it.
    assert side.calls == ["follow", *["wait"] * 4, "lead"]
    side.calls.clear()
    staging.read_kv(TABLE, 0, 5)
    assert side.calls.count("wait") == 2 + 6


class FullSide(RecordingSide):
    """The device has no memory left for the second piece."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = 0

    def use(self) -> AbstractContextManager[None]:
        self.uses += 1
        if self.uses == 2:
            raise torch.OutOfMemoryError
        return super().use()


def test_a_copy_that_fails_midway_is_waited_for_by_whatever_comes_next() -> None:
    """Promise: a piece that is under way when another fails reaches neither a buffer in use again nor a block that has become another's."""
    pool, side = pool_of(KVDtype.FLOAT32), FullSide()
    staging = staging_of(pool, KVDtype.FLOAT32, side, 1)
    with pytest.raises(torch.OutOfMemoryError):
        staging.read_kv(TABLE, 0, 5)
    assert side.calls == ["follow"]
    kv = staging.read_kv(TABLE, 0, 5)
    assert side.calls == ["follow", "follow", "wait", *["wait"] * 6]
    side.calls.clear()
    side.uses = 0
    with pytest.raises(torch.OutOfMemoryError):
        staging.write_kv(TABLE, 0, kv)
    assert side.calls == ["follow", "lead"]


def covered(cuts: Sequence[slice]) -> list[int]:
    return [plane for cut in cuts for plane in range(cut.start, cut.stop)]


def test_pieces_are_whole_planes_as_many_as_fit() -> None:
    assert pieces(5, 100, 250) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert len(pieces(5, 100, 10)) == 5
    for piece_bytes in (1, 99, 100, 101, 499, 500, 10**9):
        assert covered(pieces(5, 100, piece_bytes)) == list(range(5))
