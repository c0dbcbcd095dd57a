"""The oracle: tiny random checkpoints made by `transformers`, its tokens for them, and a paged driver for the runner under test.

The driver stands in for the engine: it keeps block tables, cuts prompts into chunks, and lets requests arrive one by one, so that every
step mixes decode rows of many lengths with prefill chunks.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from baton.engine.batch import BatchRow, Runner, SampleInput
from baton.types import PositionLogprobs, SamplingParams

VOCAB = 320
GREEDY = SamplingParams(max_tokens=1024, temperature=0.0, ignore_eos=True, logprobs=2)
SMALLEST_MARGIN = 1e-4
"""Between the best and the second best logit of the oracle, at every step: float32 rounding is far below it."""

_SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GPT2_SHAPE: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **values}}


def llama(**changes: Any) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**{**_SHAPE, **changes}))


def mistral(**changes: Any) -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**{**_SHAPE, "sliding_window": None, **changes}))


def qwen2(**changes: Any) -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**{**_SHAPE, **changes}))


def qwen3(**changes: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**{**_SHAPE, "head_dim": 32, **changes}))


def gpt2(**changes: Any) -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(**{**_GPT2_SHAPE, **changes}))


_WINDOW: Mapping[str, Any] = {"use_sliding_window": True, "sliding_window": 24}
_LONG: Mapping[str, Any] = {
    "short_factor": [1.0 + i / 8 for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
_YARN: Mapping[str, Any] = {"factor": 4.0, "original_max_position_embeddings": 128}

ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": llama,
    "llama-tied-mqa": lambda: llama(tie_word_embeddings=True, num_key_value_heads=1),
    "llama-mha-biases": lambda: llama(
        num_key_value_heads=4, attention_bias=True, mlp_bias=True, hidden_act="gelu"
    ),
    "llama-wide-heads": lambda: llama(head_dim=32, rms_norm_eps=1e-3),
    "mistral": mistral,
    "mistral-window": lambda: mistral(sliding_window=24),
    "qwen2": lambda: qwen2(tie_word_embeddings=True),
    "qwen2-window": lambda: qwen2(**_WINDOW, max_window_layers=1),
    "qwen3": lambda: qwen3(tie_word_embeddings=True),
    "qwen3-window": lambda: qwen3(
        **_WINDOW, layer_types=["sliding_attention", "full_attention", "sliding_attention"]
    ),
    "gpt2": gpt2,
    "gpt2-variant": lambda: gpt2(
        n_inner=80,
        scale_attn_by_inverse_layer_idx=True,
        activation_function="relu",
        tie_word_embeddings=False,
    ),
    "rope-linear": lambda: llama(**_rope("linear", factor=4.0)),
    "rope-dynamic": lambda: llama(**_rope("dynamic", factor=2.0)),
    "rope-llama3": lambda: llama(
        **_rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=128,
        )
    ),
    "rope-yarn": lambda: llama(**_rope("yarn", **_YARN)),
    "rope-yarn-mscale": lambda: llama(
        **_rope("yarn", **_YARN, mscale=1.0, mscale_all_dim=0.8, truncate=False, beta_fast=16)
    ),
    "rope-longrope-short": lambda: llama(
        **_rope("longrope", **_LONG, factor=1.0, original_max_position_embeddings=512)
    ),
}
"""Everything that the engine claims to compute as `transformers` does."""


def longrope_long() -> PreTrainedModel:
    """Its trained context is far shorter than what it serves."""
    return llama(**_rope("longrope", **_LONG, factor=16.0, original_max_position_embeddings=32))


def save(build: Callable[[], PreTrainedModel], path: Path, *, shard_size: str = "1GB") -> Path:
    """Writes a checkpoint. Biases and norms are random too: their usual start, 0 and 1, would hide them."""
    torch.manual_seed(17)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.2)
    model.save_pretrained(path, max_shard_size=shard_size)
    return path


def prompt_of(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(length)
    ids: list[int] = torch.randint(3, VOCAB, (length,), generator=generator).tolist()
    return ids


@dataclass(slots=True)
class Oracle:
    """`transformers` on a checkpoint, in float32 on CPU."""

    path: Path
    _model: Any = None
    _known: dict[tuple[tuple[int, ...], int], list[int]] = field(default_factory=dict)

    def generate(self, prompt: list[int], count: int) -> list[int]:
        """Greedy tokens; fails where a step's choice is too close for rounding."""
        key = (tuple(prompt), count)
        if key not in self._known:
            self._known[key] = self._generate(prompt, count)
        return self._known[key]

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """After the last token. -> [V]"""
        with torch.no_grad():
            logits = self._loaded()(torch.tensor([tokens])).logits[0, -1]
        return torch.log_softmax(logits.float(), -1)

    def _generate(self, prompt: list[int], count: int) -> list[int]:
        output = self._loaded().generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=None,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        best = torch.cat(output.logits).topk(2).values
        margin = (best[:, 0] - best[:, 1]).min().item()
        assert margin > SMALLEST_MARGIN, f"the oracle chose by {margin}: take another prompt"
        tokens: list[int] = output.sequences[0, len(prompt) :].tolist()
        return tokens

    def _loaded(self) -> Any:
        # Any, because the model's own annotations do not pass a strict checker.
        if self._model is None:
            self._model = AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32)
        return self._model


@dataclass(slots=True)
class _Request:
    prompt: list[int]
    table: list[int]
    computed: int = 0
    output: list[int] = field(default_factory=list)
    logprobs: list[PositionLogprobs] = field(default_factory=list)

    def row(self, budget: int) -> BatchRow:
        tokens = self.prompt + self.output
        end = min(len(tokens), self.computed + budget)
        wanted = SampleInput(GREEDY, self.prompt, self.output) if end == len(tokens) else None
        return BatchRow(tokens[self.computed : end], self.computed, self.table, wanted)


def drive(
    runner: Runner, prompts: Sequence[list[int]], count: int, *, chunk: int, blocks_seed: int = 0
) -> list[_Request]:
    """Greedy generation of `count` tokens for all prompts; a new request arrives every third step."""
    size = runner.info.block_size_tokens
    free = list(range(runner.info.num_blocks))
    random.Random(blocks_seed).shuffle(free)
    requests = []
    for prompt in prompts:
        needed = -(-(len(prompt) + count) // size)
        requests.append(_Request(prompt, [free.pop() for _ in range(needed)]))
    step = 0
    while any(len(request.output) < count for request in requests):
        arrived = requests[: 1 + step // 3]
        budget, members, rows = chunk, [], []
        for request in sorted(arrived, key=lambda r: not r.output):
            if budget and len(request.output) < count:
                members.append(request)
                rows.append(request.row(budget))
                budget -= len(rows[-1].token_ids)
        for request, row, result in zip(members, rows, runner.run(rows), strict=True):
            request.computed += len(row.token_ids)
            assert (result is None) == (row.sample is None)
            if result is not None:
                assert result.logprobs is not None
                request.output.append(result.token_id)
                request.logprobs.append(result.logprobs)
        step += 1
    return requests
