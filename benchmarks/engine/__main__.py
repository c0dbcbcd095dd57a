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
from dataclasses import replace
from datetime import UTC, datetime

from benchmarks.engine import plot, report, results
from benchmarks.engine.cells import cells, profile_cells
from benchmarks.engine.checkpoints import ROOT, checkpoint
from benchmarks.engine.options import chosen, parse
from benchmarks.engine.peers import PEERS
from benchmarks.engine.peers.base import Peer
from benchmarks.engine.peers.baton import Baton
from benchmarks.engine.processes import Process
from benchmarks.engine.results import Contender
from benchmarks.engine.rounds import Rounds
from benchmarks.report import machine


def installed(args: argparse.Namespace, cores: tuple[int, ...]) -> dict[str, Peer]:
    """The peers that are there or could be installed; tells of the others."""
    found = {}
    for name in args.peers:
        peer = PEERS[name](cache=args.cache, cores=cores)
        if isinstance(peer, Baton):
            peer = replace(peer, kernels=args.kernels)
        try:
            peer.install()
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"{name} cannot be installed: {error}", flush=True)
        else:
            found[name] = peer
    return found


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
    args = parse(sys.argv[1:], __doc__)
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
