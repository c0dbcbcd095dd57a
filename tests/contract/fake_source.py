"""A `KVSource` whose behaviour is chosen by the request's id, so that one source, in whatever process, serves every test."""

import asyncio
import os
import zlib
from dataclasses import replace
from enum import Enum

import numpy as np

from baton.kv.checksum import sealed
from baton.kv.spec import KVDtype, KVSpec, WireKV
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.endpoint import SourceEndpoint
from baton.transfer.layout import meta_of
from baton.types import AttemptKey, RequestId

SPEC = KVSpec(
    num_layers=3,
    num_kv_heads=2,
    head_dim=8,
    dtype=KVDtype.FLOAT32,
    position_scheme="rope:theta=10000",
    model_fingerprint="fake",
)
HALF_SPEC = replace(SPEC, dtype=KVDtype.BFLOAT16)
LARGE_SPEC = replace(SPEC, num_kv_heads=64, head_dim=128)
"""192 KiB a token."""
_SPECS = {spec.digest: spec for spec in (SPEC, HALF_SPEC, LARGE_SPEC)}


class Act(Enum):
    """What the source does with a request."""

    GOOD = "good"
    LATE = "late"
    """Ready after a third of a second."""
    PIECES = "pieces"
    """Has pieces that end before token 32 sooner than the whole."""
    NEVER = "never"
    """Neither becomes ready nor answers a pull."""
    SLOW = "slow"
    """Answers a pull after a twentieth of a second."""
    BROKEN = "broken"
    """Raises what no source should."""
    FLIPPED = "flipped"
    """One bit changes after the seal."""
    TRUNCATED = "truncated"
    """The last token is missing."""
    TRANSPOSED = "transposed"
    """The same bytes in another shape."""
    RETYPED = "retyped"
    """The same bytes as another element type."""
    FORTRAN = "fortran"
    """The same values in another memory order."""
    STALE = "stale"
    """An earlier attempt's meta."""
    SHIFTED = "shifted"
    """Another range's meta."""
    FOREIGN = "foreign"
    """Another spec's meta."""
    MISSING = "missing"
    """Meta without a buffer."""


def key_for(act: Act, suffix: object = 0, attempt: int = 1) -> AttemptKey:
    """A key whose pull makes the source act so."""
    return AttemptKey(RequestId(f"{act.value}:{suffix}"), attempt)


def refused_key(reason: str) -> AttemptKey:
    """A key that the source refuses for that reason."""
    return AttemptKey(RequestId(f"refuse:{reason}"), 1)


def request_for(key: AttemptKey, first: int = 2, last: int = 7, spec: KVSpec = SPEC) -> PullRequest:
    return PullRequest(key=key, first=first, last=last, digest=spec.digest)


def kv_of(request: PullRequest, spec: KVSpec) -> WireKV:
    """Every bit pattern, NaNs among them; the same wherever it is computed."""
    seed = zlib.crc32(f"{request.key} {request.first} {request.last}".encode())
    shape = spec.wire_shape(request.last - request.first)
    num_bytes = spec.token_bytes * (request.last - request.first)
    words = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)
    return words.view(spec.dtype.wire_dtype).reshape(shape)


class FakeSource:
    """Acts as the request's id says."""

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        del timeout_s
        name, _, detail = key.request_id.partition(":")
        if name == "refuse":
            return Refused(detail, "as asked")
        act = Act(name)
        if act is Act.BROKEN:
            raise RuntimeError("the source is broken")
        if act is Act.LATE:
            await asyncio.sleep(0.3)
        if act is Act.NEVER:
            await asyncio.Event().wait()
        if act is Act.PIECES and piece is not None and piece.last < 32:
            return Underway()
        return Ready(first_token=key.attempt, done_unix_s=1.5)

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        name, _, detail = request.key.request_id.partition(":")
        if name == "refuse":
            return Refused(detail, "as asked"), None
        act = Act(name)
        if act is Act.BROKEN:
            raise RuntimeError("the source is broken")
        if act is Act.NEVER:
            await asyncio.Event().wait()
        if act is Act.SLOW:
            await asyncio.sleep(0.05)
        spec = _SPECS.get(request.digest, SPEC)
        kv = kv_of(request, spec)
        meta = meta_of(request, spec, sealed(kv))
        return _meta_after(act, meta), _kv_after(act, kv)


def _meta_after(act: Act, meta: KVMeta) -> KVMeta:
    match act:
        case Act.STALE:
            return replace(meta, key=replace(meta.key, attempt=meta.key.attempt - 1))
        case Act.SHIFTED:
            return replace(meta, first=meta.first + 1, last=meta.last + 1)
        case Act.FOREIGN:
            return replace(meta, digest=HALF_SPEC.digest)
        case _:
            return meta


def _kv_after(act: Act, kv: WireKV) -> WireKV | None:
    changed: WireKV | None = kv
    match act:
        case Act.FLIPPED:
            kv.reshape(-1).view(np.uint8)[kv.nbytes // 2] ^= 0x10
        case Act.TRUNCATED:
            changed = np.ascontiguousarray(kv[:, :, :-1])
        case Act.TRANSPOSED:
            changed = kv.reshape(kv.shape[1], kv.shape[0], *kv.shape[2:])
        case Act.RETYPED:
            changed = kv.view(np.int32)
        case Act.FORTRAN:
            changed = np.asfortranarray(kv)
        case Act.MISSING:
            changed = None
    return changed


class FakePrefill:
    """An actor that serves a `FakeSource` as a prefill worker's does."""

    def __init__(self) -> None:
        self._endpoint = SourceEndpoint(FakeSource())

    async def kv_ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        return await self._endpoint.ready(key, timeout_s, piece)

    async def kv_pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        return await self._endpoint.pull(request)

    async def pid(self) -> int:
        return os.getpid()
