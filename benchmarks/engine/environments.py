"""Makes the environments that peers run in, each its own: what one pins, another needs in another version."""

import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

TORCH = "torch==2.13.0"
"""Installed first, and pinned: what depends on a wider range gets a build that is gigabytes larger."""


def make_environment(directory: Path, *steps: Sequence[str]) -> Path:
    """A virtual environment that pip made in these steps; returns its Python. Made once: again where the steps change."""
    python = directory / "bin" / "python"
    wanted = "".join(f"pip {' '.join(step)}\n" for step in steps)
    stamp = directory / "made.txt"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {directory}:\n{wanted}", end="", flush=True)
    if not python.exists():
        venv.create(directory, with_pip=True)
    for step in steps:
        subprocess.run([python, "-m", "pip", "-q", *step], check=True)
    stamp.write_text(wanted)
    return python
