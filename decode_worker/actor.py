"""The decode worker as a Ray actor: `baton.worker.actor`, with KV pulled through Ray's object store."""

from baton.transfer.credits import ByteCredits
from baton.transfer.ray_store import RayTransport
from baton.worker.actor import ActorConfig, WorkerActor, async_engine
from decode_worker.worker import DecodeWorker


class DecodeActor(WorkerActor):
    """Pulls from prefill actors of the same namespace."""

    def __init__(self, config: ActorConfig) -> None:
        engine = async_engine(config.engine, name="decode")
        budget = ByteCredits(config.settings.kv_credit_bytes)
        transport = RayTransport(budget, config.namespace)
        super().__init__(config, DecodeWorker(config.settings, engine, transport))
