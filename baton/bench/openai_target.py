"""Any server with OpenAI's HTTP API: chat completions and completions, streamed. aiohttp on uvloop costs a fifth of httpx for each part of
an answer.
"""

import json
import ssl
import time
from types import TracebackType
from typing import Any, Self

import aiohttp

from baton.bench.prompts import Planned
from baton.bench.records import OK, Record
from baton.bench.sse import EventStream
from baton.bench.target import Described, Options
from baton.client.types import ChatMessage, ConnectionOptions
from baton.client.wire import call_metadata
from baton.errors import (
    BatonError,
    FieldViolation,
    InvalidRequestError,
    NotFoundError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from baton.service.tls import TlsFiles, client_context

DESCRIBE_S = 15.0
CONNECT_S = 10.0
IDLE_S = 4.0
"""A connection that waits longer is not used again: common servers close theirs after 5 s, perhaps while a request is on its way."""
MESSAGE_CHARS = 500


class OpenAiTarget:
    """A server at a base URL, with or without `/v1`."""

    def __init__(
        self,
        url: str,
        options: Options,
        *,
        api_key: str = "",
        connection: ConnectionOptions | None = None,
    ) -> None:
        """Raises `InvalidRequestError` for an unusable URL or certificate."""
        if not url.startswith(("http://", "https://")):
            raise InvalidRequestError(
                FieldViolation("--url", f"{url!r} is not http:// or https://")
            )
        self._url = url.rstrip("/").removesuffix("/v1")
        self._options = options
        self._tls = _context(connection or ConnectionOptions()) if url.startswith("https") else None
        self._headers = dict(call_metadata(api_key)) | {"content-type": "application/json"}
        self._model = options.model

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(
            limit=0, keepalive_timeout=IDLE_S, ssl=True if self._tls is None else self._tls
        )
        timeout = aiohttp.ClientTimeout(total=self._options.timeout_s, sock_connect=CONNECT_S)
        self._session = aiohttp.ClientSession(
            connector=connector, headers=self._headers, timeout=timeout
        )
        try:
            self._model = await self._find_model()
        except BaseException:
            await self._session.close()
            raise
        self.described = Described(name=f"{self._url} (OpenAI HTTP)", model=self._model)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def _find_model(self) -> str:
        """The one that was named, else the first one that the server lists."""
        timeout = aiohttp.ClientTimeout(total=DESCRIBE_S, sock_connect=CONNECT_S)
        try:
            async with self._session.get(f"{self._url}/v1/models", timeout=timeout) as response:
                status, body = response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise UnavailableError(f"{self._url}: {_told(error)}") from None
        if status in (401, 403):
            raise _refusal(status, _error_message(body))
        if self._options.model:
            # Whatever it lists: a server without the list may still know the model.
            return self._options.model
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise NotFoundError(
                "list of models", f"{self._url}/v1/models; name one with --model"
            ) from None

    def prepare(self, planned: Planned) -> tuple[str, bytes]:
        body: dict[str, Any] = {
            "model": self._model,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        prompt = planned.prompt
        if isinstance(prompt, str):
            path, body["prompt"] = "/v1/completions", prompt
        elif isinstance(prompt[0], ChatMessage):
            path = "/v1/chat/completions"
            body["messages"] = [_message(message) for message in prompt]
        else:
            path, body["prompt"] = "/v1/completions", list(prompt)
        if planned.output_tokens is not None:
            body["max_tokens"] = planned.output_tokens
        if self._options.ignore_eos:
            body["ignore_eos"] = True
        if self._options.temperature is not None:
            body["temperature"] = self._options.temperature
        return self._url + path, json.dumps(body).encode()

    async def send(self, payload: tuple[str, bytes], record: Record) -> None:
        url, body = payload
        record.begin()
        try:
            async with self._session.post(url, data=body) as response:
                if response.status != 200:
                    message = _error_message(await response.read())
                    record.failed(str(response.status), message)
                    return
                record.request_id = response.headers.get("x-request-id", "")
                await _read(response, record)
        # Before TimeoutError, of which the second is a kind.
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            record.failed("CONNECTION", _told(error), lost=True)
        except TimeoutError:
            record.failed("TIMEOUT", f"no end within {self._options.timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            record.failed("DISCONNECTED", _told(error), lost=True)


async def _read(response: aiohttp.ClientResponse, record: Record) -> None:
    stream = EventStream()
    done = False
    async for piece in response.content.iter_any():
        at_s = time.perf_counter()
        for data in stream.feed(piece):
            if data == b"[DONE]":
                done = True
            elif not _take(data, at_s, record):
                return
    if done or record.finish_reason:
        record.status = OK
    else:
        record.failed("INCOMPLETE", "the stream ended before the answer did")


def _take(data: bytes, at_s: float, record: Record) -> bool:
    """Whether the stream is worth reading on."""
    try:
        event = json.loads(data)
        error = event.get("error")
        if error:
            code = error.get("code") if isinstance(error, dict) else None
            record.failed(str(code or "ERROR"), _error_message(data))
            return False
        for choice in event.get("choices") or ():
            if _has_output(choice):
                record.arrived(at_s)
            record.finish_reason = choice.get("finish_reason") or record.finish_reason
        usage = event.get("usage")
        if usage:
            record.prompt_tokens = usage.get("prompt_tokens")
            record.completion_tokens = usage.get("completion_tokens")
            details = usage.get("prompt_tokens_details") or {}
            record.cached_tokens = details.get("cached_tokens")
    except (ValueError, AttributeError, TypeError):
        record.failed("MALFORMED", data[:MESSAGE_CHARS].decode(errors="replace"))
        return False
    return True


def _has_output(choice: dict[str, Any]) -> bool:
    """A role alone is no output, nor is an empty text."""
    if choice.get("text"):
        return True
    delta = choice.get("delta") or {}
    said = ("content", "reasoning_content", "reasoning", "tool_calls")
    return any(delta.get(part) for part in said)


def _message(message: object) -> dict[str, str]:
    assert isinstance(message, ChatMessage)
    return {"role": message.role, "content": message.content}


def _context(connection: ConnectionOptions) -> ssl.SSLContext:
    files = TlsFiles(
        cert=connection.tls_cert_file, key=connection.tls_key_file, ca=connection.tls_ca_file
    )
    return client_context(files)


def _refusal(status: int, message: str) -> BatonError:
    return UnauthenticatedError(message) if status == 401 else PermissionDeniedError(message)


def _error_message(body: bytes) -> str:
    """OpenAI's, FastAPI's, or whatever the body is."""
    try:
        fields = json.loads(body)
        error = fields.get("error", fields.get("detail", fields))
        told = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        told = body.decode(errors="replace")
    return str(told)[:MESSAGE_CHARS] or "no message"


def _told(error: Exception) -> str:
    return str(error) or type(error).__name__
