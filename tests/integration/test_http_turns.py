"""Turns of sessions over HTTP: a client that names its turn may ask for it again, and has it once."""

import asyncio
from typing import Any

import httpx
import openai
import pytest

from baton.v1 import session_pb2
from tests.integration.http_house import HttpHouse, http_house

SHORT = {"max_tokens": 6, "ignore_eos": True}
PATHS = {
    "/v1/completions": {"prompt": "Once", **SHORT},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello."}], **SHORT},
}


async def opened(here: HttpHouse) -> str:
    """A new session."""
    made = await here.house.sessions.Create(session_pb2.SessionServiceCreateRequest())
    return str(made.session.session_id)


async def turns(here: HttpHouse, session_id: str) -> int:
    """How many the session has."""
    asked = session_pb2.SessionServiceGetRequest(session_id=session_id)
    return int((await here.house.sessions.Get(asked)).session.turns)


async def post(here: HttpHouse, path: str, key: str, **body: Any) -> httpx.Response:
    return await here.client.post(path, json=body, headers={"idempotency-key": key})


class Losing(httpx.AsyncHTTPTransport):
    """Reads the first answer to its end, and loses it."""

    lost = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        response = await super().handle_async_request(request)
        if not self.lost:
            self.lost += 1
            await response.aread()
            raise httpx.ReadError("the connection broke", request=request)
        return response


@pytest.mark.parametrize("path", PATHS)
async def test_a_turn_that_is_posted_again_is_told_again(path: str) -> None:
    """Promise: the same body under the same key gets the session's last answer, drawn without a seed as it was, whole or in a stream,
    and the session has it once; so does the standard's form of the header.
    """
    async with http_house() as here:
        session_id = await opened(here)
        turn: dict[str, Any] = {**PATHS[path], "session_id": session_id}
        first = await post(here, path, "turn-1", **turn)
        assert first.status_code == 200, first.text
        for key in ("turn-1", '"turn-1"'):
            again = await post(here, path, key, **turn)
            ours, theirs = again.json(), first.json()
            assert {**ours, "created": 0} == {**theirs, "created": 0}
        streamed = await post(here, path, "turn-1", **turn, stream=True)
        assert f'"id":"{first.json()["id"]}"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert await turns(here, session_id) == 1
        for key in ("turn-2", ""):
            assert (await post(here, path, key, **turn)).status_code == 200
        assert await turns(here, session_id) == 3


async def test_the_sdks_retry_after_a_lost_answer_appends_nothing() -> None:
    """Promise: OpenAI's client, told a key, tries again by itself where an answer was lost, and the conversation goes on as if it had not
    been.
    """
    async with http_house() as here:
        session_id = await opened(here)
        losing = Losing()
        # The SDK's annotations name another release of the library.
        through: Any = httpx.AsyncClient(transport=losing)
        async with openai.AsyncOpenAI(
            base_url=here.base_url,
            api_key="none",
            max_retries=2,
            http_client=through,
        ) as client:
            answer = await client.completions.create(
                model="sim",
                prompt="first",
                max_tokens=6,
                extra_headers={"Idempotency-Key": "a"},
                extra_body={"session_id": session_id, "ignore_eos": True},
            )
        assert losing.lost == 1
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 6)
        assert await turns(here, session_id) == 1


async def test_a_turn_that_its_store_keeps_waiting_ends_at_its_deadline() -> None:
    """Promise: 504 when the client's time is over, not whatever the store says later; and the session is free again."""
    async with http_house() as here:
        session_id = await opened(here)
        sessions = here.house.app._sessions
        assert sessions is not None
        begin, answers = sessions._store.begin_turn, asyncio.Event()

        async def hang(*arguments: Any) -> Any:
            await answers.wait()
            return await begin(*arguments)

        sessions._store.begin_turn = hang  # type: ignore[method-assign, assignment]
        turn = {"prompt": "a", **SHORT, "session_id": session_id}
        asked = {"x-request-timeout-s": "0.2"}
        async with asyncio.timeout(5):
            late = await here.client.post("/v1/completions", json=turn, headers=asked)
        assert late.status_code == 504
        assert "'session'" in late.json()["error"]["message"]
        answers.set()
        async with asyncio.timeout(5):
            while (await post(here, "/v1/completions", "", **turn)).status_code != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert await turns(here, session_id) == 1


async def test_a_turn_that_others_followed_is_refused_for_good() -> None:
    """Promise: it is neither had twice nor answered with another turn's words; other content under its key is another turn."""
    async with http_house() as here:
        session_id = await opened(here)
        path = "/v1/completions"
        for prompt in ("a", "b"):
            turn = {"prompt": prompt, **SHORT, "session_id": session_id}
            assert (await post(here, path, "same", **turn)).status_code == 200
        late = await post(here, path, "same", prompt="a", **SHORT, session_id=session_id)
        assert (late.status_code, late.headers["x-should-retry"]) == (409, "false")
        assert await turns(here, session_id) == 2


async def test_a_key_that_can_name_no_turn_is_named() -> None:
    """Without a session the header changes nothing, whatever it holds: proxies and clients add it unasked."""
    async with http_house() as here:
        session_id = await opened(here)
        path, body = "/v1/completions", PATHS["/v1/completions"]
        for key in ("not one", "x" * 129, '"'):
            refused = await post(here, path, key, **body, session_id=session_id)
            error = refused.json()["error"]
            assert (refused.status_code, error["param"]) == (400, "idempotency-key")
            assert "not one" not in error["message"]
        assert await turns(here, session_id) == 0
        both = await asyncio.gather(*(post(here, path, "not one", **body) for _ in range(2)))
        assert [answer.status_code for answer in both] == [200, 200]
