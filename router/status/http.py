"""The HTTP side: the snapshot at `/status`, with the caller's key, and the page at `/`, which shows nothing that is not in its files.

The page's files are read once, when the routes are made, and each has a path of its own: no path is made from what a client asks. The page
may load, and talk to, nothing but this port. Handlers run on the router's event loop.
"""

import hashlib
from collections.abc import Callable, Coroutine, Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from router.http.edge import caller_of
from router.status.board import StatusBoard
from router.status.snapshot import StatusSnapshot

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Asked again each time, and answered with 304 while it is the same.
    "cache-control": "no-cache",
}
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def status_routes(board: StatusBoard) -> APIRouter:
    """`/status`. It needs a key where there are any."""
    routes = APIRouter(tags=["status"])

    @routes.get(
        "/status",
        summary="The router's state: the fleet, requests, sessions, latencies and rates",
        description="An administrator sees everything, a tenant what is its own. Prompts and outputs are not part of it.",
        responses={200: {"model": StatusSnapshot}},
        response_class=Response,
    )
    async def status(request: Request) -> Response:
        body = board.json(caller_of(request))
        return Response(body, headers=_JSON_HEADERS, media_type="application/json")

    return routes


_JSON_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def page_routes() -> APIRouter:
    """The page at `/`, and its files. They need no key: the page asks for one."""
    routes = APIRouter()
    for name, content in _page().items():
        path = "/" if name == "index.html" else f"/page/{name}"
        handler = _sender(content, _TYPES[PurePath(name).suffix])
        routes.add_api_route(path, handler, methods=["GET", "HEAD"], include_in_schema=False)
    return routes


def _page() -> Mapping[str, bytes]:
    directory = files("router.status") / "page"
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.is_file()}


def _sender(content: bytes, media_type: str) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "etag": etag}

    async def send(request: Request) -> Response:
        if etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return send
