"""What is sent: requests by their lengths, by a trace, or from a file. Pure, except `read_prompts`; drawn from the caller's generator.

Prompts of so many tokens are token ids that a `TokenVocabulary` draws or, where the server shall tokenize, words that a `TextVocabulary`
draws: each is one token of the served model's tokenizer wherever it stands, so that texts that begin with the same words begin with the
same tokens.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import cycle
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from baton.bench.lengths import Lengths
from baton.bench.traces import Trace
from baton.client.types import ChatMessage, Prompt
from baton.errors import FieldViolation, InvalidRequestError

Pieces = npt.NDArray[np.int64]
"""What a vocabulary draws and writes: its own numbers of tokens or words."""
_WORDS = 2048
_ENOUGH_WORDS = 64
_TRIES = 8


class PromptKind(Enum):
    """How a prompt travels."""

    TOKENS = "tokens"
    TEXT = "text"
    CHAT = "chat"
    """A user's message; the model's chat template adds tokens to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A request to be sent."""

    prompt: Prompt
    input_tokens: int | None
    """Of the prompt, without what a template adds; None where nobody here can tell."""
    output_tokens: int | None
    """Most to generate; None leaves it to the server."""


class TextTokenizer(Protocol):
    """The served model's, as this module uses it."""

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """The tokens of a text; `begins` adds the special ones."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of tokens."""

    def has_text(self, token_id: int) -> bool:
        """Whether a token can be part of a text."""


class Vocabulary(Protocol):
    """Draws prompts."""

    def draw(self, rng: np.random.Generator, count: int) -> Pieces:
        """So many tokens, or words of one token each."""

    def write(self, pieces: Pieces) -> Prompt:
        """The prompt of `len(pieces)` tokens. Equal beginnings of pieces are equal beginnings of tokens."""


class TokenVocabulary:
    """Token ids."""

    def __init__(self, vocab_size: int, excluded: Sequence[int] = ()) -> None:
        """Raises `InvalidRequestError` where nothing is left to draw."""
        self._ids = np.setdiff1d(np.arange(vocab_size), np.asarray(excluded, np.int64))
        if not len(self._ids):
            raise InvalidRequestError(FieldViolation("vocabulary", "has no ordinary token"))

    def draw(self, rng: np.random.Generator, count: int) -> Pieces:
        return rng.choice(self._ids, count)

    def write(self, pieces: Pieces) -> list[int]:
        ids: list[int] = pieces.tolist()
        return ids


class TextVocabulary:
    """Words of one token each, with a blank between them."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        """Raises `InvalidRequestError` where the tokenizer has no such words."""
        self._encode = tokenizer.encode
        self._words = np.asarray(_single_token_words(tokenizer), dtype=object)
        if not len(self._words):
            raise InvalidRequestError(
                FieldViolation(
                    "--tokenizer", "has no words of one token; send --prompt-as tokens instead"
                )
            )

    def draw(self, rng: np.random.Generator, count: int) -> Pieces:
        return rng.integers(0, len(self._words), count)

    def write(self, pieces: Pieces) -> str:
        words: list[str] = self._words[pieces].tolist()
        # Words may make other tokens together, and the first of a text may be more of them than it is after a blank.
        for _ in range(_TRIES):
            excess = self.count(" ".join(words)) - len(pieces)
            if not excess:
                break
            words = words[:-excess] if excess > 0 else words + words[:1] * -excess
        return " ".join(words) or str(self._words[pieces[0]])

    def count(self, text: str) -> int:
        """Tokens of a text, special ones aside."""
        return len(self._encode(text, begins=False))


def _single_token_words(tokenizer: TextTokenizer) -> list[str]:
    """At the beginning of a text too, where the tokenizer has enough of those."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text, begins=False))

    after_a_blank: list[str] = []
    anywhere: list[str] = []
    seen: set[str] = set()
    for token_id in np.random.default_rng(0).permutation(tokenizer.vocab_size).tolist():
        if len(anywhere) == _WORDS:
            break
        word = tokenizer.decode([token_id]).strip() if tokenizer.has_text(token_id) else ""
        if word in seen or not (word.isascii() and word.isalpha()):
            continue
        seen.add(word)
        twice = count(f"{word} {word}")
        if count(f"{word} {word} {word}") == twice + 1:
            after_a_blank.append(word)
            if twice == 2:
                anywhere.append(word)
    return anywhere if len(anywhere) >= _ENOUGH_WORDS else after_a_blank


Form = Callable[[Prompt], Prompt]
"""How a vocabulary's prompt, or a file's text, travels."""


def as_message(prompt: Prompt) -> Prompt:
    """A text as what a user says."""
    return [ChatMessage("user", prompt)] if isinstance(prompt, str) else prompt


def synthetic(
    vocabulary: Vocabulary,
    input_lengths: Lengths,
    output_lengths: Lengths,
    rng: np.random.Generator,
    form: Form,
) -> Iterator[Planned]:
    """Requests without end; no two share a prefix, but for chance."""
    while True:
        count = input_lengths.draw(rng)
        yield Planned(
            prompt=form(vocabulary.write(vocabulary.draw(rng, count))),
            input_tokens=count,
            output_tokens=output_lengths.draw(rng),
        )


def replayed(vocabulary: Vocabulary, trace: Trace, seed: int, form: Form) -> Iterator[Planned]:
    """The trace's requests: blocks of the same name are the same tokens, and what no block names is nobody else's."""
    rng = np.random.default_rng(seed)
    block_tokens = trace.block_tokens
    blocks: dict[int, Pieces] = {}
    for entry in trace.entries:
        parts: list[Pieces] = []
        left = entry.input_tokens
        for block in entry.blocks:
            if left <= 0:
                break
            if block not in blocks:
                # By its name alone: the same whichever part of the trace is replayed.
                drawn = np.random.default_rng([seed, 1 if block < 0 else 0, abs(block)])
                blocks[block] = vocabulary.draw(drawn, block_tokens)
            parts.append(blocks[block][:left])
            left -= block_tokens
        if left > 0:
            parts.append(vocabulary.draw(rng, left))
        yield Planned(
            prompt=form(vocabulary.write(np.concatenate(parts))),
            input_tokens=entry.input_tokens,
            output_tokens=entry.output_tokens,
        )


def read_prompts(
    path: Path, output_lengths: Lengths | None, rng: np.random.Generator, form: Form
) -> Iterator[Planned]:
    """A file's prompts, over and over. Lines of JSON objects hold `prompt`, a text, or `messages`, each with `role` and `content`, and may
    hold `output_tokens`; any other file has a prompt a line. Raises `InvalidRequestError` naming file and line, at once.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequestError(FieldViolation(str(path), str(error))) from None
    is_json = path.suffix in (".jsonl", ".json")
    prompts: list[tuple[Prompt, int | None]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompts.append(_from_json(line) if is_json else (line, None))
        except (ValueError, KeyError, TypeError) as error:
            problem = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InvalidRequestError(FieldViolation(f"{path}, line {number}", problem)) from None
    if not prompts:
        raise InvalidRequestError(FieldViolation(str(path), "holds no prompts"))
    return _over_and_over(prompts, output_lengths, rng, form)


def _over_and_over(
    prompts: Sequence[tuple[Prompt, int | None]],
    output_lengths: Lengths | None,
    rng: np.random.Generator,
    form: Form,
) -> Iterator[Planned]:
    for prompt, named in cycle(prompts):
        drawn = None if output_lengths is None else output_lengths.draw(rng)
        yield Planned(
            prompt=form(prompt), input_tokens=None, output_tokens=drawn if named is None else named
        )


def _from_json(line: str) -> tuple[Prompt, int | None]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise TypeError("not a JSON object")
    named = fields.get("output_tokens")
    if named is not None and (not isinstance(named, int) or named < 1):
        raise ValueError(f"output_tokens is {named!r}")
    if "messages" in fields:
        messages = [ChatMessage(str(m["role"]), str(m["content"])) for m in fields["messages"]]
        if not messages:
            raise ValueError("messages is empty")
        return messages, named
    text = fields["prompt"]
    if not isinstance(text, str) or not text:
        raise ValueError("prompt is no text")
    return text, named
