"""The one exception tree. `baton.service.status` maps it to gRPC statuses; `baton.client` maps statuses back to it.

BatonError
├── InvalidRequestError      the request can never succeed as written (names the field)
├── UnauthenticatedError     no API key, or none that is valid
├── PermissionDeniedError    the caller is known, and may not
├── NotFoundError            unknown model, request or session
├── AlreadyExistsError       a request of that id runs
├── CapacityError            no room now: queue, KV pool or object store (carries when to try again)
├── UnavailableError         no healthy worker, or the peer died (retry elsewhere)
│   └── DrainingError        this process is about to stop (retry elsewhere at once)
├── PreconditionError        this worker cannot: wrong KV digest, KV lost or expired
├── CorruptKVError           KV bytes are not what was sent
├── DeadlineError            the caller's deadline passed (names the stage)
├── CancelledError           the request was cancelled by id
├── AbortedError             somebody else goes on with it
├── SessionBusyError         another turn of the session runs
├── SessionLostError         the session was closed, or taken over, while its turn ran
├── ModelLoadError           the checkpoint is unusable (names the file)
└── InternalError            a bug, or an engine that failed
"""

from dataclasses import dataclass


class BatonError(Exception):
    """Root of everything that Baton raises on purpose."""

    reason = "INTERNAL"
    """Machine-readable, upper snake case: `ErrorInfo.reason`, and the label of failure metrics."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field of a request."""

    field: str
    """Path in the protobuf message, such as `sampling.top_p`."""
    description: str


class InvalidRequestError(BatonError):
    """The request can never succeed as written."""

    reason = "INVALID_REQUEST"

    def __init__(self, *violations: FieldViolation) -> None:
        super().__init__("; ".join(f"{v.field}: {v.description}" for v in violations))
        self.violations = violations


class UnauthenticatedError(BatonError):
    """No API key, or none that is valid."""

    reason = "UNAUTHENTICATED"


class PermissionDeniedError(BatonError):
    """The caller is known, and may not."""

    reason = "PERMISSION_DENIED"


class NotFoundError(BatonError):
    """No model, request or session of that name."""

    reason = "NOT_FOUND"

    def __init__(self, resource_type: str, name: str) -> None:
        super().__init__(f"no {resource_type} named {name!r}")
        self.resource_type = resource_type
        self.name = name


class AlreadyExistsError(BatonError):
    """A request of that id runs."""

    reason = "ALREADY_EXISTS"


class CapacityError(BatonError):
    """No room now."""

    reason = "NO_CAPACITY"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(BatonError):
    """Nobody can serve this now: no healthy worker, draining, or the peer died."""

    reason = "UNAVAILABLE"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DrainingError(UnavailableError):
    """This process takes nothing new: it is about to stop. Others may serve the request at once."""

    reason = "DRAINING"


class PreconditionError(BatonError):
    """This worker cannot serve this attempt; another attempt can succeed."""

    reason = "FAILED_PRECONDITION"


class CorruptKVError(BatonError):
    """KV bytes differ from what was sent; a new attempt recomputes them."""

    reason = "CORRUPT_KV"


class DeadlineError(BatonError):
    """The caller's deadline passed."""

    reason = "DEADLINE_EXCEEDED"

    def __init__(self, stage: str) -> None:
        super().__init__(f"deadline exceeded in stage {stage!r}")
        self.stage = stage


class CancelledError(BatonError):
    """The request was cancelled by id."""

    reason = "CANCELLED"


class AbortedError(BatonError):
    """Somebody else has what this call was about, and goes on with it."""

    reason = "ABORTED"


class SessionBusyError(BatonError):
    """Another turn of the session runs."""

    reason = "SESSION_BUSY"

    def __init__(self, session_id: str) -> None:
        super().__init__(f"another turn of session {session_id!r} runs")
        self.session_id = session_id


class SessionLostError(BatonError):
    """The session was closed, or another turn took it over, while this turn ran: the turn is no part of it."""

    reason = "SESSION_LOST"


class ModelLoadError(BatonError):
    """The checkpoint is unusable."""

    reason = "MODEL_LOAD"

    def __init__(self, path: str, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class InternalError(BatonError):
    """A bug, or an engine that failed."""

    reason = "INTERNAL"
