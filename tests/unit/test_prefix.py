"""Block hashes: the same for a content and its position, on routers and workers, however a sequence came to be."""

from hypothesis import given
from hypothesis import strategies as st

from baton.kv.prefix import ROOT, SequenceHashes, block_hashes, child_hash, root_of

tokens_of = st.lists(st.integers(0, 2**32 - 1), max_size=60)


def test_hashes_are_what_they_have_always_been() -> None:
    """Routers and workers of different versions meet: the function is part of the protocol."""
    assert block_hashes(range(8), 4) == [5919486166599431679, 3142802598544154706]


@given(tokens=tokens_of, size=st.integers(1, 9))
def test_a_chain_of_children_is_the_sequence(tokens: list[int], size: int) -> None:
    parent, chained = ROOT, []
    for start in range(0, len(tokens) - size + 1, size):
        parent = child_hash(parent, tokens[start : start + size])
        chained.append(parent)
    assert block_hashes(tokens, size) == chained


@given(
    parts=st.lists(tokens_of, min_size=1, max_size=4),
    sizes=st.sets(st.integers(1, 9)),
    salt=st.text(max_size=4),
)
def test_a_sequence_that_grows_has_the_hashes_of_the_whole(
    parts: list[list[int]], sizes: set[int], salt: str
) -> None:
    """Under its salt, and forked too."""
    growing = SequenceHashes(parts[0], salt)
    whole = list(parts[0])
    for part in [*parts[1:], []]:
        for size in sizes:
            assert growing.of(size) == block_hashes(whole, size, root_of(salt))
        growing = growing.fork()
        growing.extend(part)
        whole += part
    assert len(growing) == len(whole)
