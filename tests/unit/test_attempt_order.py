"""Two workers' tokens come out as one sequence, or the attempt fails."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import InternalError
from baton.types import TokenChunk
from router.ordering import TokenOrder


@given(st.data())
def test_chunks_in_any_order_come_out_by_position_without_gap_or_repeat(
    data: st.DataObject,
) -> None:
    first = data.draw(st.integers(0, 5))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=8))
    chunks, start = [], first
    for length in lengths:
        chunks.append(TokenChunk(start, tuple(range(start, start + length))))
        start += length
    order = TokenOrder(first)
    out: list[int] = []
    for chunk in data.draw(st.permutations(chunks)):
        for due in order.put(chunk):
            out.extend(due.token_ids)
        assert order.next_index == first + len(out)
    assert out == list(range(first, start))
    assert not order.holds_any


def test_a_token_that_was_given_out_is_refused() -> None:
    order = TokenOrder(3)
    order.put(TokenChunk(3, (7,)))
    with pytest.raises(InternalError):
        order.put(TokenChunk(3, (7,)))


def test_a_token_that_waits_is_not_overwritten() -> None:
    order = TokenOrder(0)
    order.put(TokenChunk(2, (7, 8)))
    with pytest.raises(InternalError):
        order.put(TokenChunk(3, (9,)))
    assert order.holds_any


def test_an_empty_chunk_is_no_token() -> None:
    order = TokenOrder(0)
    assert order.put(TokenChunk(0, ())) == []
    assert order.next_index == 0
