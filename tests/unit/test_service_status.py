"""The status table: every error class crosses the wire and comes back as itself."""

import grpc
import pytest
from google.rpc import error_details_pb2  # type: ignore[import-untyped]

from baton import errors
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
from baton.service.groups import first_error
from baton.service.status import code_of, error_from_rpc, to_status

EXAMPLES: tuple[BatonError, ...] = (
    InvalidRequestError(FieldViolation("sampling.top_p", "must be in (0, 1]")),
    InvalidRequestError(FieldViolation("prompt", "empty"), FieldViolation("model", "empty")),
    NotFoundError("model", "tales-9b"),
    AlreadyExistsError("request r1 runs"),
    DrainingError("about to stop", retry_after_s=0.5),
    AbortedError("another router reads it"),
    CapacityError("queue is full", retry_after_s=0.25),
    UnavailableError("draining", retry_after_s=2.5),
    PreconditionError("other KV digest"),
    CorruptKVError("checksum differs"),
    DeadlineError("handoff"),
    CancelledError("cancelled by id"),
    SessionBusyError("s1"),
    SessionLostError("it was closed"),
    ModelLoadError("/models/x/config.json", "not JSON"),
    InternalError("engine failed"),
    UnauthenticatedError("the API key is not valid"),
    PermissionDeniedError("for administrators"),
)


def as_rpc_error(error: BatonError) -> grpc.aio.AioRpcError:
    status = to_status(error)
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", status.SerializeToString()))
    return grpc.aio.AioRpcError(
        code_of(error), grpc.aio.Metadata(), trailers, status.message, "debug"
    )


def plain(code: grpc.StatusCode, details: str = "text") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details, "debug")


def fields_of(error: BatonError) -> dict[str, object]:
    return vars(error)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda e: type(e).__name__)
def test_an_error_comes_back_as_its_own_class_with_its_fields(error: BatonError) -> None:
    back = error_from_rpc(as_rpc_error(error))
    assert type(back) is type(error)
    assert fields_of(back) == fields_of(error)


def test_every_error_class_of_the_tree_has_a_row_and_an_example() -> None:
    tree = {
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, BatonError) and each is not BatonError
    }
    assert tree == {type(example) for example in EXAMPLES}
    assert len({each.reason for each in tree}) == len(tree)
    for example in EXAMPLES:
        assert error_from_rpc(as_rpc_error(example)).reason == example.reason


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (EXAMPLES[0], error_details_pb2.BadRequest),
        (NotFoundError("model", "m"), error_details_pb2.ResourceInfo),
        (CapacityError("full"), error_details_pb2.RetryInfo),
        (UnavailableError("gone"), error_details_pb2.RetryInfo),
        (PreconditionError("no"), error_details_pb2.PreconditionFailure),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, BatonError) else "",
)
def test_a_status_carries_error_info_and_the_detail_of_its_class(
    error: BatonError, detail: type
) -> None:
    packed = to_status(error).details
    info = error_details_pb2.ErrorInfo()
    assert packed[0].Unpack(info)
    assert (info.domain, info.reason) == ("baton", error.reason)
    assert packed[1].Is(detail.DESCRIPTOR)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNAVAILABLE, UnavailableError),
        (grpc.StatusCode.CANCELLED, CancelledError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityError),
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.UNIMPLEMENTED, PreconditionError),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.UNKNOWN, InternalError),
        (grpc.StatusCode.PERMISSION_DENIED, PermissionDeniedError),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
    ],
)
def test_a_status_without_details_maps_by_its_code(
    code: grpc.StatusCode, kind: type[BatonError]
) -> None:
    assert type(error_from_rpc(plain(code))) is kind


def test_a_message_over_the_limit_is_no_capacity_problem() -> None:
    error = plain(grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (9 vs. 4)")
    assert isinstance(error_from_rpc(error), InvalidRequestError)


def test_broken_details_do_not_hide_the_code() -> None:
    trailers = grpc.aio.Metadata(("grpc-status-details-bin", b"\xff\xff"))
    error = grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), trailers, "gone", ""
    )
    assert isinstance(error_from_rpc(error), UnavailableError)


def test_huge_and_unencodable_errors_fit_into_trailers() -> None:
    many = (FieldViolation("f" * 5000, "\ud800" * 5000) for _ in range(500))
    assert len(to_status(InvalidRequestError(*many)).SerializeToString()) < 8192
    assert len(to_status(NotFoundError("x" * 9999, "y" * 9999)).SerializeToString()) < 8192


def test_the_typed_leaf_of_an_exception_group_is_preferred() -> None:
    wanted = DeadlineError("pull")
    group = ExceptionGroup("a", [ValueError("x"), ExceptionGroup("b", [wanted])])
    assert first_error(group) is wanted
    assert isinstance(first_error(ExceptionGroup("c", [KeyError("k")])), KeyError)
