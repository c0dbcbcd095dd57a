"""The load generator against foreign servers with OpenAI's API."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from baton.bench import openai_target
from baton.bench.figures import figures_of
from baton.bench.openai_target import OpenAiTarget
from baton.bench.prompts import Planned
from baton.bench.records import OK, Record
from baton.bench.runner import Limits, Phase
from baton.bench.target import Options
from baton.client import ChatMessage, ConnectionOptions, Prompt
from baton.errors import (
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from tests.certificates import Authority
from tests.integration.http_house import http_house
from tests.integration.openai_fake import GAP_S, TOKENS, Foreign, foreign_server
from tests.integration.sim_house import LENGTH

CHAT = [ChatMessage("user", "Hello.")]


@pytest.fixture
async def foreign() -> AsyncIterator[Foreign]:
    async with foreign_server() as here:
        yield here


async def ask(
    foreign: Foreign, prompt: Prompt = CHAT, *, options: Options | None = None, key: str = ""
) -> Record:
    url = f"http://127.0.0.1:{foreign.port}/v1/"
    async with OpenAiTarget(url, options or Options(), api_key=key) as target:
        planned = Planned(prompt=prompt, input_tokens=5, output_tokens=TOKENS)
        phase = Phase(target, Limits(concurrency=1))
        await phase.closed_loop([(planned, target.prepare(planned))], asyncio.Event())
        (record,) = phase.records
        return record


@pytest.mark.parametrize("prompt", [CHAT, "Hello.", [1, 2, 3]], ids=["chat", "text", "tokens"])
async def test_an_answer_is_timed_by_its_parts_and_counted_by_the_server(
    foreign: Foreign, prompt: Prompt
) -> None:
    """The role, the reason and the usage are no parts of it."""
    record = await ask(foreign, prompt)
    assert (record.status, record.finish_reason, record.request_id) == (OK, "length", "r-1")
    assert len(record.chunk_s) == TOKENS
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (11, 3, 9)
    assert record.chunk_s[0] - record.sent_s >= GAP_S
    assert record.ended_s >= record.chunk_s[-1] >= record.chunk_s[0]


async def test_requests_are_what_the_api_wants(foreign: Foreign) -> None:
    await ask(foreign, options=Options(temperature=0.0), key="secret")
    await ask(foreign, "Hi", options=Options(model="good", ignore_eos=False))
    chat, text = foreign.bodies
    assert chat == {
        "model": "good",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "Hello."}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
        "temperature": 0.0,
    }
    assert text["prompt"] == "Hi"
    assert text.keys().isdisjoint({"ignore_eos", "temperature", "messages"})
    assert foreign.headers[0]["authorization"] == "Bearer secret"
    assert "authorization" not in foreign.headers[1]


@pytest.mark.parametrize("model", ["uncounted", "crlf"])
async def test_servers_that_differ_are_understood(foreign: Foreign, model: str) -> None:
    """Without a count, each part is a token."""
    record = await ask(foreign, options=Options(model=model))
    assert record.status == OK
    assert record.output_tokens == (TOKENS if model == "uncounted" else 9)
    assert record.input_tokens == (5 if model == "uncounted" else 11)


@pytest.mark.parametrize(
    ("model", "status", "message", "lost"),
    [
        ("busy", "429", "too many", False),
        ("plain", "500", "it broke", False),
        ("failing", "overloaded", "out of blocks", False),
        ("broken", "MALFORMED", "{not json", False),
        ("ending", "INCOMPLETE", "before the answer", False),
        ("dying", "DISCONNECTED", "", True),
        ("hanging", "TIMEOUT", "no end within 0.5 s", False),
    ],
)
async def test_every_way_to_fail_has_a_status(
    foreign: Foreign, model: str, status: str, message: str, *, lost: bool
) -> None:
    record = await ask(foreign, options=Options(model=model, timeout_s=0.5))
    assert (record.status, record.lost) == (status, lost)
    assert message in record.message
    figures = figures_of([record])
    assert (figures.answered, figures.errors) == (0, {status: 1})


async def test_a_server_without_a_list_of_models_must_be_told_the_name(foreign: Foreign) -> None:
    foreign.models = []
    assert (await ask(foreign, options=Options(model="good"))).status == OK
    with pytest.raises(NotFoundError, match="--model"):
        await ask(foreign)


async def test_a_wrong_key_a_dead_server_and_a_wrong_url_are_refused_before_the_run(
    foreign: Foreign,
) -> None:
    foreign.key = "right"
    assert (await ask(foreign, key="right")).status == OK
    with pytest.raises(UnauthenticatedError, match="who are you"):
        await ask(foreign, key="wrong")
    with pytest.raises(UnavailableError, match="Cannot connect"):
        await OpenAiTarget("http://127.0.0.1:1", Options()).__aenter__()
    with pytest.raises(InvalidRequestError, match="--url"):
        OpenAiTarget("127.0.0.1:8000", Options())


async def test_a_server_that_dies_is_lost() -> None:
    async with AsyncExitStack() as connected:
        async with foreign_server() as foreign:
            url = f"http://127.0.0.1:{foreign.port}"
            target = await connected.enter_async_context(OpenAiTarget(url, Options()))
        planned = Planned(prompt=CHAT, input_tokens=1, output_tokens=1)
        record = Record(index=0, scheduled_s=0.0)
        await target.send(target.prepare(planned), record)
    assert (record.status, record.lost) == ("CONNECTION", True)
    assert record.message


async def test_a_server_that_cannot_be_connected_to_in_time_is_lost(
    foreign: Foreign, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever takes no connection is not one that answers late."""
    monkeypatch.setattr(openai_target, "CONNECT_S", 0.2)
    record = Record(index=0, scheduled_s=0.0)
    with ExitStack() as open_:
        deaf = open_.enter_context(socket.socket())
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        # Once its backlog is full, the kernel answers no further connection.
        for _ in range(4):
            filler = open_.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(deaf.getsockname())
        async with OpenAiTarget(f"http://127.0.0.1:{foreign.port}", Options()) as target:
            url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1/completions"
            await target.send((url, b"{}"), record)
    assert (record.status, record.lost) == ("CONNECTION", True)
    assert "Connection timeout" in record.message


async def test_https_checks_the_server_and_shows_the_clients_certificate(tmp_path: Path) -> None:
    authority = Authority.make(tmp_path / "ours")
    stranger = Authority.make(tmp_path / "theirs")
    server, client = authority.issue("server"), authority.issue("client")
    tls = {
        "ssl_certfile": server.cert,
        "ssl_keyfile": server.key,
        "ssl_ca_certs": server.ca,
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }
    async with foreign_server(**tls) as foreign:
        url = f"https://127.0.0.1:{foreign.port}"
        good = ConnectionOptions(
            tls_ca_file=client.ca, tls_cert_file=client.cert, tls_key_file=client.key
        )
        async with OpenAiTarget(url, Options(), connection=good) as target:
            assert target.described.model == "good"
        distrusting = ConnectionOptions(tls_ca_file=str(stranger.ca_file))
        with pytest.raises(UnavailableError, match="certificate"):
            await OpenAiTarget(url, Options(), connection=distrusting).__aenter__()
        nameless = ConnectionOptions(tls_ca_file=client.ca)
        with pytest.raises(UnavailableError):
            await OpenAiTarget(url, Options(), connection=nameless).__aenter__()
    with pytest.raises(InvalidRequestError, match=r"none\.pem"):
        OpenAiTarget(url, Options(), connection=ConnectionOptions(tls_ca_file="none.pem"))


@pytest.mark.parametrize("prompt", [CHAT, "Hello.", [65, 66, 67]], ids=["chat", "text", "tokens"])
async def test_the_routers_own_http_port_is_measured_too(prompt: Prompt) -> None:
    async with (
        http_house() as here,
        OpenAiTarget(here.base_url, Options(timeout_s=20)) as target,
    ):
        asked = [Planned(prompt=prompt, input_tokens=None, output_tokens=LENGTH)] * 6
        phase = Phase(target, Limits(concurrency=3))
        await phase.closed_loop([(each, target.prepare(each)) for each in asked], asyncio.Event())
    assert [(r.status, r.output_tokens) for r in phase.records] == [(OK, LENGTH)] * 6
    assert all(r.prompt_tokens and r.chunk_s and r.finish_reason == "length" for r in phase.records)
