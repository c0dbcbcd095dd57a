"""The decode worker, put together: the same object inside a Ray actor, in one process with prefill, and in tests."""

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from baton.engine.aio import AsyncEngine
from baton.kv.spec import WireKV
from baton.service.settings import WorkerSettings
from baton.service.worker_host import WorkerHost
from baton.transfer.base import KVMeta, KVTransport, Piece, PullRequest, Ready, Refused, Underway
from baton.types import AttemptKey, Role, WorkerInfo
from baton.v1 import decode_pb2_grpc
from baton.vllm.servicer import SERVICE as VLLM_SERVICE
from baton.vllm.servicer import VllmServicer
from baton.worker.calls import exported
from decode_worker.decoder import Decoder
from decode_worker.foreign import ForeignDecode
from decode_worker.held import HeldAttempts
from decode_worker.servicer import SERVICE, DecodeServicer
from decode_worker.source import StoppedAttempts


class DecodeWorker:
    """Serves DecodeService, and foreign routers; takes KV through the transport, which it closes when it stops."""

    def __init__(
        self, settings: WorkerSettings, engine: AsyncEngine, transport: KVTransport
    ) -> None:
        self.host = WorkerHost(
            settings,
            Role.DECODE,
            engine,
            services={Role.DECODE: SERVICE},
            roleless=[VLLM_SERVICE],
        )
        self._transport = transport
        self._decoder = Decoder(self.host, transport)
        self._foreign = ForeignDecode(self.host, self._decoder, transport)
        self._attempts = HeldAttempts()
        self._source = StoppedAttempts(engine, self._attempts)

    async def start(self) -> WorkerInfo:
        """See `WorkerHost.start`."""
        servicer = DecodeServicer(self.host, self._decoder, self._attempts)
        foreign = VllmServicer(self.host, decode=self._foreign)

        def add(server: grpc.aio.Server) -> None:
            vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(foreign, server)
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)

        return await self.host.start(add, servicer.tunnelled)

    async def drain(self, grace_s: float) -> bool:
        """Refuses new calls; returns once the running ones have ended, or after the grace. See `WorkerHost.drain`."""
        return await self.host.drain(grace_s)

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        """See `KVSource.ready`: for attempts that were handed over."""
        return await self._source.ready(key, timeout_s, piece)

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        """See `KVSource.pull`."""
        return await exported(self.host, request, self._source.pull)

    async def stop(self) -> None:
        self.host.refuse_calls()
        await self._attempts.close()
        await self.host.stop()
        await self._foreign.close()
        await self._transport.close()
