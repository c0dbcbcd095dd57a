"""The table between Baton's exceptions and HTTP."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from baton import errors
from baton.errors import (
    BatonError,
    CapacityError,
    DeadlineError,
    DrainingError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    SessionBusyError,
)
from baton.service.status import code_of
from router.http.errors import to_http, violations
from router.http.openai.fields import ChatRequest

MADE: dict[type[BatonError], BatonError] = {
    InvalidRequestError: InvalidRequestError(FieldViolation("a.b", "is bad")),
    NotFoundError: NotFoundError("model", "m"),
    CapacityError: CapacityError("full", retry_after_s=2.2),
    DrainingError: DrainingError("drains", retry_after_s=0.0),
    DeadlineError: DeadlineError("decode"),
    SessionBusyError: SessionBusyError("s"),
    errors.ModelLoadError: errors.ModelLoadError("p", "is bad"),
}
KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, BatonError) and kind is not BatonError
]
STATUS_OF_CODE = {
    "INVALID_ARGUMENT": {400},
    "UNAUTHENTICATED": {401},
    "PERMISSION_DENIED": {403},
    "NOT_FOUND": {404},
    "ALREADY_EXISTS": {409},
    "ABORTED": {409},
    "RESOURCE_EXHAUSTED": {429},
    "CANCELLED": {499},
    "INTERNAL": {500},
    "DATA_LOSS": {500},
    "FAILED_PRECONDITION": {500, 503},
    "UNAVAILABLE": {503},
    "DEADLINE_EXCEEDED": {504},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_has_a_status_that_fits_its_grpc_code(kind: type[BatonError]) -> None:
    error = MADE.get(kind) or kind("why")
    answer = to_http(error)
    assert answer.status in STATUS_OF_CODE[code_of(error).name]
    body = json.loads(answer.body)["error"]
    assert list(body) == ["message", "type", "param", "code"]
    assert body["message"] == error.message
    assert body["code"]


def test_an_error_tells_when_to_try_again() -> None:
    """Whole seconds, and never at once: a client that obeys does not come too early."""
    assert to_http(MADE[CapacityError]).headers["retry-after"] == "3"
    assert to_http(MADE[DrainingError]).headers["retry-after"] == "1"
    assert to_http(MADE[DeadlineError]).headers == {"x-should-retry": "false"}
    assert "x-should-retry" not in to_http(MADE[SessionBusyError]).headers


def test_problems_are_named_as_the_client_wrote_their_fields() -> None:
    """Without pydantic's alternatives, of which the one that went furthest counts."""
    found: list[dict[str, Any]] = [
        {"type": "t", "loc": ("body", "messages", 0, "user", "content", "str"), "msg": "a"},
        {"type": "t", "loc": ("body", "messages", 0, "user", "content", "list[x]", 1), "msg": "b"},
        {
            "type": "unknown_fields",
            "loc": ("body", "messages", 1, "user"),
            "msg": "",
            "ctx": {"names": ["name"]},
        },
        {"type": "t", "loc": ("header", "x-request-timeout-s"), "msg": "c"},
    ]
    assert [(each.field, each.description) for each in violations(found)] == [
        ("messages[0].content[1]", "b"),
        ("messages[1].name", "there is no such field"),
        ("x-request-timeout-s", "c"),
    ]


@pytest.mark.parametrize(
    ("message", "count", "parts"),
    [({"role": "user", "content": "x"}, 8193, 1), ({"type": "text", "text": "x"}, 1, 1025)],
    ids=["messages", "parts"],
)
def test_a_long_list_is_refused_for_its_length(
    message: dict[str, str], count: int, parts: int
) -> None:
    """Promise: nobody keeps the event loop busy with a body of a hundred thousand messages, or parts of one."""
    each = message if parts == 1 else {"role": "user", "content": [message] * parts}
    with pytest.raises(ValidationError) as refused:
        ChatRequest.model_validate({"messages": [each] * count})
    told = list(violations(refused.value.errors()))
    assert any("at most" in violation.description for violation in told), told
