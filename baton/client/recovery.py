"""What a client does when a request's stream breaks: decisions only; the sync and the async client carry them out.

    the router accepted it      attach, at the next router: workers still generate, or remember
    no worker holds it          ask for the whole again, with the same seed: the answer is the same, and what is here is left out
    it was never accepted       ask again

A lost or a draining router is tried again, and one that accepted a request and then finds no worker for it, which another may have
or which may come back: that word stands once it has brought no new output for `reconnect_s`. Whatever else a router says of a request
stands at once. A `Routers` may be shared by threads; a `Recovery` is used by one thread or task at a time.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import grpc
import grpc.aio

from baton.client.wire import Collector
from baton.errors import (
    AlreadyExistsError,
    BatonError,
    CancelledError,
    DrainingError,
    NotFoundError,
    SessionBusyError,
    UnavailableError,
)
from baton.service.status import error_from_rpc, said_by_peer
from baton.v1 import inference_pb2 as pb
from baton.v1.inference_pb2_grpc import InferenceServiceStub
from baton.v1.session_pb2_grpc import SessionServiceStub

FIRST_PAUSE_S = 0.05
MAX_PAUSE_S = 1.0
TOLD_AFTER_S = 2.0
"""Most connections that break are replaced by then."""
UNACCEPTED_S = 3.0
"""A request that no router has accepted yet is tried for so long at most: there may be none."""

_log = logging.getLogger(__name__)
_LOST = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
"""How gRPC itself puts it that the connection, or the process at its other end, is gone."""


Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Services:
    """What a router is asked."""

    inference: InferenceServiceStub
    sessions: SessionServiceStub

    @classmethod
    def of(cls, channel: grpc.Channel | grpc.aio.Channel) -> Self:
        return cls(InferenceServiceStub(channel), SessionServiceStub(channel))


class Routers:
    """The routers of one fleet, and the one in use."""

    def __init__(self, services: Sequence[Services], metadata: Metadata = ()) -> None:
        self._services = tuple(services)
        self._index = 0
        self.metadata = metadata
        """Goes with every call."""
        self.closed = False
        """By the client: no call can be made any more."""

    @property
    def current(self) -> Services:
        return self._services[self._index]

    def each(self) -> tuple[Services, ...]:
        """All of them, the one in use first."""
        index = self._index
        return self._services[index:] + self._services[:index]

    def move_on(self, lost: Services) -> None:
        """That one is lost; no effect where it is no longer in use."""
        index = self._index
        if self._services[index] is lost:
            self._index = (index + 1) % len(self._services)


def call_error(error: grpc.RpcError, *, closed: bool) -> BatonError:
    """Why a call ended. gRPC says "cancelled" of one that this end `closed`, and of one that a router let go of as it stopped."""
    typed = error_from_rpc(error)
    if isinstance(typed, CancelledError) and not closed and not said_by_peer(error):
        return UnavailableError("the router let go of the call")
    return typed


def split_targets(address: str) -> list[str]:
    """The targets in a list of addresses; a target with a scheme stands alone, as it may have commas of its own."""
    if "://" in address or address.startswith(("ipv4:", "ipv6:", "dns:", "unix:")):
        return [address]
    targets = [target for part in address.split(",") if (target := part.strip())]
    return targets or [address]


@dataclass(frozen=True, slots=True)
class Retry:
    """The next call."""

    message: pb.GenerateRequest | pb.AttachRequest
    pause_s: float
    """Before it."""
    elsewhere: bool
    """At the next router, where there are several."""
    delay: str | None
    """Why nothing new comes; None where it is not worth a word yet."""

    def tell(self, request_id: str) -> None:
        """Logs why an answer is late."""
        if self.delay is not None:
            _log.info("request %s is asked for again: %s", request_id, self.delay)


class Recovery:
    """See the module docstring."""

    def __init__(
        self,
        request: pb.GenerateRequest | pb.AttachRequest,
        collector: Collector,
        reconnect_s: float,
    ) -> None:
        self._request = request
        self._collector = collector
        self._reconnect_s = reconnect_s
        self._lost_s: float | None = None
        """When the first call since then broke; on the caller's monotonic clock."""
        self._pause_s = 0.0
        self._refused = False
        """It broke by the word of a router that serves, which accepts the request as often as it is asked."""
        self._reason = ""
        """Why it broke last."""
        self._again = False
        """Attach found nothing."""

    def progress(self, *, fresh: bool) -> None:
        """Something came; `fresh` where it is output that was not here yet."""
        self._again = False
        if fresh or not self._refused:
            self._lost_s, self._pause_s, self._refused = None, 0.0, False

    def after(self, error: grpc.RpcError, now_s: float) -> Retry | None:
        """What to do once a call broke; None where the error stands."""
        typed = error_from_rpc(error)
        lost = self._is_loss(error, typed)
        if not lost and not self._is_answer_to_retry(typed):
            return None
        if lost:
            self._refused = said_by_peer(error) and not isinstance(typed, DrainingError)
            self._reason = typed.message
        self._lost_s = now_s if self._lost_s is None else self._lost_s
        patience_s = self._reconnect_s
        if self._collector.seed is None:
            patience_s = min(patience_s, UNACCEPTED_S)
        # That Attach found nothing is no last word: it would tell of a lost request, and not of why it was lost.
        attached = isinstance(typed, NotFoundError) and not self._again
        if now_s - self._lost_s >= patience_s and not attached:
            return None
        pause_s = self._pause_s
        self._pause_s = min(MAX_PAUSE_S, max(FIRST_PAUSE_S, 2 * pause_s))
        self._again = isinstance(typed, NotFoundError)
        message = self._message()
        if message is None:
            return None
        # A router that serves has looked for a worker for a while itself.
        late = self._refused or now_s - self._lost_s >= TOLD_AFTER_S
        return Retry(message, pause_s, lost, self._reason if late else None)

    def _is_loss(self, error: grpc.RpcError, typed: BatonError) -> bool:
        if said_by_peer(error):
            # A router that stops ends its requests so.
            accepted = self._collector.seed is not None
            return isinstance(typed, DrainingError) or (
                accepted and isinstance(typed, UnavailableError)
            )
        return isinstance(error, grpc.Call | grpc.aio.AioRpcError) and error.code() in _LOST

    def _is_answer_to_retry(self, typed: BatonError) -> bool:
        """Attach found nothing; or the request that is asked for again has not quite ended there."""
        return self._lost_s is not None and isinstance(
            typed, AlreadyExistsError | NotFoundError | SessionBusyError
        )

    def _message(self) -> pb.GenerateRequest | pb.AttachRequest | None:
        seed = self._collector.seed
        if seed is None:
            return self._request
        if not self._again:
            self._collector.expect_the_rest()
            return pb.AttachRequest(
                request_id=self._request.request_id, positions=self._collector.positions()
            )
        if isinstance(self._request, pb.AttachRequest):
            return None  # what was asked for, only whoever began it knows
        self._collector.expect_all_again()
        repeat = pb.GenerateRequest()
        repeat.CopyFrom(self._request)
        repeat.sampling.seed = seed
        return repeat
