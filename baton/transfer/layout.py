"""What makes a wire buffer the one that was asked for: the source says what it sends, decode compares before it touches a byte.
Whether the bytes are those that left the source's pool is seen where they enter decode's (`baton.kv.checksum`).

Pure functions, called on either side's event loop. A mismatch is a value where the caller must drop the buffer before it
raises, since a traceback keeps its frames' locals alive.
"""

from itertools import pairwise

from baton.errors import CorruptKVError, PreconditionError
from baton.kv.spec import KVSpec, SealedKV, WireKV
from baton.transfer.base import KVMeta, PullRequest

PIECE_TOKENS = 512
"""Fewest tokens of a piece that goes while the prompt is computed, and most of the last one: about what one step computes."""
PIECE_BYTES = 8 << 20
"""Fewest bytes of such a piece, where there is more than one: below, calls cost more than copies."""
MOST_PIECES = 8


def meta_of(request: PullRequest, spec: KVSpec, kv: SealedKV) -> KVMeta:
    """Describes `kv`, the source's answer to `request`. Raises `PreconditionError` where decode asks for another spec's KV, and
    `CorruptKVError` where it is not the KV that was asked for.
    """
    if request.digest != spec.digest:
        raise PreconditionError(f"KV digest is {spec.digest} here, {request.digest} was asked for")
    if problem := _misfit(kv.data, request, spec):
        raise CorruptKVError(f"KV of {request.key}: {problem}")
    return KVMeta(
        key=request.key,
        first=request.first,
        last=request.last,
        dtype=spec.dtype.value,
        digest=spec.digest,
        checksum=kv.checksum,
    )


def find_mismatch(
    meta: KVMeta, buffer: WireKV | None, request: PullRequest, spec: KVSpec
) -> str | None:
    """Why `buffer` is not what was asked for, or None where it is. The checksum is not compared."""
    if request.digest != spec.digest:
        return f"asked for digest {request.digest}, but decode's is {spec.digest}"
    expected = (request.key, request.first, request.last, spec.dtype.value, spec.digest)
    if (got := (meta.key, meta.first, meta.last, meta.dtype, meta.digest)) != expected:
        return f"meta says {_describe(*got)}; asked for {_describe(*expected)}"
    if buffer is None:
        return "no buffer came with the meta"
    return _misfit(buffer, request, spec)


def handoff_pieces(
    first: int, last: int, token_bytes: int, *, max_bytes: int, overlap_tokens: int
) -> list[tuple[int, int]]:
    """The consecutive pieces in which tokens [first, last) go from prefill to decode; both find them by this.

    More than `overlap_tokens` of them go while the prompt is computed: seven pieces at most, since each is a call, a copy and a command
    to two engines, and then the last tokens, which are all that is left to hand over once the prompt is done.
    """
    num_tokens = last - first
    if num_tokens <= max(1, overlap_tokens):
        return split_range(first, last, token_bytes, max_bytes)
    cut = last - min(PIECE_TOKENS, num_tokens // 2)
    body = cut - first
    count = min(MOST_PIECES - 1, body // PIECE_TOKENS, body * token_bytes // PIECE_BYTES)
    piece_bytes = -(-body // max(1, count)) * token_bytes
    return [
        *split_range(first, cut, token_bytes, min(piece_bytes, max_bytes)),
        *split_range(cut, last, token_bytes, max_bytes),
    ]


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
