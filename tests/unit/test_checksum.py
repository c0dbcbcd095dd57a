"""The checksum that KV travels with."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import CorruptKVError
from baton.kv.checksum import RunningChecksum, sealed
from baton.kv.spec import WireKV


def numbers() -> WireKV:
    return np.arange(240, dtype=np.uint16).reshape(2, 2, 5, 3, 4)


@given(position=st.integers(0, 479), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(position: int, bit: int) -> None:
    kv = sealed(numbers())
    kv.data.reshape(-1).view(np.uint8)[position] ^= 1 << bit
    checksum = RunningChecksum()
    checksum.add(kv.data)
    with pytest.raises(CorruptKVError, match="checksum"):
        checksum.compare(kv)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_in_wire_order_have_the_checksum_of_the_whole(parts: int) -> None:
    kv = sealed(numbers())
    assert kv.checksum == xxhash.xxh3_64_intdigest(numbers().tobytes())
    checksum = RunningChecksum()
    for part in kv.data.reshape(parts, -1):
        checksum.add(part)
    checksum.compare(kv)


def test_an_empty_buffer_has_a_checksum() -> None:
    kv = sealed(np.empty((2, 2, 0, 3, 4), np.uint16))
    RunningChecksum().compare(kv)
