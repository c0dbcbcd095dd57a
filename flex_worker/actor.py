"""The flexible worker as a Ray actor: `baton.worker.actor`, with both ends of the transfer."""

from baton.kv.spec import WireKV
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.credits import ByteCredits
from baton.transfer.endpoint import SourceEndpoint
from baton.transfer.ray_store import RayTransport
from baton.types import AttemptKey
from baton.worker.actor import ActorConfig, WorkerActor
from flex_worker.worker import FlexWorker


class FlexActor(WorkerActor):
    """Found by decode under its worker id; pulls from actors of the same namespace."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__(config)
        budget = ByteCredits(config.settings.kv_credit_bytes)
        transport = RayTransport(budget, config.namespace)
        worker = FlexWorker(config.settings, config.role, self._engine, transport)
        self._worker = worker
        self._source = SourceEndpoint(worker)

    async def kv_ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        """See `KVSource.ready`."""
        return await self._source.ready(key, timeout_s, piece)

    async def kv_pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        """See `KVSource.pull`. The object belongs to the caller: the KV outlives this process."""
        return await self._source.pull(request)
