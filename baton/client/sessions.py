"""Sessions, as the clients' `sessions`: conversations that the router remembers, so that a turn sends only what is new.

session = client.sessions.create()
client.complete("Who has the ball?", session=session)
"""

from collections.abc import AsyncIterator, Iterator

from baton.client.recovery import Routers
from baton.client.types import Session, SessionState
from baton.client.unary import ask, ask_async
from baton.client.wire import session_id, usage
from baton.errors import FieldViolation, InvalidRequestError
from baton.v1 import session_pb2 as pb

TIMEOUT_S = 10.0

_STATES = {
    SessionState.IDLE: pb.SESSION_STATE_IDLE,
    SessionState.GENERATING: pb.SESSION_STATE_GENERATING,
}
_STATES_BACK = {number: state for state, number in _STATES.items()}


class Sessions:
    """Of a `Client`. Sessions may be given as such, or by their ids."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers

    def create(
        self, *, ttl_s: float = 0.0, idle_s: float = 0.0, timeout_s: float | None = TIMEOUT_S
    ) -> Session:
        """A new session; `ttl_s` and `idle_s` shorten its life and the pauses that end it. Raises `CapacityError` where there are too
        many.
        """
        request = pb.SessionServiceCreateRequest(ttl_seconds=ttl_s, idle_seconds=idle_s)
        return _session(
            ask(self._routers, lambda to: to.sessions.Create, request, timeout_s).session
        )

    def get(self, session: Session | str, *, timeout_s: float | None = TIMEOUT_S) -> Session:
        """As it is now. Raises `NotFoundError` once it was closed or has expired."""
        request = pb.SessionServiceGetRequest(session_id=session_id(session))
        return _session(ask(self._routers, lambda to: to.sessions.Get, request, timeout_s).session)

    def list(
        self,
        *,
        state: SessionState | None = None,
        page_size: int = 0,
        timeout_s: float | None = TIMEOUT_S,
    ) -> Iterator[Session]:
        """All of the caller's sessions, the oldest first, fetched page by page; `timeout_s` is for each page, whose size 0 leaves to the
        router.
        """
        request = _list_request(state, page_size)
        while True:
            page = ask(self._routers, lambda to: to.sessions.List, request, timeout_s)
            yield from map(_session, page.sessions)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def close(self, session: Session | str, *, timeout_s: float | None = TIMEOUT_S) -> Session:
        """The router forgets it; a turn that runs ends with `SessionLostError`. Returns it as it was last. Raises `NotFoundError`."""
        request = pb.SessionServiceCloseRequest(session_id=session_id(session))
        return _session(
            ask(self._routers, lambda to: to.sessions.Close, request, timeout_s).session
        )


class AsyncSessions:
    """Of an `AsyncClient`; the methods are those of `Sessions`."""

    def __init__(self, routers: Routers) -> None:
        self._routers = routers

    async def create(
        self, *, ttl_s: float = 0.0, idle_s: float = 0.0, timeout_s: float | None = TIMEOUT_S
    ) -> Session:
        """See `Sessions.create`."""
        request = pb.SessionServiceCreateRequest(ttl_seconds=ttl_s, idle_seconds=idle_s)
        response = await ask_async(self._routers, lambda to: to.sessions.Create, request, timeout_s)
        return _session(response.session)

    async def get(self, session: Session | str, *, timeout_s: float | None = TIMEOUT_S) -> Session:
        """See `Sessions.get`."""
        request = pb.SessionServiceGetRequest(session_id=session_id(session))
        response = await ask_async(self._routers, lambda to: to.sessions.Get, request, timeout_s)
        return _session(response.session)

    async def list(
        self,
        *,
        state: SessionState | None = None,
        page_size: int = 0,
        timeout_s: float | None = TIMEOUT_S,
    ) -> AsyncIterator[Session]:
        """See `Sessions.list`."""
        request = _list_request(state, page_size)
        while True:
            page = await ask_async(self._routers, lambda to: to.sessions.List, request, timeout_s)
            for each in page.sessions:
                yield _session(each)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def close(
        self, session: Session | str, *, timeout_s: float | None = TIMEOUT_S
    ) -> Session:
        """See `Sessions.close`."""
        request = pb.SessionServiceCloseRequest(session_id=session_id(session))
        response = await ask_async(self._routers, lambda to: to.sessions.Close, request, timeout_s)
        return _session(response.session)


def _list_request(state: SessionState | None, page_size: int) -> pb.SessionServiceListRequest:
    number = pb.SESSION_STATE_UNSPECIFIED if state is None else _STATES[state]
    try:
        return pb.SessionServiceListRequest(page_size=page_size, state=number)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError(FieldViolation("page_size", str(error))) from error


def _session(message: pb.Session) -> Session:
    return Session(
        session_id=message.session_id,
        # A state of a newer server is one of its business.
        state=_STATES_BACK.get(message.state, SessionState.GENERATING),
        model=message.model,
        turns=message.turns,
        history_tokens=message.history_tokens,
        usage=usage(message.usage),
        last_cached_tokens=message.last_cached_tokens,
        prefill_worker=message.prefill_worker,
        decode_worker=message.decode_worker,
        failed_turns=message.failed_turns,
        last_failure=message.last_failure,
        created_unix_s=message.created_unix_seconds,
        updated_unix_s=message.updated_unix_seconds,
        expires_unix_s=message.expires_unix_seconds,
    )
