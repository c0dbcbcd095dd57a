"""An answer under way: generates, and writes what comes, whole or as server-sent events.

In the task of the HTTP request, on the router's event loop. The work runs in a task of its own, which is cancelled at once when the
client goes, in whichever stage it is; nobody writes before the first token, so that what fails before it is answered with its status.
Afterwards an error is the stream's last event. How long a client may leave its answer unread is for the connection to bound.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError, InvalidRequestError
from baton.service.access import Caller
from baton.service.interceptors import typed_error
from baton.service.tracing import Origin
from baton.v1 import inference_pb2
from router.http.edge import response_to
from router.http.errors import to_http
from router.http.openai.forms import REASONS, Choice, Form, Heading, Pieces, usage_of, whole
from router.http.openai.request import translated
from router.inference import AnswerStream, Inference


class Writer(Protocol):
    """Takes the answers to a request's prompts."""

    began: bool
    """Something was written: errors have no status any more."""

    async def write(self, first: int, response: inference_pb2.GenerateResponse) -> None:
        """`first` is the index of the prompt's first choice."""
        ...

    async def finish(self) -> None:
        """Every prompt has its answer."""
        ...

    async def fail(self, error: bytes) -> None:
        """Precondition: began."""
        ...


WriterOf = Callable[[Send], Writer]


class GenerationResponse(Response):
    """See the module docstring."""

    def __init__(
        self,
        inference: Inference,
        requests: Sequence[inference_pb2.GenerateRequest],
        caller: Caller,
        writer_of: WriterOf,
        *,
        timeout_s: float | None,
        origin: Origin,
    ) -> None:
        super().__init__()
        self._inference = inference
        self._requests = requests
        self._caller = caller
        self._writer_of = writer_of
        self._timeout_s = timeout_s
        self._origin = origin

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.create_task(self._serve(scope, receive, send), name="answer")
        gone = asyncio.create_task(_gone(receive), name="client")
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        finally:
            work.cancel()
            gone.cancel()
            # What it raises after the client went is nobody's.
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        writer = self._writer_of(send)
        try:
            await self._generate(writer)
            await writer.finish()
        except Exception as error:  # noqa: BLE001 - the boundary
            typed: BatonError = typed_error(error, scope["path"])
            if isinstance(typed, InvalidRequestError):
                typed = translated(typed)
            answer = to_http(typed)
            if writer.began:
                await writer.fail(answer.body)
            else:
                await response_to(answer)(scope, receive, send)

    async def _generate(self, writer: Writer) -> None:
        if len(self._requests) == 1:
            await self._answer(writer, 0)
            return
        async with asyncio.TaskGroup() as group:
            for number in range(len(self._requests)):
                group.create_task(self._answer(writer, number))

    async def _answer(self, writer: Writer, number: int) -> None:
        request = self._requests[number]
        part = _Part(writer, number * max(1, request.sampling.n))
        await self._inference.generate(
            request, self._caller, part, timeout_s=self._timeout_s, origin=self._origin
        )


class _Part:
    """What answers one of the prompts."""

    def __init__(self, writer: Writer, first: int) -> None:
        self._writer = writer
        self._first = first

    async def write(self, response: inference_pb2.GenerateResponse) -> None:
        await self._writer.write(self._first, response)


_: type[AnswerStream] = _Part


class WholeWriter:
    """Keeps everything until the end."""

    def __init__(self, send: Send, form: Form, fingerprint: Callable[[], str]) -> None:
        self._send = send
        self._form = form
        self._fingerprint = fingerprint
        self._accepted: inference_pb2.Accepted | None = None
        self._choices: dict[int, Choice] = {}
        self._reasons: dict[int, str] = {}
        self._usages: list[inference_pb2.Usage] = []
        self.began = False

    async def write(self, first: int, response: inference_pb2.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted":
                self._accepted = self._accepted or response.accepted
            case "chunk":
                chunk = response.chunk
                choice = self._choices.setdefault(first + chunk.choice, Choice())
                choice.parts.append(chunk.text)
                choice.positions.extend(chunk.tokens.logprobs)
            case "finished":
                self._usages.append(response.finished.usage)
                for end in response.finished.choices:
                    self._reasons[first + end.choice] = REASONS[end.reason]

    async def finish(self) -> None:
        assert self._accepted is not None
        choices = [
            (self._choices.get(index, Choice()), reason)
            for index, reason in sorted(self._reasons.items())
        ]
        heading = _heading(self._accepted, self._form, self._fingerprint())
        body = whole(self._form, heading, choices, usage_of(self._usages))
        self.began = True
        await _begin(self._send, "application/json", len(body))
        await self._send({"type": "http.response.body", "body": body})

    async def fail(self, error: bytes) -> None:  # noqa: ARG002
        raise AssertionError("a whole answer is written at its end")


class EventWriter:
    """Writes an event for each message with tokens."""

    def __init__(
        self, send: Send, form: Form, fingerprint: Callable[[], str], *, with_usage: bool
    ) -> None:
        self._send = send
        self._form = form
        self._fingerprint = fingerprint
        self._with_usage = with_usage
        self._pieces: Pieces | None = None
        self._choices: dict[int, Choice] = {}
        self._usages: list[inference_pb2.Usage] = []
        self.began = False

    async def write(self, first: int, response: inference_pb2.GenerateResponse) -> None:
        match response.WhichOneof("event"):
            case "accepted":
                if self._pieces is None:
                    heading = _heading(response.accepted, self._form, self._fingerprint())
                    self._pieces = Pieces(self._form, heading, with_usage=self._with_usage)
            case "chunk":
                await self._write_piece(first + response.chunk.choice, response.chunk)
            case "finished":
                await self._write_ends(first, response.finished)

    async def finish(self) -> None:
        assert self._pieces is not None
        await self._say(self._pieces.end(usage_of(self._usages)), more=False)

    async def fail(self, error: bytes) -> None:
        await self._say(f"data: {error.decode()}\n\n", more=False)

    async def _write_piece(self, index: int, chunk: inference_pb2.Chunk) -> None:
        assert self._pieces is not None
        choice, opening = self._choices.get(index), ""
        if choice is None:
            choice = self._choices[index] = Choice()
            opening = self._pieces.opening(index)
        text = opening + self._pieces.piece(index, choice, chunk)
        if text:
            await self._say(text)

    async def _write_ends(self, first: int, finished: inference_pb2.Finished) -> None:
        assert self._pieces is not None
        self._usages.append(finished.usage)
        events = ""
        for end in finished.choices:
            index = first + end.choice
            if index not in self._choices:
                events += self._pieces.opening(index)
            events += self._pieces.closing(index, REASONS[end.reason])
        await self._say(events)

    async def _say(self, text: str, *, more: bool = True) -> None:
        if not self.began:
            self.began = True
            await _begin(self._send, "text/event-stream; charset=utf-8")
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})


def _heading(accepted: inference_pb2.Accepted, form: Form, fingerprint: str) -> Heading:
    return Heading(
        id=form.prefix + accepted.request_id,
        created=int(time.time()),
        model=accepted.model,
        fingerprint=fingerprint,
    )


async def _begin(send: Send, content_type: str, length: int | None = None) -> None:
    headers = [(b"content-type", content_type.encode()), (b"cache-control", b"no-store")]
    if length is not None:
        headers.append((b"content-length", str(length).encode()))
    else:
        # nginx would hold events back.
        headers.append((b"x-accel-buffering", b"no"))
    await send({"type": "http.response.start", "status": 200, "headers": headers})


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed its connection. Precondition: its request was read."""
    while (await receive())["type"] != "http.disconnect":
        pass
