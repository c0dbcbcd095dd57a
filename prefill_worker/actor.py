"""The prefill worker as a Ray actor: `baton.worker.actor`, and the methods through which decode pulls KV."""

from baton.kv.spec import WireKV
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.transfer.endpoint import SourceEndpoint
from baton.types import AttemptKey
from baton.worker.actor import ActorConfig, WorkerActor
from prefill_worker.worker import PrefillWorker


class PrefillActor(WorkerActor):
    """Found by decode under its worker id."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__(config)
        worker = PrefillWorker(config.settings, self._engine)
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
