"""Writes one of the benchmark's models: `python -m benchmarks.engine.make_checkpoint tiny DIR`."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from baton.cli.config import shipped_model
from benchmarks.engine.checkpoints import SHIPPED

CONTEXT_TOKENS = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What decides how long a decoder's step takes."""

    family: Callable[..., PreTrainedConfig]
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    intermediate_size: int
    vocab_size: int


SHAPES = {
    "tiny": Shape(
        family=LlamaConfig,
        hidden_size=256,
        layers=6,
        heads=8,
        kv_heads=4,
        intermediate_size=688,
        vocab_size=4096,
    ),
    "smollm2": Shape(
        family=LlamaConfig,
        hidden_size=576,
        layers=30,
        heads=9,
        kv_heads=3,
        intermediate_size=1536,
        vocab_size=49152,
    ),
    "qwen": Shape(
        family=Qwen2Config,
        hidden_size=896,
        layers=24,
        heads=14,
        kv_heads=2,
        intermediate_size=4864,
        vocab_size=151936,
    ),
}


def save_random(shape: Shape, directory: Path) -> None:
    """With a vocabulary of words without meaning."""
    torch.manual_seed(0)
    config = shape.family(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate_size,
        vocab_size=shape.vocab_size,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(torch.bfloat16).save_pretrained(directory)
    # Some converters refuse a model without a tokenizer; no engine here uses it.
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, shape.vocab_size)}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = Tokenizer(WordLevel(words, unk_token=special["unk_token"]))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)  # type: ignore[no-untyped-call]
    fast.save_pretrained(directory)


def save_shipped(directory: Path) -> None:
    """In bfloat16, as the others are: the format of the comparison."""
    source = shipped_model()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, directory / name)


if __name__ == "__main__":
    name, target = sys.argv[1], Path(sys.argv[2])
    if name == SHIPPED:
        save_shipped(target)
    else:
        save_random(SHAPES[name], target)
