"""CTranslate2: eight-bit weights and activations, static batches. It has no bfloat16 on CPUs."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from benchmarks.engine.checkpoints import Checkpoint
from benchmarks.engine.environments import TORCH, make_environment
from benchmarks.engine.peers.base import Peer


class CTranslate2(Peer):
    """An engine of its own in C++."""

    name = "ctranslate2"
    formats: ClassVar = {"int8": "int8", "f32": "float32"}

    @property
    def python(self) -> Path:
        return self.cache / "ctranslate2" / "bin" / "python"

    def install(self) -> None:
        """Its converter needs torch and transformers."""
        directory = self.cache / "ctranslate2"
        packages = ["install", "ctranslate2==4.8.5", "transformers==5.23.0"]
        make_environment(directory, ["install", TORCH], packages)

    def _converted(self, checkpoint: Checkpoint, weight_format: str) -> Path:
        return self.cache / "converted" / f"{checkpoint.name}-ct2-{self.formats[weight_format]}"

    def convert(self, checkpoint: Checkpoint, weight_format: str) -> None:
        directory = self._converted(checkpoint, weight_format)
        if directory.exists():
            return
        directory.parent.mkdir(parents=True, exist_ok=True)
        partial = directory.with_suffix(".partial")
        command = [str(self.python.with_name("ct2-transformers-converter")), "--force"]
        command += ["--model", str(checkpoint.directory), "--output_dir", str(partial)]
        command += ["--quantization", self.formats[weight_format]]
        subprocess.run(command, check=True, capture_output=True)
        partial.rename(directory)

    def arguments(self, checkpoint: Checkpoint, weight_format: str) -> Sequence[str]:
        directory = self._converted(checkpoint, weight_format)
        return ["--model", str(directory), "--format", self.formats[weight_format]]
