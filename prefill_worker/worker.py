"""The prefill worker, put together: the same object inside a Ray actor, in one process with decode, and in tests."""

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from baton.engine.aio import AsyncEngine
from baton.kv.spec import WireKV
from baton.service.settings import WorkerSettings
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVMeta, Piece, PullRequest, Ready, Refused, Underway
from baton.types import AttemptKey, Role, WorkerInfo
from baton.v1 import prefill_pb2_grpc
from baton.vllm.servicer import SERVICE as VLLM_SERVICE
from baton.vllm.servicer import VllmServicer
from baton.worker.calls import exported
from prefill_worker.foreign import ForeignPrefill
from prefill_worker.prefiller import Prefiller
from prefill_worker.servicer import SERVICE, PrefillServicer


class PrefillWorker:
    """Serves PrefillService, and foreign routers, and is the `baton.transfer.base.KVSource` that decode pulls from."""

    def __init__(self, settings: WorkerSettings, engine: AsyncEngine) -> None:
        self.host = WorkerHost(
            settings,
            Role.PREFILL,
            engine,
            services={Role.PREFILL: SERVICE},
            roleless=[VLLM_SERVICE],
        )
        self._prefiller = Prefiller(self.host)
        self._foreign = ForeignPrefill(self.host, self._prefiller)
        self.host.when_refusing(self._prefiller.refuse_new)

    async def start(self) -> WorkerInfo:
        """See `WorkerHost.start`."""
        servicer = PrefillServicer(self.host, self._prefiller)
        foreign = VllmServicer(self.host, prefill=self._foreign)

        def add(server: grpc.aio.Server) -> None:
            vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(foreign, server)
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(servicer, server)

        return await self.host.start(add, servicer.tunnelled)

    async def drain(self, grace_s: float) -> bool:
        """Refuses new calls; returns once the KV of all running ones was pulled, or after the grace. See `WorkerHost.drain`."""
        return await self.host.drain(grace_s)

    async def stop(self) -> None:
        self.host.refuse_calls()
        await self._foreign.close()
        await self.host.stop()

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        return await self._prefiller.ready(key, timeout_s, piece)

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        return await exported(self.host, request, self._prefiller.pull)

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        self._prefiller.check_integrity()
