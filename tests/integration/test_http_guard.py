"""What a client of the HTTP port can do wrong, or on purpose: each gets an answer in OpenAI's form, or its connection is closed within
a bound, and nobody else notices.
"""

import asyncio
import json
import logging
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

import httpx
import pytest

from baton.service.keys import TenantLimits, add_key, new_key
from tests.certificates import Authority, put
from tests.integration.http_house import COMPLETION, HttpHouse, answered, http_house, posted


async def test_what_is_no_http_gets_400_and_a_closed_connection() -> None:
    async with http_house(0, 0) as here:
        for data in (
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"GET / HTTP/9.9\r\n\r\n",
            b"NO SUCH THING\r\n\r\n",
            b"GET /health HTTP/1.1\r\nbad header\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: two\r\n\r\n",
            b"GET /\xff\xfe HTTP/1.1\r\nhost: here\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        ):
            status, error = answered(await here.say(data))
            assert (status, error["type"]) == (400, "invalid_request_error"), data


async def test_a_body_over_the_limit_gets_413_and_the_connection_serves_on() -> None:
    """Told by its length or found out in chunks; the next request of the connection is answered."""

    async def chunks() -> Any:
        for _ in range(40):
            yield b" " * 1000

    async with http_house(0, 1, max_message_bytes=20_000) as here:
        json_type = {"content-type": "application/json"}
        for content in (b" " * 30_000, chunks()):
            answer = await here.client.post("/v1/completions", content=content, headers=json_type)
            assert answer.status_code == 413
            assert answer.json()["error"]["code"] == "request_too_large"
            assert (await here.client.post("/v1/completions", json=COMPLETION)).status_code == 200


async def test_a_head_over_the_limit_gets_431_whether_or_not_it_ends() -> None:
    async with http_house(0, 0, max_metadata_bytes=4096) as here:
        whole = b"GET /health HTTP/1.1\r\nhost: x\r\nx-much: " + b"y" * 5000 + b"\r\n\r\n"
        for data in (whole, whole[:-4], b"GET /" + b"z" * 5000 + b" HTTP/1.1\r\n\r\n"):
            status, error = answered(await here.say(data))
            assert (status, error["code"]) == (431, "head_too_large")


async def test_a_request_that_does_not_arrive_is_given_up() -> None:
    """Nothing at all, half a head, half a body, and blank lines: 408 and a closed connection within the limit."""
    async with http_house(0, 0, http_read_timeout_s=0.3) as here:
        half = posted(b"{}", b"content-type: application/json")[:-1]
        for data in (b"", b"GET /health HT", half, b"\r\n\r\n"):
            status, error = answered(await here.say(data))
            assert (status, error["code"]) == (408, "request_timeout")


async def test_a_client_that_sends_drop_by_drop_is_given_up() -> None:
    """Progress does not prolong the limit."""
    async with http_house(0, 0, http_read_timeout_s=0.3) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(b"GET /health HTTP/1.1\r\n")

        async def drip() -> None:
            while True:
                writer.write(b"x: y\r\n")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        async with asyncio.timeout(5):
            status, _ = answered(await reader.readuntil(b"}}"))
        dripping.cancel()
        writer.close()
        assert status == 408


async def test_blank_lines_after_an_answer_do_not_keep_a_connection() -> None:
    async with http_house(0, 0, http_read_timeout_s=0.3) as here:
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        writer.write(b"\r\n\r\n")
        async with asyncio.timeout(5):
            status, _ = answered(await reader.read())
        writer.close()
        assert status == 408


async def test_a_client_that_offers_another_protocol_is_answered_in_this_one() -> None:
    """Java's client offers HTTP/2 with its first request, whose body must not be lost; CONNECT goes nowhere."""
    async with http_house(0, 1) as here:
        offer = (
            b"connection: Upgrade, HTTP2-Settings, close",
            b"Upgrade: h2c",
            b"http2-settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
            b"content-type: application/json",
        )
        whole = posted(json.dumps(COMPLETION).encode(), *offer)
        for cut in (len(whole), len(whole) - 5, 40):
            reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
            writer.write(whole[:cut])
            await writer.drain()
            await here.client.get("/health")
            writer.write(whole[cut:])
            async with asyncio.timeout(5):
                assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()
        status, error = answered(await here.say(b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n"))
        assert (status, error["code"]) == (400, "invalid_http")


async def test_a_body_in_chunks_is_bounded_with_all_that_is_around_it() -> None:
    """Chunk extensions and trailers count too: nobody sends without an end."""
    async with http_house(0, 1, max_message_bytes=2000, max_metadata_bytes=2000) as here:
        head = b"POST /v1/models HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        extension = b"1;" + b"e" * 40_000
        trailer = b"0\r\n" + b"x: " + b"t" * 40_000
        for rest in (extension, trailer):
            data = await here.say(head + rest)
            assert b" 413 " in data or b" 405 " in data


async def test_a_second_request_before_the_answer_is_dropped_and_the_connection_closed() -> None:
    """In one piece with the first, or while that one's stream runs; the first one's answer is whole."""
    async with http_house(0, 1) as here:
        body = json.dumps(COMPLETION | {"stream": True}).encode()
        first = posted(body, b"content-type: application/json")
        data = await here.say(first + b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert data.count(b"HTTP/1.1 200") == 1
        assert data.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_garbage_behind_a_request_cuts_its_stream_and_frees_its_workers() -> None:
    async with http_house() as here:
        body = json.dumps(COMPLETION | {"stream": True, "max_tokens": 1500}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(posted(body, b"content-type: application/json"))
        await reader.readuntil(b"data: ")
        writer.write(b"\x00\x01\x02 garbage\r\n\r\n")
        async with asyncio.timeout(5):
            await reader.read()
        writer.close()
        assert await here.house.app.table.idle(5)


async def test_a_client_that_does_not_read_loses_its_request() -> None:
    """Its workers are free once it has stalled for `write_stall_s`, and others are answered meanwhile."""
    async with http_house(write_stall_s=0.5, client_messages_per_s=1e6) as here:
        body = json.dumps(
            COMPLETION | {"stream": True, "max_tokens": 1900, "n": 16, "logprobs": 20}
        ).encode()
        stalled = socket.socket()
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        stalled.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(stalled, ("127.0.0.1", here.port))
        await loop.sock_sendall(stalled, posted(body, b"content-type: application/json"))
        await here.runs_one()
        assert (await here.client.post("/v1/completions", json=COMPLETION)).status_code == 200
        assert await here.house.app.table.idle(30)
        assert here.ended("cancelled") == 1
        stalled.close()


async def test_a_connection_that_is_reset_frees_the_workers() -> None:
    async with http_house() as here:
        body = json.dumps(COMPLETION | {"stream": True, "max_tokens": 1500}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        writer.write(posted(body, b"content-type: application/json"))
        await reader.readuntil(b"data: ")
        raw = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        assert await here.house.app.table.idle(5)


async def test_one_connection_too_many_gets_503() -> None:
    async with http_house(0, 0, http_max_connections=2) as here:
        kept = [await asyncio.open_connection("127.0.0.1", here.port) for _ in range(2)]
        status, error = answered(await here.say(b""))
        assert (status, error["code"]) == (503, "too_many_connections")
        kept[0][1].close()
        async with asyncio.timeout(5):
            while True:
                try:
                    answer = await here.client.get("/health")
                except httpx.ReadError:
                    continue
                if answer.status_code == 200:
                    break
        kept[1][1].close()


async def test_http_over_tls_uses_the_certificates_as_they_are(tmp_path: Path) -> None:
    """As the gRPC port does: replaced files count from the next handshake on, and a client without a certificate is turned away where
    one is asked for.
    """
    ours, other = Authority.make(tmp_path / "ours"), Authority.make(tmp_path / "other")
    files, client = ours.issue("router"), ours.issue("client")
    settings: Any = {
        "tls_cert_file": files.cert,
        "tls_key_file": files.key,
        "tls_client_ca_file": str(ours.ca_file),
        "fleet_listen": "127.0.0.1:0",
    }

    def trusting(authority: Authority) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(authority.ca_file))
        context.load_cert_chain(client.cert, client.key)
        return context

    async def status(context: ssl.SSLContext, here: HttpHouse) -> int:
        async with httpx.AsyncClient(verify=context) as asking:
            answer = await asking.post(f"{here.base_url}/completions", json=COMPLETION)
            return answer.status_code

    async with http_house(0, 1, scheme="https", **settings) as here:
        assert await status(trusting(ours), here) == 200
        nobody = ssl.create_default_context(cafile=str(ours.ca_file))
        with pytest.raises(httpx.TransportError):
            await status(nobody, here)
        put(files, other.issue("router"))
        with pytest.raises(httpx.ConnectError):
            await status(trusting(ours), here)
        assert await status(trusting(other), here) == 200


async def test_no_refusal_quotes_the_request_and_no_log_either(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """At DEBUG, of values that are wrong in every way, and of keys. Names of fields are what a refusal is about."""
    secret = "swordfish"
    file = str(tmp_path / "keys.json")
    entry, key = new_key("acme", limits=TenantLimits())
    add_key(file, entry)
    caplog.set_level(logging.DEBUG)
    said: Any = {"role": "user", "content": secret}
    chats: list[dict[str, Any]] = [
        {"messages": [said | {"role": secret}]},
        {"messages": [said | {"content": [{"type": secret}]}]},
        {"messages": [said], "tool_choice": secret, "temperature": secret},
        {"messages": [said], "top_p": 7},
        {"messages": [said], "stop": [secret * 99]},
        {"messages": secret},
    ]
    answers = []
    async with http_house(1, 1, api_keys_file=file, fleet_listen="127.0.0.1:0") as here:
        bearing = {"authorization": f"Bearer {key}"}
        for chat in chats:
            answer = await here.client.post("/v1/chat/completions", json=chat, headers=bearing)
            assert answer.status_code == 400
            answers.append(answer.text)
        for content in (f'{{"prompt": "{secret}"', f'"{secret}"'):
            answer = await here.client.post("/v1/completions", content=content, headers=bearing)
            assert answer.status_code == 400
            answers.append(answer.text)
        for wrong in (f"Bearer {key}x", f"Bearer baton_{secret}_{secret * 4}", secret):
            answer = await here.client.get("/v1/models", headers={"authorization": wrong})
            assert answer.status_code == 401
            answers.append(answer.text)
        body = COMPLETION | {"prompt": secret}
        assert (await here.client.post("/v1/completions", json=body, headers=bearing)).is_success
        answers.append((await here.client.get("/metrics")).text)
    # The client that runs in this process logs too.
    ours = [vars(record) for record in caplog.records if not record.name.startswith("http")]
    for each in (secret, key, key.split("_", 2)[2]):
        assert each not in repr(ours) + "".join(answers)
