"""The models that are served, by name."""

from pathlib import Path

from baton.cli.config import shipped_model
from benchmarks.engine.checkpoints import NAMES as CHECKPOINTS
from benchmarks.engine.checkpoints import SHIPPED, checkpoint

CACHE = Path.home() / ".cache" / "baton" / "bench-engine"
"""Of checkpoints and environments; `benchmarks.engine` makes the same ones."""
SIM = "sim"
"""A simulated engine in place of the shipped model's: its steps take time, and hardly a core."""
NAMES = (*CHECKPOINTS, SIM)


def model_directory(name: str, cache: Path) -> Path:
    """Made where it is not there."""
    return shipped_model() if name in {SHIPPED, SIM} else checkpoint(name, cache).directory


def model_flags(name: str, cache: Path, *, step_ms: float = 20.0) -> list[str]:
    """Of `baton serve`. The shapes are served in bfloat16."""
    if name == SIM:
        return ["--engine", "sim", "--step-ms", f"{step_ms:g}"]
    dtype = "float32" if name == SHIPPED else "bfloat16"
    return ["--model", str(model_directory(name, cache)), "--dtype", dtype]
