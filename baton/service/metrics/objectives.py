"""Which requests were in time, and which count for goodput. Pure.

TTFT is from receipt to the first message with tokens. TPOT is the time from there to the last message with tokens, over the tokens
after the first: the first one does not count. Goodput is what ended well and met every objective that it has.
"""

from dataclasses import dataclass

from baton.errors import (
    AbortedError,
    AlreadyExistsError,
    BatonError,
    CancelledError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    SessionBusyError,
    SessionLostError,
    UnauthenticatedError,
)

_CALLERS = (
    AbortedError,
    AlreadyExistsError,
    CancelledError,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    SessionBusyError,
    SessionLostError,
    UnauthenticatedError,
)
"""What a request fails with by its caller's own doing: no objective is missed by that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """What a request is wanted to keep to; 0 where nothing is."""

    ttft_s: float = 0.0
    tpot_s: float = 0.0


NO_OBJECTIVES = Objectives()


@dataclass(frozen=True, slots=True)
class Attainment:
    """How a request kept to its objectives."""

    ttft: bool | None
    """None where it has no such objective, or nothing tells."""
    tpot: bool | None
    good: bool
    """Whether it ended well and missed none."""


def attainment(
    objectives: Objectives,
    error: BatonError | None,
    *,
    ttft_s: float | None,
    tpot_s: float | None,
) -> Attainment:
    """`error` is what the request failed with. One that the service let fail before its first token missed that."""
    ttft = tpot = None
    if objectives.ttft_s and (ttft_s is not None or not isinstance(error, _CALLERS)):
        ttft = ttft_s is not None and ttft_s <= objectives.ttft_s
    if objectives.tpot_s and tpot_s is not None:
        tpot = tpot_s <= objectives.tpot_s
    return Attainment(ttft, tpot, error is None and ttft is not False and tpot is not False)
