"""A router with an HTTP port, and workers with simulated engines; asked by httpx, or by sockets for what httpx will not say."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import httpx

from baton.engine.sim import SimConfig
from router.chat import ChatTemplate
from router.http.front import HttpFront
from router.text import Tokenizer
from tests.integration.router_fakes import SETTINGS
from tests.integration.sim_house import SIM, House, house

TEMPLATE = "{% for each in messages %}{{ each.role }}: {{ each.content }}\n{% endfor %}assistant: "
COMPLETION = {"prompt": "x", "max_tokens": 2, "ignore_eos": True}
HTTP = replace(SETTINGS, http_listen="127.0.0.1:0")


def chatty() -> Tokenizer:
    """Tokens are bytes, and messages lines."""
    template = ChatTemplate(TEMPLATE, {}, path="test")
    return Tokenizer(Tokenizer.of_bytes()._backend, template)


def posted(body: bytes, *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    length = b"content-length: %d" % len(body)
    lines = (b"POST " + path + b" HTTP/1.1", b"host: here", length, *headers)
    return b"\r\n".join((*lines, b"", body))


def answered(data: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of the one answer that the data is."""
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status, error


@dataclass
class HttpHouse:
    """The house, and a client of its HTTP port."""

    house: House
    scheme: str = "http"

    def __post_init__(self) -> None:
        self.client = self.another_client()

    def another_client(self) -> httpx.AsyncClient:
        """With connections of its own."""
        return httpx.AsyncClient(base_url=f"{self.scheme}://127.0.0.1:{self.port}", timeout=20)

    @property
    def front(self) -> HttpFront:
        front = self.house.app.http
        assert front is not None
        return front

    @property
    def port(self) -> int:
        return self.front.port

    @property
    def base_url(self) -> str:
        """For OpenAI's SDK."""
        return f"{self.scheme}://127.0.0.1:{self.port}/v1"

    async def runs_one(self) -> None:
        """Returns once the router has a request."""
        async with asyncio.timeout(10):
            while not len(self.house.app.table):  # noqa: ASYNC110 - the table tells nobody
                await asyncio.sleep(0.005)

    def ended(self, outcome: str) -> float:
        """Requests that ended so."""
        registry = self.house.app.metrics.registry
        return registry.get_sample_value("baton_requests_total", {"outcome": outcome}) or 0.0

    async def say(self, data: bytes, timeout_s: float = 5.0) -> bytes:
        """What the router answers to these bytes until it closes the connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            async with asyncio.timeout(timeout_s):
                return await reader.read()
        finally:
            writer.close()


@asynccontextmanager
async def http_house(
    prefill: int = 1,
    decode: int = 1,
    *,
    scheme: str = "http",
    sim: SimConfig = SIM,
    **settings: Any,
) -> AsyncIterator[HttpHouse]:
    """At the end, every worker is at rest."""
    asked = replace(HTTP, **settings)
    async with house(prefill, decode, settings=asked, tokenizer=chatty(), sim=sim) as inner:
        here = HttpHouse(inner, scheme)
        async with here.client:
            yield here
