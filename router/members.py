"""A worker as the router talks to it: one channel for as long as it is a member, and word of its loss to whoever uses it.

Owned by `router.fleet`; used on the router's event loop only. A member is lost once and for good; a worker that joins again
is a new member with a new channel.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from baton import codec
from baton.errors import UnavailableError
from baton.types import AttemptKey, WorkerId, WorkerInfo
from baton.v1 import decode_pb2, decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc

RELEASE_TIMEOUT_S = 1.0
"""Releasing after a broken call is a courtesy: the worker also notices by itself."""
CLOSE_GRACE_S = 1.0
"""Calls on a lost member end by themselves, as their attempts are told; this bounds those that do not."""

LostCallback = Callable[[UnavailableError], None]


class Member:
    """See the module docstring."""

    def __init__(self, info: WorkerInfo, session: int, channel: grpc.aio.Channel) -> None:
        self.info = info
        self.session = session
        self._prefill = prefill_pb2_grpc.PrefillServiceStub(channel)
        self._decode = decode_pb2_grpc.DecodeServiceStub(channel)
        self._channel = channel
        self._lost: UnavailableError | None = None
        self._watchers: set[LostCallback] = set()
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def worker_id(self) -> WorkerId:
        return self.info.worker_id

    def call_prefill(self, request: prefill_pb2.PrefillRequest, timeout_s: float) -> Any:
        """Starts a Prefill call. Raises `UnavailableError` where the member is lost: its channel takes no calls."""
        self._raise_if_lost()
        return self._prefill.Prefill(request, timeout=timeout_s)

    def call_decode(self, request: decode_pb2.DecodeRequest, timeout_s: float) -> Any:
        """Starts a Decode call. Raises `UnavailableError` where the member is lost."""
        self._raise_if_lost()
        return self._decode.Decode(request, timeout=timeout_s)

    @contextmanager
    def watch(self, on_lost: LostCallback) -> Iterator[None]:
        """Inside the context, `on_lost` is called when the member is lost; at once if it already is. It must not raise."""
        if self._lost is not None:
            on_lost(self._lost)
        self._watchers.add(on_lost)
        try:
            yield
        finally:
            self._watchers.discard(on_lost)

    def lose(self, why: str) -> None:
        """The worker is no member any more. Idempotent."""
        if self._lost is not None:
            return
        self._lost = UnavailableError(f"worker {self.worker_id} is gone: {why}")
        for on_lost in tuple(self._watchers):
            on_lost(self._lost)

    def release_prefill(self, key: AttemptKey) -> None:
        """Tells a prefill worker, in the background and once, to let go of an attempt whose call broke."""
        task = asyncio.create_task(self._release_prefill(key), name=f"release {key}")
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def close(self) -> None:
        """Ends the channel, and what still runs on it after a grace. Precondition: lost."""
        await self._channel.close(CLOSE_GRACE_S)
        for task in tuple(self._releases):
            task.cancel()
        await asyncio.gather(*self._releases, return_exceptions=True)

    async def _release_prefill(self, key: AttemptKey) -> None:
        request = prefill_pb2.ReleaseRequest(key=codec.key_to_proto(key))
        try:
            self._raise_if_lost()
            await self._prefill.Release(request, timeout=RELEASE_TIMEOUT_S)
        except (grpc.aio.AioRpcError, UnavailableError):
            # It is dead, or it has noticed by itself.
            return

    def _raise_if_lost(self) -> None:
        if self._lost is not None:
            raise self._lost


@dataclass(frozen=True, slots=True)
class Pair:
    """The workers of an attempt."""

    prefill: Member | None
    """None: decode computes the prompt itself."""
    decode: Member
