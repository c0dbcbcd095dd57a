"""Decode's end of every transport: from a peer's answer to the buffer that was asked for, or to the error that says why there is none.

Runs in the decode worker's event loop. Invariant: however a pull ends, its buffer is dropped before its credit returns.
"""

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace

from baton.errors import (
    BatonError,
    CancelledError,
    CapacityError,
    CorruptKVError,
    DeadlineError,
    InternalError,
    PreconditionError,
    UnavailableError,
)
from baton.kv.spec import KVSpec, SealedKV, WireKV
from baton.transfer.base import KVMeta, PullRequest, Refused
from baton.transfer.credits import ByteCredits
from baton.transfer.layout import find_mismatch

Fetch = Callable[[PullRequest], Awaitable[tuple[KVMeta | Refused, WireKV | None]]]

_RAISED: Mapping[str, Callable[[str], BatonError]] = {
    error.reason: error
    for error in (UnavailableError, CapacityError, CorruptKVError, CancelledError, InternalError)
}


@asynccontextmanager
async def received(
    fetch: Fetch, request: PullRequest, *, spec: KVSpec, budget: ByteCredits, timeout_s: float
) -> AsyncIterator[SealedKV]:
    """`KVTransport.pull`, given how this transport fetches an answer. `fetch` keeps no reference to what it returned."""
    kv: WireKV | None = None
    async with AsyncExitStack() as lease:
        try:
            async with deadline(timeout_s, "kv_pull"):
                num_bytes = spec.token_bytes * (request.last - request.first)
                await lease.enter_async_context(budget.lease(num_bytes))
                meta, kv = await fetch(replace(request, timeout_s=source_timeout_s(timeout_s)))
                if isinstance(meta, Refused):
                    raise error_from(meta)
                problem = find_mismatch(meta, kv, request, spec)
            if problem or kv is None:
                raise CorruptKVError(f"KV of {request.key}: {problem}")
            kv.flags.writeable = False
            with _frames_cleared():
                yield SealedKV(kv, meta.checksum)
        finally:
            kv = None  # a traceback would keep it alive


@contextmanager
def _frames_cleared() -> Iterator[None]:
    """An error that comes out of the body, from an import say, keeps nothing that the functions it passed held."""
    try:
        yield
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise


def error_from(refused: Refused) -> BatonError:
    """What decode raises for a refusal: the retryable errors as themselves, anything unknown as a precondition of this attempt."""
    if refused.reason == DeadlineError.reason:
        return DeadlineError("handoff")
    return _RAISED.get(refused.reason, PreconditionError)(refused.message)


def source_timeout_s(timeout_s: float) -> float:
    """What the source is given of decode's `timeout_s`: a little less, so that its own account arrives before decode gives up."""
    return timeout_s - min(0.25, timeout_s / 8)


@asynccontextmanager
async def deadline(timeout_s: float, stage: str) -> AsyncIterator[None]:
    """Raises `DeadlineError` where the body takes longer."""
    timer = asyncio.timeout(timeout_s)
    try:
        async with timer:
            yield
    except TimeoutError as error:
        if timer.expired():
            raise DeadlineError(stage) from error
        raise
