"""Measures CTranslate2: runs in CTranslate2's environment.

python -m benchmarks.engine.runners.ctranslate2 --model DIR --format int8 --threads 2
"""

import json
import time
from pathlib import Path

import ctranslate2

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


class Generator:
    """Measures cells on one model."""

    def __init__(self, model: Path, compute_type: str, threads: int) -> None:
        """Generates the first token."""
        self._generator = ctranslate2.Generator(
            str(model),
            device="cpu",
            compute_type=compute_type,
            inter_threads=1,
            intra_threads=threads,
        )
        # It takes tokens by their text.
        self._words: list[str] = json.loads((model / "vocabulary.json").read_text())
        self._seed = 0
        self._generate(1, READY_PROMPT_TOKENS, 1)

    def _generate(self, batch: int, context: int, tokens: int) -> list[float]:
        """When it began, and when each step's last token came."""
        self._seed += 1
        prompts = [
            [self._words[token] for token in prompt(context, len(self._words), self._seed + n)]
            for n in range(batch)
        ]
        token_s = [0.0] * tokens

        def note(result: ctranslate2.GenerationStepResult) -> bool:
            token_s[result.step] = time.perf_counter()
            return False

        began_s = time.perf_counter()
        self._generator.generate_batch(
            prompts,
            max_length=tokens,
            min_length=tokens,
            beam_size=1,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        assert all(token_s)
        return [began_s, *token_s]

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
    serve(args.answers, Generator(Path(args.model), args.format, args.threads))
