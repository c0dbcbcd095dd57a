"""Sealing, verifying and cutting wire buffers."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import CorruptKVError, PreconditionError
from baton.kv.spec import KVDtype, KVSpec, WireKV
from baton.transfer.base import PullRequest
from baton.transfer.layout import (
    INLINE_BYTES,
    checksum,
    find_mismatch,
    find_mismatch_off_loop,
    seal,
    seal_off_loop,
    split_range,
)
from baton.types import AttemptKey, RequestId

SPEC = KVSpec(
    num_layers=2,
    num_kv_heads=3,
    head_dim=4,
    dtype=KVDtype.BFLOAT16,
    position_scheme="learned",
    model_fingerprint="m",
)
REQUEST = PullRequest(
    key=AttemptKey(RequestId("r"), 2), first=4, last=9, digest=SPEC.digest, timeout_s=1.0
)


def buffer_for(spec: KVSpec = SPEC, num_tokens: int = 5) -> WireKV:
    num_bytes = spec.token_bytes * num_tokens
    words = np.random.default_rng(3).integers(0, 256, num_bytes, np.uint8)
    return words.view(spec.dtype.wire_dtype).reshape(spec.wire_shape(num_tokens))


def test_a_seal_describes_the_buffer() -> None:
    buffer = buffer_for()
    meta = seal(REQUEST, SPEC, buffer)
    assert (meta.key, meta.first, meta.last) == (REQUEST.key, 4, 9)
    assert (meta.dtype, meta.digest) == ("bfloat16", SPEC.digest)
    assert meta.checksum == xxhash.xxh3_64_intdigest(buffer.tobytes())
    assert find_mismatch(meta, buffer, REQUEST, SPEC) is None


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_every_element_type_can_be_sealed_and_verified(dtype: KVDtype) -> None:
    spec = replace(SPEC, dtype=dtype)
    request = replace(REQUEST, digest=spec.digest)
    buffer = buffer_for(spec)
    assert find_mismatch(seal(request, spec, buffer), buffer, request, spec) is None


def test_the_source_refuses_to_seal_for_another_spec() -> None:
    with pytest.raises(PreconditionError, match="elsewhere"):
        seal(replace(REQUEST, digest="elsewhere"), SPEC, buffer_for())


def test_the_source_refuses_to_seal_a_buffer_of_another_range() -> None:
    with pytest.raises(CorruptKVError, match="shape"):
        seal(REQUEST, SPEC, buffer_for(num_tokens=4))


@given(position=st.integers(0, 5 * SPEC.token_bytes - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_is_found(position: int, bit: int) -> None:
    buffer = buffer_for()
    meta = seal(REQUEST, SPEC, buffer)
    buffer.reshape(-1).view(np.uint8)[position] ^= 1 << bit
    assert "checksum" in (find_mismatch(meta, buffer, REQUEST, SPEC) or "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", AttemptKey(RequestId("r"), 1)),
        ("key", AttemptKey(RequestId("other"), 2)),
        ("first", 3),
        ("last", 10),
        ("dtype", "float16"),
        ("digest", "other"),
        ("checksum", 0),
    ],
)
def test_meta_that_differs_in_one_field_is_refused(field: str, value: Any) -> None:
    buffer = buffer_for()
    meta = replace(seal(REQUEST, SPEC, buffer), **{field: value})
    assert find_mismatch(meta, buffer, REQUEST, SPEC)


def test_a_request_that_names_another_spec_than_decodes_is_refused() -> None:
    buffer = buffer_for()
    meta = seal(REQUEST, SPEC, buffer)
    assert "decode's is" in (
        find_mismatch(meta, buffer, replace(REQUEST, digest="other"), SPEC) or ""
    )


def test_a_buffer_with_gaps_is_refused() -> None:
    buffer = buffer_for(replace(SPEC, head_dim=8))[..., ::2]
    meta = seal(REQUEST, SPEC, np.ascontiguousarray(buffer))
    assert "contiguous" in (find_mismatch(meta, buffer, REQUEST, SPEC) or "")


async def test_large_buffers_are_sealed_and_verified_alike_in_a_thread() -> None:
    num_tokens = INLINE_BYTES // SPEC.token_bytes + 1
    request = replace(REQUEST, first=0, last=num_tokens)
    buffer = buffer_for(num_tokens=num_tokens)
    meta = await seal_off_loop(request, SPEC, buffer)
    assert meta == seal(request, SPEC, buffer)
    assert await find_mismatch_off_loop(meta, buffer, request, SPEC) is None
    buffer[0, 0, 0, 0, 0] ^= 1
    assert "checksum" in str(await find_mismatch_off_loop(meta, buffer, request, SPEC))


def test_an_empty_buffer_has_a_checksum() -> None:
    assert checksum(np.empty(SPEC.wire_shape(0), np.uint16)) == xxhash.xxh3_64_intdigest(b"")


@given(
    first=st.integers(0, 1000),
    num_tokens=st.integers(1, 5000),
    token_bytes=st.integers(1, 1 << 20),
    max_bytes=st.integers(1, 1 << 26),
)
def test_pieces_cover_the_range_once_and_are_small_and_few(
    first: int, num_tokens: int, token_bytes: int, max_bytes: int
) -> None:
    last = first + num_tokens
    pieces = split_range(first, last, token_bytes, max_bytes)
    assert pieces[0][0] == first
    assert pieces[-1][1] == last
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    sizes = [end - start for start, end in pieces]
    assert max(sizes) - min(sizes) <= 1
    most = max(1, max_bytes // token_bytes)
    assert 1 <= min(sizes) <= max(sizes) <= most
    assert len(pieces) == -(-num_tokens // most)


def test_an_empty_range_is_one_empty_piece() -> None:
    assert split_range(7, 7, 1024, 4096) == [(7, 7)]
