"""Pulls a token range in pieces, a few in flight at once: while decode imports one, prefill copies out and ships the next.

Runs in the decode worker's event loop, over any transport.
"""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

from baton.kv.spec import KVSpec
from baton.transfer.base import KVTransport, PullRequest, WireKV
from baton.transfer.layout import split_range

Import = Callable[[int, WireKV], Awaitable[None]]
"""Copies a buffer into the pool as the KV of the tokens from the given one on; does not keep it."""


async def pull_pieces(
    transport: KVTransport,
    address: str,
    request: PullRequest,
    *,
    spec: KVSpec,
    piece_bytes: int,
    in_flight: int,
    timeout_s: float,
    into: Import,
) -> None:
    """Pulls `request` in pieces of at most `piece_bytes`, at most `in_flight` at once, and hands each to `into`, one at a time and in
    order. `timeout_s` bounds each piece's pull. Raises what `KVTransport.pull` and `into` raise; then nothing is left in flight.

    Pieces ask for their credit in order, so a piece that waits for its turn never holds what an earlier one needs.
    """
    slots = asyncio.Semaphore(in_flight)
    pieces = split_range(request.first, request.last, spec.token_bytes, piece_bytes)

    async def carry(piece: tuple[int, int], turn: asyncio.Event, done: asyncio.Event) -> None:
        first, last = piece
        part = PullRequest(key=request.key, first=first, last=last, digest=request.digest)
        async with transport.pull(address, part, spec=spec, timeout_s=timeout_s) as kv:
            await turn.wait()
            try:
                await into(first, kv)
            finally:
                del kv  # a traceback would keep it alive
        done.set()
        slots.release()

    turns = [asyncio.Event() for _ in range(len(pieces) + 1)]
    turns[0].set()
    try:
        async with asyncio.TaskGroup() as group:
            for piece, (turn, done) in zip(pieces, pairwise(turns), strict=True):
                await slots.acquire()
                group.create_task(carry(piece, turn, done))
    except BaseExceptionGroup as failures:
        raise _first(failures) from None


def _first(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that came first: the others are its consequences."""
    failure = failures.exceptions[0]
    return _first(failure) if isinstance(failure, BaseExceptionGroup) else failure
