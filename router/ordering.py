"""Puts tokens from two streams in order. Pure; one per attempt."""

from baton.errors import InternalError
from baton.types import TokenChunk


class TokenOrder:
    """Takes chunks as they come and gives them out by output position, without gap or repeat."""

    def __init__(self, first_index: int) -> None:
        self.next_index = first_index
        """Position of the next token to give out."""
        self._held: dict[int, TokenChunk] = {}

    @property
    def holds_any(self) -> bool:
        """Whether tokens wait for ones before them."""
        return bool(self._held)

    def put(self, chunk: TokenChunk) -> list[TokenChunk]:
        """The chunks that are due now, in order. Raises `InternalError` where a token was there before."""
        if not chunk.token_ids:
            return []
        if chunk.first_index == self.next_index and not self._held:
            self.next_index = chunk.end_index
            return [chunk]
        if chunk.first_index < self.next_index or self._overlaps(chunk):
            raise InternalError(f"a worker repeated the token at position {chunk.first_index}")
        self._held[chunk.first_index] = chunk
        due = []
        while self.next_index in self._held:
            ready = self._held.pop(self.next_index)
            self.next_index = ready.end_index
            due.append(ready)
        return due

    def _overlaps(self, chunk: TokenChunk) -> bool:
        return any(
            held.first_index < chunk.end_index and chunk.first_index < held.end_index
            for held in self._held.values()
        )
