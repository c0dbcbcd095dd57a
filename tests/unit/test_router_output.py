"""The buffer between attempts and the client: what goes in comes out once, in order, in messages of bounded size."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.types import FinishReason, PositionLogprobs, SamplingParams, TokenChunk, TokenLogprob
from router.output import MAX_PIECE_TOKENS, Output, Outputs, Piece
from router.text import OutputText, Tokenizer

BYTES = Tokenizer.of_bytes()


def output(
    max_tokens: int = 1000,
    *,
    stop: tuple[str, ...] = (),
    eos: int = 0,
    max_unread_bytes: int = 1 << 20,
) -> Output:
    sampling = SamplingParams(max_tokens=max_tokens, stop=stop)
    text = OutputText(BYTES, sampling, prompt=(65,), eos_token_ids=(eos,))
    return Output(text, max_tokens, max_unread_bytes=max_unread_bytes)


async def drain(buffer: Output) -> list[Piece]:
    pieces, outputs = [], Outputs([buffer])
    while (piece := await outputs.take()) is not None:
        pieces.append(piece)
    return pieces


@given(st.lists(st.tuples(st.integers(1, 60), st.booleans()), min_size=1, max_size=40))
def test_tokens_come_out_once_and_in_order_however_they_went_in(
    puts: list[tuple[int, bool]],
) -> None:
    async def run() -> list[Piece]:
        buffer, pieces, index = output(10_000), [], 0
        for length, take in puts:
            buffer.put(TokenChunk(index, tuple(97 + (index + i) % 26 for i in range(length))))
            index += length
            if take:
                taken = buffer.take()
                assert taken is not None
                pieces.append(taken)
        buffer.finish()
        buffer.close()
        return pieces + await drain(buffer)

    tokens: list[int] = []
    pieces = asyncio.run(run())
    for piece in pieces:
        assert piece.tokens is not None
        assert piece.tokens.first_index == len(tokens)
        assert 0 < len(piece.tokens.token_ids) <= MAX_PIECE_TOKENS
        tokens.extend(piece.tokens.token_ids)
    assert tokens == [97 + i % 26 for i in range(sum(length for length, _ in puts))]
    assert "".join(piece.text for piece in pieces) == bytes(tokens).decode()


async def test_logprobs_are_cut_and_joined_with_their_tokens() -> None:
    buffer = output(stop=("d",))
    seen = [PositionLogprobs(TokenLogprob(token, -1.0), ()) for token in b"abcde"]
    assert not buffer.put(TokenChunk(0, tuple(b"ab"), tuple(seen[:2])))
    assert buffer.put(TokenChunk(2, tuple(b"cde"), tuple(seen[2:])))
    buffer.finish()
    buffer.close()
    (piece,) = await drain(buffer)
    assert piece == Piece("abc", TokenChunk(0, tuple(b"abcd"), tuple(seen[:4])))
    assert buffer.generated == list(b"abcd")
    assert (buffer.stop, buffer.end) == ("d", FinishReason.STOP)


async def test_tokens_past_the_limit_are_left_out_and_no_more_are_wanted() -> None:
    buffer = output(max_tokens=3)
    assert buffer.end is None
    assert buffer.put(TokenChunk(0, tuple(b"abcde")))
    assert buffer.generated == list(b"abc")
    assert buffer.end is FinishReason.LENGTH


async def test_an_end_token_ends_the_output_but_the_worker_is_let_to_say_so() -> None:
    buffer = output(eos=7)
    assert not buffer.put(TokenChunk(0, (97, 7)))
    assert (buffer.end, buffer.stop_token_id) == (FinishReason.STOP, 7)
    assert buffer.put(TokenChunk(2, (98,))), "a worker that goes on is stopped"
    assert buffer.generated == [97, 7]


@pytest.mark.parametrize("first", [b"\xe2\x82", b"\xe2"])
async def test_a_character_is_not_given_out_in_parts(first: bytes) -> None:
    buffer = output()
    buffer.put(TokenChunk(0, tuple(first)))
    piece = buffer.take()
    assert piece is not None
    assert piece.text == ""
    buffer.put(TokenChunk(len(first), tuple("€".encode()[len(first) :])))
    piece = buffer.take()
    assert piece is not None
    assert piece.text == "€"


async def test_a_reader_waits_for_output_and_learns_of_the_end() -> None:
    buffer = output()
    reader = asyncio.create_task(drain(buffer))
    await asyncio.sleep(0)
    buffer.put(TokenChunk(0, (97,)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    buffer.close()
    assert [piece.text for piece in await reader] == ["a"]


@pytest.mark.parametrize("logprobs", [0, 5])
async def test_what_a_reader_leaves_is_bounded_in_bytes(logprobs: int) -> None:
    """A reader that takes nothing ends the output before it holds much more than the limit; log-probabilities count."""
    buffer = output(100_000, max_unread_bytes=10_000)
    seen = PositionLogprobs(TokenLogprob(97, -1.0), (TokenLogprob(97, -1.0),) * (logprobs - 1))
    puts = 0
    while not buffer.put(TokenChunk(puts, (97,), (seen,) if logprobs else ())):
        puts += 1
    assert buffer.overflowed
    assert buffer.end is None
    # Text that nobody takes is not made, and does not count.
    assert puts == 10_000 // (4 + 12 * logprobs)


async def test_a_reader_that_keeps_up_is_never_given_up() -> None:
    """What was taken does not count: an output may be many times as long as the limit."""
    buffer = output(100_000, max_unread_bytes=10_000)
    for index in range(0, 20_000, 100):
        assert not buffer.put(TokenChunk(index, (97,) * 100))
        if index % 1000 == 900:
            for _ in range(5):
                buffer.take()
    assert not buffer.overflowed


async def test_what_comes_within_a_rest_is_one_piece_and_the_end_ends_the_rest() -> None:
    """Promise: for tokens that no worker joins."""
    buffer = output()
    outputs = Outputs([buffer])
    for rest_s, ends in ((0.05, False), (86_400.0, True)):
        taking = asyncio.create_task(outputs.take(rest_s))
        for _ in range(3):
            await asyncio.sleep(0)
            buffer.put(TokenChunk(len(buffer.generated), (97,)))
        assert not taking.done()
        if ends:
            buffer.finish()
            buffer.close()
        async with asyncio.timeout(5):
            piece = await taking
        assert piece is not None
        assert piece.tokens is not None
        assert len(piece.tokens.token_ids) == 3
    assert await outputs.take() is None
