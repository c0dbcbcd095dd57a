"""Reads a worker's response stream to its end, and says how it ended."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from grpc.aio import AioRpcError

from baton.errors import BatonError, CancelledError, InternalError, UnavailableError
from baton.service.status import error_from_rpc, said_by_peer


@dataclass(frozen=True, slots=True)
class Broken:
    """Why a stream ended."""

    error: BatonError
    from_worker: bool
    """The worker itself said so; else the connection broke."""


class Call(Protocol):
    """A call to a worker that streams responses."""

    async def consume(self, handle: Callable[[Any], None]) -> Broken:
        """Hands each response on until the stream ends; a BatonError that `handle` raises ends it too. The call is over afterwards,
        whichever way this ends.

        A stream that ends without a status of its own counts as broken: for a stream that is done, nobody asks.
        """
        ...


class DirectCall:
    """A gRPC call of its own."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def consume(self, handle: Callable[[Any], None]) -> Broken:
        task = asyncio.current_task()
        assert task is not None
        try:
            # The stubs do not know the end-of-stream marker.
            while (response := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                handle(response)
        except AioRpcError as error:
            return Broken(_not_ours(error_from_rpc(error)), from_worker=said_by_peer(error))
        except BatonError as error:
            return Broken(error, from_worker=True)
        except asyncio.CancelledError:
            # A closed channel cancels its calls, not the tasks that read them.
            if task.cancelling():
                raise
            return Broken(UnavailableError("the channel was closed"), from_worker=False)
        finally:
            self._call.cancel()
        return Broken(InternalError("the stream ended early"), from_worker=True)


async def consume(start: Callable[[], Call], handle: Callable[[Any], None]) -> Broken:
    """Starts a call and consumes it; see `Call.consume`."""
    try:
        call = start()
    except UnavailableError as error:
        return Broken(error, from_worker=False)
    return await call.consume(handle)


def _not_ours(error: BatonError) -> BatonError:
    """A call that the router cancels is not read any more: this one was let go by a worker that stops."""
    if isinstance(error, CancelledError):
        return UnavailableError("the worker let go of the call")
    return error
