"""The block pool's books balance after any sequence of operations, and the prefix cache finds what it should."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from baton.kv.blocks import BlockPool, blocks_for
from baton.kv.prefix import ROOT, block_hashes, child_hash, root_of

SIZE = 4


def hold_prompt(pool: BlockPool, tokens: list[int]) -> list[int] | None:
    """What an engine does to admit a prompt and compute it."""
    hashes = block_hashes(tokens, SIZE)
    matched = pool.match(hashes, tokens)
    pool.hold(matched)
    fresh = pool.allocate(blocks_for(len(tokens), SIZE) - len(matched))
    if fresh is None:
        pool.free(matched)
        return None
    table = matched + fresh
    for index, block_hash in enumerate(hashes):
        parent = hashes[index - 1] if index else ROOT
        pool.publish(table[index], block_hash, parent, tokens[index * SIZE : (index + 1) * SIZE])
    return table


def test_chains_of_different_salts_have_no_block_in_common() -> None:
    tokens = list(range(20))
    chains = [block_hashes(tokens, SIZE, root_of(salt)) for salt in ("", "a", "b", "a/", "é")]
    assert len({each for chain in chains for each in chain}) == 5 * len(chains[0])
    assert block_hashes(tokens, SIZE, root_of("a")) == chains[1]
    assert root_of("") == ROOT


def test_a_second_prompt_shares_the_full_blocks_of_its_common_prefix() -> None:
    pool = BlockPool(8, SIZE)
    first = hold_prompt(pool, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    second = hold_prompt(pool, [1, 2, 3, 4, 5, 6, 7, 8, 10])
    assert first is not None
    assert second is not None
    assert first[:2] == second[:2]
    assert first[2] != second[2]
    pool.check_integrity([first, second])


def test_freed_blocks_stay_cached_until_blanks_run_out_and_go_oldest_tail_first() -> None:
    pool = BlockPool(4, SIZE)
    old = hold_prompt(pool, list(range(8)))
    assert old is not None
    pool.free(old)
    assert (pool.num_blank, pool.num_cached) == (2, 2)
    taken = pool.allocate(3)
    assert taken is not None
    hashes = block_hashes(list(range(8)), SIZE)
    assert pool.match(hashes, list(range(8))) == old[:1], "the head of the prefix goes last"


def test_allocate_answers_none_and_changes_nothing_when_there_is_no_room() -> None:
    pool = BlockPool(2, SIZE)
    table = pool.allocate(2)
    assert table is not None
    assert pool.allocate(1) is None
    pool.check_integrity([table])


def test_a_hash_collision_is_a_miss() -> None:
    pool = BlockPool(4, SIZE)
    table = pool.allocate(1)
    assert table is not None
    pool.publish(table[0], child_hash(ROOT, [1, 2, 3, 4]), ROOT, [9, 9, 9, 9])
    assert pool.match(block_hashes([1, 2, 3, 4], SIZE), [1, 2, 3, 4]) == []


def test_after_a_hash_collision_nothing_more_of_the_sequence_is_published() -> None:
    pool = BlockPool(4, SIZE)
    table = pool.allocate(2)
    assert table is not None
    stolen = child_hash(ROOT, [1, 2, 3, 4])
    assert pool.publish(table[0], stolen, ROOT, [9, 9, 9, 9])
    assert not pool.publish(table[1], stolen, ROOT, [1, 2, 3, 4])
    pool.check_integrity([table])


def test_the_same_tokens_after_another_prefix_have_another_hash() -> None:
    assert block_hashes([1, 1, 5, 6], 2)[1] != block_hashes([2, 2, 5, 6], 2)[1]
    assert len(block_hashes([1, 2, 3], 2)) == 1


class PoolMachine(RuleBasedStateMachine):
    """Admits and frees prompts with common prefixes in a small pool, and mirrors the announced prefix cache."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, SIZE)
        self.tables: list[list[int]] = []
        self.mirror: set[int] = set()

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20),
    )
    def admit(self, tokens: list[int]) -> None:
        table = hold_prompt(self.pool, tokens)
        if table is not None:
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.free(self.tables.pop(index))

    @rule()
    def announce(self) -> None:
        delta = self.pool.take_delta()
        assert not set(delta.stored) & set(delta.evicted)
        self.mirror -= set(delta.evicted)
        self.mirror |= set(delta.stored)
        assert self.mirror == set(self.pool._by_hash)

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity(self.tables)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2)])
def test_blocks_for_rounds_up(tokens: int, blocks: int) -> None:
    assert blocks_for(tokens, SIZE) == blocks
