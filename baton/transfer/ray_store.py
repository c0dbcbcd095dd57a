"""The Ray transport: decode calls a method of the prefill actor, and the answer comes back through the object store.

    decode: handle.kv_pull.remote(sent)  ──▶  prefill actor: return meta, kv      (one object, numpy only)
            await ref                       ◀──  the object belongs to decode, its caller: prefill may die now

Runs in the decode worker's event loop, and nothing here blocks it. The prefill actor forwards `kv_ready` and `kv_pull` to a
`SourceEndpoint`; it is created with `max_restarts=0, max_task_retries=0`, so that a call runs at most once and a dead peer is
known at once. References live inside `pull` only; they are never serialized.
"""

import asyncio
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ObjectStoreFullError,
    OutOfDiskError,
    PendingCallsLimitExceeded,
    RayActorError,
    RayError,
    RayTaskError,
)

from baton.errors import CapacityError, InternalError, UnavailableError
from baton.kv.spec import KVSpec, SealedKV, WireKV
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.credits import ByteCredits
from baton.transfer.receive import deadline, error_from, received, source_timeout_s
from baton.types import AttemptKey


class RayTransport:
    """A `KVTransport` between actors of one Ray cluster; an address is an actor's name in `namespace`. The process is connected to
    Ray before the first call, and stays so.
    """

    def __init__(self, budget: ByteCredits, namespace: str) -> None:
        self._budget = budget
        self._namespace = namespace
        self._handles: dict[str, ActorHandle[Any]] = {}

    async def ready(
        self, address: str, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway:
        answer: Ready | Underway | Refused
        async with deadline(timeout_s, "kv_ready"):
            handle = await self._handle(address)
            with self._typed_errors(address):
                call: ray.ObjectRef[Any] = handle.kv_ready.remote(
                    key, source_timeout_s(timeout_s), piece
                )
                answer = await _settled(call)
        if isinstance(answer, Refused):
            raise error_from(answer)
        return answer

    def pull(
        self, address: str, request: PullRequest, *, spec: KVSpec, timeout_s: float
    ) -> AbstractAsyncContextManager[SealedKV]:
        async def fetch(sent: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
            handle = await self._handle(address)
            with self._typed_errors(address):
                ref: ray.ObjectRef[Any] = handle.kv_pull.remote(sent)
                try:
                    answer: tuple[KVMeta | Refused, WireKV | None] = await _settled(ref)
                    return answer
                finally:
                    del ref

        return received(fetch, request, spec=spec, budget=self._budget, timeout_s=timeout_s)

    async def close(self) -> None:
        """Forgets the peers; calls that still run are not disturbed."""
        self._handles.clear()

    async def _handle(self, address: str) -> ActorHandle[Any]:
        if handle := self._handles.get(address):
            return handle
        if not ray.is_initialized():  # else the lookup would start a cluster of its own
            raise UnavailableError("this process is not connected to Ray")
        try:
            handle = await asyncio.to_thread(ray.get_actor, address, self._namespace)
        except (ValueError, RayError) as error:
            raise UnavailableError(f"no actor named {address!r}: {error}") from error
        self._handles[address] = handle
        return handle

    @contextmanager
    def _typed_errors(self, address: str) -> Iterator[None]:
        """Ray's exceptions as Baton's. A dead peer's handle is forgotten: its name may come back as another actor."""
        try:
            yield
        except RayActorError as error:
            self._handles.pop(address, None)
            raise UnavailableError(f"the KV source {address!r} is gone: {_brief(error)}") from error
        except (ObjectStoreFullError, OutOfDiskError, PendingCallsLimitExceeded) as error:
            raise CapacityError(f"no room for KV from {address!r}: {_brief(error)}") from error
        except RayTaskError as error:
            raise InternalError(f"the KV source {address!r} failed: {_brief(error)}") from error
        except RayError as error:
            raise UnavailableError(f"KV from {address!r} is lost: {_brief(error)}") from error


async def _settled(ref: ray.ObjectRef[Any]) -> Any:
    """The reference's value; a caller that gives up takes the call back, so that the source stops working for it. Ray loses a
    cancellation that overtakes its call, whose value it then keeps until the source's own timeout.
    """
    try:
        return await ref
    except asyncio.CancelledError:
        ray.cancel(ref, recursive=False)
        raise
    finally:
        del ref  # a traceback would keep it, and the object, alive


def _brief(error: RayError) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
