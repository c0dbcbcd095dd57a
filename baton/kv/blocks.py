"""The books of the paged KV pool: which block is free, cached or held, and which prefix each cached block carries.

Every block is in exactly one state:

    blank    no content, nobody holds it
    cached   carries a hashed prefix, nobody holds it; evicted, least recently used first, when blanks run out
    held     one or more sequences hold it; it may carry a hashed prefix, which makes it shareable

Only full, computed blocks are hashed, and a block's content never changes while it is hashed or shared, so sharing needs no
copies. Torch-free and without a clock; owned by the engine's thread.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from baton.kv.prefix import ROOT
from baton.types import BlockHash, PrefixDelta


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks hold that many tokens."""
    return -(-num_tokens // block_size)


@dataclass(frozen=True, slots=True)
class _Content:
    """What a hashed block carries. Kept to tell a hash collision from a hit."""

    hash: BlockHash
    parent: BlockHash
    tokens: tuple[int, ...]


class BlockPool:
    """Blocks numbered [0, num_blocks), each for `block_size` tokens."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._holders = [0] * num_blocks
        self._content: dict[int, _Content] = {}
        self._by_hash: dict[BlockHash, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._stored: dict[BlockHash, None] = {}
        self._evicted: dict[BlockHash, None] = {}

    @property
    def num_blank(self) -> int:
        return len(self._blank)

    @property
    def num_cached(self) -> int:
        """Cached blocks that nobody holds."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now."""
        return len(self._blank) + len(self._cached)

    def match(
        self, hashes: Sequence[BlockHash], tokens: Sequence[int], root: BlockHash = ROOT
    ) -> list[int]:
        """The blocks that carry the longest cached prefix of a sequence. Does not hold them.

        `hashes[i]` names tokens [i * block_size, (i + 1) * block_size), `root` is the parent of the first.
        """
        blocks = []
        parent = root
        for index, block_hash in enumerate(hashes):
            block = self._by_hash.get(block_hash)
            if block is None:
                break
            first = index * self.block_size
            content = self._content[block]
            if content.parent != parent or content.tokens != tuple(
                tokens[first : first + self.block_size]
            ):
                break
            blocks.append(block)
            parent = block_hash
        return blocks

    def num_unheld(self, blocks: Sequence[int]) -> int:
        """How many of these blocks `hold` would take from the available ones."""
        return sum(not self._holders[block] for block in blocks)

    def hold(self, blocks: Sequence[int]) -> None:
        """Adds a holder to blocks that `match` returned."""
        for block in blocks:
            if not self._holders[block]:
                del self._cached[block]
            self._holders[block] += 1

    def allocate(self, count: int) -> list[int] | None:
        """Hands out `count` blocks with one holder each, evicting cached ones as needed. None: not so many are available."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def free(self, blocks: Sequence[int]) -> None:
        """Removes a holder from each block of a sequence. Its last blocks become the first to be evicted, so that what stays
        cached is a prefix.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._content:
                self._cached[block] = None
            else:
                self._blank.append(block)

    def publish(
        self, block: int, block_hash: BlockHash, parent: BlockHash, tokens: Sequence[int]
    ) -> bool:
        """Makes a held, full, computed block reusable. No effect where another block carries that prefix already. False where that
        hash stands for another prefix: what comes after it cannot be published either.
        """
        content = _Content(block_hash, parent, tuple(tokens))
        known = self._by_hash.get(block_hash)
        if known is not None:
            return self._content[known] == content
        self._content[block] = content
        self._by_hash[block_hash] = block
        if block_hash in self._evicted:
            del self._evicted[block_hash]
        else:
            self._stored[block_hash] = None
        return True

    def take_delta(self) -> PrefixDelta:
        """Changes of the prefix cache since the last call."""
        delta = PrefixDelta(stored=tuple(self._stored), evicted=tuple(self._evicted))
        self._stored.clear()
        self._evicted.clear()
        return delta

    def _forget(self, block: int) -> None:
        block_hash = self._content.pop(block).hash
        del self._by_hash[block_hash]
        if block_hash in self._stored:
            del self._stored[block_hash]
        else:
            self._evicted[block_hash] = None

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Asserts that the books balance, given the block tables of every sequence that holds any."""
        holders = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), "a sequence holds a block twice"
            for block in table:
                holders[block] += 1
        assert holders == self._holders, "holders differ from the block tables"
        blank, cached = set(self._blank), set(self._cached)
        assert len(blank) == len(self._blank), "a block is blank twice"
        assert not blank & cached, "a block is blank and cached"
        held = {block for block, count in enumerate(holders) if count}
        assert not held & (blank | cached), "a held block is available"
        assert len(held) + len(blank) + len(cached) == self.num_blocks, "a block is lost"
        assert cached <= set(self._content), "a cached block has no content"
        assert not blank & set(self._content), "a blank block has content"
        assert {c.hash: b for b, c in self._content.items()} == self._by_hash, "the index is stale"
