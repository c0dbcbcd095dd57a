"""Server-sent events in pieces."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from baton.bench.sse import EventStream


@given(
    st.lists(st.text(st.characters(blacklist_characters="\r\n", codec="utf-8"), min_size=1)),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["data: ", "data:"]),
    st.lists(st.integers(0, 2000)),
)
def test_events_are_the_same_however_the_bytes_are_cut(
    texts: list[str], newline: str, prefix: str, cuts: list[int]
) -> None:
    texts = [text.lstrip(" ") or "x" for text in texts]
    stream = "".join(f"{prefix}{text}{newline}{newline}" for text in texts).encode()
    places = sorted({min(cut, len(stream)) for cut in cuts} | {0, len(stream)})
    reader = EventStream()
    found = [data for first, last in pairwise(places) for data in reader.feed(stream[first:last])]
    assert found == [text.encode() for text in texts]


def test_comments_names_and_ids_are_passed_over_and_lines_joined() -> None:
    reader = EventStream()
    assert reader.feed(b": ping\n\nevent: x\nid: 3\ndata: a\ndata: b\n\n\n\n") == [b"a\nb"]
    assert reader.feed(b"data: unfinished\n") == []


@given(st.lists(st.binary()))
def test_no_bytes_break_it(pieces: list[bytes]) -> None:
    reader = EventStream()
    for piece in pieces:
        reader.feed(piece)
