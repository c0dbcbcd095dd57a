"""The decode worker as a Ray actor: `baton.worker.actor`, with KV pulled through Ray's object store."""

from baton.transfer.credits import ByteCredits
from baton.transfer.ray_store import RayTransport
from baton.worker.actor import ActorConfig, WorkerActor
from decode_worker.worker import DecodeWorker


class DecodeActor(WorkerActor):
    """Pulls from prefill actors of the same namespace."""

    def __init__(self, config: ActorConfig) -> None:
        super().__init__(config)
        budget = ByteCredits(config.settings.kv_credit_bytes)
        transport = RayTransport(budget, config.namespace)
        self._worker = DecodeWorker(config.settings, self._engine, transport)
