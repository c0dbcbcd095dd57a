"""What OpenAI's SDK says of sampling reaches the engine: `baton serve` with the shipped model, asked by HTTP and by gRPC."""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest

from baton.client import Client, SamplingOptions
from tests.served import Served, served

PROMPT = "Mara has a red ball and a blue kite. Mara"
HOT = SamplingOptions(max_tokens=24, temperature=1.5, seed=4, ignore_eos=True)
OPENAIS = {"temperature", "top_p", "presence_penalty", "frequency_penalty", "logit_bias", "seed"}
"""The SDK's own; the others travel in its `extra_body`."""

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    flags = ("--transport", "memory", "--http", "127.0.0.1:0")
    with served(tmp_path_factory.mktemp("sampling"), *flags) as running:
        yield running


@pytest.fixture(scope="module")
def sdk(server: Served) -> Iterator[openai.OpenAI]:
    found = re.search(r"http://(\S+)/v1", server.output())
    assert found is not None, server.output()
    with openai.OpenAI(base_url=f"http://{found[1]}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(sdk: openai.OpenAI, **parameters: Any) -> str:
    """The text by HTTP, of the prompt and HOT's parameters with these changes."""
    given: dict[str, Any] = {"temperature": HOT.temperature, "seed": HOT.seed} | parameters
    known = {name: value for name, value in given.items() if name in OPENAIS}
    ours = {name: value for name, value in given.items() if name not in OPENAIS}
    answer = sdk.completions.create(
        model="tales",
        prompt=PROMPT,
        max_tokens=HOT.max_tokens,
        extra_body={"ignore_eos": True, **ours},
        **known,
    )
    text: str = answer.choices[0].text
    return text


def by_grpc(server: Served, sampling: SamplingOptions) -> tuple[str, list[int]]:
    with Client(server.address) as client:
        result = client.complete(PROMPT, sampling=sampling)
        return result.text, list(result.token_ids)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"seed": 5},
        {"top_p": 0.1},
        {"top_k": 1},
        {"min_p": 0.9},
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 2.0},
        {"logit_bias": True},
        {"stop_token_ids": True},
        {"min_tokens": 20, "stop_token_ids": True},
    ],
    ids="-".join,
)
def test_a_sampling_parameter_says_by_http_what_it_says_by_grpc(
    server: Served, sdk: openai.OpenAI, changes: dict[str, Any]
) -> None:
    """Promise: no parameter is dropped or taken for another: with it, the text is the one by gRPC, and not the one without it."""
    plain, tokens = by_grpc(server, HOT)
    # What depends on the model's own tokens.
    seen = {"logit_bias": {tokens[0]: -100.0}, "stop_token_ids": [tokens[5]]}
    changes = {name: seen[name] if value is True else value for name, value in changes.items()}
    expected, _ = by_grpc(server, replace(HOT, **changes))
    http = changes | {
        name: {str(token): bias for token, bias in value.items()}
        for name, value in changes.items()
        if name == "logit_bias"
    }
    assert ask(sdk) == plain
    assert ask(sdk, **http) == expected
    if "min_tokens" not in changes:
        assert expected != plain
    else:
        assert len(expected) > len(ask(sdk, stop_token_ids=changes["stop_token_ids"]))


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
def test_a_stop_string_ends_a_chat_before_it(sdk: openai.OpenAI, *, streamed: bool) -> None:
    """Promise: of several stop strings the first that occurs ends the text, however it falls on tokens, and the reason is `stop`."""
    asked: dict[str, Any] = {
        "model": "tales",
        "messages": [{"role": "user", "content": PROMPT}],
        "max_completion_tokens": 24,
        "temperature": 0.0,
    }
    extra = {"ignore_eos": True}
    whole = sdk.chat.completions.create(**asked, extra_body=extra).choices[0].message.content
    assert whole
    stop = whole[len(whole) // 2 - 2 : len(whole) // 2 + 2]
    asked |= {"stop": ["never said", stop]}
    if streamed:
        pieces = list(sdk.chat.completions.create(**asked, stream=True, extra_body=extra))
        said = "".join(each.delta.content or "" for piece in pieces for each in piece.choices)
        reason = pieces[-1].choices[0].finish_reason
    else:
        choice = sdk.chat.completions.create(**asked, extra_body=extra).choices[0]
        said, reason = choice.message.content or "", choice.finish_reason
    assert (said, reason) == (whole[: whole.index(stop)], "stop")
    assert 0 < len(said) < len(whole)
