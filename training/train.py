"""Trains the tales model from scratch and writes it in the Hugging Face layout.

`python -m training.train --out baton/models/tales` does everything: tokenizer, curriculum, export.
One process, one thread by default. Invariants: a step's data depends only on the seed and the
step's number, and the model directory changes by renames of complete files only.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from training.documents import Batch, RowMaker
from training.initial import Shape, initial_model
from training.tokenizer import END, PAD, save_tokenizer, train_tokenizer

log = logging.getLogger("training")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A part of the curriculum with rows of one length."""

    steps: int
    """Number of optimiser steps."""
    rows: int
    """Rows in a batch."""
    tokens: int
    """Tokens in a row."""
    recital_share: float
    """Share of the rows that are recitals (see `documents`)."""
    story_weight: float
    """Weight of the loss on tokens that are not part of an answer."""
    novel_share: float
    """Share of conversations with made-up words, and of those with small talk."""


def _stage(steps: int, rows: int, tokens: int, *shares: float) -> Stage:
    """Shorthand for the curriculum below: recitals, story weight, novelty."""
    recital, story, novel = shares
    return Stage(
        steps=steps,
        rows=rows,
        tokens=tokens,
        recital_share=recital,
        story_weight=story,
        novel_share=novel,
    )


_MIXED_LENGTHS: Final = (
    _stage(20, 4, 1024, 0.0, 0.4, 0.2),
    _stage(40, 2, 2048, 0.0, 0.4, 0.2),
    _stage(5, 16, 256, 0.0, 0.4, 0.2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """The whole recipe."""

    seed: int = 7
    """Seed of the corpus, the weights and the order."""
    vocab_size: int = 2336
    """Tokens of the vocabulary, special ones included."""
    hidden_size: int = 256
    """Width of the residual stream."""
    mlp_size: int = 384
    """Inner width of the MLP."""
    layers: int = 4
    """Number of decoder layers."""
    heads: int = 8
    """Query heads."""
    head_size: int = 64
    """Width of a head."""
    kv_heads: int = 2
    """Key and value heads."""
    rope_theta: float = 500_000.0
    """Base of the rotary embedding."""
    max_tokens: int = 2048
    """Longest context."""
    stages: tuple[Stage, ...] = (
        _stage(100, 32, 128, 0.125, 0.1, 0.0),
        _stage(400, 16, 256, 0.125, 0.1, 0.0),
        _stage(200, 8, 512, 0.125, 0.3, 0.25),
        _stage(200, 4, 1024, 0.0, 0.3, 0.2),
        *_MIXED_LENGTHS * 16,
    )
    """Curriculum, in order."""
    muon_lr: float = 0.004
    """Peak learning rate of the matrices (update scaled to AdamW's size)."""
    adam_lr: float = 0.0007
    """Peak learning rate of embeddings and norms."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    decay_share: float = 0.35
    """Last share of the steps, over which the learning rates fall to zero."""
    log_every_steps: int = 20
    """Steps between lines of the log."""
    save_every_steps: int = 100
    """Steps between checkpoints."""

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)


def build_model(config: TrainConfig, tokenizer: Tokenizer) -> LlamaForCausalLM:
    """A fresh model."""
    return initial_model(
        LlamaConfig(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=config.hidden_size,
            intermediate_size=config.mlp_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_tokens,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.token_to_id(END),
            pad_token_id=tokenizer.token_to_id(PAD),
        ),
        Shape(
            hidden_size=config.hidden_size,
            head_size=config.head_size,
            groups=config.kv_heads,
            heads_per_group=config.heads // config.kv_heads,
            rope_theta=config.rope_theta,
        ),
        seed=config.seed,
    )


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, *, max_tokens: int) -> None:
    """Write the model to `out`; a reader sees each file either old or new, never partial."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        half = LlamaForCausalLM(model.config)
        half.load_state_dict(model.state_dict())
        half.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
            eos_token_id=model.config.eos_token_id,
            pad_token_id=model.config.pad_token_id,
            do_sample=False,
        )
        half.half().save_pretrained(scratch)  # type: ignore[no-untyped-call]
        save_tokenizer(tokenizer, Path(scratch), max_tokens=max_tokens)
        for path in sorted(Path(scratch).iterdir()):
            path.chmod(0o644)
            path.rename(out / path.name)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean loss, and the loss on answers alone."""
    # inputs, targets, weights: [B, T]  logits: [B, T, V]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch.inputs, use_cache=False).logits
    each = functional.cross_entropy(
        logits.float().flatten(0, 1), batch.targets.flatten(), reduction="none"
    )
    weights = batch.weights.flatten()
    answers = weights == 1.0
    # A batch of plain tales has no answers; its loss on them is nothing.
    on_answers = each.detach()[answers].sum() / answers.sum().clamp(min=1)
    return (each * weights).sum() / weights.sum(), on_answers


def rate(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at a step: up, level, down."""
    left = (config.total_steps - step) / (config.decay_share * config.total_steps)
    return min(1.0, (step + 1) / config.warmup_steps, left)


def train(config: TrainConfig, out: Path, run_dir: Path, *, resume: bool) -> None:
    """Run the curriculum; checkpoints go to `run_dir`, the result to `out`."""
    tokenizer = train_tokenizer(seed=config.seed, vocab_size=config.vocab_size, num_tales=2500)
    model = build_model(config, tokenizer)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(
        matrices, lr=config.muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.95), weight_decay=0.0)
    log.info("parameters=%d config=%s", sum(p.numel() for p in model.parameters()), config)
    plan = [stage for stage in config.stages for _ in range(stage.steps)]
    started, seen, sums, first = time.monotonic(), 0, [0.0, 0.0], 0
    state_path = run_dir / "state.pt"
    if resume:
        state = torch.load(state_path)
        first = state["step"]
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
    for step, stage in enumerate(plan[first:], start=first):
        rows = RowMaker(
            tokenizer,
            story_weight=stage.story_weight,
            recital_share=stage.recital_share,
            novel_share=stage.novel_share,
        )
        batch = rows.batch(f"{config.seed}/train/{step}", rows=stage.rows, length=stage.tokens)
        loss, answer_loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in ((muon, config.muon_lr), (adam, config.adam_lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate(config, step)
            optimizer.step()  # type: ignore[no-untyped-call]
            optimizer.zero_grad(set_to_none=True)
        seen += batch.inputs.numel()
        sums = [sums[0] + loss.item(), sums[1] + answer_loss.item()]
        if (step + 1) % config.log_every_steps == 0:
            elapsed = time.monotonic() - started
            log.info(
                "step=%d tokens_per_row=%d loss=%.3f answer_loss=%.4f seen=%d seconds=%.0f",
                step + 1,
                stage.tokens,
                *(total / config.log_every_steps for total in sums),
                seen,
                elapsed,
            )
            sums = [0.0, 0.0]
        if (step + 1) % config.save_every_steps == 0:
            export(model, tokenizer, run_dir / "latest", max_tokens=config.max_tokens)
            state = {"model": model.state_dict(), "step": step + 1}
            state |= {"muon": muon.state_dict(), "adam": adam.state_dict()}
            torch.save(state, state_path)
    export(model, tokenizer, out, max_tokens=config.max_tokens)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--run-dir", type=Path, default=Path(tempfile.gettempdir()) / "tales-run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.run_dir.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.run_dir / "train.log")],
    )
    torch.set_num_threads(args.threads)
    train(TrainConfig(), args.out, args.run_dir, resume=args.resume)


if __name__ == "__main__":
    main()
