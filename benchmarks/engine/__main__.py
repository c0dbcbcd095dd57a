"""Measures Baton's engine and every engine that a user would pick instead, on the same weights, in the same run.

    python -m benchmarks.engine                                          all of it: hours, and gigabytes of other engines
    python -m benchmarks.engine --shapes smollm2 --peers baton vllm --cells decode --rounds 1
    python -m benchmarks.engine --profile                                where the time of Baton's steps goes
    python -m benchmarks.engine --report                                 tables and picture from what is measured

Environments, checkpoints and what engines compile are kept in --cache, results in --out: cells that are measured again replace those that
are there, of the same engine and format; --resume measures only what is missing.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.engine import plot, report, results
from benchmarks.engine.cells import cells, profile_cells
from benchmarks.engine.checkpoints import NAMES, checkpoint
from benchmarks.engine.peers import PEERS
from benchmarks.engine.peers.base import ROOT, Peer
from benchmarks.engine.processes import Process
from benchmarks.engine.protocol import Cell
from benchmarks.engine.results import Contender
from benchmarks.engine.rounds import Rounds
from benchmarks.report import machine

CACHE = Path.home() / ".cache" / "baton" / "bench-engine"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description=__doc__,
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
    parser.add_argument("--cache", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engine.json"))
    parser.add_argument("--resume", action="store_true", help="leave out what the results have")
    parser.add_argument("--profile", action="store_true", help="only where Baton's time goes")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    return parser.parse_args(argv)


def installed(args: argparse.Namespace, cores: tuple[int, ...]) -> dict[str, Peer]:
    """The peers that are there or could be installed; tells of the others."""
    found = {}
    for name in args.peers:
        peer = PEERS[name](cache=args.cache, cores=cores)
        try:
            peer.install()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name} cannot be installed: {error}", flush=True)
        else:
            found[name] = peer
    return found


def chosen(found: Sequence[Cell], beginnings: Sequence[str]) -> list[Cell]:
    """Cells whose names begin so; a beginning that ends in a space ends there."""
    return [cell for cell in found if f"{cell.name} ".startswith(tuple(beginnings))]


def measure(args: argparse.Namespace, taken: results.Results) -> list[str]:
    """Adds this run's samples; returns what failed."""
    cores = tuple(sorted(os.sched_getaffinity(0)))[: args.threads]
    if args.profile:
        args.peers, args.rounds = ["baton"], 1
    peers = installed(args, cores)
    contenders = [
        Contender(name, weight_format)
        for name, peer in peers.items()
        for weight_format in args.formats
        if weight_format in peer.formats
    ]
    command = shlex.join(["python", "-m", "benchmarks.engine", *sys.argv[1:]])
    date = datetime.now(UTC).isoformat(timespec="seconds")
    taken.runs.append({"command": command, "date": date, "machine": machine()})
    run = len(taken.runs) - 1
    limits = [sys.executable, "-m", "benchmarks.engine.machine", "--threads", str(len(cores))]
    environment = {"OMP_NUM_THREADS": str(len(cores))}
    log = args.cache / "logs" / "machine.log"
    with Process([*limits, "--cache", str(args.cache)], environment, log) as machine_limits:
        rounds = Rounds(
            peers=peers,
            cache=args.cache,
            machine=machine_limits,
            results=taken,
            run=run,
            rounds=args.rounds,
            resume=args.resume,
            save=lambda: results.save(args.out, taken),
        )
        for name in args.shapes:
            model = checkpoint(name, args.cache)
            found = profile_cells() if args.profile else cells(model.config)
            rounds.measure(model, contenders, chosen(found, args.cells))
    return rounds.failures


def main() -> None:
    """Measures, prints, writes; exit code 1 where an engine failed."""
    args = parse(sys.argv[1:])
    args.cache = args.cache.resolve()
    os.chdir(ROOT)
    taken = results.load(args.out)
    failures = [] if args.report else measure(args, taken)
    table = report.markdown(taken.samples)
    args.out.with_suffix(".md").write_text(table)
    plot.draw(taken.samples, args.out.with_suffix(".svg"))
    print(f"\n{table}\nwrote {args.out}, and the same as .md and .svg")
    for failure in failures:
        print(f"failed: {failure}")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
