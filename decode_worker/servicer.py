"""DecodeService over gRPC: protobuf in, protobuf out; the work is `decode_worker.decoder`'s. Runs on the worker's event loop."""

from contextlib import aclosing

from baton.codec import (
    chunk_to_proto,
    finish_reason_to_proto,
    key_from_proto,
    load_to_proto,
    sequence_from_proto,
    worker_info_to_proto,
)
from baton.errors import FieldViolation, InvalidRequestError
from baton.service.calls import Context, bounded
from baton.service.worker_host import WorkerHost
from baton.v1 import decode_pb2, decode_pb2_grpc
from decode_worker.decoder import (
    DecodeJob,
    Decoder,
    JobEvent,
    JobFinished,
    JobKvReceived,
    JobReserved,
    JobTokens,
)


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """See the module docstring. Errors become statuses in `baton.service.interceptors`."""

    def __init__(self, host: WorkerHost, decoder: Decoder) -> None:
        self._host = host
        self._decoder = decoder

    async def Decode(  # noqa: N802
        self, request: decode_pb2.DecodeRequest, context: Context
    ) -> None:
        async with bounded(context, self._host.settings.default_timeout_s) as left_s:
            job = DecodeJob(
                key=key_from_proto(request.key),
                sequence=sequence_from_proto(request.sequence),
                source=_source(request),
                digest=request.kv_digest,
                timeout_s=left_s,
            )
            async with aclosing(self._decoder.run(job)) as events:
                async for event in events:
                    await context.write(_to_proto(event))

    async def GetInfo(  # noqa: N802
        self,
        request: decode_pb2.DecodeServiceGetInfoRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> decode_pb2.DecodeServiceGetInfoResponse:
        return decode_pb2.DecodeServiceGetInfoResponse(
            info=worker_info_to_proto(self._host.info),
            load=load_to_proto(self._host.engine.load),
        )


def _source(request: decode_pb2.DecodeRequest) -> str | None:
    if not request.HasField("source"):
        return None
    if not request.source.transfer_address:
        raise InvalidRequestError(FieldViolation("source.transfer_address", "must not be empty"))
    return request.source.transfer_address


def _to_proto(event: JobEvent) -> decode_pb2.DecodeResponse:
    response = decode_pb2.DecodeResponse
    match event:
        case JobReserved(queue_s, cached):
            return response(reserved=response.Reserved(queue_seconds=queue_s, cached_tokens=cached))
        case JobKvReceived(kv_bytes, handoff_s):
            return response(
                kv_received=response.KvReceived(kv_bytes=kv_bytes, handoff_seconds=handoff_s)
            )
        case JobTokens(chunk):
            return response(tokens=chunk_to_proto(chunk))
        case JobFinished(reason, preemptions):
            return response(
                finished=response.Finished(
                    reason=finish_reason_to_proto(reason), preemptions=preemptions
                )
            )
