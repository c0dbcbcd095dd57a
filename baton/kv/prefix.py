"""Names for KV blocks by content: equal hashes mean the same tokens at the same positions with the same tokens before them, under
the same salt.

Workers index their prefix caches by these, and routers compute them to find the worker that holds a prompt. Torch-free, pure.
"""

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from struct import unpack

from baton.types import BlockHash

ROOT = BlockHash(0)
"""The parent of an unsalted sequence's first block."""


def root_of(salt: str) -> BlockHash:
    """The parent of a sequence's first block. Chains of different salts have no block in common, so that nobody learns from a hit
    what was asked under a salt that is not his.
    """
    if not salt:
        return ROOT
    digest = blake2b(salt.encode(), digest_size=HASH_BYTES, person=b"baton-kv-salt").digest()
    return BlockHash(int.from_bytes(digest, "little"))


HASH_BYTES = 8
TOKEN_BYTES = 4


def child_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """The hash of the block that holds `tokens` after the block `parent`."""
    return block_hashes(tokens, len(tokens), parent)[0]


def block_hashes(
    tokens: Sequence[int], block_size: int, parent: BlockHash = ROOT
) -> list[BlockHash]:
    """The hash of every full block of a sequence that follows the block `parent`, in order; a last block that is not full has none."""
    data = _token_bytes(tokens[: len(tokens) // block_size * block_size])
    width = TOKEN_BYTES * block_size
    digest = parent.to_bytes(HASH_BYTES, "little")
    digests = []
    for start in range(0, len(data), width):
        digest = blake2b(digest + data[start : start + width], digest_size=HASH_BYTES).digest()
        digests.append(digest)
    return list(unpack(f"<{len(digests)}Q", b"".join(digests)))


class SequenceHashes:
    """The block hashes of one sequence that grows at its end; each is computed once."""

    def __init__(self, tokens: Sequence[int], salt: str = "") -> None:
        self._tokens = list(tokens)
        self._salt = salt
        self._hashes: dict[int, list[BlockHash]] = {}

    def __len__(self) -> int:
        """Tokens of the sequence."""
        return len(self._tokens)

    def fork(self) -> "SequenceHashes":
        """Another sequence that begins as this one, with what was computed."""
        other = SequenceHashes(self._tokens, self._salt)
        other._hashes = {size: list(hashes) for size, hashes in self._hashes.items()}
        return other

    def extend(self, tokens: Sequence[int]) -> None:
        """Adds tokens to the end of the sequence."""
        self._tokens.extend(tokens)

    def of(self, block_size: int) -> Sequence[BlockHash]:
        """As `block_hashes` gives them for the whole sequence, under its salt."""
        hashes = self._hashes.setdefault(block_size, [])
        first = len(hashes) * block_size
        if len(self._tokens) - first >= block_size:
            parent = hashes[-1] if hashes else root_of(self._salt)
            hashes += block_hashes(self._tokens[first:], block_size, parent)
        return hashes


def _token_bytes(tokens: Sequence[int]) -> bytes:
    """Each token as four bytes, little-endian."""
    numbers = array("I", tokens)
    assert numbers.itemsize == TOKEN_BYTES
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tobytes()
