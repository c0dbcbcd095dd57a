"""Describing, comparing and cutting wire buffers."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import CorruptKVError, PreconditionError
from baton.kv.checksum import sealed
from baton.kv.spec import KVDtype, KVSpec, WireKV
from baton.transfer.base import PullRequest
from baton.transfer.layout import (
    MOST_PIECES,
    PIECE_BYTES,
    PIECE_TOKENS,
    find_mismatch,
    handoff_pieces,
    meta_of,
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
    meta = meta_of(REQUEST, SPEC, sealed(buffer))
    assert (meta.key, meta.first, meta.last) == (REQUEST.key, 4, 9)
    assert (meta.dtype, meta.digest) == ("bfloat16", SPEC.digest)
    assert meta.checksum == sealed(buffer).checksum
    assert find_mismatch(meta, buffer, REQUEST, SPEC) is None


@pytest.mark.parametrize("dtype", list(KVDtype))
def test_every_element_type_can_be_sealed_and_verified(dtype: KVDtype) -> None:
    spec = replace(SPEC, dtype=dtype)
    request = replace(REQUEST, digest=spec.digest)
    buffer = buffer_for(spec)
    assert find_mismatch(meta_of(request, spec, sealed(buffer)), buffer, request, spec) is None


def test_the_source_refuses_to_seal_for_another_spec() -> None:
    with pytest.raises(PreconditionError, match="elsewhere"):
        meta_of(replace(REQUEST, digest="elsewhere"), SPEC, sealed(buffer_for()))


def test_the_source_refuses_to_seal_a_buffer_of_another_range() -> None:
    with pytest.raises(CorruptKVError, match="shape"):
        meta_of(REQUEST, SPEC, sealed(buffer_for(num_tokens=4)))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("key", AttemptKey(RequestId("r"), 1)),
        ("key", AttemptKey(RequestId("other"), 2)),
        ("first", 3),
        ("last", 10),
        ("dtype", "float16"),
        ("digest", "other"),
    ],
)
def test_meta_that_differs_in_one_field_is_refused(field: str, value: Any) -> None:
    buffer = buffer_for()
    meta = replace(meta_of(REQUEST, SPEC, sealed(buffer)), **{field: value})
    assert find_mismatch(meta, buffer, REQUEST, SPEC)


def test_a_request_that_names_another_spec_than_decodes_is_refused() -> None:
    buffer = buffer_for()
    meta = meta_of(REQUEST, SPEC, sealed(buffer))
    assert "decode's is" in (
        find_mismatch(meta, buffer, replace(REQUEST, digest="other"), SPEC) or ""
    )


def test_a_buffer_with_gaps_is_refused() -> None:
    buffer = buffer_for(replace(SPEC, head_dim=8))[..., ::2]
    meta = meta_of(REQUEST, SPEC, sealed(np.ascontiguousarray(buffer)))
    assert "contiguous" in (find_mismatch(meta, buffer, REQUEST, SPEC) or "")


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


@given(
    first=st.integers(0, 1000),
    num_tokens=st.integers(1, 20000),
    token_bytes=st.integers(1, 1 << 20),
    max_bytes=st.integers(1, 1 << 30),
    overlap_tokens=st.integers(0, 2000),
)
def test_a_long_prompt_goes_in_few_pieces_of_which_the_last_one_is_small(
    first: int, num_tokens: int, token_bytes: int, max_bytes: int, overlap_tokens: int
) -> None:
    """Promise: what is handed over after the prompt is done does not grow with the prompt; nor do the calls that it takes, but by the
    limit of a pull.
    """
    last = first + num_tokens
    pieces = handoff_pieces(
        first, last, token_bytes, max_bytes=max_bytes, overlap_tokens=overlap_tokens
    )
    assert pieces[0][0] == first
    assert pieces[-1][1] == last
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(start < end for start, end in pieces)
    assert max(end - start for start, end in pieces) <= max(1, max_bytes // token_bytes)
    if num_tokens <= max(1, overlap_tokens):
        assert pieces == split_range(first, last, token_bytes, max_bytes)
        return
    assert len(pieces) >= 2
    assert pieces[-1][1] - pieces[-1][0] <= PIECE_TOKENS
    if max_bytes >= num_tokens * token_bytes:
        assert len(pieces) <= MOST_PIECES
        for start, end in pieces[:-1] if len(pieces) > 2 else []:
            # Cut evenly, so that a piece may lack one token of what was aimed at.
            assert end - start >= PIECE_TOKENS - 1
            assert (end - start + 1) * token_bytes >= PIECE_BYTES


def test_an_empty_range_is_one_empty_piece() -> None:
    assert split_range(7, 7, 1024, 4096) == [(7, 7)]
