"""SessionService: protobuf in, protobuf out; the work is `router.sessions.manager`'s. Runs on the router's event loop. Errors become
statuses in `baton.service.interceptors`.
"""

from baton.errors import FieldViolation, InvalidRequestError
from baton.service.access import Access, caller_of
from baton.service.calls import Context
from baton.v1 import inference_pb2, session_pb2_grpc
from baton.v1 import session_pb2 as pb
from router.model import ServedModel
from router.sessions.manager import SessionManager
from router.sessions.record import Session, SessionId
from router.sessions.store import Query

DEFAULT_PAGE = 100
MAX_PAGE = 1000

_STATES = {
    pb.SESSION_STATE_UNSPECIFIED: None,
    pb.SESSION_STATE_IDLE: False,
    pb.SESSION_STATE_GENERATING: True,
}


class SessionServicer(session_pb2_grpc.SessionServiceServicer):
    """See the module docstring."""

    def __init__(self, sessions: SessionManager, model: ServedModel, *, access: Access) -> None:
        self._access = access
        self._sessions = sessions
        self._model = model

    async def Create(  # noqa: N802
        self, request: pb.SessionServiceCreateRequest, context: Context
    ) -> pb.SessionServiceCreateResponse:
        for name, seconds in (
            ("ttl_seconds", request.ttl_seconds),
            ("idle_seconds", request.idle_seconds),
        ):
            if not seconds >= 0:  # a NaN fails every comparison
                raise InvalidRequestError(FieldViolation(name, "must not be negative"))
        session = await self._sessions.create(
            self._tenant(context),
            model=self._model.name,
            ttl_s=request.ttl_seconds,
            idle_s=request.idle_seconds,
        )
        return pb.SessionServiceCreateResponse(session=self._told(session))

    async def Get(  # noqa: N802
        self, request: pb.SessionServiceGetRequest, context: Context
    ) -> pb.SessionServiceGetResponse:
        session = await self._sessions.get(self._tenant(context), request.session_id)
        return pb.SessionServiceGetResponse(session=self._told(session))

    async def List(  # noqa: N802
        self, request: pb.SessionServiceListRequest, context: Context
    ) -> pb.SessionServiceListResponse:
        if request.state not in _STATES:
            raise InvalidRequestError(FieldViolation("state", "is not known"))
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        sessions = await self._sessions.list(
            Query(
                tenant=self._tenant(context),
                after=SessionId(request.page_token),
                limit=size + 1,
                generating=_STATES[request.state],
            )
        )
        more = len(sessions) > size
        return pb.SessionServiceListResponse(
            sessions=map(self._told, sessions[:size]),
            next_page_token=sessions[size - 1].key.session_id if more else "",
        )

    async def Close(  # noqa: N802
        self, request: pb.SessionServiceCloseRequest, context: Context
    ) -> pb.SessionServiceCloseResponse:
        session = await self._sessions.remove(self._tenant(context), request.session_id)
        return pb.SessionServiceCloseResponse(session=self._told(session))

    def _tenant(self, context: Context) -> str:
        return caller_of(self._access, context).tenant

    def _told(self, session: Session) -> pb.Session:
        generating = self._sessions.is_generating(session)
        return pb.Session(
            session_id=session.key.session_id,
            state=pb.SESSION_STATE_GENERATING if generating else pb.SESSION_STATE_IDLE,
            model=session.model,
            turns=session.turns,
            history_tokens=session.history_tokens,
            usage=inference_pb2.Usage(
                prompt_tokens=session.prompt_tokens,
                cached_tokens=session.cached_tokens,
                completion_tokens=session.completion_tokens,
            ),
            last_cached_tokens=session.last_cached_tokens,
            prefill_worker=session.prefill_worker,
            decode_worker=session.decode_worker,
            failed_turns=session.failed_turns,
            last_failure=session.last_failure,
            created_unix_seconds=session.created_s,
            updated_unix_seconds=session.updated_s,
            expires_unix_seconds=session.expires_s,
        )
