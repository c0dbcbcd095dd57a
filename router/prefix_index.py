"""Which workers hold which blocks in their prefix caches, looked up by hash, so that asking costs neither a
look at each worker nor, mostly, one at each block. Pure; owned by `router.registry`.

Each worker has a bit; each hash has the set of its holders, as the integer of their bits. The bit of a worker that left goes to
the next that comes.
"""

from collections.abc import Sequence

from baton.types import BlockHash, PrefixDelta, WorkerId


class PrefixIndex:
    """For the workers of one block size."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._holders: dict[BlockHash, int] = {}
        self._held: dict[WorkerId, set[BlockHash]] = {}
        self._bit_of: dict[WorkerId, int] = {}
        self._worker_at: dict[int, WorkerId] = {}

    def __len__(self) -> int:
        """Workers."""
        return len(self._held)

    def add(self, worker_id: WorkerId) -> None:
        """Takes in a worker whose cache is empty. Precondition: it is not here."""
        assert worker_id not in self._held
        bit = next(bit for bit in range(len(self._held) + 1) if bit not in self._worker_at)
        self._bit_of[worker_id], self._worker_at[bit] = bit, worker_id
        self._held[worker_id] = set()

    def remove(self, worker_id: WorkerId) -> None:
        """Forgets a worker and all that it holds."""
        self._evict(worker_id, tuple(self._held[worker_id]))
        del self._held[worker_id], self._worker_at[self._bit_of.pop(worker_id)]

    def update(self, worker_id: WorkerId, delta: PrefixDelta) -> None:
        """Takes in the changes of a worker's cache."""
        self._evict(worker_id, delta.evicted)
        held, mask = self._held[worker_id], 1 << self._bit_of[worker_id]
        held.update(delta.stored)
        for block_hash in delta.stored:
            self._holders[block_hash] = self._holders.get(block_hash, 0) | mask

    def cached_tokens(self, hashes: Sequence[BlockHash]) -> dict[WorkerId, int]:
        """How many leading tokens of a sequence each worker holds; who holds none is absent. Caches evict the end of a sequence first,
        so who holds a block is taken to hold what comes before it, and most blocks need no look.
        """
        if not hashes:
            return {}
        look, last = self._holders.get, len(hashes) - 1
        first = look(hashes[0], 0)
        whole = first & look(hashes[last], 0)
        found = self._at_depth(whole, len(hashes))
        # (a, b, who holds block a, who of them holds block b)
        spans = [(0, last, first, whole)]
        while spans:
            a, b, at_a, at_b = spans.pop()
            lost = at_a & ~at_b
            if not lost:
                continue
            if b - a == 1:
                found.update(self._at_depth(lost, b))
                continue
            middle = (a + b) // 2
            at_middle = at_b | (at_a & look(hashes[middle], 0))
            spans.append((a, middle, at_a, at_middle))
            spans.append((middle, b, at_middle, at_b))
        return found

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        assert {bit: worker for worker, bit in self._bit_of.items()} == self._worker_at
        assert self._bit_of.keys() == self._held.keys()
        counted: dict[BlockHash, int] = {}
        for worker_id, held in self._held.items():
            for block_hash in held:
                counted[block_hash] = counted.get(block_hash, 0) | 1 << self._bit_of[worker_id]
        assert counted == self._holders

    def _evict(self, worker_id: WorkerId, hashes: Sequence[BlockHash]) -> None:
        held, mask = self._held[worker_id], 1 << self._bit_of[worker_id]
        for block_hash in hashes:
            if block_hash in held:
                held.discard(block_hash)
                left = self._holders[block_hash] & ~mask
                if left:
                    self._holders[block_hash] = left
                else:
                    del self._holders[block_hash]

    def _at_depth(self, bits: int, blocks: int) -> dict[WorkerId, int]:
        """The workers whose bits these are, each with so many blocks, in tokens."""
        at = self._worker_at
        held = (at[bit] for bit, digit in enumerate(reversed(f"{bits:b}")) if digit == "1")
        return dict.fromkeys(held, blocks * self._block_tokens)
