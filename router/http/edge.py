"""The outermost ASGI application: what holds for every request, whoever handles it.

    id       each answer carries `x-request-id`: the client's, or a new one
    access   no handler runs for a caller without a key, but for the paths that are open
    size     a body over the limit gets 413
    errors   whatever is raised becomes an answer in OpenAI's form; nothing that a request contained is logged

Runs on the router's event loop, in the task of the request.
"""

import re
import secrets
from email.utils import formatdate

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.service.access import HEADER, Access, Caller
from baton.service.interceptors import typed_error
from router.http.errors import HttpError, of_status, to_http

REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,100}")


class Edge:
    """See the module docstring."""

    def __init__(self, app: ASGIApp, access: Access, *, max_body_bytes: int) -> None:
        self._app = app
        self._access = access
        self._max_body_bytes = max_body_bytes
        self.open_paths: set[str] = set()
        """Answered without a key."""
        self.draining = False
        """Connections close after their answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID_HEADER, "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        has_begun = False

        async def send_marked(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                self._mark(message, request_id)
            await send(message)

        try:
            scope["state"]["request_id"] = request_id
            if scope["path"] not in self.open_paths:
                scope["state"]["caller"] = self._find(headers)
            self._check_length(headers)
            await self._app(scope, self._limited(receive), send_marked)
        except HTTPException as error:
            await response_to_status(error)(scope, receive, send_marked)
        except Exception as error:  # noqa: BLE001 - the boundary
            typed = typed_error(error, scope["path"])
            if not has_begun:
                await response_to(to_http(typed))(scope, receive, send_marked)

    def _find(self, headers: Headers) -> Caller:
        given = headers.getlist(HEADER)
        return self._access.find(given[0] if len(given) == 1 else None)

    def _mark(self, start: Message, request_id: str) -> None:
        headers = MutableHeaders(raw=start.setdefault("headers", []))
        headers["date"] = formatdate(usegmt=True)
        headers[REQUEST_ID_HEADER] = request_id
        if self.draining:
            headers["connection"] = "close"

    def _check_length(self, headers: Headers) -> None:
        given = headers.get("content-length", "")
        if given.isdecimal() and int(given) > self._max_body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def receive_limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise self._too_large()
            return message

        return receive_limited

    def _too_large(self) -> HTTPException:
        return HTTPException(413, f"the body has more than {self._max_body_bytes} bytes")


def caller_of(request: Request) -> Caller:
    """In whose name a request acts. Precondition: its path is not open."""
    caller = request.state.caller
    assert isinstance(caller, Caller)
    return caller


def response_to(error: HttpError) -> Response:
    """The answer that tells an error."""
    return Response(error.body, error.status, error.headers, "application/json")


def response_to_status(error: HTTPException) -> Response:
    """The answer to what HTTP itself has wrong: no such path, no such method, too much."""
    message, code = _MESSAGES.get(error.status_code, (error.detail, "request_too_large"))
    answer = of_status(error.status_code, message, code=code, headers=error.headers)
    return response_to(answer)


_MESSAGES = {
    404: ("there is nothing at this path", "unknown_path"),
    405: ("the path does not take this method", "method_not_allowed"),
}
