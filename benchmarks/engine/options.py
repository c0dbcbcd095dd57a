"""What the benchmark's command line takes."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from baton.engine.config import KERNELS
from benchmarks.engine.checkpoints import NAMES
from benchmarks.engine.peers import PEERS
from benchmarks.engine.protocol import Cell

CACHE = Path.home() / ".cache" / "baton" / "bench-engine"


def parse(argv: Sequence[str], description: str | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS))
    parser.add_argument(
        "--formats", nargs="+", choices=["bf16", "int8", "f32"], default=["bf16", "int8"]
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        default=[""],
        help="beginnings of cells' names: prefill, 'decode b1 ', mixed, ready",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--kernels", choices=KERNELS, help="what computes in Baton")
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine.json"))
    parser.add_argument("--resume", action="store_true", help="leave out what the results have")
    parser.add_argument("--profile", action="store_true", help="only where Baton's time goes")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


def chosen(found: Sequence[Cell], beginnings: Sequence[str]) -> list[Cell]:
    """Cells whose names begin so; a beginning that ends in a space ends there."""
    return [cell for cell in found if f"{cell.name} ".startswith(tuple(beginnings))]
