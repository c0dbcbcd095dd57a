"""Waits for the KV of a prompt whose Prefill call the router makes after the Decode call, and may never make: it can die in between.

Runs on the worker's event loop, in the task of the attempt.
"""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from baton.transfer.base import Piece, Ready, Underway

ARRIVAL_S = 0.5
"""How long a Prefill call may still be on its way from a router that has gone."""


async def ready_unless_orphaned(
    ask: Callable[[Piece], Coroutine[Any, Any, Ready | Underway]],
    piece: Piece,
    orphaned: asyncio.Event,
) -> Ready | Underway:
    """What `ask`, see `KVSource.ready`, tells. Once `orphaned` is set, raises `PreconditionError` where the source has not heard of the
    attempt `ARRIVAL_S` later.
    """
    asking = asyncio.create_task(ask(piece))
    watching = asyncio.create_task(orphaned.wait())
    try:
        await asyncio.wait({asking, watching}, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait({asking}, timeout=ARRIVAL_S)
        if asking.done():
            return asking.result()
        return await ask(replace(piece, has_begun=True))
    finally:
        asking.cancel()
        watching.cancel()
        await asyncio.wait({asking, watching})
        if not asking.cancelled():
            asking.exception()  # told above, or no longer asked for
