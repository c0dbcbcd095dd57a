"""Measures transformers' `generate`, with its dynamic cache; greedy.

python -m benchmarks.engine.runners.transformers --model DIR --format bfloat16 --threads 2
"""

import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from benchmarks.engine.protocol import (
    READY_PROMPT_TOKENS,
    Answer,
    Cell,
    peak_rss_bytes,
    prompt,
    runner_arguments,
    serve,
    stretches,
)


class Clock(StoppingCriteria):
    """Notes when each step's tokens are there; stops nothing."""

    def __init__(self) -> None:
        self.token_s: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.BoolTensor:
        self.token_s.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)  # type: ignore[return-value]


class Generate:
    """Measures cells on one model."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        """Generates the first token."""
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        self._model.train(mode=False)
        self._model.generation_config.eos_token_id = None
        self._seed = 0
        self._generate(1, READY_PROMPT_TOKENS, 1)

    def _generate(self, batch: int, context: int, tokens: int) -> list[float]:
        """When it began, and when each token came."""
        self._seed += 1
        vocab_size = self._model.config.vocab_size
        ids = torch.tensor([prompt(context, vocab_size, self._seed + n) for n in range(batch)])
        clock = Clock()
        began_s = time.perf_counter()
        with torch.inference_mode():
            # transformers declares a self that its models are not.
            self._model.generate(  # type: ignore[misc]
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        assert len(clock.token_s) == tokens
        return [began_s, *clock.token_s]

    def __call__(self, cell: Cell) -> Answer:
        if cell.kind == "prefill":
            stamps = [self._generate(1, cell.context, 1) for _ in range(cell.repetitions)]
            seconds, tokens = [done - began for began, done in stamps], cell.context
        else:
            count = cell.repetitions * cell.steps + 1
            times = self._generate(cell.batch, cell.context, count)[1:]
            seconds, tokens = stretches(times, cell.steps), cell.steps * cell.batch
        return Answer(seconds=seconds, tokens=tokens, peak_rss_bytes=peak_rss_bytes())


if __name__ == "__main__":
    args = runner_arguments()
    torch.set_num_threads(args.threads)
    serve(args.answers, Generate(args.model, getattr(torch, args.format)))
