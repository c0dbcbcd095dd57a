"""Reads a worker's response stream to its end, and says how it ended."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import grpc
from grpc.aio import AioRpcError

from baton.errors import BatonError, CancelledError, InternalError, UnavailableError
from baton.service.status import error_from_rpc, said_by_peer


@dataclass(frozen=True, slots=True)
class Broken:
    """Why a stream ended."""

    error: BatonError
    from_worker: bool
    """The worker itself said so, and holds nothing more; else the connection broke, or the router gave up what it heard."""


class Follower(NamedTuple):
    """Whom a call tells."""

    handle: Callable[[Any], None]
    """Takes a response. A `BatonError` that it raises ends the call."""
    on_end: Callable[[Broken], None]
    """Learns once how the stream ended."""
    on_bug: Callable[[Exception], None]
    """Gets whatever else the two raise; the call is over then."""


class Call(Protocol):
    """A call to a worker that streams responses."""

    rests: bool
    """Whether the worker joins tokens at the pace that it was told."""

    def follow(self, follower: Follower) -> None:
        """Hands each response on as it comes, in whoever's turn. To be called once, as soon as there is a call.

        A stream that ends without a status of its own counts as broken: for a stream that is done, nobody asks.
        """
        ...

    def cancel(self) -> None:
        """The call is over, and nothing more is told. Idempotent."""
        ...


class DirectCall:
    """A gRPC call of its own."""

    rests = False

    def __init__(self, call: Any) -> None:
        self._call = call
        self._reading: asyncio.Task[None] | None = None

    def follow(self, follower: Follower) -> None:
        """See `Call`."""

        async def read() -> None:
            try:
                follower.on_end(await self._read(follower.handle))
            except Exception as error:  # noqa: BLE001 - a bug, which belongs to whoever follows
                follower.on_bug(error)

        self._reading = asyncio.create_task(read(), name="reads a worker's responses")

    def cancel(self) -> None:
        """See `Call`."""
        self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()

    async def _read(self, handle: Callable[[Any], None]) -> Broken:
        task = asyncio.current_task()
        assert task is not None
        try:
            # The stubs do not know the end-of-stream marker.
            while (response := await self._call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                handle(response)
        except AioRpcError as error:
            return Broken(_not_ours(error_from_rpc(error)), from_worker=said_by_peer(error))
        except BatonError as error:
            return Broken(error, from_worker=False)
        except asyncio.CancelledError:
            # A closed channel cancels its calls, not the tasks that read them.
            if task.cancelling():
                raise
            return Broken(UnavailableError("the channel was closed"), from_worker=False)
        finally:
            self._call.cancel()
        return Broken(InternalError("the stream ended early"), from_worker=True)


def _not_ours(error: BatonError) -> BatonError:
    """A call that the router cancels is not read any more: this one was let go by a worker that stops."""
    if isinstance(error, CancelledError):
        return UnavailableError("the worker let go of the call")
    return error
