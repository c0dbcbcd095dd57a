"""What the client reads: text, stop strings, usage, log-probabilities, whatever pieces the tokens come in."""

import asyncio

import pytest

from baton.errors import UnavailableError
from baton.v1 import common_pb2
from tests.integration.router_fakes import PROMPT, Cluster, cluster, expected

TEXT = bytes(expected(PROMPT, 10)).decode()


async def one_of_each(here: Cluster) -> None:
    await here.prefill("p")
    await here.decode("d")


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("length", [1, 3])
async def test_a_stop_string_ends_the_output_before_it_wherever_it_falls(
    start: int, length: int
) -> None:
    """Whether it begins in prefill's token or spans several of decode's; the token that completes it counts, its text does not."""
    async with cluster() as here:
        await one_of_each(here)
        stop = TEXT[start : start + length]
        where = TEXT.index(stop)
        answer = await here.generate(stop=[stop])
        assert answer.text == TEXT[:where]
        assert answer.end.reason == common_pb2.FINISH_REASON_STOP
        assert answer.end.stop_string == stop
        assert answer.tokens == expected(PROMPT, where + len(stop))
        assert answer.end.usage.completion_tokens == where + len(stop)
        assert answer.failures == []


async def test_a_stop_string_frees_the_workers_at_once() -> None:
    async with cluster() as here:
        await one_of_each(here)

        async def slow(stage: str) -> None:
            if stage == "token:6":
                await asyncio.Event().wait()

        here.workers[1].script = slow
        answer = await here.generate(stop=[TEXT[3:6]])
        assert answer.text == TEXT[: TEXT.index(TEXT[3:6])]
        await here.settled()


async def test_a_stop_string_that_spans_a_recovery_is_found() -> None:
    async with cluster() as here:
        await one_of_each(here)
        failed: list[str] = []

        async def once(stage: str) -> None:
            if stage == "token:5" and not failed:
                failed.append(stage)
                raise UnavailableError("gone")

        here.workers[1].script = once
        answer = await here.generate(stop=[TEXT[3:7]])
        assert answer.text == TEXT[:3]
        assert answer.end.stop_string == TEXT[3:7]
        assert answer.failures == ["UNAVAILABLE"]


async def test_the_beginning_of_a_stop_string_that_is_never_completed_is_given_out() -> None:
    async with cluster() as here:
        await one_of_each(here)
        answer = await here.generate(stop=[TEXT[8:] + "never"])
        assert answer.text == TEXT
        assert answer.end.reason == common_pb2.FINISH_REASON_LENGTH
        assert answer.end.WhichOneof("stop_match") is None


async def test_a_text_prompt_is_tokenized_and_the_drawn_seed_is_told() -> None:
    async with cluster() as here:
        await one_of_each(here)
        answer = await here.generate(text="hello")
        assert answer.tokens == expected(tuple(b"hello"), 10)
        assert answer.accepted is not None
        assert answer.accepted.prompt_tokens == 5
        assert answer.accepted.model == "fake"
        assert answer.accepted.request_id


async def test_logprobs_reach_the_client_one_for_each_token() -> None:
    async with cluster() as here:
        await here.decode("d")
        positions = 0
        async for response in here.call(logprobs=2, stop=[TEXT[6]]):
            if response.HasField("chunk"):
                tokens = response.chunk.tokens
                assert [p.chosen.token_id for p in tokens.logprobs] == list(tokens.token_ids)
                assert all(len(p.top) == 2 for p in tokens.logprobs)
                positions += len(tokens.logprobs)
        assert positions == TEXT.index(TEXT[6]) + 1
