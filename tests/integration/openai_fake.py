"""A server with OpenAI's API that nobody of this house wrote the rules of: it answers as its model's name says, in the ways in which real
servers differ.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

GAP_S = 0.005
TOKENS = 4


@dataclass
class Foreign:
    """What the server was asked, and where it is."""

    port: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    key: str = ""
    """Callers must show it; empty: none."""
    models: list[str] = field(default_factory=lambda: ["good"])
    """Of the list; without any there is no list."""


def _event(choice: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    return {"choices": [] if choice is None else [{"index": 0} | choice]} | more


def _parts(body: dict[str, Any], *, chat: bool) -> list[str]:
    """The lines of a good answer: a role without output, TOKENS parts, a reason, usage, the end."""

    def part(text: str) -> dict[str, Any]:
        return {"delta": {"content": text}} if chat else {"text": text}

    first = {"delta": {"role": "assistant", "content": ""}} if chat else {"text": ""}
    events = [_event(first), *(_event(part(f" {i}")) for i in range(TOKENS))]
    events.append(_event(part("") | {"finish_reason": "length"}))
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    if body.get("stream_options", {}).get("include_usage") and body["model"] != "uncounted":
        events.append(_event(None, usage=usage))
    return [*(json.dumps(event) for event in events), "[DONE]"]


async def _stream(body: dict[str, Any], *, chat: bool) -> AsyncIterator[bytes]:
    newline = "\r\n" if body["model"] == "crlf" else "\n"
    for number, part in enumerate(_parts(body, chat=chat)):
        if number > 2 and body["model"] == "broken":
            yield b"data: {not json\n\n"
        if number > 2 and body["model"] == "failing":
            yield b'data: {"error": {"message": "out of blocks", "code": "overloaded"}}\n\n'
            return
        if number > 2 and body["model"] == "dying":
            raise ConnectionResetError
        if number > 2 and body["model"] == "ending":
            return
        if body["model"] == "hanging" and number > 2:
            await asyncio.sleep(60)
        if 0 < number <= TOKENS:
            await asyncio.sleep(GAP_S)
        yield f"data: {part}{newline}{newline}".encode()


def _app(foreign: Foreign) -> FastAPI:
    app = FastAPI()

    def refused(request: Request) -> Response | None:
        if foreign.key and request.headers.get("authorization") != f"Bearer {foreign.key}":
            return JSONResponse({"error": {"message": "who are you?"}}, 401)
        return None

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if not foreign.models:
            return JSONResponse({"detail": "Not Found"}, 404)
        listed = {"data": [{"id": name} for name in foreign.models]}
        return refused(request) or JSONResponse(listed)

    async def answer(request: Request, *, chat: bool) -> Response:
        body = await request.json()
        foreign.bodies.append(body)
        foreign.headers.append(dict(request.headers))
        if body["model"] == "busy":
            return JSONResponse({"error": {"message": "too many", "code": 429}}, 429)
        if body["model"] == "plain":
            return Response("it broke", 500)
        return refused(request) or StreamingResponse(
            _stream(body, chat=chat),
            media_type="text/event-stream",
            headers={"x-request-id": f"r-{len(foreign.bodies)}"},
        )

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, chat=True)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, chat=False)

    return app


@asynccontextmanager
async def foreign_server(**tls: Any) -> AsyncIterator[Foreign]:
    """Runs it on a free port; `tls` is uvicorn's."""
    foreign = Foreign()
    config = uvicorn.Config(_app(foreign), port=0, log_level="critical", **tls)
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    task = asyncio.create_task(server.serve())
    async with asyncio.timeout(10):
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    foreign.port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield foreign
    finally:
        server.should_exit = server.force_exit = True
        await task
