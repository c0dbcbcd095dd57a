"""What is measured: the same cells for every engine, sized by the model."""

from baton.engine.config import ModelConfig
from benchmarks.engine.limits import flops_per_token
from benchmarks.engine.protocol import Cell

PREFILL_TOKENS = (128, 512, 2048)
DECODE_BATCHES = (1, 4, 16, 32)
DECODE_CONTEXT = 128
LONG_CONTEXTS = (1024, 4096)
LONG_BATCHES = (1, 8)
MIXED_CHUNKS = (None, 128, 256)
MIXED_STREAMS = 16
MIXED_PROMPT_TOKENS = 512
MIXED_PROMPTS = 16
MIXED_SHARE = 0.3
"""Prompts arrive so fast that computing them alone would take this share of the time, at `MIXED_FLOPS`."""
MIXED_FLOPS = 500e9
"""A fixed rate, below what two cores multiply: the same load in every run."""


def cells(model: ModelConfig) -> list[Cell]:
    """Those whose contexts the model has room for."""
    token_flops = flops_per_token(model)
    small = token_flops < 50e6
    found = [
        Cell(kind="prefill", context=tokens, repetitions=max(1, 1024 // tokens))
        for tokens in PREFILL_TOKENS
    ]
    found += [
        Cell(
            kind="decode",
            batch=batch,
            context=DECODE_CONTEXT,
            repetitions=2,
            steps=64 if small else 24,
        )
        for batch in DECODE_BATCHES
    ]
    found += [
        Cell(kind="decode", batch=batch, context=context, repetitions=2, steps=16)
        for context in LONG_CONTEXTS
        for batch in LONG_BATCHES
    ]
    interval_s = MIXED_PROMPT_TOKENS * token_flops / MIXED_FLOPS / MIXED_SHARE
    found += [
        Cell(
            kind="mixed",
            batch=MIXED_STREAMS,
            context=MIXED_PROMPT_TOKENS,
            chunk=chunk,
            interval_s=round(interval_s, 3),
            repetitions=MIXED_PROMPTS,
            steps=16,
        )
        for chunk in MIXED_CHUNKS
    ]
    found += [Cell(kind="ready"), Cell(kind="ready-cold")]
    # A stream that started first is ahead of the last by the steps that the others' prompts took.
    ahead = 1.2
    return [cell for cell in found if ahead * cell.context + 64 <= model.longest_context_tokens]


def profile_cells() -> list[Cell]:
    """One stream, many, and a prompt."""
    decode = [
        Cell(kind="decode", batch=batch, context=16, repetitions=1, steps=64, profile=True)
        for batch in (1, 16)
    ]
    return [*decode, Cell(kind="prefill", context=512, repetitions=4, profile=True)]
