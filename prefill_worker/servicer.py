"""PrefillService over gRPC: protobuf in, protobuf out; the work is `prefill_worker.prefiller`'s. Runs on the worker's event loop."""

from contextlib import aclosing

from baton.codec import (
    chunk_to_proto,
    finish_reason_to_proto,
    key_from_proto,
    load_to_proto,
    sequence_from_proto,
    worker_info_to_proto,
)
from baton.service.calls import Context, bounded
from baton.service.tracing import trace_of
from baton.service.tunnel import Method
from baton.service.worker_host import WorkerHost
from baton.v1 import prefill_pb2, prefill_pb2_grpc
from prefill_worker.prefiller import (
    PREFILL,
    JobEvent,
    JobFirstToken,
    JobHanded,
    JobProgress,
    JobStarted,
    Prefiller,
    PrefillJob,
)

SERVICE = PREFILL.service


class PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    """See the module docstring. Errors become statuses in `baton.service.interceptors`."""

    def __init__(self, host: WorkerHost, prefiller: Prefiller) -> None:
        self._host = host
        self._prefiller = prefiller

    @property
    def tunnelled(self) -> dict[str, Method]:
        """What routers call in a tunnel."""
        return {f"/{SERVICE}/Prefill": Method(prefill_pb2.PrefillRequest.FromString, self.Prefill)}

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Context
    ) -> None:
        job = PrefillJob(
            key=key_from_proto(request.key),
            sequence=sequence_from_proto(request.sequence),
            skip_tokens=request.skip_tokens,
            digest=request.kv_digest,
            trace=trace_of(context.invocation_metadata() or ()),
        )
        async with (
            bounded(context, self._host.settings.default_timeout_s),
            aclosing(self._prefiller.run(job)) as events,
        ):
            async for event in events:
                await context.write(_to_proto(event))

    async def Release(  # noqa: N802
        self, request: prefill_pb2.ReleaseRequest, context: Context
    ) -> prefill_pb2.ReleaseResponse:
        async with bounded(context, self._host.settings.default_timeout_s):
            released = await self._prefiller.release(key_from_proto(request.key))
        return prefill_pb2.ReleaseResponse(released=released)

    async def GetInfo(  # noqa: N802
        self,
        request: prefill_pb2.PrefillServiceGetInfoRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> prefill_pb2.PrefillServiceGetInfoResponse:
        return prefill_pb2.PrefillServiceGetInfoResponse(
            info=worker_info_to_proto(self._host.info),
            load=load_to_proto(self._host.engine.load),
        )


def _to_proto(event: JobEvent) -> prefill_pb2.PrefillResponse:
    response = prefill_pb2.PrefillResponse
    match event:
        case JobStarted(queue_s, cached):
            return response(started=response.Started(queue_seconds=queue_s, cached_tokens=cached))
        case JobProgress(computed):
            return response(progress=response.Progress(computed_tokens=computed))
        case JobFirstToken(token, finish, prefill_s):
            first = response.FirstToken(token=chunk_to_proto(token), prefill_seconds=prefill_s)
            if finish is not None:
                first.finish_reason = finish_reason_to_proto(finish)
            return response(first_token=first)
        case JobHanded(kv_bytes):
            return response(handed=response.Handed(kv_bytes=kv_bytes))
