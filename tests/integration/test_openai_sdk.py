"""OpenAI's own SDK against the router's HTTP port: what its users write works, and what fails raises the SDK's exceptions."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from baton.service.keys import TenantLimits, add_key, new_key
from baton.v1 import session_pb2
from tests.integration.http_house import HttpHouse, http_house
from tests.integration.sim_house import LENGTH, prompt_of

MESSAGES: Any = [{"role": "user", "content": "Tell me a tale of the sea."}]
SAME = {"ignore_eos": True}
"""An answer of the length that was asked for."""


@asynccontextmanager
async def sdk(here: HttpHouse, key: str = "none") -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=here.base_url, api_key=key, max_retries=0, timeout=20
    ) as client:
        yield client


async def test_a_chat_is_answered_whole_and_in_a_stream_alike() -> None:
    """The stream's texts joined are the whole answer, and its usage is the whole one's; the first piece tells the role."""
    async with http_house() as here, sdk(here) as client:
        asked: dict[str, Any] = {"model": "sim", "messages": MESSAGES, "seed": 7}
        whole = await client.chat.completions.create(**asked, max_tokens=40, extra_body=SAME)
        choice = whole.choices[0]
        assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 40
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + 40

        stream = await client.chat.completions.create(
            **asked,
            max_completion_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=SAME,
        )
        pieces = [piece async for piece in stream]
        assert pieces[0].choices[0].delta.role == "assistant"
        said = "".join(each.delta.content or "" for piece in pieces for each in piece.choices)
        assert said == choice.message.content
        assert pieces[-2].choices[0].finish_reason == "length"
        last = pieces[-1]
        assert (last.choices, all(piece.usage is None for piece in pieces[:-1])) == ([], True)
        assert last.usage is not None
        assert last.usage.completion_tokens == 40
        assert len({piece.id for piece in pieces}) == 1


async def test_the_sync_client_is_answered_too() -> None:
    async with http_house() as here:

        def ask() -> tuple[str, str]:
            with openai.OpenAI(base_url=here.base_url, api_key="none") as client:
                asked: dict[str, Any] = {"model": "sim", "prompt": "Once", "seed": 3}
                whole = client.completions.create(**asked, max_tokens=20, extra_body=SAME)
                stream = client.completions.create(
                    **asked, max_tokens=20, stream=True, extra_body=SAME
                )
                return whole.choices[0].text, "".join(each.choices[0].text for each in stream)

        whole, streamed = await asyncio.to_thread(ask)
        assert whole == streamed != ""


async def test_a_conversation_goes_on_with_the_message_that_was_the_answer() -> None:
    """The SDK's message objects are sent back as they came."""
    async with http_house() as here, sdk(here) as client:
        first = await client.chat.completions.create(
            model="sim", messages=MESSAGES, max_tokens=8, seed=1, extra_body=SAME
        )
        answer = first.choices[0].message
        assert answer.content
        parts = [{"type": "text", "text": "And "}, {"type": "text", "text": "then?"}]
        following: Any = [*MESSAGES, answer, {"role": "user", "content": parts}]
        second = await client.chat.completions.create(model="sim", messages=following, max_tokens=8)
        asked = "user: Tell me a tale of the sea.\nassistant: {}\nuser: And then?\nassistant: "
        assert second.usage is not None
        assert second.usage.prompt_tokens == len(asked.format(answer.content).encode())


async def test_choices_of_each_prompt_stand_in_order() -> None:
    """N choices for each of several prompts, text or tokens, are those that each prompt gets alone."""
    async with http_house() as here, sdk(here) as client:
        asked: dict[str, Any] = {"model": "sim", "seed": 5, "max_tokens": 9, "extra_body": SAME}
        alone = [
            (await client.completions.create(prompt=prompt, n=2, **asked)).choices
            for prompt in ("one", "two")
        ]
        expected = [choice.text for choices in alone for choice in choices]
        for prompts in (["one", "two"], [list(b"one"), list(b"two")]):
            both: Any = await client.completions.create(prompt=prompts, n=2, **asked)
            assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
            assert [choice.text for choice in both.choices] == expected
            assert both.usage.prompt_tokens == 6
            assert both.usage.completion_tokens == 4 * 9
        stream = await client.completions.create(
            prompt=["one", "two"],
            n=2,
            stream=True,
            stream_options={"include_usage": True},
            **asked,
        )
        texts, usage = ["", "", "", ""], None
        async for piece in stream:
            usage = piece.usage
            for each in piece.choices:
                texts[each.index] += each.text
        assert texts == expected
        assert usage is not None
        assert usage.completion_tokens == 4 * 9


async def test_log_probabilities_have_each_endpoints_own_shape() -> None:
    """One entry for each token, in a stream too; the bytes of a chat's tokens joined are its text's."""
    async with http_house() as here, sdk(here) as client:
        asked: dict[str, Any] = {"model": "sim", "max_tokens": 12, "seed": 2, "extra_body": SAME}
        chat = await client.chat.completions.create(
            messages=MESSAGES, logprobs=True, top_logprobs=1, **asked
        )
        told = chat.choices[0].logprobs
        assert told is not None
        assert told.content is not None
        assert len(told.content) == 12
        joined = b"".join(bytes(entry.bytes or ()) for entry in told.content)
        assert joined.decode("utf-8", "replace") == chat.choices[0].message.content
        assert all(entry.logprob <= 0 for entry in told.content)
        assert all(len(entry.top_logprobs) == 1 for entry in told.content)
        stream: Any = await client.chat.completions.create(
            messages=MESSAGES, logprobs=True, top_logprobs=1, stream=True, **asked
        )
        entries: list[Any] = []
        async for piece in stream:
            logprobs = piece.choices[0].logprobs
            entries += [] if logprobs is None else logprobs.content
        assert [entry.bytes for entry in entries] == [entry.bytes for entry in told.content]

        text = await client.completions.create(prompt="Once", logprobs=1, **asked)
        lists = text.choices[0].logprobs
        assert lists is not None
        assert lists.tokens is not None
        assert lists.text_offset is not None
        assert lists.text_offset[0] == 0
        assert lists.text_offset == sorted(lists.text_offset)
        assert lists.token_logprobs is not None
        assert lists.top_logprobs is not None
        for name, logprob, top in zip(
            lists.tokens, lists.token_logprobs, lists.top_logprobs, strict=True
        ):
            assert top[name] == logprob
        assert len(lists.tokens) == 12


async def test_what_repeats_is_told_to_be_cached() -> None:
    async with http_house() as here, sdk(here) as client:
        for _ in range(2):
            answer = await client.completions.create(
                model="sim", prompt="tide " * 40, max_tokens=2, extra_body=SAME
            )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 160


async def test_models_are_listed_and_found_by_name() -> None:
    async with http_house(0, 1) as here, sdk(here) as client:
        listed = [model.id async for model in client.models.list()]
        assert listed == ["sim"]
        found = await client.models.retrieve("sim")
        assert (found.object, found.owned_by) == ("model", "baton")
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


async def test_failures_raise_the_sdks_exceptions() -> None:
    """By status, with OpenAI's code, the field that is wrong, and when to try again."""
    async with http_house(1, 1, max_running=1, max_queued=0) as here, sdk(here) as client:
        asked: dict[str, Any] = {"model": "sim", "messages": MESSAGES}
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(**asked, top_p=7)
        assert (refused.value.param, refused.value.type) == ("top_p", "invalid_request_error")
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(**(asked | {"model": "other"}))
        with pytest.raises(openai.NotFoundError) as lost:
            await client.chat.completions.create(**asked, extra_body={"session_id": "none"})
        assert lost.value.code == "session_not_found"
        with pytest.raises(openai.InternalServerError) as late:
            await client.chat.completions.create(
                **asked, extra_headers={"x-request-timeout-s": "0.05"}, extra_body=SAME
            )
        assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")
        assert late.value.response.headers["x-should-retry"] == "false"

        stream = await client.chat.completions.create(**asked, stream=True, extra_body=SAME)
        await anext(aiter(stream))
        with pytest.raises(openai.RateLimitError) as full:
            await client.chat.completions.create(**asked)
        assert int(full.value.response.headers["retry-after"]) >= 1
        await stream.close()
        assert await here.house.app.table.idle(5)


async def test_no_worker_is_unavailable_and_a_drain_too() -> None:
    async with http_house(0, 0, worker_wait_s=0.1) as here, sdk(here) as client:
        asked: dict[str, Any] = {"model": "sim", "prompt": "x"}
        assert [model async for model in client.models.list()] == []
        with pytest.raises(openai.InternalServerError) as alone:
            await client.completions.create(**asked)
        assert alone.value.status_code == 503
        assert "retry-after" in alone.value.response.headers
        await here.house.add_decode()
        await here.house.app.drain(1.0)
        async with sdk(here) as another:
            with pytest.raises(openai.InternalServerError) as drained:
                await another.completions.create(**asked)
        assert (drained.value.status_code, drained.value.code) == (503, "draining")


async def test_keys_tell_tenants_apart(tmp_path: Path) -> None:
    """No path but the open ones answers without a key; a tenant's session is not there for another."""
    file = str(tmp_path / "keys.json")
    entry, key = new_key("acme", limits=TenantLimits())
    add_key(file, entry)
    settings: Any = {"api_keys_file": file, "fleet_listen": "127.0.0.1:0"}
    async with http_house(0, 1, **settings) as here:
        for path in ("/v1/models", "/v1/completions", "/nowhere"):
            answer = await here.client.post(path, content=b"not read")
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.json()["error"]["code"] == "invalid_api_key"
        for path in ("/health", "/ready", "/metrics", "/openapi.json"):
            assert (await here.client.get(path)).status_code == 200
        document = (await here.client.get("/openapi.json")).json()
        assert document["paths"]["/v1/completions"]["post"]["security"] == [{"HTTPBearer": []}]
        async with sdk(here, "baton_no_key") as stranger:
            with pytest.raises(openai.AuthenticationError):
                await stranger.models.list()
        async with sdk(here, key) as client:
            said = await client.completions.create(model="sim", prompt="x", max_tokens=2)
            assert said.choices[0].finish_reason
        twice = [("authorization", f"Bearer {key}"), ("authorization", "Bearer other")]
        assert (await here.client.get("/v1/models", headers=twice)).status_code == 401


async def test_a_stream_that_is_left_frees_its_workers() -> None:
    """The SDK's user breaks off: the request ends at once, and `http_house` finds every block free."""
    async with http_house() as here, sdk(here) as client:
        stream = await client.completions.create(
            model="sim", prompt="x", max_tokens=1500, stream=True, extra_body=SAME
        )
        await anext(aiter(stream))
        assert len(here.house.app.table) == 1
        await stream.close()
        assert await here.house.app.table.idle(5)
        assert here.ended("cancelled") == 1


async def test_a_whole_answer_that_is_left_frees_its_workers() -> None:
    async with http_house() as here:
        body = {"prompt": "x", "max_tokens": 1500, **SAME}
        asking = asyncio.create_task(here.client.post("/v1/completions", json=body))
        await here.runs_one()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert await here.house.app.table.idle(5)
        assert here.ended("cancelled") == 1


async def test_a_turn_of_a_session_goes_on_with_what_was_said() -> None:
    """`session_id` in the body: the second turn's prompt has the first one's in front."""
    async with http_house() as here, sdk(here) as client:
        opened = await here.house.sessions.Create(session_pb2.SessionServiceCreateRequest())
        turn: dict[str, Any] = {"session_id": opened.session.session_id, **SAME}
        prompts = []
        for text in ("first", "then"):
            answer = await client.completions.create(
                model="sim", prompt=text, max_tokens=6, extra_body=turn
            )
            assert answer.usage is not None
            prompts.append(answer.usage.prompt_tokens)
        assert prompts == [5, 5 + 6 + 4]


async def test_the_clients_request_id_comes_back_and_may_be_said_twice() -> None:
    """Gateways give one id to several requests of theirs, which may run at once."""
    async with http_house() as here:
        headers = {"x-request-id": "trace-1"}
        body = {"prompt": "x", "max_tokens": 50, **SAME}
        answers = await asyncio.gather(
            *(here.client.post("/v1/completions", json=body, headers=headers) for _ in range(2))
        )
        assert [answer.headers["x-request-id"] for answer in answers] == ["trace-1"] * 2
        ids = {answer.json()["id"] for answer in answers}
        assert len(ids) == 2
        assert all(each.startswith("cmpl-trace-1.") for each in ids)


async def test_a_raw_stream_is_events_and_ends_with_done() -> None:
    async with http_house() as here:
        body = {"prompt": "x", "max_tokens": 5, "stream": True, **SAME}
        answer: httpx.Response = await here.client.post("/v1/completions", json=body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        assert all(event.startswith("data: {") for event in events[:-2])


async def test_an_answer_over_http_is_the_one_over_grpc() -> None:
    """Token for token, for the same seed and parameters: both fronts ask one core."""
    async with http_house() as here:
        prompt = prompt_of(4)
        over_grpc = await here.house.generate(4)
        body = {"prompt": list(prompt), "seed": 4, "max_tokens": LENGTH, **SAME}
        over_http = await here.client.post("/v1/completions", json=body)
        assert over_http.json()["choices"][0]["text"] == over_grpc.text != ""
