"""What makes a wire buffer trustworthy: the source seals it, decode verifies it before a byte enters its pool.

Pure functions, called on either side's event loop or, for large buffers, in a thread of its default executor (`seal_off_loop`,
`find_mismatch_off_loop`). A mismatch is a value where the caller must drop the buffer before it raises, since a traceback
keeps its frames' locals alive.
"""

import asyncio
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import xxhash

from baton.errors import CorruptKVError, PreconditionError
from baton.kv.spec import KVSpec, WireKV
from baton.transfer.base import KVMeta, PullRequest

INLINE_BYTES = 1 << 20
"""Up to here a checksum takes about as long as a hop to another thread."""

T = TypeVar("T")


def seal(request: PullRequest, spec: KVSpec, buffer: WireKV) -> KVMeta:
    """Describes `buffer`, the source's answer to `request`. Raises `PreconditionError` where decode asks for another spec's KV, and
    `CorruptKVError` where the buffer is not the KV that was asked for.
    """
    if request.digest != spec.digest:
        raise PreconditionError(f"KV digest is {spec.digest} here, {request.digest} was asked for")
    if problem := _misfit(buffer, request, spec):
        raise CorruptKVError(f"KV of {request.key}: {problem}")
    return KVMeta(
        key=request.key,
        first=request.first,
        last=request.last,
        dtype=spec.dtype.value,
        digest=spec.digest,
        checksum=checksum(buffer),
    )


def find_mismatch(
    meta: KVMeta, buffer: WireKV | None, request: PullRequest, spec: KVSpec
) -> str | None:
    """Why `buffer` is not what was asked for, or None where it is; the cheap comparisons come first."""
    if request.digest != spec.digest:
        return f"asked for digest {request.digest}, but decode's is {spec.digest}"
    expected = (request.key, request.first, request.last, spec.dtype.value, spec.digest)
    if (got := (meta.key, meta.first, meta.last, meta.dtype, meta.digest)) != expected:
        return f"meta says {_describe(*got)}; asked for {_describe(*expected)}"
    if buffer is None:
        return "no buffer came with the meta"
    if problem := _misfit(buffer, request, spec):
        return problem
    if (actual := checksum(buffer)) != meta.checksum:
        return f"checksum is {actual:#018x}, sealed as {meta.checksum:#018x}"
    return None


async def seal_off_loop(request: PullRequest, spec: KVSpec, buffer: WireKV) -> KVMeta:
    """`seal`, without blocking the event loop where the buffer is large."""
    return await _off_loop(buffer, lambda: seal(request, spec, buffer))


async def find_mismatch_off_loop(
    meta: KVMeta, buffer: WireKV | None, request: PullRequest, spec: KVSpec
) -> str | None:
    """`find_mismatch`, without blocking the event loop where the buffer is large. Nothing holds the buffer when this returns."""
    return await _off_loop(buffer, lambda: find_mismatch(meta, buffer, request, spec))


def checksum(buffer: WireKV) -> int:
    """XXH3-64 of a contiguous buffer's bytes."""
    return xxhash.xxh3_64_intdigest(buffer.data)


def split_range(first: int, last: int, token_bytes: int, max_bytes: int) -> list[tuple[int, int]]:
    """Cuts tokens [first, last) into consecutive pieces of nearly equal size, as few as keep each within `max_bytes`; a piece of a
    range that is not empty has at least one token, however large. An empty range is one empty piece: whoever pulls the pieces has
    always pulled up to `last`.
    """
    num_tokens = last - first
    most_tokens = max(1, max_bytes // token_bytes)
    num_pieces = max(1, -(-num_tokens // most_tokens))
    cuts = [first + num_tokens * i // num_pieces for i in range(num_pieces + 1)]
    return list(pairwise(cuts))


async def _off_loop(buffer: WireKV | None, compute: Callable[[], T]) -> T:
    if buffer is None or buffer.nbytes <= INLINE_BYTES:
        return compute()
    thread = asyncio.get_running_loop().run_in_executor(None, compute)
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        # The thread reads the buffer: whoever cancelled may free it, or its credit, only afterwards.
        await asyncio.wait({thread})
        raise


def _misfit(buffer: WireKV, request: PullRequest, spec: KVSpec) -> str | None:
    shape = spec.wire_shape(request.last - request.first)
    if buffer.shape != shape:
        return f"shape is {buffer.shape}, not {shape}"
    if buffer.dtype != spec.dtype.wire_dtype:
        return f"element type is {buffer.dtype}, not {spec.dtype.wire_dtype}"
    if not buffer.flags.c_contiguous:
        return "buffer is not contiguous"
    return None


def _describe(key: object, first: int, last: int, dtype: str, digest: str) -> str:
    return f"{key} [{first}, {last}) {dtype} {digest}"
