"""What the load generator sends."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.bench.lengths import Lengths
from baton.bench.prompts import (
    TextVocabulary,
    TokenVocabulary,
    Vocabulary,
    as_message,
    read_prompts,
    replayed,
    synthetic,
)
from baton.bench.traces import Trace, TraceEntry
from baton.cli.config import shipped_model
from baton.client import ChatMessage, Prompt
from baton.errors import InvalidRequestError
from router.text import Tokenizer

TOKENIZER = Tokenizer.load(str(shipped_model()))
TEXTS = TextVocabulary(TOKENIZER)
IDS = TokenVocabulary(200, (0, 7))
BLOCK_TOKENS = 8

entries = st.lists(
    st.builds(
        TraceEntry,
        at_s=st.just(0.0),
        input_tokens=st.integers(1, 40),
        output_tokens=st.integers(1, 9),
        blocks=st.lists(st.integers(0, 5), max_size=5).map(tuple),
    ),
    min_size=1,
    max_size=6,
)


def as_is(prompt: Prompt) -> Prompt:
    return prompt


def tokens_of(prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        return TOKENIZER.encode(prompt, begins=False)
    return [token for token in prompt if isinstance(token, int)]


def shared(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@pytest.mark.parametrize("vocabulary", [TEXTS, IDS], ids=["text", "tokens"])
@given(length=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_a_prompt_has_as_many_tokens_as_was_asked(
    vocabulary: Vocabulary, length: int, seed: int
) -> None:
    prompt = vocabulary.write(vocabulary.draw(np.random.default_rng(seed), length))
    assert len(tokens_of(prompt)) == length


@pytest.mark.parametrize("vocabulary", [TEXTS, IDS], ids=["text", "tokens"])
@settings(max_examples=50)
@given(trace=entries, seed=st.integers(0, 1000))
def test_replayed_prompts_share_the_blocks_that_the_trace_says(
    vocabulary: Vocabulary, trace: list[TraceEntry], seed: int
) -> None:
    """As long as the trace's; equal as far as blocks are; what follows differs but for chance."""
    planned = list(replayed(vocabulary, Trace(tuple(trace), BLOCK_TOKENS), seed, as_is))
    prompts = [tokens_of(each.prompt) for each in planned]
    assert [len(prompt) for prompt in prompts] == [entry.input_tokens for entry in trace]
    assert [each.output_tokens for each in planned] == [entry.output_tokens for entry in trace]
    for entry, prompt in zip(trace, prompts, strict=True):
        for other, other_prompt in zip(trace, prompts, strict=True):
            blocks = shared(list(entry.blocks), list(other.blocks))
            promised = min(blocks * BLOCK_TOKENS, len(prompt), len(other_prompt))
            assert shared(prompt, other_prompt) >= promised


def test_prompts_that_share_no_block_share_next_to_nothing() -> None:
    trace = [
        TraceEntry(at_s=0, input_tokens=64, output_tokens=1, blocks=(number, 99))
        for number in range(20)
    ]
    prompts = [tokens_of(each.prompt) for each in replayed(IDS, Trace(tuple(trace), 32), 0, as_is)]
    assert max(shared(a, b) for a in prompts for b in prompts if a is not b) < 4


def test_a_block_is_the_same_in_whichever_part_of_a_trace() -> None:
    trace = [
        TraceEntry(at_s=0, input_tokens=64, output_tokens=1, blocks=(number, number + 1))
        for number in range(4)
    ]
    whole, part = (
        [each.prompt for each in replayed(IDS, Trace(tuple(taken), 32), 3, as_is)]
        for taken in (trace, trace[2:])
    )
    assert whole[2:] == part


@given(st.integers(0, 2**32))
def test_the_seed_is_the_load(seed: int) -> None:
    lengths = Lengths.parse("uniform:1:50", "--isl")

    def first() -> list[object]:
        rng = np.random.default_rng(seed)
        return list(islice(synthetic(IDS, lengths, lengths, rng, as_is), 5))

    assert first() == first()


def test_ids_leave_out_what_is_excluded() -> None:
    drawn = set(IDS.draw(np.random.default_rng(0), 10_000).tolist())
    assert drawn == set(range(200)) - {0, 7}
    with pytest.raises(InvalidRequestError, match="no ordinary token"):
        TokenVocabulary(2, (0, 1))


def test_a_tokenizer_without_words_says_what_to_do() -> None:
    with pytest.raises(InvalidRequestError, match="--prompt-as tokens"):
        TextVocabulary(Tokenizer.of_bytes())


def test_a_files_lines_are_prompts_over_and_over(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("One.\n\n{Two}.\n")
    osl = Lengths.parse("5", "--osl")
    planned = list(islice(read_prompts(path, osl, np.random.default_rng(0), as_message), 3))
    assert [each.prompt for each in planned] == [
        [ChatMessage("user", text)] for text in ("One.", "{Two}.", "One.")
    ]
    assert {each.output_tokens for each in planned} == {5}


def test_a_jsonl_file_has_prompts_conversations_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "One.", "output_tokens": 3}\n{"messages": [{"role": "system", "content": "Be."}]}\n'
    )
    first, second = islice(read_prompts(path, None, np.random.default_rng(0), as_is), 2)
    assert (first.prompt, first.output_tokens) == ("One.", 3)
    assert (second.prompt, second.output_tokens) == ([ChatMessage("system", "Be.")], None)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"prompt": ""}',
        '{"prompt": 3}',
        '{"messages": []}',
        '{"messages": [{}]}',
        '{"prompt": "x", "output_tokens": 0}',
    ],
)
def test_an_unreadable_prompt_is_refused_by_its_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "One."}\n' + line)
    with pytest.raises(InvalidRequestError, match="line 2"):
        read_prompts(path, None, np.random.default_rng(0), as_is)
