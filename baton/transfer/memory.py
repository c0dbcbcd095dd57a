"""The transport for prefill and decode in one process: same rules as the Ray store's, one copy fewer, nothing to install.

`MemorySources` is shared by the workers of one event loop; each decode worker has its own `MemoryTransport`.
"""

import asyncio
from collections.abc import Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from baton.errors import UnavailableError
from baton.kv.spec import KVSpec, SealedKV, WireKV
from baton.transfer.base import KVMeta, KVSource, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.credits import ByteCredits
from baton.transfer.endpoint import SourceEndpoint
from baton.transfer.receive import deadline, error_from, received, source_timeout_s
from baton.types import AttemptKey

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Peer:
    endpoint: SourceEndpoint
    gone: asyncio.Event


class MemorySources:
    """Which source answers at which address. A source that leaves takes its unanswered calls with it, as a dead process would."""

    def __init__(self) -> None:
        self._peers: dict[str, _Peer] = {}

    @contextmanager
    def serving(self, address: str, source: KVSource) -> Iterator[None]:
        """Serves `source` at `address` inside the context."""
        self.add(address, source)
        try:
            yield
        finally:
            self.remove(address)

    def add(self, address: str, source: KVSource) -> None:
        """Raises `ValueError` where the address is taken."""
        if address in self._peers:
            raise ValueError(f"a KV source serves at {address!r} already")
        self._peers[address] = _Peer(SourceEndpoint(source), asyncio.Event())

    def remove(self, address: str) -> None:
        """Idempotent; unanswered calls raise `UnavailableError`."""
        if peer := self._peers.pop(address, None):
            peer.gone.set()

    def peer(self, address: str) -> _Peer:
        """Raises `UnavailableError` where nobody serves."""
        if peer := self._peers.get(address):
            return peer
        raise UnavailableError(f"no KV source at {address!r}")


class MemoryTransport:
    """A `KVTransport` over `MemorySources`."""

    def __init__(self, sources: MemorySources, budget: ByteCredits) -> None:
        self._sources = sources
        self._budget = budget

    async def ready(
        self, address: str, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway:
        async with deadline(timeout_s, "kv_ready"):
            peer = self._sources.peer(address)
            call = peer.endpoint.ready(key, source_timeout_s(timeout_s), piece)
            answer = await _unless_gone(call, peer, address)
        if isinstance(answer, Refused):
            raise error_from(answer)
        return answer

    def pull(
        self, address: str, request: PullRequest, *, spec: KVSpec, timeout_s: float
    ) -> AbstractAsyncContextManager[SealedKV]:
        async def fetch(sent: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
            peer = self._sources.peer(address)
            return await _unless_gone(peer.endpoint.pull(sent), peer, address)

        return received(fetch, request, spec=spec, budget=self._budget, timeout_s=timeout_s)

    async def close(self) -> None:
        """Nothing to close."""


async def _unless_gone(call: Coroutine[Any, Any, T], peer: _Peer, address: str) -> T:
    """The call's result, unless the peer leaves first; the call is not left running."""
    calling = asyncio.ensure_future(call)
    leaving = asyncio.ensure_future(peer.gone.wait())
    try:
        await asyncio.wait({calling, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if calling.done():
            return calling.result()
        raise UnavailableError(f"the KV source at {address!r} left")
    finally:
        calling.cancel()
        leaving.cancel()
        await asyncio.wait({calling, leaving})
