"""Owns the tokenizer of the tales model: byte-level BPE, special tokens and chat template.

Invariants: every byte string encodes; encoding adds no token by itself, so text rendered by the
chat template and then encoded is exactly what the model was trained on; a later turn only appends
to the tokens of the turns before it. Used by `train`, which writes the files to the model
directory.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from training import scenes, words
from training.corpus import Message, answer_words, as_messages, write_tale, write_turns

PAD: Final = "<|pad|>"
END: Final = "<|end|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
SPECIALS: Final = (PAD, END, SYSTEM, USER, ASSISTANT)

CHAT_TEMPLATE: Final = (
    "{%- for message in messages -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def render(messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
    """What the chat template makes of the messages."""
    text = "".join(f"<|{m.role}|>{m.content.strip()}{END}" for m in messages)
    return text + (ASSISTANT if add_generation_prompt else "")


def train_tokenizer(*, seed: int, vocab_size: int, num_tales: int) -> Tokenizer:
    """A tokenizer fitted to `num_tales` conversations."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample_texts(seed, num_tales), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path, *, max_tokens: int) -> None:
    """Write the files that `transformers.AutoTokenizer` reads."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_tokens,
        "pad_token": PAD,
        "eos_token": END,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def count_words(text: str) -> int:
    """A stand-in for a token count while there is no tokenizer yet."""
    return len(text.split())


def _sample_texts(seed: int, num_tales: int) -> Iterator[str]:
    """Conversations without their special tokens."""
    rng = random.Random(seed)
    yield from scenes.GREETINGS
    # Rare words and names at the head of a sentence become single tokens too.
    for _ in range(num_tales // 10):
        yield " " + " ".join(sorted(answer_words()))
        yield from words.WOMEN + words.MEN
    for _ in range(num_tales):
        tale = write_tale(rng, split="train", max_tokens=300, count=count_words)
        turns = write_turns(rng, tale, split="train", limit=10)
        yield from (message.content for message in as_messages(tale, turns))
