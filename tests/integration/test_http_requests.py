"""What the body of a request cannot say: each mistake is answered in OpenAI's form, by its field. `test_http_guard` has what is wrong
with the HTTP around it.
"""

import json
from typing import Any

from tests.integration.http_house import COMPLETION, answered, http_house, posted

NO_REQUESTS: list[tuple[bytes, str]] = [
    (b"", "body"),
    (b"{", "body"),
    (b"[1]", "body"),
    (b"null", "body"),
    (b'{"prompt": "\xff"}', "body"),
    (b'{"prompt": "\\ud800"}', "prompt"),
    (b'{"prompt": "x", "stop": ["\\udfff"]}', "stop[0]"),
    (b'{"prompt": "x", "temperature": NaN}', "temperature"),
    (b'{"prompt": "x", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "x", "seed": %d}' % 10**40, "seed"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "body"),
    (b'{"prompt": "x", "max_tokens": 0}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": true}', "max_tokens"),
    (b'{"prompt": "x", "n": 17}', "n"),
    (b'{"prompt": "x", "n": 2, "best_of": 3}', "best_of"),
    (b'{"prompt": "x", "echo": true}', "echo"),
    (b'{"prompt": "x", "suffix": "y"}', "suffix"),
    (b'{"prompt": "x", "nonsense": 1}', "nonsense"),
    (b'{"prompt": "x", "' + b"n" * 100_000 + b'": 1}', "n" * 64),
    (b'{"prompt": "x", "stream_options": {"all": true}}', "stream_options.all"),
    (b'{"prompt": "x", "logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"prompt": "x", "logit_bias": {"999": 1}}', "logit_bias[999]"),
    (b'{"prompt": ""}', "prompt"),
    (b'{"prompt": []}', "prompt"),
    (b'{"prompt": [[]]}', "prompt"),
    (b'{"prompt": [300]}', "prompt"),
    (b'{"prompt": [1, "x"]}', "prompt[1]"),
    (b'{"prompt": [' + b'"x",' * 64 + b'"x"]}', "prompt"),
    (b"[" * 100_000, "body"),
    (b'{"prompt": [' + b"1.5," * 100_000 + b"1]}", "prompt[0]"),
    (b"{" + b",".join(b'"f%d":1' % n for n in range(50_000)) + b"}", "f0"),
    (b'{"metadata": {' + b",".join(b'"%d":1' % n for n in range(50_000)) + b"}}", "metadata"),
]


async def test_a_body_that_is_no_request_gets_400_naming_the_field() -> None:
    async with http_house(0, 1) as here:
        for body, field in NO_REQUESTS:
            data = posted(body, b"content-type: application/json", b"connection: close")
            status, error = answered(await here.say(data))
            assert (status, error["type"]) == (400, "invalid_request_error"), body[:100]
            assert error["param"] == field, (body[:100], error)
            assert len(error["message"]) < 2000
        assert here.ended("invalid_request") == len(NO_REQUESTS)


NO_CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0].image_url",
    ),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "a"}}, "audio"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ({"temperature": -1.0}, "temperature"),
    ({"priority": 1000}, "priority"),
    ({"ttft_slo_seconds": 0.0}, "ttft_slo_seconds"),
]


async def test_what_a_chat_cannot_have_is_refused_by_its_name() -> None:
    async with http_house(0, 1) as here:
        for change, field in NO_CHATS:
            body = {"messages": [{"role": "user", "content": "x"}], **change}
            answer = await here.client.post("/v1/chat/completions", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_what_clients_send_without_asking_for_more_is_accepted() -> None:
    """Fields that ask for nothing: harmless ones, and values that say to do without what is not there."""
    async with http_house(0, 1) as here:
        harmless = {
            "user": "u",
            "metadata": {"a": "b"},
            "store": False,
            "service_tier": "auto",
            "safety_identifier": "s",
            "prompt_cache_key": "k",
        }
        without = {
            "tools": [],
            "tool_choice": "none",
            "parallel_tool_calls": False,
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "functions": None,
            "stop": None,
            "temperature": None,
            "top_k": -1,
            "logprobs": False,
        }
        chat = {"messages": [{"role": "developer", "content": "x"}], "max_tokens": 1}
        answer = await here.client.post("/v1/chat/completions", json=chat | harmless | without)
        assert answer.status_code == 200, answer.text
        text = COMPLETION | harmless | {"echo": False, "suffix": None, "best_of": 1, "n": 1}
        answer = await here.client.post("/v1/completions", json=text)
        assert answer.status_code == 200, answer.text


async def test_another_content_type_than_json_is_refused() -> None:
    async with http_house(0, 1) as here:
        for kind in ("text/plain", "multipart/form-data", "application/octet-stream", "nonsense"):
            answer = await here.client.post(
                "/v1/completions", content=json.dumps(COMPLETION), headers={"content-type": kind}
            )
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")
            assert "application/json" in answer.json()["error"]["message"]
