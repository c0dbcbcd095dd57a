"""The bytes of single tokens."""

import pytest
import tokenizers
from tokenizers import decoders, models

from baton.cli.config import shipped_model
from router.text import Tokenizer
from router.token_bytes import byte_symbols, bytes_of

TEXT = "Ahoy, söt café: 海と空 \N{SAILBOAT}!"


@pytest.mark.parametrize("source", ["bytes", "shipped"])
def test_the_bytes_of_a_texts_tokens_joined_are_its_own(source: str) -> None:
    """Also where a character is spread over several tokens."""
    tokenizer = Tokenizer.of_bytes() if source == "bytes" else Tokenizer.load(str(shipped_model()))
    ids = tokenizer.encode(TEXT)
    assert b"".join(tokenizer.token_bytes(each) for each in ids).decode() == TEXT


def test_a_byte_of_byte_fallback_is_that_byte() -> None:
    vocabulary = {"<0xE6>": 0, "a": 1}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    assert [bytes_of(backend, token_id) for token_id in (0, 1)] == [b"\xe6", b"a"]


def test_a_token_that_is_not_in_the_vocabulary_has_no_bytes() -> None:
    assert Tokenizer.of_bytes().token_bytes(100_000) == b""


def test_the_byte_level_alphabet_has_every_byte_once() -> None:
    assert sorted(byte_symbols().values()) == list(range(256))
