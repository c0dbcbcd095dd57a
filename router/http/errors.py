"""The one table between Baton's exceptions and HTTP, and the body that every HTTP error has: OpenAI's. Pure."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.errors import (
    AbortedError,
    AlreadyExistsError,
    BatonError,
    CancelledError,
    CapacityError,
    DeadlineError,
    FieldViolation,
    InternalError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    SessionBusyError,
    SessionLostError,
    UnauthenticatedError,
    UnavailableError,
)

CLOSED_REQUEST = 499
"""What proxies have made of it: no answer, for the request was cancelled."""


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the table."""

    status: int
    kind: str
    """The body's `type`."""
    retried: bool = True
    """Whether clients that retry by status may. OpenAI's ask for statuses of 500 and more, 408, 409 and 429."""


_INVALID = "invalid_request_error"
_SERVER = "server_error"
_TABLE: Mapping[type[BatonError], _Row] = {
    InvalidRequestError: _Row(400, _INVALID),
    UnauthenticatedError: _Row(401, "authentication_error"),
    PermissionDeniedError: _Row(403, "permission_error"),
    NotFoundError: _Row(404, "not_found_error"),
    AlreadyExistsError: _Row(409, "conflict_error", retried=False),
    SessionBusyError: _Row(409, "conflict_error"),
    SessionLostError: _Row(409, "conflict_error", retried=False),
    AbortedError: _Row(409, "conflict_error", retried=False),
    CapacityError: _Row(429, "rate_limit_error"),
    CancelledError: _Row(CLOSED_REQUEST, "cancelled_error"),
    UnavailableError: _Row(503, "unavailable_error"),
    # Of one worker; others may have been able to.
    PreconditionError: _Row(503, "unavailable_error"),
    DeadlineError: _Row(504, "timeout_error", retried=False),
    InternalError: _Row(500, _SERVER),
}
_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    503: "unavailable_error",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpError:
    """An answer that tells what went wrong."""

    status: int
    body: bytes
    """A JSON object `{"error": {message, type, param, code}}`."""
    headers: Mapping[str, str]


def to_http(error: BatonError) -> HttpError:
    """The answer for an error's class, or for the nearest base that has a row."""
    row = next((_TABLE[base] for base in type(error).__mro__ if base in _TABLE), None)
    row = row or _TABLE[InternalError]
    param, code = None, error.reason.lower()
    if isinstance(error, InvalidRequestError) and error.violations:
        param = error.violations[0].field
    elif isinstance(error, NotFoundError):
        code = f"{error.resource_type}_not_found"
        param = "model" if error.resource_type == "model" else None
    headers = {}
    if isinstance(error, CapacityError | UnavailableError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, UnauthenticatedError):
        code = "invalid_api_key"
        headers["www-authenticate"] = "Bearer"
    if not row.retried:
        headers["x-should-retry"] = "false"
    body = error_body(error.message, row.kind, param=param, code=code)
    return HttpError(status=row.status, body=body, headers=headers)


def of_status(
    status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None
) -> HttpError:
    """What HTTP itself has wrong, beside the table."""
    kind = _BY_STATUS.get(status, _INVALID if status < 500 else _SERVER)
    return HttpError(
        status=status,
        body=error_body(message, kind, param=None, code=code),
        headers=headers or {},
    )


def error_body(message: str, kind: str, *, param: str | None, code: str | None) -> bytes:
    """One JSON object, on one line."""
    fields = {"message": message, "type": kind, "param": param, "code": code}
    # ASCII: what a client sent may be no text.
    return json.dumps({"error": fields}).encode()


def violations(errors: Iterable[Mapping[str, Any]]) -> Iterator[FieldViolation]:
    """What pydantic found wrong with a request, by the paths of its fields."""
    found: dict[str, str] = {}
    for error in errors:
        place, *path = error["loc"]
        if error["type"] == "json_invalid":
            found[place] = f"is not JSON: {error['ctx']['error']} at {path[0]}"
            continue
        field = _path(path) or place
        if error["type"] == "unknown_fields":
            above = f"{_path(path)}." if path else ""
            found |= {above + name: "there is no such field" for name in error["ctx"]["names"]}
            continue
        problem = error["msg"]
        if error["type"] in _NO_OBJECTS:
            problem = _NOT_AN_OBJECT
        elif error["type"] == "union_tag_invalid":
            # Pydantic's words quote the request.
            problem = (
                f"{error['ctx']['discriminator']} must be one of {error['ctx']['expected_tags']}"
            )
        found[field] = f"{found[field]}; or: {problem}" if field in found else problem
    for field, problem in found.items():
        # Of the alternatives, the one that went furthest was meant.
        if not any(other.startswith((f"{field}.", f"{field}[")) for other in found):
            yield FieldViolation(field, problem)


def _path(steps: Sequence[int | str]) -> str:
    """As a client writes it: without pydantic's names of alternatives, which are types, and the roles of messages."""
    path = ""
    for before, step in zip(("", *steps), steps, strict=False):
        if isinstance(step, int):
            path += f"[{step}]"
        elif "[" not in step and step not in _TYPES and not isinstance(before, int):
            path += f".{step}"
    return path.removeprefix(".")


_NO_OBJECTS = ("model_type", "model_attributes_type")
_NOT_AN_OBJECT = "must be a JSON object, sent as application/json"
_TYPES = ("str", "int", "float", "bool")
