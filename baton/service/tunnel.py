"""The worker's end of a tunnel: calls that a router makes on one stream, each served by the handler of the method that it names.

A tunnelled call is to its handler what a gRPC call is: `write` waits while the router does not read, the task is cancelled when the
router cancels or the stream breaks. What the handlers of many calls write in one step of the event loop travels in one message.
Runs on the worker's event loop; the Open call is the lease on its calls.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import grpc
from google.protobuf.message import DecodeError, Message

from baton.engine.pace import Pace
from baton.errors import FieldViolation, InvalidRequestError
from baton.service.calls import Context
from baton.service.interceptors import typed_error
from baton.service.status import to_status
from baton.service.tracing import headers_of
from baton.types import TraceContext
from baton.v1 import tunnel_pb2, tunnel_pb2_grpc

MESSAGE_BYTES = 256 * 1024
"""About the largest message that the stream carries; a single response may be larger."""
WAITING_BYTES = 1024 * 1024
"""With so much yet to be sent, writers wait."""
MAX_REST_S = 1.0
"""Tokens wait no longer, whatever a router asks for."""


@dataclass(frozen=True, slots=True)
class Method:
    """A response-streaming method that can be called through a tunnel."""

    parse: Callable[[bytes], Any]
    handle: Callable[[Any, Context], Awaitable[None]]
    """Writes its responses through the context, of which it uses `write`, `time_remaining` and `invocation_metadata` only; and `pace_of`
    it.
    """


class TunnelServicer(tunnel_pb2_grpc.TunnelServiceServicer):
    """See the module docstring."""

    def __init__(self, methods: Mapping[str, Method]) -> None:
        """Methods by their full name."""
        self._methods = methods
        self._open: set[Outbox] = set()
        self._none_open = asyncio.Event()
        self._none_open.set()

    async def finish(self, timeout_s: float) -> None:
        """Ends the tunnels, each when its router has read what its calls said; returns then, or after the timeout."""
        for outbox in self._open:
            outbox.finish()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()

    async def Open(  # noqa: N802
        self,
        requests: AsyncIterator[tunnel_pb2.OpenRequest],
        context: grpc.aio.ServicerContext[tunnel_pb2.OpenRequest, tunnel_pb2.OpenResponse],
    ) -> None:
        outbox, pace = Outbox(), Pace()
        calls: dict[int, asyncio.Task[None]] = {}
        await context.write(tunnel_pb2.OpenResponse())
        sending = asyncio.create_task(outbox.send(context.write), name="tunnel")
        self._open.add(outbox)
        self._none_open.clear()
        try:
            async for request in requests:
                if request.HasField("rest_seconds"):
                    pace.rest_s = min(MAX_REST_S, max(0.0, request.rest_seconds))
                for start in request.starts:
                    task = asyncio.create_task(self._serve(start, outbox, pace), name=start.method)
                    calls[start.call] = task
                    task.add_done_callback(partial(_forget, calls, start.call))
                for call in request.cancels:
                    if call in calls:
                        calls[call].cancel()
        finally:
            # Attempts may outlive their router.
            pace.rest_s = 0.0
            self._open.remove(outbox)
            if not self._open:
                self._none_open.set()
            left = [sending, *calls.values()]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    async def _serve(
        self, start: tunnel_pb2.OpenRequest.Start, outbox: "Outbox", pace: Pace
    ) -> None:
        status = b""
        try:
            method, request = self._parse(start)
            call = _TunnelledCall(start, outbox, pace)
            await method.handle(request, cast("Context", call))
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            status = to_status(typed_error(error, start.method)).SerializeToString()
        except Exception as error:  # noqa: BLE001 - the boundary
            status = to_status(typed_error(error, start.method)).SerializeToString()
        outbox.end(start.call, status)

    def _parse(self, start: tunnel_pb2.OpenRequest.Start) -> tuple[Method, Any]:
        method = self._methods.get(start.method)
        if method is None:
            raise InvalidRequestError(FieldViolation("method", "cannot be called in a tunnel"))
        try:
            return method, method.parse(start.request)
        except DecodeError:
            violation = FieldViolation("request", "not a valid protobuf message")
            raise InvalidRequestError(violation) from None


def _forget(calls: dict[int, asyncio.Task[None]], call: int, _task: asyncio.Task[None]) -> None:
    calls.pop(call, None)


def pace_of(context: object) -> Pace | None:
    """At which a handler's caller wants tokens; None: as they come."""
    return context.pace if isinstance(context, _TunnelledCall) else None


class _TunnelledCall:
    """What a handler uses of a `Context`."""

    def __init__(self, start: tunnel_pb2.OpenRequest.Start, outbox: "Outbox", pace: Pace) -> None:
        self.pace = pace
        self._call = start.call
        self._deadline_s = time.monotonic() + start.timeout_seconds
        self._trace = TraceContext(start.traceparent, start.tracestate)
        self._outbox = outbox

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return headers_of(self._trace)

    def time_remaining(self) -> float:
        return max(0.0, self._deadline_s - time.monotonic())

    async def write(self, message: Message) -> None:
        await self._outbox.room()
        self._outbox.put(self._call, message.SerializeToString())


class Outbox:
    """What all calls of a tunnel have to say, and its way out."""

    def __init__(self) -> None:
        self._next = tunnel_pb2.OpenResponse()
        self._next_bytes = 0
        self._waiting: list[tunnel_pb2.OpenResponse] = []
        """Full messages, before the next one."""
        self._waiting_bytes = 0
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._finishes = False

    async def room(self) -> None:
        """Returns once not too much waits to be sent."""
        if not self._has_room.is_set():
            await self._has_room.wait()

    def put(self, call: int, response: bytes) -> None:
        """Queues a call's next response."""
        if self._next_bytes + len(response) > MESSAGE_BYTES:
            self._close_next()
        self._next.messages.add(call=call, response=response)
        self._grown(len(response))

    def end(self, call: int, status: bytes) -> None:
        """Queues a call's last word."""
        self._next.ends.add(call=call, status=status)
        self._grown(len(status))

    def finish(self) -> None:
        """No call says anything more."""
        self._finishes = True
        self._changed.set()

    async def send(self, write: Callable[[tunnel_pb2.OpenResponse], Awaitable[None]]) -> None:
        """Sends until it is cancelled, the stream breaks, or all was said."""
        while True:
            await self._changed.wait()
            # Whoever else was woken in this step of the loop adds its part.
            await asyncio.sleep(0)
            self._close_next()
            self._changed.clear()
            waiting, self._waiting = self._waiting, []
            for response in waiting:
                await write(response)
            self._waiting_bytes = self._next_bytes + sum(r.ByteSize() for r in self._waiting)
            if self._waiting_bytes < WAITING_BYTES:
                self._has_room.set()
            # An end without an error has no bytes of its own.
            if self._finishes and not self._waiting and not self._has_next():
                return await write(tunnel_pb2.OpenResponse(last=True))

    def _has_next(self) -> bool:
        return bool(self._next.messages or self._next.ends)

    def _close_next(self) -> None:
        if self._has_next():
            self._waiting.append(self._next)
            self._next, self._next_bytes = tunnel_pb2.OpenResponse(), 0

    def _grown(self, num_bytes: int) -> None:
        self._next_bytes += num_bytes
        self._waiting_bytes += num_bytes
        if self._waiting_bytes >= WAITING_BYTES:
            self._has_room.clear()
        self._changed.set()
