"""Names for KV blocks by content: equal hashes mean the same tokens at the same positions with the same tokens before them.

Workers index their prefix caches by these, and routers compute them to find the worker that holds a prompt. Torch-free, pure.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from baton.types import BlockHash

ROOT = BlockHash(0)
"""The parent of a sequence's first block."""


def child_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """The hash of the block that holds `tokens` after the block `parent`."""
    data = parent.to_bytes(8, "little") + np.asarray(tokens, dtype="<u4").tobytes()
    return BlockHash(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))


def block_hashes(tokens: Sequence[int], block_size: int) -> list[BlockHash]:
    """The hash of every full block of a sequence, in order; a last block that is not full has none."""
    hashes = []
    parent = ROOT
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = child_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes
