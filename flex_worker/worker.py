"""The flexible worker, put together: the parts of the prefill and the decode worker on one host and one engine.

Prefill and decode share the KV pool and its prefix cache, so that a change of role recomputes nothing that is cached. The role is
a matter of what routers place here: both services answer at any time, and what was placed before a change ends in peace.
"""

import grpc
from smg_grpc_proto.generated import vllm_engine_pb2_grpc

from baton.engine.aio import AsyncEngine
from baton.kv.spec import WireKV
from baton.service.settings import WorkerSettings
from baton.service.worker_host import WorkerHost
from baton.transfer.base import (
    KVMeta,
    KVSource,
    KVTransport,
    Piece,
    PullRequest,
    Ready,
    Refused,
    Underway,
)
from baton.types import AttemptKey, Role, WorkerInfo
from baton.v1 import decode_pb2_grpc, prefill_pb2_grpc
from baton.vllm.servicer import SERVICE as VLLM_SERVICE
from baton.vllm.servicer import VllmServicer
from baton.worker.calls import exported
from decode_worker.decoder import Decoder
from decode_worker.foreign import ForeignDecode
from decode_worker.held import HeldAttempts
from decode_worker.servicer import SERVICE as DECODE_SERVICE
from decode_worker.servicer import DecodeServicer
from decode_worker.source import StoppedAttempts
from prefill_worker.foreign import ForeignPrefill
from prefill_worker.prefiller import Prefiller
from prefill_worker.servicer import SERVICE as PREFILL_SERVICE
from prefill_worker.servicer import PrefillServicer


class FlexWorker:
    """A `baton.transfer.base.KVSource` for others, and a puller through the transport, which it closes when it stops."""

    def __init__(
        self, settings: WorkerSettings, role: Role, engine: AsyncEngine, transport: KVTransport
    ) -> None:
        """`role` is the first one."""
        services = {Role.PREFILL: PREFILL_SERVICE, Role.DECODE: DECODE_SERVICE}
        self.host = WorkerHost(settings, role, engine, services=services, roleless=[VLLM_SERVICE])
        self._prefiller = Prefiller(self.host)
        self._foreign_prefill = ForeignPrefill(self.host, self._prefiller)
        self.host.when_refusing(self._prefiller.refuse_new)
        self._transport = transport
        self._decoder = Decoder(self.host, transport)
        self._foreign_decode = ForeignDecode(self.host, self._decoder, transport)
        self._attempts = HeldAttempts()
        self._stopped = StoppedAttempts(engine, self._attempts)

    async def start(self) -> WorkerInfo:
        """See `WorkerHost.start`."""
        prefill = PrefillServicer(self.host, self._prefiller)
        decode = DecodeServicer(self.host, self._decoder, self._attempts)
        foreign = VllmServicer(
            self.host, prefill=self._foreign_prefill, decode=self._foreign_decode
        )

        def add(server: grpc.aio.Server) -> None:
            vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(foreign, server)
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(prefill, server)
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(decode, server)

        return await self.host.start(add, prefill.tunnelled | decode.tunnelled)

    async def drain(self, grace_s: float) -> bool:
        """See `WorkerHost.drain`."""
        return await self.host.drain(grace_s)

    async def stop(self) -> None:
        self.host.refuse_calls()
        await self._foreign_prefill.close()
        await self._attempts.close()
        await self.host.stop()
        await self._foreign_decode.close()
        await self._transport.close()

    async def ready(
        self, key: AttemptKey, timeout_s: float, piece: Piece | None = None
    ) -> Ready | Underway | Refused:
        return await self._source_of(key).ready(key, timeout_s, piece)

    async def pull(self, request: PullRequest) -> tuple[KVMeta | Refused, WireKV | None]:
        return await exported(self.host, request, self._source_of(request.key).pull)

    def _source_of(self, key: AttemptKey) -> KVSource:
        """No attempt is in both phases on one worker."""
        return self._stopped if key in self._attempts else self._prefiller

    def check_integrity(self) -> None:
        """Raises AssertionError where the books do not balance."""
        self._prefiller.check_integrity()
