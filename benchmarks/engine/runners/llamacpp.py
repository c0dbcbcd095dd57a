"""Measures llama.cpp by its own benchmarks, which time the model alone: a process per cell.

python -m benchmarks.engine.runners.llamacpp --model FILE --format q8_0 --threads 2 --tools DIR
"""

import json
import re
import resource
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.protocol import (
    READY_PROMPT_TOKENS,
    Answer,
    Cell,
    peak_rss_bytes,
    runner_arguments,
    serve,
)

CONTEXT_STEP_TOKENS = 256
"""Its caches grow by this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """The benchmarks, and what they run."""

    directory: Path
    model: str
    threads: int

    def _run(self, tool: str, *arguments: object) -> str:
        command = [self.directory / tool, "-m", self.model, "-t", self.threads, *arguments]
        return subprocess.run(
            [str(part) for part in command], check=True, capture_output=True, text=True
        ).stdout

    def ready(self) -> None:
        """Loads the model, computes a short prompt, generates a token."""
        pair = f"{READY_PROMPT_TOKENS},1"
        self._run("llama-bench", "-p", 0, "-n", 0, "-pg", pair, "-r", 1, "--no-warmup")

    def prefill(self, context: int, repetitions: int) -> list[float]:
        """Seconds of each prompt."""
        counts = ["-p", context, "-n", 0, "-r", repetitions]
        tests = json.loads(self._run("llama-bench", *counts, "-o", "json"))
        return [nanoseconds / 1e9 for nanoseconds in tests[0]["samples_ns"]]

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Seconds of all steps."""
        stream = -(-(context + steps) // CONTEXT_STEP_TOKENS) * CONTEXT_STEP_TOKENS
        counts = ["-npp", context, "-ntg", steps, "-npl", batch, "-c", batch * stream]
        out = self._run("llama-batched-bench", *counts, "--output-format", "jsonl")
        # A warning may stand before it in its line.
        found = re.search(r'{.*"t_tg".*}', out)
        assert found is not None, out
        return float(json.loads(found[0])["t_tg"])

    def __call__(self, cell: Cell) -> Answer:
        if cell.kind == "prefill":
            seconds, tokens = self.prefill(cell.context, cell.repetitions), cell.context
        else:
            # One stretch: each would compute the contexts again.
            steps = cell.repetitions * cell.steps
            seconds, tokens = [self.decode(cell.batch, cell.context, steps)], steps * cell.batch
        return Answer(seconds=seconds, tokens=tokens, peak_rss_bytes=tools_peak_rss_bytes())


def tools_peak_rss_bytes() -> int:
    """The largest process' so far."""
    return peak_rss_bytes(resource.RUSAGE_CHILDREN)


if __name__ == "__main__":
    args = runner_arguments()
    tools = Tools(directory=Path(args.tools), model=args.model, threads=args.threads)
    tools.ready()
    serve(args.answers, tools, tools_peak_rss_bytes)
