"""KV of attempts that were handed over, for the decode worker that goes on with them: the source's end of a transfer.

Runs on the worker's event loop. An attempt is stopped before anybody is told to pull it, so `ready` never waits.
"""

from baton.engine.aio import AsyncEngine
from baton.errors import BatonError, PreconditionError
from baton.kv.spec import WireKV
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.layout import meta_of
from baton.types import AttemptKey
from decode_worker.held import HeldAttempts


class StoppedAttempts:
    """Implements `baton.transfer.base.KVSource`."""

    def __init__(self, engine: AsyncEngine, attempts: HeldAttempts) -> None:
        self._engine = engine
        self._attempts = attempts

    async def ready(
        self,
        key: AttemptKey,
        timeout_s: float,  # noqa: ARG002
        piece: Piece | None = None,  # noqa: ARG002
    ) -> Ready | Underway | Refused:
        try:
            return self._attempts.get(key).stopped_at()
        except BatonError as error:
            return Refused(PreconditionError.reason, error.message)

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        try:
            spec = self._engine.info.spec
            kv = await self._engine.export_kv(request.key, request.first, request.last)
            return meta_of(request, spec, kv), kv.data
        except BatonError as error:
            return Refused(error.reason, error.message), None
