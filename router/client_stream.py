"""The stream to one client: every write bounded, and none that leaves the call without a way to end.

Used by the request's own task on the router's event loop.
"""

import asyncio
from typing import Any

from google.protobuf.message import Message

from baton.errors import CapacityError
from baton.service.calls import Context

OPENING_GRACE_S = 1.0


class ClientStream:
    """See the module docstring."""

    def __init__(self, context: Context, stall_s: float) -> None:
        self._context = context
        self._stall_s = stall_s
        self._opened = False
        self._stalled = False

    async def write(self, response: Message) -> None:
        """Returns once gRPC has taken the message. Raises `CapacityError` where the client has not read for so long that it cannot."""
        task = asyncio.current_task()
        assert task is not None
        cancelling, self._stalled = task.cancelling(), False
        # As `asyncio.timeout` does it, but several times cheaper, for every message to a client.
        timer = asyncio.get_running_loop().call_later(self._stall_s, self._give_up, task)
        try:
            if self._opened:
                await self._context.write(response)
            else:
                await self._open(response)
        except asyncio.CancelledError:
            if self._stalled and task.uncancel() <= cancelling:
                raise CapacityError("the client does not read its stream") from None
            raise
        finally:
            timer.cancel()

    def _give_up(self, task: asyncio.Task[Any]) -> None:
        self._stalled = True
        task.cancel()

    async def _open(self, response: Message) -> None:
        """The first message takes the call's initial metadata along. Cancelled in the middle, gRPC would send that again with the
        status, fail, and leave the client without one; so a cancellation waits for the write.
        """
        writing = asyncio.ensure_future(self._context.write(response))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            await asyncio.wait({writing}, timeout=OPENING_GRACE_S)
            writing.cancel()
            # Its own failure, if any, does not matter any more.
            await asyncio.gather(writing, return_exceptions=True)
            raise
        self._opened = True
