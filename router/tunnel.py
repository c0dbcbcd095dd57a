"""The router's end of a tunnel to one worker: calls that share one stream, since calls of their own cost more than what they carry.

A tunnel opens when it is first asked for; until it is open, and with a worker that serves none, `start` has no call to give and
the caller makes a gRPC call. One that breaks ends its calls, and opens again when it is asked for. What all callers start in one
step of the event loop travels in one message. Used on the router's event loop.
"""

import asyncio
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from baton.errors import BatonError, InternalError, UnavailableError
from baton.service.status import error_from_status_bytes
from baton.types import NO_TRACE, TraceContext
from baton.v1 import tunnel_pb2, tunnel_pb2_grpc
from router.streams import Broken, Follower

REOPEN_S = 1.0
"""How long a tunnel that broke is not opened again."""
REST_CHANGE = 0.2
"""A worker is told again of a rest that is so much longer or shorter."""
MESSAGE_BYTES = 256 * 1024
"""About the largest message that the stream carries. A larger request travels by itself: where it is too large, it alone fails."""


class TunnelledCall:
    """One call; see `router.streams.Call`."""

    rests = True

    def __init__(self, parse: Callable[[bytes], Any], let_go: Callable[[], None]) -> None:
        """`let_go` has the worker end it, where it has not."""
        self._parse = parse
        self._let_go = let_go
        self._follower: Follower | None = None
        """None once nothing more is to be told."""

    def follow(self, follower: Follower) -> None:
        """See `Call`. Precondition: the event loop has made no step since the call was started."""
        self._follower = follower

    def cancel(self) -> None:
        """See `Call`."""
        self._follower = None
        self._let_go()

    def deliver(self, response: bytes) -> None:
        """The next response has come."""
        follower = self._follower
        if follower is None:
            return
        try:
            follower.handle(self._parse(response))
        except DecodeError:
            self._give_up(InternalError("a response is no valid message"))
        except BatonError as error:
            self._give_up(error)
        except Exception as error:  # noqa: BLE001 - a bug, which belongs to whoever follows
            self.cancel()
            follower.on_bug(error)

    def end(self, broken: Broken) -> None:
        """No more will come."""
        follower, self._follower = self._follower, None
        if follower is not None:
            try:
                follower.on_end(broken)
            except Exception as error:  # noqa: BLE001 - likewise; other calls are in the same stream
                follower.on_bug(error)

    def _give_up(self, error: BatonError) -> None:
        self._let_go()
        self.end(Broken(error, from_worker=False))


class Tunnel:
    """See the module docstring."""

    def __init__(
        self, channel: grpc.aio.Channel, rest_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        """`rest_s` tells how long tokens may wait for more at the worker."""
        self._rest_s = rest_s
        self._told_rest_s = 0.0
        """What the worker knows of it."""
        self._stub = tunnel_pb2_grpc.TunnelServiceStub(channel)
        self._ids = itertools.count(1)
        self._calls: dict[int, TunnelledCall] = {}
        self._next = tunnel_pb2.OpenRequest()
        self._next_bytes = 0
        self._full: list[tunnel_pb2.OpenRequest] = []
        """Messages before the next one."""
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._open = False
        self._not_before_s = 0.0
        self.unserved = False
        """The worker knows no tunnels."""

    def start(
        self,
        method: str,
        request: Message,
        parse: Callable[[bytes], Any],
        timeout_s: float,
        trace: TraceContext = NO_TRACE,
    ) -> TunnelledCall | None:
        """Starts a call; None where the tunnel is not open."""
        if not self._open:
            self.open()
            return None
        body = request.SerializeToString()
        if len(body) > MESSAGE_BYTES:
            return None
        if self._next_bytes + len(body) > MESSAGE_BYTES:
            self._full.append(self._take_next())
        number = next(self._ids)
        call = self._calls[number] = TunnelledCall(parse, partial(self._let_go, number))
        self._next.starts.add(
            call=number,
            method=method,
            request=body,
            timeout_seconds=timeout_s,
            traceparent=trace.traceparent,
            tracestate=trace.tracestate,
        )
        self._next_bytes += len(body)
        self._changed.set()
        return call

    @property
    def is_open(self) -> bool:
        """Whether calls can be started."""
        return self._open

    def open(self) -> None:
        """Opens it in the background, unless it opens already, broke a moment ago, or the worker serves none."""
        if self._task is None and not self.unserved and time.monotonic() >= self._not_before_s:
            self._task = asyncio.create_task(self._run(), name="tunnel of the router")

    async def close(self) -> None:
        """Ends every call. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _run(self) -> None:
        stream = self._stub.Open()
        self._told_rest_s = 0.0
        sending: asyncio.Task[None] | None = None
        try:
            # The stubs do not know the end-of-stream marker.
            while (response := await stream.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
                if sending is None:
                    sending = asyncio.create_task(self._send(stream), name="sends in a tunnel")
                    self._open = True
                self._deliver(response)
                if response.last:
                    break
        except grpc.aio.AioRpcError as error:
            self.unserved = error.code() is grpc.StatusCode.UNIMPLEMENTED
        except asyncio.CancelledError:
            pass  # by `close`, or because the channel was closed; all that is left to do follows
        finally:
            self._open = False
            self._task = None
            self._not_before_s = time.monotonic() + REOPEN_S
            stream.cancel()
            if sending is not None:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)
            calls, self._calls = self._calls, {}
            self._full.clear()
            self._take_next()
            lost = Broken(UnavailableError("the tunnel broke"), from_worker=False)
            for call in calls.values():
                call.end(lost)

    async def _send(self, stream: Any) -> None:
        while True:
            await self._changed.wait()
            # Whoever else was woken in this step of the loop adds its part.
            await asyncio.sleep(0)
            self._changed.clear()
            full, self._full = self._full, []
            for request in (*full, self._take_next()):
                await stream.write(request)

    def _take_next(self) -> tunnel_pb2.OpenRequest:
        taken, self._next, self._next_bytes = self._next, tunnel_pb2.OpenRequest(), 0
        return taken

    def _deliver(self, response: tunnel_pb2.OpenResponse) -> None:
        self._tell_rest()
        for message in response.messages:
            call = self._calls.get(message.call)
            if call is not None:
                call.deliver(message.response)
        for end in response.ends:
            call = self._calls.pop(end.call, None)
            if call is not None:
                call.end(_end_of(end.status))

    def _tell_rest(self) -> None:
        """Where it has changed by so much that it matters."""
        rest_s, told_s = self._rest_s(), self._told_rest_s
        if abs(rest_s - told_s) > REST_CHANGE * told_s:
            self._next.rest_seconds = self._told_rest_s = rest_s
            self._changed.set()

    def _let_go(self, number: int) -> None:
        if self._calls.pop(number, None) is not None:
            self._next.cancels.append(number)
            self._changed.set()


def _end_of(status: bytes) -> Broken:
    if not status:
        return Broken(InternalError("the stream ended early"), from_worker=True)
    try:
        return Broken(error_from_status_bytes(status), from_worker=True)
    except DecodeError:
        return Broken(InternalError("a status is no valid message"), from_worker=True)
