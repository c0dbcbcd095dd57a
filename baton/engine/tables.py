"""Gives requests their blocks and takes them back: the one place where block tables and the pool's books change together.

A request's table holds, in order, blocks that the prefix cache lent (shared, never written) and blocks of its own. Owned by the
engine.
"""

from baton.engine.request import RequestState
from baton.kv.blocks import BlockPool, blocks_for
from baton.scheduling.plan import Waiting


class BlockTables:
    """See the module docstring."""

    def __init__(self, pool: BlockPool, *, prefix_cache: bool, prompts_only: bool = False) -> None:
        """With `prompts_only`, no other request reuses the KV of generated tokens, nor do these reuse a prompt's."""
        self._pool = pool
        self._prefix_cache = prefix_cache
        self._prompts_only = prompts_only

    def waiting_view(self, state: RequestState) -> Waiting:
        """What admitting the request would take now."""
        matched = self._match(state)
        return Waiting(
            key=state.key,
            num_tokens=len(state.tokens),
            num_cached=len(matched) * self._pool.block_size,
            num_blocks=self._total(state) - len(matched) + self._pool.num_unheld(matched),
            computes=not state.awaits_import,
        )

    def fill(self, state: RequestState) -> bool:
        """Gives blocks for all of the request's tokens, with what the prefix cache holds as computed. False, and nothing is
        changed: not so many are available.
        """
        matched = self._match(state)
        self._pool.hold(matched)
        fresh = self._pool.allocate(self._total(state) - len(matched))
        if fresh is None:
            self._pool.free(matched)
            return False
        state.table = matched + fresh
        state.num_computed = len(matched) * self._pool.block_size
        state.num_published = len(matched)
        return True

    def grow(self, state: RequestState, num_tokens: int) -> bool:
        """Extends the table to that many tokens; False where no block is available."""
        missing = blocks_for(num_tokens, self._pool.block_size) - len(state.table)
        if missing > 0:
            blocks = self._pool.allocate(missing)
            if blocks is None:
                return False
            state.table += blocks
        return True

    def give_back(self, state: RequestState) -> None:
        """Takes every block; the request is as if nothing was computed."""
        self._pool.free(state.table)
        state.table = []
        state.num_computed = 0
        state.num_published = 0

    def publish(self, state: RequestState) -> None:
        """Makes the blocks that are now full of computed tokens reusable."""
        if not self._prefix_cache:
            return
        full = min(state.num_computed, self._shared(state)) // self._pool.block_size
        hashes = state.hashes(full)
        for index in range(state.num_published, full):
            parent = hashes[index - 1] if index else state.root
            tokens = state.block_tokens(index)
            if not self._pool.publish(state.table[index], hashes[index], parent, tokens):
                return
            state.num_published = index + 1

    def _match(self, state: RequestState) -> list[int]:
        """Cached blocks of the sequence, short of its last token: that one's logits are needed, here or where its KV comes from."""
        if not self._prefix_cache:
            return []
        full = (self._shared(state) - 1) // self._pool.block_size
        return self._pool.match(state.hashes(full), state.tokens, state.root)

    def _shared(self, state: RequestState) -> int:
        """Leading tokens whose KV is what it is in any sequence."""
        return len(state.prompt) if self._prompts_only else len(state.tokens)

    def _total(self, state: RequestState) -> int:
        # A sequence whose KV is imported goes on with one more token at once.
        tokens = len(state.tokens) + (1 if state.awaits_import else 0)
        return blocks_for(tokens, self._pool.block_size)
