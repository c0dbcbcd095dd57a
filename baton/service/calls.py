"""What servicers need of a gRPC call: its time left, and a bound for calls that came without one."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from baton.errors import DeadlineError

Context = grpc.aio.ServicerContext[Any, Any]


def time_left_s(context: Context, default_s: float) -> float:
    """Seconds until the caller's deadline; the default for a caller that set none."""
    remaining: float | None = context.time_remaining()
    return default_s if remaining is None else max(0.0, remaining)


@asynccontextmanager
async def bounded(context: Context, default_s: float) -> AsyncIterator[float]:
    """Runs a handler's body within the caller's deadline, or the default; yields the seconds left. Raises `DeadlineError`. (gRPC itself
    cancels a handler whose caller's deadline passes, but not always before the body has noticed.)
    """
    left_s = time_left_s(context, default_s)
    timer = asyncio.timeout(left_s)
    try:
        async with timer:
            yield left_s
    except TimeoutError:
        if timer.expired():
            raise DeadlineError("call") from None
        raise
