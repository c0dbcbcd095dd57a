"""DecodeService over gRPC: protobuf in, protobuf out; the work is `decode_worker.decoder`'s. Runs on the worker's event loop."""

import math

from baton.codec import (
    chunk_to_proto,
    finish_reason_to_proto,
    key_from_proto,
    key_to_proto,
    load_to_proto,
    record_from_proto,
    record_to_proto,
    sequence_from_proto,
    sequence_to_proto,
    worker_info_to_proto,
)
from baton.errors import FieldViolation, InvalidRequestError, PreconditionError
from baton.service.calls import Context, time_left_s
from baton.service.tracing import trace_of
from baton.service.tunnel import Method, pace_of
from baton.service.worker_host import WorkerHost
from baton.types import AttemptKey
from baton.v1 import decode_pb2, decode_pb2_grpc
from baton.worker.calls import bind_attempt
from decode_worker.decoder import (
    TAKES_KV,
    DecodeJob,
    Decoder,
    JobEvent,
    JobFinished,
    JobKvReceived,
    JobReserved,
    JobTokens,
)
from decode_worker.held import HeldAttempt, HeldAttempts, Terms

SERVICE = TAKES_KV.service


class DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    """See the module docstring. Errors become statuses in `baton.service.interceptors`."""

    def __init__(self, host: WorkerHost, decoder: Decoder, attempts: HeldAttempts) -> None:
        self._host = host
        self._decoder = decoder
        self._attempts = attempts

    @property
    def tunnelled(self) -> dict[str, Method]:
        """What routers call in a tunnel."""
        return {f"/{SERVICE}/Decode": Method(decode_pb2.DecodeRequest.FromString, self.Decode)}

    async def Decode(  # noqa: N802
        self, request: decode_pb2.DecodeRequest, context: Context
    ) -> None:
        job = DecodeJob(
            key=key_from_proto(request.key),
            sequence=sequence_from_proto(request.sequence),
            source=_source(request),
            source_key=_source_key(request),
            digest=request.kv_digest,
            timeout_s=time_left_s(context, self._host.settings.default_timeout_s),
            trace=trace_of(context.invocation_metadata() or ()),
            pace=pace_of(context),
        )
        bind_attempt(job.key)
        terms = Terms(record=record_from_proto(request.record), grace_s=_grace_s(request))
        attempt = self._attempts.start(job, terms, self._decoder.run(job))

        async def write(event: JobEvent) -> None:
            await context.write(_to_proto(event))

        await attempt.read(write, request.holder, None)

    async def Attach(  # noqa: N802
        self, request: decode_pb2.DecodeServiceAttachRequest, context: Context
    ) -> None:
        attempt = self._attempts.get(key_from_proto(request.key))
        bind_attempt(attempt.job.key)

        async def write(event: JobEvent) -> None:
            await context.write(_to_proto(event))
            if isinstance(event, JobKvReceived) and event.first is not None:
                await context.write(_to_proto(JobTokens(event.first)))

        await attempt.read(write, request.holder, request.next_index)

    async def Find(  # noqa: N802
        self,
        request: decode_pb2.FindRequest,
        context: Context,  # noqa: ARG002
    ) -> decode_pb2.FindResponse:
        found = self._attempts.find(request.request_id, request.tenant)
        return decode_pb2.FindResponse(attempts=map(_held_to_proto, found))

    async def HandOver(  # noqa: N802
        self,
        request: decode_pb2.HandOverRequest,
        context: Context,  # noqa: ARG002
    ) -> decode_pb2.HandOverResponse:
        key = key_from_proto(request.key)
        attempt = self._attempts.get(key)
        if attempt.holder != request.holder:
            raise PreconditionError(f"another router reads attempt {key}")
        attempt.hand_overs += 1
        try:
            held = await self._host.engine.hold(key)
            attempt.stop_at(held)
        finally:
            attempt.hand_overs -= 1
            if not attempt.hand_overs and not attempt.is_stopped:
                # A router that waits no longer goes on reading.
                self._host.engine.resume(key)
        return decode_pb2.HandOverResponse(end_index=held.end_index)

    async def Release(  # noqa: N802
        self,
        request: decode_pb2.DecodeServiceReleaseRequest,
        context: Context,  # noqa: ARG002
    ) -> decode_pb2.DecodeServiceReleaseResponse:
        released = await self._attempts.release(key_from_proto(request.key), request.holder)
        return decode_pb2.DecodeServiceReleaseResponse(released=released)

    async def GetInfo(  # noqa: N802
        self,
        request: decode_pb2.DecodeServiceGetInfoRequest,  # noqa: ARG002
        context: Context,  # noqa: ARG002
    ) -> decode_pb2.DecodeServiceGetInfoResponse:
        return decode_pb2.DecodeServiceGetInfoResponse(
            info=worker_info_to_proto(self._host.info),
            load=load_to_proto(self._host.engine.load),
        )


def _grace_s(request: decode_pb2.DecodeRequest) -> float:
    if not 0 <= request.grace_seconds < math.inf:
        raise InvalidRequestError(FieldViolation("grace_seconds", "must be finite and >= 0"))
    return request.grace_seconds


def _source(request: decode_pb2.DecodeRequest) -> str | None:
    if not request.HasField("source"):
        return None
    if not request.source.transfer_address:
        raise InvalidRequestError(FieldViolation("source.transfer_address", "must not be empty"))
    return request.source.transfer_address


def _source_key(request: decode_pb2.DecodeRequest) -> AttemptKey | None:
    return key_from_proto(request.source.key) if request.source.HasField("key") else None


def _held_to_proto(attempt: HeldAttempt) -> decode_pb2.FindResponse.HeldAttempt:
    return decode_pb2.FindResponse.HeldAttempt(
        key=key_to_proto(attempt.job.key),
        sequence=sequence_to_proto(attempt.job.sequence),
        record=record_to_proto(attempt.terms.record),
        end_index=attempt.end_index,
        failed=attempt.failed,
    )


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
