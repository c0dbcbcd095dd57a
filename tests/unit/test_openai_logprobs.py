"""Tokens in log-probabilities as OpenAI writes them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.v1 import common_pb2
from router.http.openai.forms import Choice, TextForm
from router.http.openai.logprobs import Vocabulary
from router.text import Tokenizer

BYTES = Vocabulary(Tokenizer.of_bytes())


def offsets(text: str) -> list[int]:
    """Of the tokens of a text, each of which is a byte."""
    positions = [
        common_pb2.PositionLogprobs(chosen=common_pb2.TokenLogprob(token_id=byte, logprob=-1.0))
        for byte in text.encode()
    ]
    told: list[int] = TextForm(BYTES).logprobs(Choice(), positions)["text_offset"]
    return told


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_a_token_that_begins_a_character_is_told_where_that_stands(text: str) -> None:
    """Promise: however many characters before it were split over tokens."""
    told = iter(offsets(text))
    for position, character in enumerate(text):
        first, *_ = [next(told) for _ in character.encode()]
        assert first == position


@pytest.mark.parametrize(("character", "position"), [("b", 3), ("😀", 4), ("c", 5)])
def test_split_characters_do_not_move_what_follows(character: str, position: int) -> None:
    text = "a 漢b😀c"
    before = len(text.partition(character)[0].encode())
    assert offsets(text)[before] == position
