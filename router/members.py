"""A worker as the router talks to it: one channel for as long as it is a member, and word of its loss to whoever uses it.

Owned by `router.fleet`; used on the router's event loop only. A member is lost once and for good; a worker that joins again
is a new member with a new channel.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import grpc

from baton import codec
from baton.errors import BatonError, UnavailableError
from baton.service.status import error_from_rpc
from baton.service.tracing import headers_of
from baton.types import NO_TRACE, AttemptKey, Role, TraceContext, WorkerId, WorkerInfo
from baton.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from router.releases import Release, Releases
from router.streams import Call, DirectCall
from router.tunnel import Tunnel

PREFILL = "/baton.v1.PrefillService/Prefill"
DECODE = "/baton.v1.DecodeService/Decode"

RELEASE_TIMEOUT_S = 10.0
"""A worker that does not answer a release by then will be told when it joins again, or lets go by itself, of a prompt at once, of an answer
after its grace.
"""
HAND_OVER_TIMEOUT_S = 2.0
"""An engine whose step takes longer goes on with the request itself."""
FIND_TIMEOUT_S = 1.0
"""A worker that does not say by then that it holds a request counts as not holding it."""
CLOSE_GRACE_S = 1.0
"""Calls on a lost member end by themselves, as their attempts are told; this bounds those that do not."""

ROLE_SLACK_S = 5.0
"""What a change of role may take beyond its drain."""


T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class Watch:
    """Whom a member tells. None of it may raise."""

    on_lost: Callable[[UnavailableError], None]
    on_draining: Callable[[], None] = lambda: None


class Member:
    """See the module docstring."""

    def __init__(
        self,
        info: WorkerInfo,
        session: int,
        channel: grpc.aio.Channel,
        releases: Releases,
        rest_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """Takes over the channel. `releases` are the worker's, over all its memberships; `rest_s` is `Tunnel`'s."""
        self.info = info
        self.session = session
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
        self._decode = decode_pb2_grpc.DecodeServiceStub(channel)
        self._worker = worker_pb2_grpc.WorkerServiceStub(channel)
        self._channel = channel
        self.tunnel = Tunnel(channel, rest_s)
        self._lost: UnavailableError | None = None
        self._watches: set[Watch] = set()
        self._draining = False
        self.stalled = False
        """As the worker last told."""
        self.joined_at_s = time.monotonic()
        self._releases = releases
        self._releasing: set[asyncio.Task[None]] = set()
        self.keeps_orphans = False
        """Set where this router stops: what its requests leave behind is for another router to go on with."""
        releases.connect(self._send_release)

    @property
    def worker_id(self) -> WorkerId:
        return self.info.worker_id

    def call_prefill(
        self,
        request: prefill_pb2.PrefillRequest,
        timeout_s: float,
        trace: TraceContext = NO_TRACE,
    ) -> Call:
        """Starts a Prefill call. Raises `UnavailableError` where the member is lost: its channel takes no calls."""
        self._raise_if_lost()
        parse = prefill_pb2.PrefillResponse.FromString
        call = self.tunnel.start(PREFILL, request, parse, timeout_s, trace)
        return call or DirectCall(
            self._prefill.Prefill(request, timeout=timeout_s, metadata=headers_of(trace))
        )

    def call_decode(
        self,
        request: decode_pb2.DecodeRequest,
        timeout_s: float,
        trace: TraceContext = NO_TRACE,
    ) -> Call:
        """Starts a Decode call. Raises `UnavailableError` where the member is lost."""
        self._raise_if_lost()
        parse = decode_pb2.DecodeResponse.FromString
        call = self.tunnel.start(DECODE, request, parse, timeout_s, trace)
        return call or DirectCall(
            self._decode.Decode(request, timeout=timeout_s, metadata=headers_of(trace))
        )

    def call_attach(self, request: decode_pb2.DecodeServiceAttachRequest, timeout_s: float) -> Call:
        """Starts an Attach call. Raises `UnavailableError` where the member is lost."""
        self._raise_if_lost()
        return DirectCall(self._decode.Attach(request, timeout=timeout_s))

    async def find(self, request_id: str, tenant: str) -> decode_pb2.FindResponse:
        """The attempts at a client's request that a decode worker holds; none where it does not answer in time."""
        request = decode_pb2.FindRequest(request_id=request_id, tenant=tenant)
        try:
            self._raise_if_lost()
            found: decode_pb2.FindResponse = await _answer(
                self._decode.Find(request, timeout=FIND_TIMEOUT_S)
            )
        except BatonError:
            return decode_pb2.FindResponse()
        return found

    async def hand_over(self, key: AttemptKey, holder: str) -> int:
        """Has a decode worker stop an attempt and hold its KV; returns the output position after its last token. Raises a `BatonError`
        where it does not.
        """
        request = decode_pb2.HandOverRequest(key=codec.key_to_proto(key), holder=holder)
        self._raise_if_lost()
        call: Awaitable[decode_pb2.HandOverResponse] = self._decode.HandOver(
            request, timeout=HAND_OVER_TIMEOUT_S
        )
        return (await _answer(call)).end_index

    @property
    def draining(self) -> bool:
        """Whether its requests are to go elsewhere."""
        return self._draining

    def set_draining(self, *, draining: bool) -> None:
        """As the worker last told."""
        began, self._draining = draining and not self._draining, draining
        if began:
            for watch in tuple(self._watches):
                watch.on_draining()

    async def set_role(self, role: Role, drain_timeout_s: float) -> None:
        """Has the worker turn to a role; returns once it announced it. Raises a `BatonError` where it does not, `UnavailableError` where
        the member is lost.
        """
        self._raise_if_lost()
        request = worker_pb2.SetRoleRequest(
            role=codec.role_to_proto(role), drain_timeout_seconds=drain_timeout_s
        )
        await _answer(self._worker.SetRole(request, timeout=drain_timeout_s + ROLE_SLACK_S))

    def watch(self, watch: "Watch") -> None:
        """Until `unwatch`, tells when the member is lost, and when it begins to drain; at once where it is, or does."""
        if self._lost is not None:
            watch.on_lost(self._lost)
        if self._draining:
            watch.on_draining()
        self._watches.add(watch)

    def unwatch(self, watch: "Watch") -> None:
        """Idempotent."""
        self._watches.discard(watch)

    def lose(self, why: str) -> None:
        """The worker is no member any more. Idempotent."""
        if self._lost is not None:
            return
        self._lost = UnavailableError(f"worker {self.worker_id} is gone: {why}")
        self._releases.disconnect()
        for watch in tuple(self._watches):
            watch.on_lost(self._lost)

    def release_prefill(self, key: AttemptKey) -> None:
        """Has a prefill worker let go of an attempt whose call broke, in the background."""
        self._releases.owe(Release(Role.PREFILL, key))

    def release_decode(self, key: AttemptKey, holder: str) -> None:
        """Has a decode worker let go of an attempt that nobody will attach to any more, in the background."""
        if not self.keeps_orphans:
            self._releases.owe(Release(Role.DECODE, key, holder))

    async def close(self) -> None:
        """Ends the channel, and what still runs on it after a grace. Precondition: lost."""
        await self.tunnel.close()
        await self._channel.close(CLOSE_GRACE_S)
        for task in tuple(self._releasing):
            task.cancel()
        await asyncio.gather(*self._releasing, return_exceptions=True)

    def _send_release(self, release: Release) -> None:
        async def send() -> None:
            with suppress(grpc.aio.AioRpcError):
                await self._call_release(release)
                self._releases.settle(release)

        task = asyncio.create_task(send(), name=f"release on {self.worker_id}")
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    def _call_release(self, release: Release) -> Awaitable[object]:
        key = codec.key_to_proto(release.key)
        answer: Awaitable[object]
        if release.role is Role.PREFILL:
            prompt = prefill_pb2.ReleaseRequest(key=key)
            answer = self._prefill.Release(prompt, timeout=RELEASE_TIMEOUT_S)
        else:
            held = decode_pb2.DecodeServiceReleaseRequest(key=key, holder=release.holder)
            answer = self._decode.Release(held, timeout=RELEASE_TIMEOUT_S)
        return answer

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost


async def _answer(call: Awaitable[T]) -> T:
    """The answer to a call. Raises what the worker said, or `UnavailableError` where the channel was closed meanwhile: that cancels its
    calls, and not the tasks that wait for them.
    """
    task = asyncio.current_task()
    assert task is not None
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    except asyncio.CancelledError:
        if task.cancelling():
            raise
        raise UnavailableError("the channel was closed") from None


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of an attempt."""

    prefill: Member | None
    """None: decode computes the prompt itself."""
    decode: Member
