"""The models that the engines are measured on: random weights in three shapes, and the model that ships. Made once, in the cache."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from baton.engine.config import ModelConfig, load_model_config

SHIPPED = "tales"
NAMES = (SHIPPED, "tiny", "smollm2", "qwen")
ROOT = Path(__file__).parents[2]
"""Of the checkout: programs are started as its modules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on disk, in Hugging Face format, bfloat16."""

    name: str
    directory: Path
    config: ModelConfig


def checkpoint(name: str, cache: Path) -> Checkpoint:
    """The named model, made below `cache` where it is not there yet."""
    directory = cache / "checkpoints" / name
    if not directory.exists():
        partial = directory.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        # In a process of its own: the benchmark's is not to keep the memory.
        module = "benchmarks.engine.make_checkpoint"
        subprocess.run([sys.executable, "-m", module, name, partial], check=True, cwd=ROOT)
        partial.rename(directory)
    return Checkpoint(name=name, directory=directory, config=load_model_config(directory))
