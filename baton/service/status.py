"""The one table between Baton's exceptions and gRPC statuses, in both directions. Pure, except `abort`.

A status carries `google.rpc` details: always an ErrorInfo (reason, domain `baton`, metadata), and beside it the detail that
the error's class calls for. The reverse rebuilds the class with its fields from the reason; a status without details comes
from gRPC itself (a dead peer, a passed deadline, a message over the limit) and maps by its code.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2 as details_pb2  # type: ignore[import-untyped]
from google.rpc import status_pb2
from grpc_status import rpc_status

from baton.errors import (
    AbortedError,
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    CorruptKVError,
    DeadlineError,
    DrainingError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    ModelLoadError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    SessionBusyError,
    SessionLostError,
    UnauthenticatedError,
    UnavailableError,
)

DOMAIN = "baton"
DETAILS_KEY = "grpc-status-details-bin"
"""The trailer that carries a rich status."""
MAX_MESSAGE_CHARS = 1000
"""A status travels as HTTP/2 trailers, which peers cap at 8 KiB in all."""
MAX_VIOLATIONS = 8

Aborter = grpc.aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class _Details:
    """What arrived with a status."""

    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    bad_request: details_pb2.BadRequest | None = None
    retry_after_s: float = 1.0


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table. `pack` returns the details beside ErrorInfo, `metadata` what ErrorInfo holds."""

    error: type[BatonError]
    code: grpc.StatusCode
    rebuild: Callable[[_Details], BatonError]
    pack: Callable[[Any], tuple[Message, ...]] = lambda _: ()
    metadata: Callable[[Any], dict[str, str]] = lambda _: {}


def _pack_violations(error: InvalidRequestError) -> tuple[Message, ...]:
    violations = (
        details_pb2.BadRequest.FieldViolation(
            field=_clean(v.field, 100), description=_clean(v.description, 200)
        )
        for v in error.violations[:MAX_VIOLATIONS]
    )
    return (details_pb2.BadRequest(field_violations=violations),)


def _rebuild_violations(details: _Details) -> BatonError:
    if details.bad_request is None or not details.bad_request.field_violations:
        return InvalidRequestError(FieldViolation("request", details.message))
    violations = details.bad_request.field_violations
    return InvalidRequestError(*(FieldViolation(v.field, v.description) for v in violations))


def _pack_resource(error: NotFoundError) -> tuple[Message, ...]:
    return (
        details_pb2.ResourceInfo(
            resource_type=_clean(error.resource_type, 100), resource_name=_clean(error.name, 200)
        ),
    )


def _pack_retry(error: CapacityError | UnavailableError) -> tuple[Message, ...]:
    delay = Duration()
    delay.FromNanoseconds(max(0, round(error.retry_after_s * 1e9)))
    return (details_pb2.RetryInfo(retry_delay=delay),)


def _pack_precondition(error: PreconditionError | ModelLoadError) -> tuple[Message, ...]:
    violation = details_pb2.PreconditionFailure.Violation(
        type=error.reason, subject="worker", description=_clean(error.message, 200)
    )
    return (details_pb2.PreconditionFailure(violations=[violation]),)


_TABLE = (
    _Row(
        InvalidRequestError,
        grpc.StatusCode.INVALID_ARGUMENT,
        _rebuild_violations,
        pack=_pack_violations,
    ),
    _Row(
        UnauthenticatedError,
        grpc.StatusCode.UNAUTHENTICATED,
        lambda d: UnauthenticatedError(d.message),
    ),
    _Row(
        PermissionDeniedError,
        grpc.StatusCode.PERMISSION_DENIED,
        lambda d: PermissionDeniedError(d.message),
    ),
    _Row(
        NotFoundError,
        grpc.StatusCode.NOT_FOUND,
        lambda d: NotFoundError(
            d.metadata.get("resource_type", "resource"), d.metadata.get("name", d.message)
        ),
        pack=_pack_resource,
        metadata=lambda e: {"resource_type": e.resource_type, "name": e.name},
    ),
    _Row(
        AlreadyExistsError,
        grpc.StatusCode.ALREADY_EXISTS,
        lambda d: AlreadyExistsError(d.message),
    ),
    _Row(
        CapacityError,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        lambda d: CapacityError(d.message, retry_after_s=d.retry_after_s),
        pack=_pack_retry,
    ),
    _Row(
        UnavailableError,
        grpc.StatusCode.UNAVAILABLE,
        lambda d: UnavailableError(d.message, retry_after_s=d.retry_after_s),
        pack=_pack_retry,
    ),
    _Row(
        DrainingError,
        grpc.StatusCode.UNAVAILABLE,
        lambda d: DrainingError(d.message, retry_after_s=d.retry_after_s),
        pack=_pack_retry,
    ),
    _Row(
        PreconditionError,
        grpc.StatusCode.FAILED_PRECONDITION,
        lambda d: PreconditionError(d.message),
        pack=_pack_precondition,
    ),
    _Row(CorruptKVError, grpc.StatusCode.DATA_LOSS, lambda d: CorruptKVError(d.message)),
    _Row(
        DeadlineError,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        lambda d: DeadlineError(d.metadata.get("stage", "rpc")),
        metadata=lambda e: {"stage": e.stage},
    ),
    _Row(CancelledError, grpc.StatusCode.CANCELLED, lambda d: CancelledError(d.message)),
    _Row(AbortedError, grpc.StatusCode.ABORTED, lambda d: AbortedError(d.message)),
    _Row(
        SessionBusyError,
        grpc.StatusCode.ABORTED,
        lambda d: SessionBusyError(d.metadata.get("session_id", "")),
        metadata=lambda e: {"session_id": e.session_id},
    ),
    _Row(SessionLostError, grpc.StatusCode.ABORTED, lambda d: SessionLostError(d.message)),
    _Row(
        ModelLoadError,
        grpc.StatusCode.FAILED_PRECONDITION,
        lambda d: ModelLoadError(
            d.metadata.get("path", "model"),
            d.message.removeprefix(d.metadata.get("path", "") + ": "),
        ),
        pack=_pack_precondition,
        metadata=lambda e: {"path": e.path},
    ),
    _Row(InternalError, grpc.StatusCode.INTERNAL, lambda d: InternalError(d.message)),
)
_BY_CLASS = {row.error: row for row in _TABLE}
_BY_REASON = {row.error.reason: row for row in _TABLE}


def code_of(error: BatonError) -> grpc.StatusCode:
    """The status code of an error's class, or of the nearest base that has a row."""
    return _row(error).code


def to_status(error: BatonError) -> status_pb2.Status:
    """The rich status of an error, cut to what trailers can carry."""
    row = _row(error)
    info = details_pb2.ErrorInfo(
        reason=error.reason,
        domain=DOMAIN,
        metadata={key: _clean(value, 200) for key, value in row.metadata(error).items()},
    )
    status = status_pb2.Status(
        code=_number(row.code), message=_clean(error.message, MAX_MESSAGE_CHARS)
    )
    for detail in (info, *row.pack(error)):
        status.details.add().Pack(detail)
    return status


async def abort(context: Aborter, error: BatonError) -> NoReturn:
    """Ends the call with the error's status. Raises, as `context.abort` does."""
    status = rpc_status.to_status(to_status(error))
    await context.abort(status.code, status.details, status.trailing_metadata)


def said_by_peer(error: grpc.RpcError) -> bool:
    """Whether the peer itself raised it; else it stands for what happened to the connection, or to this end of the call."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return False
    trailers: Any = error.trailing_metadata()
    return any(key == DETAILS_KEY for key, _ in trailers or ())


def error_from_rpc(error: grpc.RpcError) -> BatonError:
    """The exception that the peer raised, or that stands for what happened to the call."""
    if not isinstance(error, grpc.aio.AioRpcError | grpc.Call):
        return InternalError(str(error))
    # The two APIs type their metadata differently; both iterate as (key, value).
    trailers: Any = error.trailing_metadata()
    status = _status_in(trailers or ())
    if status is not None:
        rebuilt = error_from_status(status)
        if rebuilt is not None:
            return rebuilt
    return _error_from_code(error.code(), error.details() or "")


def error_from_status(status: status_pb2.Status) -> BatonError | None:
    """The inverse of `to_status`; None where the status is not one of ours."""
    row: _Row | None = None
    metadata: Mapping[str, str] = {}
    bad_request: details_pb2.BadRequest | None = None
    retry_after_s = 1.0
    for detail in status.details:
        info, violations, retry = (
            details_pb2.ErrorInfo(),
            details_pb2.BadRequest(),
            details_pb2.RetryInfo(),
        )
        if _unpack(detail, info) and info.domain == DOMAIN:
            row, metadata = _BY_REASON.get(info.reason), info.metadata
        elif _unpack(detail, violations):
            bad_request = violations
        elif _unpack(detail, retry):
            retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
    if row is None:
        return None
    return row.rebuild(_Details(status.message, metadata, bad_request, retry_after_s))


def error_from_status_bytes(data: bytes) -> BatonError:
    """The error in a serialized status that `to_status` made."""
    status = status_pb2.Status.FromString(data)
    return error_from_status(status) or InternalError(status.message)


def _error_from_code(code: grpc.StatusCode, message: str) -> BatonError:
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        # gRPC's own limit: no later try can succeed.
        return InvalidRequestError(FieldViolation("request", message))
    if code in _GRPC_CODES:
        return _GRPC_CODES[code](message)
    return InternalError(f"{code.name}: {message}")


_GRPC_CODES: dict[grpc.StatusCode, Callable[[str], BatonError]] = {
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.ABORTED: AbortedError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: lambda _: DeadlineError("rpc"),
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityError,
    grpc.StatusCode.INVALID_ARGUMENT: lambda m: InvalidRequestError(FieldViolation("request", m)),
    grpc.StatusCode.OUT_OF_RANGE: lambda m: InvalidRequestError(FieldViolation("request", m)),
    grpc.StatusCode.NOT_FOUND: lambda m: NotFoundError("resource", m),
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.UNIMPLEMENTED: PreconditionError,
    grpc.StatusCode.DATA_LOSS: CorruptKVError,
}


def _row(error: BatonError) -> _Row:
    for base in type(error).__mro__:
        if base in _BY_CLASS:
            return _BY_CLASS[base]
    return _BY_CLASS[InternalError]


def _number(code: grpc.StatusCode) -> int:
    number, _ = code.value
    return int(number)


def _status_in(
    metadata: Iterable[tuple[str, str | bytes]],
) -> status_pb2.Status | None:
    for key, value in metadata:
        if key == DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                return None
    return None


def _unpack(detail: AnyMessage, into: Message) -> bool:
    try:
        return bool(detail.Unpack(into))
    except DecodeError:
        return False


def _clean(text: str, limit: int) -> str:
    """Trailers must be valid UTF-8, and short."""
    valid = text.encode("utf-8", "replace").decode("utf-8")
    return valid if len(valid) <= limit else valid[: limit - 1] + "…"
