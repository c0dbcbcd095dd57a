"""An engine of native kernels in a process of its own, which computes or rests as it is told.

    python -m tests.busy_engine CHECKPOINT FOLDER THREADS TOKENS

It sees other engines through a page in FOLDER. Each line on standard input is answered by one on standard output: "step" computes once,
"compute" goes on computing until the next line, "rest" does nothing.
"""

import select
import sys
from pathlib import Path

from baton.engine.batch import BatchRow, SampleInput
from baton.engine.config import EngineConfig
from baton.engine.native import backend
from baton.engine.runner import ModelRunner
from baton.types import SamplingParams


class Prompts:
    """Computes the same prompt again and again, in one step."""

    def __init__(self, checkpoint: Path, folder: Path, threads: int, prompt_tokens: int) -> None:
        backend.SHARED_MEMORY = folder
        config = EngineConfig(
            model=str(checkpoint),
            dtype="float32",
            kv_pool_tokens=2 * prompt_tokens,
            threads=threads,
            kernels="native",
        )
        self._runner = ModelRunner(config)
        tokens = [position % 251 for position in range(prompt_tokens)]
        blocks = list(range(prompt_tokens // config.block_size_tokens))
        self._rows = [
            BatchRow(tokens, 0, blocks, SampleInput(SamplingParams(max_tokens=1), tokens, []))
        ]

    def step(self) -> None:
        self._runner.backend.compute(self._rows)


def _main(checkpoint: str, folder: str, threads: str, prompt_tokens: str) -> None:
    prompts = Prompts(Path(checkpoint), Path(folder), int(threads), int(prompt_tokens))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while line := sys.stdin.readline():
        if line == "step\n":
            prompts.step()
        sys.stdout.write(line)
        sys.stdout.flush()
        while line == "compute\n" and not select.select([sys.stdin], [], [], 0)[0]:
            prompts.step()


if __name__ == "__main__":
    _main(*sys.argv[1:])
