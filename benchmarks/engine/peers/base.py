"""What the benchmark knows of an engine."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from benchmarks.engine.checkpoints import Checkpoint

ENGINE_CELLS = frozenset({"prefill", "decode", "ready", "ready-cold"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """An engine, and how to run it. Nothing is installed or converted before `install` and `convert` are called."""

    name: ClassVar[str]
    formats: ClassVar[Mapping[str, str]]
    """Weight formats as the benchmark calls them, and as the engine does."""
    kinds: ClassVar[frozenset[str]] = ENGINE_CELLS
    """Of cells that it can be asked for."""

    cache: Path
    """Of environments, checkpoints and what they are converted to."""
    cores: tuple[int, ...]
    """Where the runner may run; it has a thread on each."""

    def install(self) -> None:
        """Makes the engine's environment where it is not there. Raises `subprocess.CalledProcessError`."""

    def convert(self, checkpoint: Checkpoint, weight_format: str) -> None:
        """Writes the checkpoint in the engine's own format, where it has one and it is not there."""

    def arguments(self, checkpoint: Checkpoint, weight_format: str) -> Sequence[str]:
        """Of the runner, beside the threads."""
        return ["--model", str(checkpoint.directory), "--format", self.formats[weight_format]]

    @property
    def python(self) -> Path:
        """Runs the runner: this environment's where the engine needs none of its own."""
        return Path(sys.executable)

    def command(self, checkpoint: Checkpoint, weight_format: str) -> list[str]:
        """Starts the runner, from the root of the checkout."""
        module = f"benchmarks.engine.runners.{self.name}"
        arguments = self.arguments(checkpoint, weight_format)
        return [str(self.python), "-m", module, "--threads", str(len(self.cores)), *arguments]

    def environment(self, compiled: Path) -> dict[str, str]:
        """Variables of the runner; whatever the engine compiles is to be kept in `compiled`."""
        return {
            "OMP_NUM_THREADS": str(len(self.cores)),
            "XDG_CACHE_HOME": str(compiled),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
